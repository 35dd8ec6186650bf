"""Questions about the Hessian of a loss, a part of the endpoint `spectrum`: of a small network, or the served model."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from serving.endpoint import Part, Response, optional

if TYPE_CHECKING:
    from torch import nn

PRODUCTS_PER_PAIR = 20  # how many products an extreme eigenpair may take
BOUND_PRODUCTS = 24  # those that find the interval of the kernel polynomial method
SAMPLES = 64  # through which a product goes for what a parameter costs
Numbers = Annotated[list[float], Field(min_length=1, max_length=65_536, fail_fast=True)]
Rows = Annotated[list[Numbers], Field(min_length=1, max_length=65_536, fail_fast=True)]
Labels = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
What = Literal["exact", "slq", "kpm", "top", "trace", "layers"]


class Network(Part):
    """A fully connected network: h_0 = input, h_i = activation(W_i h_{i-1} + b_i), none after the last layer."""

    weights: list[Rows] = Field(min_length=1, max_length=20, description="W_i, (outputs, inputs), row by row.")
    biases: list[Numbers] = optional(fail_fast=True, description="b_i of every layer; left out, there are none.")
    activation: Literal["relu", "tanh", "softplus"] = "relu"

    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(outer * (inner + (self.biases is not None)) for inner, outer in pairwise(self.sizes()))

    def sizes(self) -> list[int]:
        """Widths from the input to the output."""
        return [len(self.weights[0][0]), *(len(weight) for weight in self.weights)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sizes = self.sizes()
        for i, (weight, inner) in enumerate(zip(self.weights, sizes, strict=False)):
            if any(len(row) != inner for row in weight):
                raise ValueError(f"weights[{i}]: every row must have {inner} numbers, one for each input")
        if self.biases is not None and [len(bias) for bias in self.biases] != sizes[1:]:
            raise ValueError(f"biases: needed are vectors of {', '.join(map(str, sizes[1:]))} numbers")
        return self

    def module(self) -> "nn.Sequential":
        """The network in float64."""
        import torch
        from torch import nn

        from library.hessian.toy import ACTIVATIONS

        layers: list[nn.Module] = []
        for i, weight in enumerate(self.weights):
            layer = nn.Linear(len(weight[0]), len(weight), bias=self.biases is not None, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
                if self.biases is not None:
                    layer.bias.copy_(torch.tensor(self.biases[i], dtype=torch.float64))
            layers += [layer, ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1])


class HessianQuestion(Part):
    """The loss of a `network` on `inputs` and `targets`; without a network that of the served model on its own data."""

    network: Network = optional(description="A small network; left out, the question is about the served model.")
    inputs: Rows = optional(description="The network's inputs, a row for each sample.")
    targets: Labels | Rows = optional(description="A class, or a row, for each sample.")
    loss: Literal["cross_entropy", "mse"] = Field(
        "cross_entropy",
        description="Of a network: mean over samples, for mse of the squared error summed over outputs.",
    )
    samples: int = Field(8, ge=1, le=256, description="Samples of the served model's own data, the first ones.")
    part: Literal["train", "validation", "test"] = Field("validation", description="Which of its data.")
    what: list[What] = Field(
        ["top", "trace"],
        max_length=6,
        description="exact: all eigenvalues; slq, kpm: their density by Lanczos or Chebyshev; top: the largest with "
        "residuals; trace; layers: the trace of each parameter's block.",
    )
    top: int = Field(3, ge=1, le=50, description="How many of the largest eigenvalues.")
    steps: int = Field(16, ge=2, le=400, description="Lanczos steps, or Chebyshev degree.")
    probes: int = Field(4, ge=2, le=64, description="Random vectors of densities and traces.")
    seed: int = Field(0, ge=0, lt=2**32)
    towards: Network | Annotated[str, Field(pattern="^models:/", max_length=200)] = optional(
        description="The end of a line from this point: a network of the same sizes, or another version of the served "
        "model (models:/NAME/VERSION)."
    )
    points: int = Field(11, ge=2, le=101, description="Points of that line.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = self.model_fields_set
        if not self.what and "towards" not in given:
            raise ValueError("what: name what is asked, or give the other end of a line as `towards`")
        if "network" not in given:
            if stray := given & {"inputs", "targets", "loss"}:
                raise ValueError(f"{min(stray)}: belongs to a network, and none is given")
            if isinstance(self.towards, Network):
                raise ValueError(
                    "towards: the served model's line ends at another of its versions, models:/NAME/VERSION"
                )
            return self
        if missing := {"inputs", "targets"} - given:
            raise ValueError(f"{min(missing)}: a network needs inputs and targets")
        if stray := given & {"samples", "part"}:
            raise ValueError(f"{min(stray)}: is about the served model's data, and a network is given")
        if isinstance(self.towards, str):
            raise ValueError("towards: a network's line ends at another network")
        self._check_data()
        return self

    def _check_data(self) -> None:
        sizes = self.network.sizes()
        if any(len(row) != sizes[0] for row in self.inputs):
            raise ValueError(f"inputs: every row must have {sizes[0]} numbers, as the network takes")
        if len(self.targets) != len(self.inputs):
            raise ValueError(f"targets: {len(self.targets)} for {len(self.inputs)} inputs")
        labels = isinstance(self.targets[0], int)
        if labels != (self.loss == "cross_entropy"):
            raise ValueError(f"targets: {self.loss} needs {'rows of numbers' if labels else 'a class for each sample'}")
        if labels and max(self.targets) >= sizes[-1]:
            raise ValueError(f"targets: class {max(self.targets)} of a network with outputs 0 to {sizes[-1] - 1}")
        if not labels and any(len(row) != sizes[-1] for row in self.targets):
            raise ValueError(f"targets: every row must have {sizes[-1]} numbers, as the network gives")
        if isinstance(self.towards, Network) and (
            self.towards.sizes() != sizes or (self.towards.biases is None) != (self.network.biases is None)
        ):
            raise ValueError("towards: a network of the same sizes is needed, with biases where the first has them")

    def products(self, parameters: int) -> int:
        """How many products with the Hessian, or passes as costly, answering takes at most."""
        each = {
            "exact": parameters,
            "slq": self.probes * self.steps,
            "kpm": self.probes * (self.steps // 2) + BOUND_PRODUCTS,
            "top": PRODUCTS_PER_PAIR * self.top,
            "trace": self.probes,
            "layers": self.probes,
        }
        line = self.points if "towards" in self.model_fields_set else 0
        return sum(each[what] for what in set(self.what)) + line + 1

    def cost(self, parameters: int) -> int:
        """Products times parameters, and times samples / `SAMPLES` where that is more.

        With a network its units count as parameters do: activations are as much work in narrow layers.
        """
        samples, each = self.samples, parameters
        if self.network is not None:
            samples, each = len(self.inputs), parameters + sum(self.network.sizes())
        return self.products(parameters) * max(parameters, samples * each // SAMPLES)


class Uncertain(BaseModel, frozen=True):
    """An estimate and its standard error, 0 where it is exact."""

    value: float
    standard_error: float


class Eigenvalue(BaseModel, frozen=True):
    """An eigenvalue lies within `residual` of `value`."""

    value: float
    residual: float


class Density(BaseModel, frozen=True):
    """A density of eigenvalues, which integrates to 1, with a band of one standard error on each side."""

    grid: list[float]
    density: list[float]
    standard_error: list[float]
    nodes: list[list[float]] | None = Field(description="Of Lanczos quadrature, for each probe; null for kpm.")
    weights: list[list[float]] | None = Field(description="Their weights, which sum to 1 for each probe.")


class Block(BaseModel, frozen=True):
    """The trace of the diagonal block of one parameter."""

    name: str
    parameters: int
    trace: Uncertain


class Counted(BaseModel, frozen=True):
    """How many eigenvalues stand out, by two rules."""

    by_gap: int = Field(description="Above the largest ratio of neighbours among the largest eigenvalues.")
    gap: float = Field(description="That ratio.")
    above_negative: int | None = Field(description="Above twice |smallest|; null unless all eigenvalues are known.")


class LineAnswer(BaseModel, frozen=True):
    """The loss at (1 - a) here + a there, for each position a."""

    positions: list[float]
    losses: list[float]
    accuracies: list[float] | None
    barrier: float = Field(description="How far the line rises above its chord.")


class HessianResponse(Response):
    """The curvature of the loss; what was not asked for is null."""

    parameters: int
    samples: int
    loss: float
    gradient_norm: float
    eigenvalues: list[float] | None = Field(description="All of them, ascending.")
    slq: Density | None
    kpm: Density | None
    top: list[Eigenvalue] | None
    outliers: Counted | None
    trace: Uncertain | None
    layers: list[Block] | None
    line: LineAnswer | None
    notes: list[str]
