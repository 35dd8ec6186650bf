"""SignNet: encodings that do not depend on the signs of eigenvectors. A baseline; eigenvalues are not used.

Each eigenvector v goes through one graph isomorphism network with both signs, f(v) + f(-v). Bases within an eigenspace
of two dimensions and more still make a difference, and so the encoding jumps where eigenvalues meet. Source: Lim,
Robinson et al., "Sign and basis invariant networks for spectral graph representation learning", 2023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.spe.batch import SizeBucket, SpeBatch
from library.spe.columns import Chunk, ColumnGin, entrywise_start, pieces
from library.spe.perceptron import Perceptron


class SignNet(nn.Module):
    """f a GIN on scalars, then a perceptron of all eigenvectors' outputs: concatenated, or summed with `summed`.

    Concatenated outputs include those of zero padding and depend on the eigenvectors' order, as first released.
    """

    def __init__(self, gin: ColumnGin, out: Perceptron, *, summed: bool) -> None:
        super().__init__()
        self.gin, self.out, self.summed = gin, out, summed

    def forward(self, batch: SpeBatch) -> Tensor:
        """Encodings (N, p)."""
        slots = batch.values.shape[1]
        counted = self.training and self.gin.batched
        whole = counted or not self.summed
        stacks = [_scalars(bucket, slots if whole else bucket.vectors.shape[2], counted) for bucket in batch.buckets]
        found = []
        for sign in (1, -1):
            signed = [stack._replace(columns=sign * stack.columns) for stack in stacks]
            chunks = [chunk for s in signed for chunk in pieces([s], s.columns.shape[2], self.gin.last.in_features)]
            rows = self.gin(chunks, entrywise_start)
            found.append(self._gathered(rows, batch) if not self.summed else self._totals(rows, chunks, batch))
        return self.out(found[0] + found[1])

    def _gathered(self, rows: list[Tensor], batch: SpeBatch) -> Tensor:
        """Outputs for each eigenvector, one after another: (N, slots * outputs)."""
        return torch.cat([self.gin.last(x).flatten(2).flatten(0, 1) for x in rows])[batch.places]

    def _totals(self, rows: list[Tensor], chunks: list[Chunk], batch: SpeBatch) -> Tensor:
        """The sum of the outputs over a graph's own eigenvectors: (N, outputs)."""
        kept = torch.cat([batch.kept[bucket.graphs] for bucket in batch.buckets])
        sums, first = [], 0
        for x, chunk in zip(rows, chunks, strict=True):
            own = torch.arange(x.shape[2], device=x.device) < kept[first : first + len(x), None]
            sums.append((own.to(x.dtype)[:, None, None] @ x).squeeze(2).flatten(0, 1))
            first += len(chunk.adjacency)
        last = self.gin.last
        return F.linear(torch.cat(sums)[batch.places], last.weight) + (
            batch.kept[batch.graph_of_node][:, None] * last.bias
        )


def _scalars(bucket: SizeBucket, slots: int, counted: bool) -> Chunk:
    """A bucket with `slots` columns, one scalar a node; weights where its padded rows must not count."""
    columns = F.pad(bucket.vectors, (0, slots - bucket.vectors.shape[2]))
    weights = None
    if counted:
        rows = columns.new_ones(columns.shape[:2]) if bucket.mask is None else bucket.mask
        weights = rows[:, :, None].expand_as(columns)
    return Chunk(bucket.adjacency, columns, None, bucket.mask, weights)
