"""Message passing over each graph's nodes for many columns at once: what rho and SignNet are made of.

A chunk is a stack of graphs of one padded size s, each with c columns; node i carries the row x[i, j] in column j. One
layer is X_j <- MLP(S X_j) with S = A + (1 + eps) I, in every column j.

Three rearrangements leave the results as they are, up to rounding, and most of the time behind:

* S X is a product of small dense matrices, (s, s) by (s, c h): no message is gathered or scattered.
* Between two layers nothing nonlinear stands between the last linear of one MLP and the first of the next:
  W_1 (S (W_3 x + b_3)) = S ((W_1 W_3) x + W_1 b_3), one product with W_1 W_3 instead of two.
* The last linear of the last MLP comes after the sum over columns (`rho.py`), on n rows instead of n^2.

Where no row sees another graph's (layer norm, no norm, or evaluation), chunks go through all layers one by one, so
that a chunk stays in the processor's cache.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.spe.norms import NormName, make_norm
from library.spe.perceptron import Perceptron

CHUNK_VALUES = 1 << 19  # of one layer's activations that are worked on at a time, on a CPU


class Chunk(NamedTuple):
    """A stack of graphs with columns.

    adjacency   (b, s, s)
    columns     (b, s, k) columns as they are, or a factor of them: what `Start` makes of it
    factor      (b, k, m) the other factor, where there is one
    mask        (b, s) 1 at a graph's own nodes; None where all are
    weights     (b, s, c) how often each row counts in batch statistics; None is once each
    """

    adjacency: Tensor
    columns: Tensor
    factor: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None


Start = Callable[[Chunk, Tensor, nn.Linear], Tensor]
"""First half of the first layer: chunk, S (b, s, s) and linear to linear(S X), (b, s, c, hidden)."""


class GinLayer(nn.Module):
    """eps and the MLP of one layer; eps starts from N(0, 1) as released."""

    def __init__(self, mlp: Perceptron) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.randn(1))
        self.mlp = mlp

    def matrix(self, adjacency: Tensor) -> Tensor:
        """S = A + (1 + eps) I."""
        return adjacency + (1 + self.eps) * torch.eye(adjacency.shape[-1], device=adjacency.device)


class ColumnGin(nn.Module):
    """A graph isomorphism network on columns; `forward` stops before the last linear layer, `last`.

    `between` puts a batch norm between layers. Source: Xu, Hu, Leskovec, Jegelka, "How powerful are graph neural
    networks", 2019, with the MLP of the released SPE.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        *,
        layers: int,
        mlp_layers: int,
        mlp_hidden: int,
        norm: NormName,
        between: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(
            GinLayer(Perceptron(widths[i], mlp_hidden, widths[i + 1], layers=mlp_layers, norm=norm, dropout=dropout))
            for i in range(layers)
        )
        self.between = nn.ModuleList(make_norm("batch", hidden) for _ in range(layers - 1)) if between else None
        self.batched = norm == "batch" or between

    @property
    def last(self) -> nn.Linear:
        """The linear layer that the caller applies after what it sums."""
        return self.layers[-1].mlp.last

    def forward(self, chunks: Sequence[Chunk], start: Start) -> list[Tensor]:
        """What goes into `last`, (b, s, c, hidden) for each chunk."""
        if self.batched and self.training:
            return self._together(chunks, start)
        return [self._together([chunk], start)[0] for chunk in chunks]

    def _together(self, chunks: Sequence[Chunk], start: Start) -> list[Tensor]:
        weights = row_weights(chunks)
        first = self.layers[0]
        rows = [start(chunk, first.matrix(chunk.adjacency), first.mlp.hidden[0]) for chunk in chunks]
        rows = activated(first.mlp, rows, weights)
        for place, layer in enumerate(self.layers[1:]):
            before, linear = self.layers[place].mlp.last, layer.mlp.hidden[0]
            weight, bias = linear.weight, None
            if self.between is not None:
                rows = self.between[place]([before(x) for x in rows], weights)
            else:
                weight, bias = weight @ before.weight, linear.weight @ before.bias
            rows = [
                propagate(layer, chunk.adjacency, nn.functional.linear(x, weight, bias), linear.bias)
                for chunk, x in zip(chunks, rows, strict=True)
            ]
            rows = activated(layer.mlp, rows, weights)
        return rows


def propagate(layer: GinLayer, adjacency: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """S X + bias in every column: adjacency (b, s, s), x (b, s, c, h), bias (h,).

    As A X + eps X + X + bias, so that the gradient of eps is a sum and not a product of matrices.
    """
    flat = x.flatten(2)
    loops = torch.eye(adjacency.shape[-1], device=adjacency.device)
    found = torch.baddbmm(bias.repeat(x.shape[2]), adjacency + loops, flat)
    return torch.addcmul(found, flat, layer.eps).view_as(x)


def entrywise_start(chunk: Chunk, matrix: Tensor, linear: nn.Linear) -> Tensor:
    """The start for `columns` (b, s, c) of scalars: linear(S X)."""
    return linear((matrix @ chunk.columns)[..., None])


def node_start(chunk: Chunk, matrix: Tensor, linear: nn.Linear) -> Tensor:
    """The start for one column of node features, `columns` (b, s, features): linear(S X)."""
    return linear(matrix @ chunk.columns)[:, :, None]


def factored_start(chunk: Chunk, matrix: Tensor, linear: nn.Linear) -> Tensor:
    """The start for X_ijl = sum_r V_ir F_rl V_jr with V in `columns` and F in `factor`: X is never formed."""
    return factored_product(matrix @ chunk.columns, chunk, linear)


def factored_product(left: Tensor, chunk: Chunk, linear: nn.Linear) -> Tensor:
    """left diag(F W^T) V^T + bias in every hidden channel, one batched product (s, k) by (k, c h): (b, s, c, hidden).

    A chunk with weights gets one column of zeros more, which stands for all the padding of the released code.
    """
    right = chunk.columns.mT[..., None] * nn.functional.linear(chunk.factor, linear.weight)[:, :, None]
    if chunk.weights is not None:
        right = nn.functional.pad(right, (0, 0, 0, 1))
    bias = linear.bias.repeat(right.shape[2])
    return torch.baddbmm(bias, left, right.flatten(2)).unflatten(2, (-1, len(linear.bias)))


def pieces(stacks: Iterable[Chunk], columns: int | None, width: int) -> list[Chunk]:
    """Stacks of graphs cut into chunks of at most about `CHUNK_VALUES` activations; on accelerators left whole.

    `columns` is how many a graph has, None for as many as its padded nodes; `width` that of the layers.
    """
    cut = []
    for stack in stacks:
        b, s, _ = stack.adjacency.shape
        most = b if stack.adjacency.is_cuda else max(1, CHUNK_VALUES // (s * (columns or s) * width))
        parts = [part.split(most) if part is not None else [None] * -(-b // most) for part in stack]
        cut += [Chunk(*part) for part in zip(*parts, strict=True)]
    return cut


def row_weights(chunks: Sequence[Chunk]) -> list[Tensor] | None:
    """The weights of the chunks' rows, flat, or None where they have none."""
    return None if chunks[0].weights is None else [chunk.weights.flatten() for chunk in chunks]


def activated(mlp: Perceptron, rows: list[Tensor], weights: list[Tensor] | None) -> list[Tensor]:
    """Everything in an MLP after its first linear layer and before its last."""
    rows = mlp.activate(0, rows, weights)
    for place, linear in enumerate(mlp.hidden[1:], 1):
        rows = mlp.activate(place, [linear(x) for x in rows], weights)
    return rows
