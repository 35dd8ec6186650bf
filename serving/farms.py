"""How much to prune of each layer, part of the endpoint `spectrum`: exponents in, ratios out."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from library.errors import InputError
from serving.endpoint import Part, Response, optional

Layers = Field(min_length=1, max_length=20_000, fail_fast=True)
Alpha = Annotated[float, Field(ge=-1e100, le=1e100)]  # sums of them are finite
Size = Annotated[int, Field(ge=1, le=2**53)]
Number = Annotated[int, Field(ge=-(2**53), le=2**53)]


class AllocationQuestion(Part):
    """Exponents and sizes of layers, and the share of all weights that is to be pruned."""

    alphas: Annotated[list[Alpha], Layers] = Field(description="Of each layer; larger for lighter tails.")
    parameters: Annotated[list[Size], Layers] = Field(description="Weights of each layer.")
    sparsity: float = Field(gt=0, lt=1, description="Share of all weights to prune.")
    epsilon: float = Field(0.2, ge=0, lt=1, description="How far ratios differ; 0 prunes all layers alike.")
    blocks: Annotated[list[Number], Layers] = optional(
        description="Number of each layer's block: its layers share their mean alpha. Left out, each layer has its own."
    )


class AllocationResponse(Response):
    """The share of each layer's weights to prune, in the request's order."""

    ratios: list[float]
    achieved: float = Field(description="Their mean over all weights.")


def allocated(question: AllocationQuestion, version: str) -> AllocationResponse:
    """Raises InputError that begins with the field."""
    from library.farms.allocation import achieved, allocate

    for name in ("alphas", "blocks"):
        _same_length(name, getattr(question, name), question.parameters)
    try:
        ratios = allocate(
            question.alphas,
            question.parameters,
            question.sparsity,
            epsilon=question.epsilon,
            blocks=question.blocks,
        )
    except InputError as error:
        raise InputError(f"allocate: {error}") from error
    mean = achieved(ratios, question.parameters)
    return AllocationResponse(model=version, ratios=ratios.tolist(), achieved=mean)


def _same_length(name: str, given: Sequence[float] | None, parameters: Sequence[int]) -> None:
    if given is not None and len(given) != len(parameters):
        raise InputError(f"allocate.{name}: {len(given)} for {len(parameters)} layers, as `parameters` has them")
