"""The shape of every endpoint: what a subclass declares, and how requests share calls of its model.

An answer that takes seconds shows its progress and stops when nobody waits for it any more. Its endpoint writes
`answer` as a generator that yields a `Progress` after each step, and returns the responses:

    class Sampler(Endpoint):
        ...

        def answer(self, requests):
            state = self.start(requests)                   # raises InputError before the first step
            for step in range(self.steps):
                state = self.advance(state)
                yield Progress(done=step + 1, total=self.steps)
            return [self.response(part) for part in state]

Nothing else is to be done. Over HTTP a client that asks with `Accept: text/event-stream` gets an `event: progress` for
each `Progress` while it happens and then the response as `event: result`; another client gets the response alone.
After each step it is looked whether somebody still waits for one of `requests`; when all of them have gone away, or
were given up after the time limit, the generator is closed at its `yield` (`finally` blocks run) and the next requests
have their turn. A subclass of `Progress` may show more than numbers.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from pydantic.json_schema import JsonDict

from library.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

    from library.artifact import Artifact

NPY, ARROW = "application/x-npy", "application/vnd.apache.arrow.stream"


class Request(BaseModel):
    """A request body: unknown fields, numbers as texts, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BulkRequest(Request):
    """A request whose data may also come as the body itself: `bulk` is what the endpoint's `read` made of that."""

    _bulk: Any = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        """Take the data from the context of the validation; checks of the whole come after it."""
        if context is not None:
            self._bulk = context

    @property
    def bulk(self) -> Any:
        """The data beside the fields, None when they are in the fields."""
        return self._bulk


class Part(BaseModel):
    """A part of a request body, as strict as the whole."""

    model_config = Request.model_config


class Response(BaseModel):
    """An answer. `model` is the version of the artifact that gave it."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="Version of the artifact that answered: twelve hexadecimal digits.")


class Progress(BaseModel):
    """How far an answer is."""

    model_config = ConfigDict(frozen=True)

    done: int = Field(ge=0, description="Steps behind it.")
    total: int = Field(ge=1, description="Steps in all.")


class Waiting(Protocol):
    """Who waits for the answer to one request, as the model's thread sees them."""

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more."""

    def show(self, progress: Progress) -> None:
        """Tell them."""


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


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
    media               bodies beside JSON that `read` understands, of NPY and ARROW
    nested              whether its tables may have columns of lists, and of lists of lists
    score_bounds        edges of the histogram of `scores`

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
    media: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[bool] = False
    score_bounds: ClassVar[tuple[float, ...]] = tuple(step / 20 for step in range(1, 20))

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
    def answer(self, requests: Sequence[Any]) -> list[Any] | Generator[Progress, None, list[Any]]:
        """The responses to requests of one group, each as if it had come alone (up to the rounding of arithmetic).

        A slow one is a generator of its progress that returns the responses; see the module's docstring. Raises
        InputError that begins with the field, `field: problem`, when a request cannot be answered.
        """

    @classmethod
    def read(cls, body: "np.ndarray | pyarrow.Table", settings: dict[str, Any]) -> Any:
        """The request that an array (NPY) or a table (ARROW) and the other fields make; for those in `media` only.

        Raises InputError, or pydantic's ValidationError for a wrong setting.
        """
        raise NotImplementedError

    def scores(self, response: Any) -> Iterable[float]:
        """The numbers of an answer whose distribution tells when the data drift."""
        return ()

    def limits(self) -> dict[str, int]:
        """What the loaded model itself allows, such as its longest text."""
        return {}


def has_steps(endpoint: Endpoint) -> bool:
    """Whether the endpoint shows progress and can be stopped between steps."""
    return inspect.isgeneratorfunction(endpoint.answer)


def answer_batch(
    endpoint: Endpoint, requests: Sequence[Any], waiting: Sequence[Waiting] = ()
) -> Iterator[tuple[list[int], list[Any]]]:
    """Answer requests with one call of the model for each group; after each call, the places and outcomes of its group.

    An outcome is a response or an exception. When a call fails, its requests are halved until those at fault are
    alone: they get the exception, the others their answers. `waiting`, one for each request, are shown the progress of
    a slow answer; a request for which nobody waits any more is not begun, and its outcome is Abandoned.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(endpoint.group(request), []).append(place)
    for places in groups.values():
        if left := [place for place in places if waiting and waiting[place].gone]:
            yield left, [Abandoned()] * len(left)
            places = [place for place in places if place not in left]
        if places:
            yield places, _answer_group(endpoint, [(requests[i], waiting[i] if waiting else None) for i in places])


def check_cost(endpoint: Endpoint, cost: int, limit: int) -> None:
    """Raise TooLarge when a request costs more than `limit`."""
    if cost > limit:
        raise TooLarge(f"body: {cost} {endpoint.cost_unit} are asked for; one request may ask for at most {limit}")


def _without_default(schema: JsonDict) -> None:
    schema.pop("default", None)


def _answer_group(endpoint: Endpoint, asked: Sequence[tuple[Any, Waiting | None]]) -> list[Any]:
    try:
        found = endpoint.answer([request for request, _ in asked])
        return _finished(found, [one for _, one in asked if one]) if isinstance(found, Generator) else found
    except Exception as error:  # whatever it is, it must not reach the other requests of the batch
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    return _answer_group(endpoint, asked[:half]) + _answer_group(endpoint, asked[half:])


def _finished(steps: Generator[Progress, None, list[Any]], waiting: Sequence[Waiting]) -> list[Any]:
    """What a slow answer returns in the end, or Abandoned for each request when nobody waits for it any more."""
    with closing(steps):
        while True:
            try:
                progress = next(steps)
            except StopIteration as end:
                return end.value
            if waiting and all(one.gone for one in waiting):
                return [Abandoned()] * len(waiting)
            for one in waiting:
                one.show(progress)
