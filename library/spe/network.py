"""The whole network: features, encodings, their injection, backbone, pooling and head."""

import torch
from torch import Tensor, nn

from library.spe.backbone import GineLayer, pooled
from library.spe.basisnet import BasisNet
from library.spe.batch import SpeBatch
from library.spe.columns import ColumnGin
from library.spe.perceptron import Perceptron
from library.spe.phi import DeepSetsPhi, OnePhi, PerceptronPhi, SplinePhi, TransformerPhi
from library.spe.rho import GinDeepSetsRho, GinRho, PerceptronRho
from library.spe.settings import Backbone, Encoding, Schema
from library.spe.signnet import SignNet


class Spe(nn.Module):
    """Stable and expressive positional encodings: SPE(V, lambda) = rho(V diag(phi_l(lambda)) V^T, l = 1 to m).

    `over_nodes` mean divides them by the number of nodes: rho ends with a sum over all of these.

    Source: Huang, Lu, Robinson, Yang, Zhang, Jegelka, Li, "On the stability of expressive positional encodings for
    graphs", ICLR 2024, equation 3.

    >>> from library.spe.encode import encode
    >>> from library.spectral.graphs import Graphs
    >>> encoding = Encoding(eigenpairs=5, width=3)
    >>> ring = Graphs.from_edges([5], [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    >>> encode(Spe(encoding).eval(), ring, encoding).shape
    torch.Size([5, 3])
    """

    def __init__(self, encoding: Encoding, dropout: float = 0.0) -> None:
        super().__init__()
        self.phi = make_phi(encoding)
        self.rho = make_rho(encoding, dropout)
        self.mean = encoding.over_nodes == "mean"

    def forward(self, batch: SpeBatch) -> Tensor:
        """Encodings (N, p) of the nodes of a batch."""
        found = self.rho(self.phi(batch.values, batch.kept), batch)
        return found / batch.counts[batch.graph_of_node][:, None] if self.mean else found


class Eigenvectors(nn.Module):
    """The eigenvectors as they are, (N, d): the encoding of PEG."""

    def forward(self, batch: SpeBatch) -> Tensor:
        slots = batch.values.shape[1]
        rows = [nn.functional.pad(b.vectors, (0, slots - b.vectors.shape[2])).flatten(0, 1) for b in batch.buckets]
        return torch.cat(rows)[batch.places]


class GraphNetwork(nn.Module):
    """Graphs to predictions (B, targets): standardised values for a regression, logits for binary targets.

    `centre` and `scale` (targets,), in the model's state, turn standardised values into the target's unit:
    value = centre + scale * output. PEG's distance |V_u - V_v| of an edge multiplies its embedding in every layer, or
    is embedded in its place where edges have no types or features.
    """

    def __init__(self, encoding: Encoding, backbone: Backbone, schema: Schema) -> None:
        super().__init__()
        hidden, dropout = backbone.hidden, backbone.dropout
        self.backbone = backbone
        self.peg = encoding.method == "peg"
        self.nodes = (
            nn.Embedding(schema.node_types, hidden) if schema.node_types else nn.Linear(schema.node_features, hidden)
        )
        encoder = make_encoder(encoding, dropout)
        self.encoders = nn.ModuleList([] if encoder is None else [encoder])  # one block to an engine that shards blocks
        joined = encoder is not None and not self.peg
        self.join = nn.Linear(encoding.out, hidden) if joined else None
        self.mix = nn.Linear(2 * hidden, hidden) if joined and backbone.join == "concat" else None
        inner = backbone.mlp_hidden or hidden

        def perceptron(width: int, out: int) -> Perceptron:
            return Perceptron(width, inner, out, layers=backbone.mlp_layers, norm=backbone.norm, dropout=dropout)

        def position() -> Perceptron | None:
            if self.peg:
                return perceptron(1, hidden)
            return perceptron(encoding.out, hidden) if joined and backbone.inject == "every_layer" else None

        self.layers = nn.ModuleList(
            GineLayer(_edge_embedding(schema, hidden), position(), perceptron(hidden, hidden))
            for _ in range(backbone.layers)
        )
        self.head = perceptron(hidden, len(schema.targets))
        self.register_buffer("centre", torch.zeros(len(schema.targets)))
        self.register_buffer("scale", torch.ones(len(schema.targets)))

    @property
    def encoder(self) -> nn.Module | None:
        """What encodes nodes; None for method none."""
        return self.encoders[0] if len(self.encoders) else None

    def encode(self, batch: SpeBatch) -> Tensor | None:
        """Encodings (N, p), or None for method none."""
        return None if self.encoder is None else self.encoder(batch)

    def forward(self, batch: SpeBatch) -> Tensor:
        return self.read(batch, self.encode(batch))

    def read(self, batch: SpeBatch, encodings: Tensor | None) -> Tensor:
        """The outputs (B, targets) for encodings (N, p) that `encode` gave."""
        x, distances = self.nodes(batch.nodes), None
        if self.peg:
            distances = (encodings[batch.sources] - encodings[batch.destinations]).norm(dim=1, keepdim=True)
            encodings = None
        elif self.mix is not None:
            x = self.mix(torch.cat([x, self.join(encodings)], 1))
        elif encodings is not None:
            x = x + self.join(encodings)
        for layer in self.layers:
            x = x + layer(x, batch, encodings, distances)
        return self.head(pooled(x, batch, self.backbone.pooling))

    def predict(self, batch: SpeBatch, encodings: Tensor | None, *, binary: bool) -> Tensor:
        """Predictions (B, targets) in the targets' unit, or probabilities where they are binary, from `encode`'s."""
        found = self.read(batch, encodings).double()
        return found.sigmoid() if binary else self.centre + self.scale * found


def make_phi(encoding: Encoding) -> nn.Module:
    """The functions on eigenvalues."""
    channels, hidden, layers, masked = (
        encoding.channels,
        encoding.phi_hidden,
        encoding.phi_layers,
        encoding.masked,
    )
    match encoding.phi:
        case "mlp":
            return PerceptronPhi(channels, hidden, layers, norm=encoding.phi_norm, masked=masked)
        case "deepsets":
            return DeepSetsPhi(channels, hidden, layers, masked=masked)
        case "transformer":
            return TransformerPhi(channels, hidden, layers, heads=encoding.heads, masked=masked)
        case "spline":
            return SplinePhi(channels, encoding.pieces)
        case "one":
            return OnePhi(channels)


def make_rho(encoding: Encoding, dropout: float = 0.0) -> nn.Module:
    """The outer network."""
    if encoding.rho == "mlp":
        return PerceptronRho(_outer(encoding, encoding.channels, encoding.rho_layers, dropout))
    gin = _gin(encoding, encoding.channels, encoding.rho_hidden, encoding.out, dropout)
    return GinRho(gin) if encoding.rho == "gin" else GinDeepSetsRho(gin)


def make_encoder(encoding: Encoding, dropout: float = 0.0) -> nn.Module | None:
    """What encodes nodes, (batch) to (N, p); None for method none."""
    match encoding.method:
        case "none":
            return None
        case "spe":
            return Spe(encoding, dropout)
        case "peg":
            return Eigenvectors()
        case "signnet":
            hidden, slots = encoding.rho_hidden, encoding.eigenpairs
            each = hidden if encoding.summed else encoding.sign_width
            out = _outer(encoding, hidden if encoding.summed else slots * each, encoding.phi_layers, dropout)
            return SignNet(_gin(encoding, 1, hidden, each, dropout), out, summed=encoding.summed)
        case "basisnet":
            width = 2 * encoding.eigenpairs
            gin = _gin(encoding, width, width, encoding.out, dropout)
            return BasisNet(encoding.multiplicities, encoding.rho_hidden, gin, released=encoding.official_bugs)


def _outer(encoding: Encoding, width: int, layers: int, dropout: float) -> Perceptron:
    """The perceptron that gives the encodings, in rho mlp and in signnet."""
    hidden, norm = encoding.outer_hidden or encoding.mlp_hidden, encoding.outer_norm or encoding.norm
    return Perceptron(width, hidden, encoding.out, layers=layers, norm=norm, dropout=dropout)


def _gin(encoding: Encoding, width: int, hidden: int, out: int, dropout: float) -> ColumnGin:
    return ColumnGin(
        width,
        hidden,
        out,
        layers=encoding.rho_layers,
        mlp_layers=encoding.mlp_layers,
        mlp_hidden=encoding.mlp_hidden,
        norm=encoding.norm,
        between=encoding.between,
        dropout=dropout,
    )


def _edge_embedding(schema: Schema, hidden: int) -> nn.Module | None:
    if schema.edge_types:
        return nn.Embedding(schema.edge_types, hidden)
    return nn.Linear(schema.edge_features, hidden) if schema.edge_features else None
