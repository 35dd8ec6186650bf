"""The detector a user calls: answers to prompts with their EigenScore and calibrated risk; texts with their entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from library.artifact import Artifact
from library.calibration import Calibration
from library.errors import InputError
from library.language.tokens import Tokenizer
from library.send.decode import Decoded, Layer, block_number, newest_output, transformer_blocks
from library.send.detection import DetectionSettings
from library.send.ees import ees
from library.send.eigenscore import eigenscore, eigenvalues

LARGEST = 1e100  # of ready embeddings; the squares of larger numbers could overflow in a sum
ALL_EMPTY, SOME_EMPTY, IDENTICAL = "all-answers-empty", "some-answers-empty", "identical-answers"


@dataclass(frozen=True)
class Detection:
    """What one prompt, or one set of ready embeddings, shows.

    answer          the greedy answer; None for ready embeddings
    samples         the K sampled answers; empty for ready embeddings
    eigenscore      spread of the answers' embeddings; larger means more likely a hallucination
    ees             the Efficient EigenScore of the paper, with `ees_standard_error` over its probes
    method          how the EES was computed: exact, kpm or slq (the eigenscore is always exact)
    eigenvalues     of the K x K matrix behind the eigenscore, falling; None unless asked for
    risk            calibrated probability of a hallucination; None for the reason in `no_risk`
    flags           `all-answers-empty`: no sample has any token, so that the score is of the prompt alone;
                    `some-answers-empty`; `identical-answers`: the score is the least there is, and EES says nothing
    """

    answer: str | None
    samples: tuple[str, ...]
    eigenscore: float
    ees: float
    ees_standard_error: float
    method: str
    eigenvalues: tuple[float, ...] | None
    risk: float | None
    no_risk: str | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """How a text looks to the model: `tokens` of it, the perplexity of all but the first, and the mean entropy (nats)

    of the distributions that predict them. `sensitive_energy` is the share of the squared norm of the activations
    that lies in the sensitive coordinates; None for a model that has none.
    """

    tokens: int
    perplexity: float
    token_entropy: float
    sensitive_energy: float | None


class _Numbers(NamedTuple):
    eigenscore: float
    ees: float
    ees_standard_error: float
    method: str
    eigenvalues: tuple[float, ...] | None
    identical: bool


class HallucinationDetector:
    """A causal language model, its tokeniser, and what was learnt about its scores.

    `calibration` maps EigenScores taken with `defaults` to risks. `sensitive` int64 (n,) are the sensitive coordinates
    of the output of block `sensitive_layer`. The model is put into evaluation mode.

    Example:
        >>> from library.language.pythia import load
        >>> from library.language.tokens import ByteTokenizer
        >>> detector = HallucinationDetector(load("pythia-tiny", vocab_rows=257), ByteTokenizer())
        >>> [found] = detector.detect(["The capital of France is"], max_new_tokens=8)
        >>> len(found.samples), found.method, found.no_risk
        (10, 'exact', 'this model has no calibration')
    """

    def __init__(
        self,
        lm: nn.Module,
        tokenizer: Tokenizer,
        calibration: Calibration | None = None,
        defaults: DetectionSettings | None = None,
        *,
        sensitive: Tensor | None = None,
        sensitive_layer: Layer = "penultimate",
    ):
        self.lm, self.tokenizer, self.calibration = lm.eval(), tokenizer, calibration
        self.defaults = defaults or DetectionSettings()
        self.sensitive, self.sensitive_layer = sensitive, sensitive_layer

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        """The detector of an artifact of kind `send`, with the settings it was trained with as defaults.

        Raises ArtifactError when the artifact is of another kind or its parts do not fit.
        """
        from library.send.trained import load_send

        model, tokenizer, recipe = load_send(artifact)
        return cls(
            model.lm,
            tokenizer,
            Calibration.from_arrays(artifact.arrays()),
            recipe.answers,
            sensitive=model.dropped if len(model.dropped) else None,
            sensitive_layer=recipe.layer,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.lm.parameters()).device

    def detect(
        self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, explain: bool = False, **changes: Any
    ) -> list[Detection]:
        """Draw answers to all prompts in one batch, and score how far they spread.

        `changes` replace fields of the default `DetectionSettings`: samples, temperature, top_k, top_p,
        max_new_tokens, layer, convention, alpha. What a prompt gets depends on its text, its seed (one number, or
        one per prompt) and the settings, not on the rest of the batch. `explain` adds the eigenvalues. A risk is
        given for the default settings alone, because the calibration was made with them.

        Raises InputError that names the field or prompt: an unknown or bad setting, no prompts, an empty or too long
        prompt, and activations that are not finite.
        """
        settings = self._settings(changes)
        tokens = self.tokenizer.encode(_texts("prompts", prompts))
        decoded = settings.draw(self.lm, tokens, seed=seed, stop_token=self.tokenizer.end_of_text)
        embeddings = decoded.sampled.embeddings
        _check_finite("prompts", embeddings.flatten(1))
        return [
            self._detection(numbers, settings, flags, self._no_risk(settings, flags), *answer)
            for numbers, flags, answer in zip(
                _spectral(embeddings, settings, explain), _empty_flags(decoded), self._texts_of(decoded), strict=True
            )
        ]

    def detect_embeddings(self, embeddings: Sequence[Any], *, explain: bool = False, **changes: Any) -> list[Detection]:
        """Score ready embeddings: for each set, the K x d numbers of K answers to one prompt.

        The sets may be tensors, arrays or nested lists and may differ in shape; `changes` may replace `convention`
        and `alpha`. A risk is given when shape and settings are those of the calibration; it holds if the answers were
        drawn with the default settings from this model. Raises InputError that names the set: none, K < 2, d < 2,
        ragged, or a number that is not finite.
        """
        settings = self._settings(changes)
        if foreign := sorted(changes.keys() - {"convention", "alpha"}):
            raise InputError(f"{foreign[0]}: has no meaning for ready embeddings; use convention or alpha")
        sets = [_matrix(f"embeddings[{i}]", entry, self.device) for i, entry in enumerate(embeddings)]
        if not sets:
            raise InputError("embeddings: none given; at least 1 set is needed")
        found: dict[int, Detection] = {}
        for shape in sorted({tuple(matrix.shape) for matrix in sets}):
            numbers = [i for i, matrix in enumerate(sets) if tuple(matrix.shape) == shape]
            no_risk = self._no_risk(settings, (), shape)
            rows = _spectral(torch.stack([sets[i] for i in numbers]), settings, explain)
            found |= {
                i: self._detection(row, settings, (), no_risk, None, ()) for i, row in zip(numbers, rows, strict=True)
            }
        return [found[i] for i in range(len(sets))]

    @torch.no_grad()
    def score(self, texts: Sequence[str], *, batch_size: int = 16) -> list[Score]:
        """Perplexity, entropy and sensitive-coordinate energy of each text, `batch_size` texts at a time.

        Raises InputError that names the text: fewer than 2 tokens, or more than the model has positions.
        """
        tokens = self.tokenizer.encode(_texts("texts", texts))
        longest = self.lm.config.max_position_embeddings
        for i, row in enumerate(tokens):
            if not 2 <= len(row) <= longest:
                raise InputError(f"texts[{i}]: {len(row)} tokens; from 2 to the model's {longest} can be scored")
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))  # texts of like length share a batch
        scores: dict[int, Score] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            scores |= dict(zip(part, self._scores([tokens[i] for i in part]), strict=True))
        return [scores[i] for i in range(len(tokens))]

    def _scores(self, rows: list[list[int]]) -> list[Score]:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        present = torch.arange(width, device=self.device) < lengths[:, None]
        block = transformer_blocks(self.lm)[block_number(self.lm, self.sensitive_layer) - 1]
        with newest_output(block) as newest:
            logits = self.lm(input_ids=ids, attention_mask=present.long(), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        _check_finite("texts", newest[0].flatten(1).where(present.repeat_interleave(newest[0].shape[-1], 1), 0.0))
        surprise = -logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
        predicted = present[:, 1:]
        perplexity = (surprise.where(predicted, 0.0).double().sum(1) / predicted.sum(1)).exp()
        mean_entropy = entropy.where(predicted, 0.0).sum(1) / predicted.sum(1)
        energy: list[float | None] = [None] * len(rows)
        if self.sensitive is not None:
            squares = newest[0].double().square() * present[..., None]
            inside = squares[..., self.sensitive.to(self.device)].sum((1, 2))
            energy = (inside / squares.sum((1, 2))).tolist()
        columns = (lengths.tolist(), perplexity.tolist(), mean_entropy.tolist(), energy)
        return [Score(*row) for row in zip(*columns, strict=True)]

    def _settings(self, changes: dict[str, Any]) -> DetectionSettings:
        if unknown := sorted(changes.keys() - DetectionSettings.model_fields):
            raise InputError(f"{unknown[0]}: unknown setting; there are {', '.join(DetectionSettings.model_fields)}")
        try:
            return DetectionSettings(**(self.defaults.model_dump() | changes))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error

    def _no_risk(
        self, settings: DetectionSettings, flags: tuple[str, ...], shape: tuple[int, ...] | None = None
    ) -> str | None:
        """Why there is no risk, or None when there is one."""
        if self.calibration is None:
            return "this model has no calibration"
        if ALL_EMPTY in flags:
            return "no sampled answer has any token"
        mine, asked = self.defaults.model_dump(), settings.model_dump()
        if changed := [f"{name}={mine[name]}" for name in mine if mine[name] != asked[name]]:
            return f"the calibration holds for {', '.join(changed)}"
        expected = (self.defaults.samples, self.lm.config.hidden_size)
        if shape is not None and shape != expected:
            return f"the calibration holds for {expected[0]} answers of width {expected[1]}"
        return None

    def _detection(
        self,
        numbers: "_Numbers",
        settings: DetectionSettings,
        flags: tuple[str, ...],
        no_risk: str | None,
        answer: str | None,
        samples: tuple[str, ...],
    ) -> Detection:
        return Detection(
            answer=answer,
            samples=samples,
            eigenscore=numbers.eigenscore,
            ees=numbers.ees,
            ees_standard_error=numbers.ees_standard_error,
            method=numbers.method,
            eigenvalues=numbers.eigenvalues,
            risk=float(self.calibration.risk(numbers.eigenscore)) if no_risk is None else None,
            no_risk=no_risk,
            flags=flags + ((IDENTICAL,) if numbers.identical else ()),
        )

    def _texts_of(self, decoded: Decoded) -> list[tuple[str, tuple[str, ...]]]:
        greedy, sampled = decoded.greedy.token_lists(), decoded.sampled.token_lists()
        decode = self.tokenizer.decode
        return [(decode(g), tuple(map(decode, rows))) for g, rows in zip(greedy, sampled, strict=True)]


def _spectral(embeddings: Tensor, settings: DetectionSettings, explain: bool) -> list[_Numbers]:
    """The scores of each set of answers, for embeddings (sets, K, d)."""
    form = {"convention": settings.convention, "alpha": settings.alpha}
    efficient = ees(embeddings)
    columns = (eigenscore(embeddings, **form), efficient.value, efficient.standard_error, efficient.identical)
    spectra = [tuple(row) for row in eigenvalues(embeddings, **form).tolist()] if explain else [None] * len(embeddings)
    return [
        _Numbers(score, value, error, efficient.method, spectrum, same)
        for score, value, error, same, spectrum in zip(*(c.tolist() for c in columns), spectra, strict=True)
    ]


def _empty_flags(decoded: Decoded) -> list[tuple[str, ...]]:
    some = (decoded.sampled.lengths == 0).any(-1).tolist()
    return [
        (ALL_EMPTY,) if every else (SOME_EMPTY,) if any_ else ()
        for every, any_ in zip(decoded.all_empty.tolist(), some, strict=True)
    ]


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        raise InputError(f"{name}: a list of at least 1 text is needed")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{i}]: a text is needed, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{name}[{i}]: not valid Unicode, it holds half of a surrogate pair") from None
    return list(texts)


def _matrix(name: str, entry: Any, device: torch.device) -> Tensor:
    try:
        matrix = torch.as_tensor(entry, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name}: ragged or not numbers; give K rows of d numbers each") from None
    if matrix.dim() != 2 or min(matrix.shape) < 2:
        raise InputError(f"{name}: shape {tuple(matrix.shape)}; give K x d numbers with K and d at least 2")
    if not (matrix.abs() <= LARGEST).all():
        raise InputError(f"{name}: a number is NaN, infinite, or beyond {LARGEST:g}")
    return matrix


def _check_finite(name: str, activations: Tensor) -> None:
    for i, finite in enumerate(activations.isfinite().all(1).tolist()):
        if not finite:
            raise InputError(f"{name}[{i}]: the model's activations are not finite; load it in float32")
