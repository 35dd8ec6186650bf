"""The endpoints of a model trained with SeND: `hallucination` for prompts or embeddings, `score` for texts."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from library.errors import InputError
from serving.endpoint import Endpoint, Request, Response, optional

if TYPE_CHECKING:
    from library.artifact import Artifact
    from library.send.detector import Detection, HallucinationDetector

SETTINGS = ("samples", "temperature", "top_k", "top_p", "max_new_tokens", "layer", "convention", "alpha")
OF_EMBEDDINGS = {"embeddings", "convention", "alpha", "explain"}
Prompt = Annotated[str, Field(min_length=1, max_length=100_000)]
Embedding = Annotated[list[float], Field(min_length=2, max_length=65_536, fail_fast=True)]
ENTRIES = 64  # of ready embeddings that cost about as much as a token


class HallucinationRequest(Request):
    """One of `prompt`, `prompts` and `embeddings`, and how to draw and score answers.

    A setting that is left out is the model's own, with which its risk was calibrated (`/info` shows them, under
    recipe.answers). Of the settings, ready embeddings take `convention` and `alpha`.
    """

    prompt: Prompt = optional(description="A text to continue.")
    prompts: list[Prompt] = optional(min_length=1, max_length=64, description="Several texts to continue.")
    embeddings: list[Embedding] = optional(
        min_length=2, max_length=2048, fail_fast=True, description="K x d: the embeddings of K answers to one prompt."
    )
    samples: int = optional(ge=2, le=128, description="Answers drawn per prompt, K.")
    temperature: float = optional(gt=0, le=100, description="Divides the logits before sampling.")
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = optional(
        description="Sample among this many likeliest tokens; null for all."
    )
    top_p: float = optional(gt=0, le=1, description="Sample among the likeliest tokens of this much probability.")
    max_new_tokens: int = optional(ge=1, le=1024, description="Longest answer.")
    layer: Literal["penultimate", "middle"] | Annotated[int, Field(ge=1, le=1000)] = optional(
        description="Block whose output embeds an answer: penultimate, middle, or its number from 1."
    )
    convention: Literal["inside", "inside-code", "svd"] = optional(
        description="Which of the three published EigenScores."
    )
    alpha: float = optional(ge=1e-12, le=1e12, description="Added to each eigenvalue.")
    seed: int = Field(0, ge=0, le=2**53 - 1, description="Same prompt, settings and seed: same answers.")
    explain: bool = Field(False, description="Return the eigenvalues behind each score.")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = self.model_fields_set & {"prompt", "prompts", "embeddings"}
        if len(given) != 1:
            raise ValueError(f"give one of prompt, prompts and embeddings, not {' and '.join(sorted(given)) or 'none'}")
        if foreign := self.model_fields_set - OF_EMBEDDINGS if "embeddings" in given else ():
            raise ValueError(f"{min(foreign)}: no meaning for embeddings; they take convention, alpha and explain")
        return self

    def changes(self) -> dict[str, Any]:
        """The settings that the request names."""
        return {name: getattr(self, name) for name in SETTINGS if name in self.model_fields_set}

    def texts(self) -> list[str]:
        """The prompts, however they were given."""
        return self.prompts or [self.prompt]


class DetectionResult(BaseModel, frozen=True):
    """What one prompt, or one set of embeddings, shows. Larger scores mean more likely a hallucination."""

    answer: str | None = Field(description="The greedy answer; null for embeddings.")
    samples: list[str] = Field(description="The K sampled answers; empty for embeddings.")
    eigenscore: float = Field(description="Spread of the answers' embeddings, exact.")
    ees: float = Field(description="Efficient EigenScore.")
    standard_error: float = Field(description="Of `ees` over its random probes; 0 when its method is exact.")
    method: Literal["exact", "kpm", "slq"] = Field(description="How `ees` was computed.")
    eigenvalues: list[float] | None = Field(description="Behind `eigenscore`, falling; null unless `explain` is true.")
    risk: float | None = Field(ge=0, le=1, description="Calibrated probability of a hallucination.")
    no_risk: str | None = Field(description="Why `risk` is null.")
    flags: list[Literal["all-answers-empty", "some-answers-empty", "identical-answers"]]


class HallucinationResponse(Response):
    """One result for each prompt, in the order of the request; one for embeddings."""

    results: list[DetectionResult]


class ScoreRequest(Request):
    """One of `text` and `texts`."""

    text: Prompt = optional(description="A text of at least 2 tokens.")
    texts: list[Prompt] = optional(min_length=1, max_length=256, description="Several such texts.")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"give one of text and texts, not {'both' if self.model_fields_set else 'none'}")
        return self

    def all_texts(self) -> list[str]:
        """The texts, however they were given."""
        return self.texts or [self.text]


class TextScore(BaseModel, frozen=True):
    """How a text looks to the model."""

    tokens: int
    perplexity: float | None = Field(description="Of all tokens but the first; null beyond the largest number.")
    token_entropy: float = Field(description="Mean entropy, in nats, of the distributions that predict them.")
    sensitive_energy: float | None = Field(
        description="Share of the squared norm of the activations in the sensitive coordinates; null without any."
    )


class ScoreResponse(Response):
    """One result for each text, in the order of the request."""

    results: list[TextScore]


class Hallucination(Endpoint):
    """Draws answers to prompts and scores how far they spread."""

    name = "hallucination"
    summary = "Does the model hallucinate? Sampled answers, their EigenScore, and a calibrated risk."
    kind = "send"
    model = "send"
    Request = HallucinationRequest
    Response = HallucinationResponse
    examples = {  # noqa: RUF012 - read only
        "prompt": {"prompt": "The capital of France is", "seed": 7},
        "settings": {
            "prompts": ["Robert Boulter is an English", "The river Thames flows through"],
            "samples": 5,
            "temperature": 1.0,
            "max_new_tokens": 16,
            "explain": True,
        },
        "embeddings": {"embeddings": [[0.9, 0.1, 0.0], [0.8, 0.3, 0.1], [0.1, 0.9, 0.4]], "explain": True},
    }
    cost_unit = f"tokens (answers x (bytes of their prompt + max_new_tokens), or entries of embeddings / {ENTRIES})"
    request_cost = 1 << 18
    batch_cost = 1 << 19

    def __init__(self, detector: "HallucinationDetector", version: str):
        self.detector, self.version = detector, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        return cls(_detector(artifact, device), artifact.version)

    def cost(self, request: HallucinationRequest) -> int:
        if "embeddings" in request.model_fields_set:
            return max(1, len(request.embeddings) * len(request.embeddings[0]) // ENTRIES)
        changes, defaults = request.changes(), self.detector.defaults
        answers = changes.get("samples", defaults.samples) + 1
        longest = self.detector.lm.config.max_position_embeddings
        new = changes.get("max_new_tokens", defaults.max_new_tokens)
        return answers * sum(min(len(text.encode()), longest) + new for text in request.texts())

    def scores(self, response: HallucinationResponse) -> list[float]:
        return [result.risk for result in response.results if result.risk is not None]

    def group(self, request: HallucinationRequest) -> Hashable:
        ready = "embeddings" in request.model_fields_set
        return ready, request.explain, tuple(request.changes().items())

    def answer(self, requests: Sequence[HallucinationRequest]) -> list[HallucinationResponse]:
        first = requests[0]
        settings = {"explain": first.explain, **first.changes()}
        if "embeddings" in first.model_fields_set:
            with _renamed("embeddings[0]", "embeddings"):
                found = self.detector.detect_embeddings([request.embeddings for request in requests], **settings)
            return [self._response([detection]) for detection in found]
        texts = [request.texts() for request in requests]
        seeds = [request.seed for request, part in zip(requests, texts, strict=True) for _ in part]
        with _renamed("prompts[0]", "prompt" if "prompt" in first.model_fields_set else "prompts[0]"):
            found = self.detector.detect([text for part in texts for text in part], seed=seeds, **settings)
        return [self._response(part) for part in _split(found, map(len, texts))]

    def limits(self) -> dict[str, int]:
        return {"positions": self.detector.lm.config.max_position_embeddings}

    def _response(self, found: Iterable["Detection"]) -> HallucinationResponse:
        results = [
            DetectionResult(
                answer=detection.answer,
                samples=list(detection.samples),
                eigenscore=detection.eigenscore,
                ees=detection.ees,
                standard_error=detection.ees_standard_error,
                method=detection.method,
                eigenvalues=None if detection.eigenvalues is None else list(detection.eigenvalues),
                risk=detection.risk,
                no_risk=detection.no_risk,
                flags=list(detection.flags),
            )
            for detection in found
        ]
        return HallucinationResponse(model=self.version, results=results)


class Score(Endpoint):
    """Perplexity, entropy and sensitive-coordinate energy of texts."""

    name = "score"
    summary = "How texts look to the model: perplexity, token entropy, energy in the sensitive coordinates."
    kind = "send"
    model = "send"
    Request = ScoreRequest
    Response = ScoreResponse
    examples = {  # noqa: RUF012 - read only
        "text": {"text": "The capital of France is Paris."},
        "texts": {"texts": ["The river Thames flows through London.", "London through flows Thames river the."]},
    }
    score_bounds = tuple(step / 2 for step in range(1, 25))
    cost_unit = "bytes of text"
    request_cost = 1 << 18
    batch_cost = 1 << 19

    def __init__(self, detector: "HallucinationDetector", version: str):
        self.detector, self.version = detector, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        return cls(_detector(artifact, device), artifact.version)

    def cost(self, request: ScoreRequest) -> int:
        return sum(len(text.encode()) for text in request.all_texts())

    def scores(self, response: ScoreResponse) -> list[float]:
        return [result.token_entropy for result in response.results]

    def group(self, request: ScoreRequest) -> Hashable:
        return ()

    def answer(self, requests: Sequence[ScoreRequest]) -> list[ScoreResponse]:
        texts = [request.all_texts() for request in requests]
        with _renamed("texts[0]", "text" if "text" in requests[0].model_fields_set else "texts[0]"):
            found = self.detector.score([text for part in texts for text in part])
        results = [
            TextScore(
                tokens=score.tokens,
                perplexity=score.perplexity if math.isfinite(score.perplexity) else None,
                token_entropy=score.token_entropy,
                sensitive_energy=score.sensitive_energy,
            )
            for score in found
        ]
        return [ScoreResponse(model=self.version, results=part) for part in _split(results, map(len, texts))]

    def limits(self) -> dict[str, int]:
        return {"positions": self.detector.lm.config.max_position_embeddings}


def _detector(artifact: "Artifact", device: str) -> "HallucinationDetector":
    from library.send.detector import HallucinationDetector

    detector = HallucinationDetector.from_artifact(artifact)
    detector.lm.to(device)
    return detector


def _split(items: Iterable[Any], sizes: Iterable[int]) -> list[list[Any]]:
    """`items` in runs of the given sizes."""
    rest = iter(items)
    return [list(islice(rest, size)) for size in sizes]


@contextmanager
def _renamed(there: str, here: str) -> Iterator[None]:
    """Let an InputError about the library's argument name the request's field."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(here + message.removeprefix(there) if message.startswith(there) else message) from error
