"""The shape of every endpoint: what a subclass declares, and how requests share calls of its model."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonDict

from library.errors import InputError

if TYPE_CHECKING:
    from library.artifact import Artifact


class Request(BaseModel):
    """A request body: unknown fields, numbers as texts, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """A part of a request body, as strict as the whole."""

    model_config = Request.model_config


class Response(BaseModel):
    """An answer. `model` is the version of the artifact that gave it."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="Version of the artifact that answered: twelve hexadecimal digits.")


def optional(**constraints: Any) -> Any:
    """A field that may be left out but not be null; the schema shows no default, because the model has its own."""
    return Field(None, json_schema_extra=_without_default, **constraints)


class TooLarge(InputError):
    """A request costs more than one may: 413."""


class Endpoint(ABC):
    """One route over one artifact. The class says what is served; an instance is the loaded model.

    name, summary       of the route, `POST /<name>/predict`
    kind                of the artifacts that it takes; None takes any
    model               under which name training registers them; `models:/<model>@champion` is the default artifact
    Request, Response   bodies of `predict`
    examples            working requests by name; the first is what `prism ask --example` sends
    cost_unit           what a request costs; calls of the model are filled by it, not by the number of requests
    request_cost        the most that one request may cost, unless the deployment says otherwise
    batch_cost          the most that requests which share a batch may cost together, likewise

    `load`, `answer` and `cost` block: the replica calls the first two outside its event loop, `cost` must be quick.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    kind: ClassVar[str | None]
    model: ClassVar[str]
    Request: ClassVar[type[Request]]
    Response: ClassVar[type[Response] | UnionType]
    examples: ClassVar[dict[str, JsonDict]]
    cost_unit: ClassVar[str]
    request_cost: ClassVar[int]
    batch_cost: ClassVar[int]

    @classmethod
    @abstractmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        """The model of an artifact on a torch device. Raises ArtifactError when its parts do not fit."""

    @abstractmethod
    def cost(self, request: Any) -> int:
        """What answering costs, in `cost_unit`; at least 1."""

    @abstractmethod
    def group(self, request: Any) -> Hashable:
        """Requests of equal groups can be answered by one call of the model."""

    @abstractmethod
    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to requests of one group, each as if it had come alone (up to the rounding of arithmetic).

        Raises InputError that begins with the field, `field: problem`, when a request cannot be answered.
        """

    def limits(self) -> dict[str, int]:
        """What the loaded model itself allows, such as its longest text."""
        return {}


def answer_batch(endpoint: Endpoint, requests: Sequence[Any]) -> list[Any]:
    """Response or exception for each request, with one call of the model for each group.

    When a call fails, its requests are halved until those at fault are alone: they get the exception, the others
    their answers.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(endpoint.group(request), []).append(place)
    outcomes: list[Any] = [None] * len(requests)
    for places in groups.values():
        found = _answer_group(endpoint, [requests[place] for place in places])
        for place, outcome in zip(places, found, strict=True):
            outcomes[place] = outcome
    return outcomes


def check_cost(endpoint: Endpoint, cost: int, limit: int) -> None:
    """Raise TooLarge when a request costs more than `limit`."""
    if cost > limit:
        raise TooLarge(f"body: {cost} {endpoint.cost_unit} are asked for; one request may ask for at most {limit}")


def _without_default(schema: JsonDict) -> None:
    schema.pop("default", None)


def _answer_group(endpoint: Endpoint, requests: Sequence[Any]) -> list[Any]:
    try:
        return endpoint.answer(requests)
    except Exception as error:  # whatever it is, it must not reach the other requests of the batch
        if len(requests) == 1:
            return [error]
    half = len(requests) // 2
    return _answer_group(endpoint, requests[:half]) + _answer_group(endpoint, requests[half:])
