"""rho: the outer networks, from Q_l = V diag(phi_l(lambda)) V^T, l = 1 to m, to encodings of nodes (N, p).

Node i has the row Q[i, j, :] of m channels for every node j of its graph; all three networks work on the rows of one
column j alike and sum over j at the end, so they are equivariant under permutations of the nodes and take any size.
Each maps phi (graphs, slots, m) and a batch to (N, p) in the batch's order. The released code calls them phi.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import collective
from library.spe.batch import SizeBucket, SpeBatch
from library.spe.columns import (
    Chunk,
    ColumnGin,
    activated,
    factored_product,
    factored_start,
    pieces,
    propagate,
    row_weights,
)
from library.spe.perceptron import Perceptron

RhoName = Literal["gin", "mlp", "gin_deepsets"]


class GinRho(nn.Module):
    """A GIN over the graph's edges in every column, then PE_i = sum_j X[i, j, :] over the graph's own nodes j.

    In the released code every graph has as many columns as the largest one of its batch, and the zero columns count in
    batch norm's statistics. All zero columns of a graph are alike, so one of them stands here for all, with their
    number as its weight.
    """

    def __init__(self, gin: ColumnGin) -> None:
        super().__init__()
        self.gin = gin

    def forward(self, phi: Tensor, batch: SpeBatch) -> Tensor:
        chunks = factored_chunks(phi, batch, self.gin.last.in_features, counted=self.training and self.gin.batched)
        rows = self.gin(chunks, factored_start)
        sums = [own_columns(x, chunk.mask) for x, chunk in zip(rows, chunks, strict=True)]
        return in_order(sums, self.gin.last, batch)


class PerceptronRho(nn.Module):
    """A perceptron of every Q[i, j, :], summed over j: no messages along edges."""

    def __init__(self, mlp: Perceptron) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, phi: Tensor, batch: SpeBatch) -> Tensor:
        counted = self.training and self.mlp.norm == "batch"
        chunks = factored_chunks(phi, batch, self.mlp.last.in_features, counted=counted)
        parts = [chunks] if counted else [[chunk] for chunk in chunks]
        sums = []
        for part in parts:
            rows = [factored_product(chunk.columns, chunk, self.mlp.hidden[0]) for chunk in part]
            rows = activated(self.mlp, rows, row_weights(part))
            sums += [own_columns(x, chunk.mask) for x, chunk in zip(rows, part, strict=True)]
        return in_order(sums, self.mlp.last, batch)


class GinDeepSetsRho(nn.Module):
    """After each GIN layer, deep sets over the columns: X_ij <- ReLU(X_ij W + b + (sum_j X_ij) U).

    PE_i is then the sum over j. All sums run over a graph's own columns; the last layer has no ReLU. The last linear
    layer of an MLP, W_3 x + b_3, is part of both linear maps.
    """

    def __init__(self, gin: ColumnGin) -> None:
        super().__init__()
        self.gin = gin
        outs = [layer.mlp.last.out_features for layer in gin.layers]
        self.own = nn.ModuleList(nn.Linear(out, out) for out in outs)
        self.pooled = nn.ModuleList(nn.Linear(out, out, bias=False) for out in outs)

    def forward(self, phi: Tensor, batch: SpeBatch) -> Tensor:
        counted = self.training and self.gin.batched
        chunks = factored_chunks(phi, batch, self.gin.last.in_features, counted=counted)
        parts = [chunks] if counted else [[chunk] for chunk in chunks]
        sums = []
        for part in parts:
            rows = self._together(part)
            sums += [own_columns(x, chunk.mask) for x, chunk in zip(rows, part, strict=True)]
        return in_order(sums, None, batch)

    def _together(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        weights, rows = row_weights(chunks), []
        for place, layer in enumerate(self.gin.layers):
            linear = layer.mlp.hidden[0]
            if place == 0:
                rows = [factored_start(chunk, layer.matrix(chunk.adjacency), linear) for chunk in chunks]
            else:
                rows = [
                    propagate(layer, chunk.adjacency, F.linear(x, linear.weight), linear.bias)
                    for chunk, x in zip(chunks, rows, strict=True)
                ]
            rows = activated(layer.mlp, rows, weights)
            rows = [self._mixed(place, layer.mlp.last, x, chunk) for x, chunk in zip(rows, chunks, strict=True)]
        return rows

    def _mixed(self, place: int, last: nn.Linear, x: Tensor, chunk: Chunk) -> Tensor:
        own, pooled = self.own[place], self.pooled[place]
        total = F.linear(own_columns(x, chunk.mask), last.weight)
        total = total + column_counts(chunk, total) * last.bias
        mixed = F.linear(x, own.weight @ last.weight, own(last.bias)) + pooled(total)[:, :, None]
        return F.relu(mixed) if place + 1 < len(self.own) else mixed


def factored_chunks(phi: Tensor, batch: SpeBatch, width: int, *, counted: bool) -> list[Chunk]:
    """The batch's buckets as chunks whose columns are V and whose factor is phi; `counted` adds the rows' weights."""
    most = max(collective.all_gather(int(batch.counts.max()))) if counted else 0
    stacks = [
        Chunk(
            bucket.adjacency,
            bucket.vectors,
            phi[bucket.graphs, : bucket.vectors.shape[2]],
            bucket.mask,
            padding_weights(bucket, batch.counts[bucket.graphs], most) if counted else None,
        )
        for bucket in batch.buckets
    ]
    return pieces(stacks, None, width)


def padding_weights(bucket: SizeBucket, counts: Tensor, most: int) -> Tensor:
    """How often each row (b, s, s + 1) counts when all graphs are padded to `most` columns: int counts (b,) nodes."""
    place = torch.arange(bucket.adjacency.shape[1] + 1, device=counts.device)
    columns = (place < counts[:, None]).to(bucket.vectors) + (place == counts[:, None]) * (most - counts[:, None])
    rows = (place[:-1] < counts[:, None]).to(bucket.vectors)
    return rows[:, :, None] * columns[:, None]


def own_columns(x: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over a graph's own columns: (b, s, c, h) to (b, s, h)."""
    own = x[:, :, : x.shape[1]]
    return own.sum(2) if mask is None else (mask[:, None, None] @ own).squeeze(2)


def column_counts(chunk: Chunk, like: Tensor) -> Tensor:
    """How many columns are a graph's own: (b, 1, 1)."""
    if chunk.mask is None:
        return like.new_full((len(like), 1, 1), chunk.adjacency.shape[1])
    return chunk.mask.sum(1)[:, None, None]


def in_order(sums: Sequence[Tensor], last: nn.Linear | None, batch: SpeBatch) -> Tensor:
    """Sums over columns (b, s, h) as (N, p) in the batch's order, after the last linear layer of each summand."""
    found = torch.cat([part.flatten(0, 1) for part in sums])[batch.places]
    if last is None:
        return found
    return F.linear(found, last.weight) + batch.counts[batch.graph_of_node][:, None] * last.bias
