"""What an encoding and a backbone are made of."""

from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from library.spe.backbone import Pooling
from library.spe.norms import NormName
from library.spe.phi import PhiName
from library.spe.rho import RhoName

MethodName = Literal["spe", "none", "peg", "signnet", "basisnet"]


class Encoding(BaseModel, frozen=True, extra="forbid"):
    """How a node's place in its graph is encoded. The defaults are the paper's at a laptop's width."""

    method: MethodName = "spe"
    """spe, or one of the baselines: none, peg (eigenvectors, distances along edges), signnet, basisnet."""
    eigenpairs: PositiveInt = 37
    """Smallest eigenpairs d that are used, zero included; graphs with fewer nodes have fewer."""
    split: Literal["shrink", "keep", "error"] = "shrink"
    """When the cut at d falls into an eigenspace: use fewer pairs, cut all the same (as released), or refuse."""
    most_nodes: PositiveInt = 1000
    """spe: larger graphs are refused, because the outer network's memory grows with the square of their nodes."""
    width: PositiveInt | None = None
    """Numbers p per node; None is d, as released."""

    phi: PhiName = "mlp"
    """Functions on eigenvalues: mlp, deepsets, transformer, spline, or one (phi = 1, nodes are only marked)."""
    masked: bool = True
    """Keep padding out of phi's sums, attention and batch norm; the released code does so in one variant only."""
    channels: PositiveInt = 8
    """Functions m."""
    phi_layers: PositiveInt = 3
    """Layers of phi; of the outer perceptron for signnet."""
    phi_hidden: PositiveInt = 16
    """Width of phi."""
    phi_norm: bool = True
    """Batch norm inside phi's perceptron."""
    heads: PositiveInt = 4
    """Attention heads of phi transformer."""
    pieces: PositiveInt = 16
    """Pieces of phi spline."""

    rho: RhoName = "gin"
    """Outer network: gin, mlp, or gin_deepsets."""
    rho_layers: PositiveInt = 3
    """Layers of the outer network, and of the GIN of signnet and basisnet."""
    rho_hidden: PositiveInt = 32
    """Width between its layers."""
    mlp_layers: int = Field(3, ge=2)
    """Layers of the perceptrons inside it."""
    mlp_hidden: PositiveInt = 32
    """Width inside them."""
    norm: NormName = "batch"
    """Norm inside them: batch (as released for ZINC), layer (faster, no graph sees another), none."""
    outer_hidden: PositiveInt | None = None
    """Width inside the perceptron that is rho mlp, or ends signnet; None is mlp_hidden, released is rho_hidden."""
    outer_norm: NormName | None = None
    """Norm inside it; None is norm. Released is layer for rho mlp and batch for signnet."""
    over_nodes: Literal["sum", "mean"] = "sum"
    """rho's last step over a graph's nodes j: their sum, as published, or mean, which no graph's size makes large."""
    between: bool = False
    """Batch norm between the layers of the outer GIN."""

    summed: bool = True
    """signnet: sum over eigenvectors instead of concatenating their outputs."""
    sign_width: PositiveInt = 4
    """signnet: numbers per eigenvector that are concatenated."""
    multiplicities: PositiveInt = 14
    """basisnet: largest dimension of an eigenspace that it has a network for."""
    official_bugs: bool = False
    """basisnet: mix nodes as the released code does, to compare with it."""

    @model_validator(mode="after")
    def _fitting(self) -> "Encoding":
        if self.phi == "transformer" and self.phi_hidden % self.heads:
            raise ValueError(f"phi_hidden {self.phi_hidden} is no multiple of heads {self.heads}")
        if self.method == "spe" and self.rho == "mlp" and self.rho_layers < 2:
            raise ValueError("rho_layers must be at least 2 for rho mlp")
        return self

    @property
    def out(self) -> int:
        """Numbers per node."""
        return self.eigenpairs if self.method == "peg" else self.width or self.eigenpairs


class Backbone(BaseModel, frozen=True, extra="forbid"):
    """The network that reads node and edge features and the encodings."""

    layers: PositiveInt = 4
    """How many GINE layers it has."""
    hidden: PositiveInt = 64
    """Width of the nodes."""
    mlp_layers: int = Field(3, ge=2)
    """Layers of its perceptrons."""
    mlp_hidden: PositiveInt | None = None
    """Width inside them; None is `hidden`."""
    norm: NormName = "batch"
    """Norm inside them: batch (as released), layer, none."""
    join: Literal["add", "concat"] = "add"
    """At the input, add a linear map of the encodings to the features, or concatenate and mix."""
    inject: Literal["input", "every_layer"] = "input"
    """Feed encodings in at the input (the paper) or into every layer too (the released code)."""
    pooling: Pooling = "mean"
    """How nodes become a graph: mean or add."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in all perceptrons but phi's."""


class Schema(BaseModel, frozen=True, extra="forbid"):
    """What graphs hold: how many types, or how many features, nodes and edges have; and what is predicted.

    `reader` says how molecules become such graphs: by tokens of the `vocabulary`, by features, or not at all.
    """

    node_types: NonNegativeInt = 0
    node_features: NonNegativeInt = 0
    edge_types: NonNegativeInt = 0
    edge_features: NonNegativeInt = 0
    targets: tuple[str, ...] = ("y",)
    task: Literal["regression", "binary"] = "regression"
    unit: str = ""
    reader: Literal["tokens", "features", "none"] = "none"
    vocabulary: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> "Schema":
        if bool(self.node_types) == bool(self.node_features) or (self.edge_types and self.edge_features):
            raise ValueError("nodes need types or features, edges may have one of them")
        return self
