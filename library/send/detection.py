"""Does a score find hallucinations? Labels without annotators, and a model's answers to them judged and scored.

Labels follow MIND (Su et al., Findings of ACL 2024): a passage is cut just before a named entity and the model
continues it greedily; it has hallucinated when it names another entity instead.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from library.calibration import Auroc, Calibration, auroc
from library.errors import InputError
from library.language.tokens import Tokenizer
from library.send.decode import Decoded, Layer, sample
from library.send.eigenscore import eigenscore


class DetectionSettings(BaseModel, frozen=True, extra="forbid"):
    """How answers are drawn and their EigenScore taken. Defaults of INSIDE (arXiv 2402.03744) but for the layer."""

    samples: int = Field(10, ge=2)
    """Answers drawn per prompt."""
    temperature: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Divides the logits before sampling."""
    top_k: int | None = Field(5, ge=1)
    """Sample among this many likeliest tokens; None for all."""
    top_p: float = Field(0.99, gt=0, le=1)
    """Sample among the likeliest tokens that hold this much probability."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest answer."""
    layer: Layer = "penultimate"
    """Block whose output embeds an answer: penultimate, middle, or its number from 1."""
    convention: Literal["inside", "inside-code", "svd"] = "inside"
    """Which of the three published EigenScores."""
    alpha: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Added to each eigenvalue."""

    def draw(self, lm: nn.Module, prompts: Sequence[Sequence[int]], **arguments: Any) -> Decoded:
        """`library.send.decode.sample` with these settings."""
        return sample(lm, prompts, **self.model_dump(exclude={"convention", "alpha"}), **arguments)


@dataclass(frozen=True)
class ClozeCase:
    """A passage (by number) cut just before `entity`; `prompt` is what precedes it, with no space at its end."""

    passage: int
    prompt: str
    entity: str


def cloze_cases(
    passages: Iterable[Mapping[str, Any]], *, sentences: int = 2, min_words: int = 5, per_passage: int | None = None
) -> list[ClozeCase]:
    """Cut the first `sentences` of each passage before each named entity.

    `passages` are rows with `title` and `sentences`, words and punctuation set apart by spaces as in WikiText. In
    place of a tagger, an entity is a longest run of words that begin with a capital letter; not one that opens its
    sentence, nor one inside the title (as in MIND), nor one before which the passage has less than `min_words` words.
    At most `per_passage` of each passage, in the order of the text.

    Example:
        >>> cloze_cases([{"title": "Cromer", "sentences": ["Cromer is a town in the county of North Norfolk ."]}])
        [ClozeCase(passage=0, prompt='Cromer is a town in the county of', entity='North Norfolk')]
    """
    cases = []
    for number, passage in enumerate(passages):
        before: list[str] = []
        found = []
        for sentence in passage["sentences"][:sentences]:
            words = sentence.split()
            for start, end in _entities(words):
                entity = " ".join(words[start:end])
                if len(before) + start >= min_words and entity not in passage["title"]:
                    found.append(ClozeCase(number, " ".join(before + words[:start]), entity))
            before += words
        cases += found[:per_passage]
    return cases


def plain_passages(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Rows for `cloze_cases` of documents that have no title: a sentence ends at . ! or ? before a space.

    >>> plain_passages(["Cromer is a town. It lies by the sea."])
    [{'title': '', 'sentences': ['Cromer is a town.', 'It lies by the sea.']}]
    """
    return [{"title": "", "sentences": re.split(r"(?<=[.!?])\s+", text.strip())} for text in texts]


def hallucinated(continuation: str, entity: str, *, ended: bool) -> bool | None:
    """Whether a continuation names another entity than the true one; None when it cannot be said.

    Words are compared exactly, with the punctuation around them removed. False when the continuation begins with all
    words of `entity`; True when its first word has a capital and a word differs from the entity's; None when it
    begins with no entity, or breaks off inside the true one. Unless the continuation `ended` by itself, a last word
    with no space after it counts as broken off.

    Example:
        >>> hallucinated(" Norfolk , and", "Norfolk", ended=False), hallucinated(" Kent .", "Norfolk", ended=False)
        (False, True)
    """
    words = continuation.split()
    if words and not ended and not continuation[-1].isspace():
        words.pop()
    given, true = [_bare(word) for word in words], [_bare(word) for word in entity.split()]
    if given[: len(true)] == true:
        return False
    if not words or not _capitalised(words[0]) or given == true[: len(given)]:
        return None
    return True


@dataclass(frozen=True)
class ClozeStudy:
    """Cloze cases with the model's answers judged. `labels` bool, `groups` int64 and each score are over the decided.

    A case is decided when its greedy continuation begins with an entity; `cases` counts all of them.
    """

    labels: Tensor
    groups: Tensor
    scores: dict[str, Tensor]
    cases: int

    @property
    def accuracy(self) -> float:
        """The share of all cases in which the greedy continuation begins with the true entity."""
        return float((~self.labels).sum()) / self.cases

    def auroc(self, score: str = "eigenscore") -> Auroc:
        """How well a score tells the hallucinated from the correct, with passages as groups."""
        return auroc(self.scores[score], self.labels, self.groups)

    def calibration(self, score: str = "eigenscore") -> Calibration:
        """The calibration of a score on these cases. Raises InputError when only one label occurs."""
        return Calibration.fit(self.scores[score], self.labels)

    @classmethod
    def merged(cls, parts: Sequence["ClozeStudy"]) -> "ClozeStudy":
        """One study of the parts that several workers made."""
        return cls(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.groups for part in parts]),
            {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
            sum(part.cases for part in parts),
        )


def cloze_study(
    lm: nn.Module,
    tokenizer: Tokenizer,
    cases: Sequence[ClozeCase],
    settings: DetectionSettings | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    fixed_length: bool = False,
    forward: Callable[..., Any] | None = None,
) -> ClozeStudy:
    """Let the model continue each case, judge its greedy continuation, and score its sampled ones (`answer_scores`).

    A prompt too long for the model keeps its end. `batch_size` prompts are decoded together; `fixed_length` and
    `forward` are those of `library.send.decode.sample`. Raises InputError when there are no cases.
    """
    settings = settings or DetectionSettings()
    if not cases:
        raise InputError("no cloze cases; the passages need named entities inside their sentences")
    room = lm.config.max_position_embeddings - settings.max_new_tokens
    prompts = [tokens[-room:] for tokens in tokenizer.encode([case.prompt for case in cases])]
    labels: list[bool | None] = []
    scores: list[dict[str, Tensor]] = []
    for start in range(0, len(cases), batch_size):
        decoded = settings.draw(
            lm,
            prompts[start : start + batch_size],
            seed=seed,
            stop_token=tokenizer.end_of_text,
            fixed_length=fixed_length,
            forward=forward,
        )
        scores.append(answer_scores(decoded, settings))
        for case, answer in zip(cases[start : start + batch_size], decoded.greedy.token_lists(), strict=True):
            ended = len(answer) < settings.max_new_tokens
            labels.append(hallucinated(tokenizer.decode(answer), case.entity, ended=ended))
    decided = torch.tensor([label is not None for label in labels])
    return ClozeStudy(
        torch.tensor([label for label in labels if label is not None], dtype=torch.bool),
        torch.tensor([case.passage for case in cases])[decided],
        {name: torch.cat([part[name] for part in scores])[decided] for name in scores[0]},
        len(cases),
    )


def calibrate(
    lm: nn.Module,
    tokenizer: Tokenizer,
    cases: Sequence[ClozeCase],
    settings: DetectionSettings,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The calibration of EigenScore on cloze cases, as arrays of an artifact, and the record to publish beside it.

    The record says on how many cases it rests, how accurate the model was, and the area under the ROC curve of each
    score with its standard error: with an area near or below 0.5 the score does not tell the labels apart for this
    model, and the monotone risk is little more than the share of hallucinations. Without arrays the record's `reason`
    says why there is no calibration. The model computes on a GPU where one is visible, and returns to where it was.
    """
    home = next(lm.parameters()).device
    record: dict[str, Any] = {"cases": len(cases), "settings": settings.model_dump(mode="json"), "reason": None}
    try:
        lm.to("cuda" if torch.cuda.is_available() else home)
        study = cloze_study(lm, tokenizer, cases, settings, seed=seed, batch_size=batch_size)
        record |= {
            "decided": len(study.labels),
            "hallucinated": int(study.labels.sum()),
            "accuracy": study.accuracy,
        }
        areas = {name: asdict(study.auroc(name)) for name in study.scores}
        return study.calibration().arrays(), record | {"auroc": areas}
    except InputError as error:
        return {}, record | {"reason": str(error)}
    finally:
        lm.to(home)


def answer_scores(decoded: Decoded, settings: DetectionSettings) -> dict[str, Tensor]:
    """Scores of each prompt, float64 (prompts,) on the CPU; of each, larger means more likely a hallucination.

    eigenscore                  of the K sampled answers' embeddings, in `settings.convention`
    length_normalised_entropy   `-(1/K) sum_k (1/N_k) sum_t log p(y_kt)` over the sampled answers' tokens
                                (Malinin and Gales, ICLR 2021)
    perplexity                  `exp(-(1/N) sum_t log p(y_t))` of the greedy answer
    """
    embeddings = decoded.sampled.embeddings
    return {
        "eigenscore": eigenscore(embeddings, convention=settings.convention, alpha=settings.alpha).cpu().double(),
        "length_normalised_entropy": -decoded.sampled.mean_logprob.mean(-1).cpu().double(),
        "perplexity": (-decoded.greedy.mean_logprob).exp().cpu().double(),
    }


@dataclass(frozen=True)
class HaluEvalRow:
    """A query, a model's response to it, and a person's judgement whether it hallucinates."""

    id: str
    user_query: str
    response: str
    hallucinated: bool


def read_halueval(path: str | Path) -> list[HaluEvalRow]:
    """The rows of HaluEval's general part (Li et al., EMNLP 2023), from JSON Lines, plain or with gzip (`.gz`).

    Further fields are ignored. Raises InputError that names the line and the field.
    """
    fields = {"id": str, "user_query": str, "response": str, "hallucinated": bool}
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                for name, kind in fields.items():
                    if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                        raise InputError(f"{path} line {number}: {name} is missing or is no {kind.__name__}")
                rows.append(HaluEvalRow(**{name: row[name] for name in fields}))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {len(rows) + 1}: not JSON ({error.msg})") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def _entities(words: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of the longest runs of capitalised words, but for a run that opens the sentence."""
    opening = next((i for i, word in enumerate(words) if word[0].isalnum()), 0)
    runs, start = [], None
    for i, word in enumerate([*words, ""]):
        if _capitalised(word):
            start = i if start is None else start
        elif start is not None:
            runs.append((start, i))
            start = None
    return [(start, end) for start, end in runs if start > opening and len(words[start]) > 1]


def _capitalised(word: str) -> bool:
    return _bare(word)[:1].isupper()


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word)
