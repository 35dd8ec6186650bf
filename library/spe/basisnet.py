"""BasisNet: encodings from the projector onto each eigenspace. A baseline.

Eigenvalues that are equal after rounding to 5 decimals span one eigenspace. An invariant network for every multiplicity
reads the projector P = V_g V_g^T (n, n) and gives `multiplicity` numbers a node; those of all eigenspaces and the
eigenvalues go through a GIN. The partition is hard: encodings jump where the rounding joins or parts eigenvalues.
Source: Lim, Robinson et al., "Sign and basis invariant networks for spectral graph representation learning", 2023.

Two defects of the implementation that came with SPE are mended: the coefficients of the invariant layers are trained
(on a GPU they were not parameters), and outputs (multiplicity, n) are transposed to (n, multiplicity), where they were
reshaped, which mixed nodes. `released` restores the second, and the norms' statistics over one graph at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import InputError
from library.spe.batch import SizeBucket, SpeBatch
from library.spe.columns import Chunk, ColumnGin, node_start, pieces
from library.spe.norms import BatchNorm

DECIMALS = 5  # to which eigenvalues are rounded before they are compared


class InvariantNet(nn.Module):
    """One invariant network, for projectors of one multiplicity: 2 -> 1, twice 1 -> 1, two linear layers.

    The 2 -> 1 layer mixes five contractions of P: its diagonal, trace / n, row sums / n, column sums / n and total /
    n^2; a 1 -> 1 layer the identity and the mean over nodes. Each is followed by ReLU, then batch norm; between the
    linear layers there is ReLU alone.
    """

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.contractions = nn.Parameter(torch.randn(5, hidden) * math.sqrt(2) / (1 + hidden))
        self.contraction_bias = nn.Parameter(torch.zeros(hidden))
        self.own = nn.ParameterList(
            nn.Parameter(torch.randn(hidden, hidden) * math.sqrt(2) / (2 * hidden)) for _ in range(2)
        )
        self.mean = nn.ParameterList(
            nn.Parameter(torch.randn(hidden, hidden) * math.sqrt(2) / (2 * hidden)) for _ in range(2)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(hidden)) for _ in range(2))
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in range(3))
        self.first = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, out)

    def forward(self, stacks: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        """Contractions (spaces, s, 5) and the nodes' masks (spaces, s), to (spaces, s, multiplicity)."""
        weights = [mask.flatten() for mask in masks]
        rows = [F.relu(x @ self.contractions + self.contraction_bias) for x in stacks]
        rows = self.norms[0](rows, weights)
        for place, (own, mean, bias) in enumerate(zip(self.own, self.mean, self.biases, strict=True), 1):
            rows = [
                F.relu(x @ own + ((mask[:, None] @ x) / mask.sum(1)[:, None, None]) @ mean + bias)
                for x, mask in zip(rows, masks, strict=True)
            ]
            rows = self.norms[place](rows, weights)
        return [self.last(F.relu(self.first(x))) for x in rows]


class BasisNet(nn.Module):
    """Invariant networks for multiplicities 1 to `multiplicities`, then a GIN from (outputs, eigenvalues) to p.

    Raises InputError for an eigenspace of more dimensions.
    """

    def __init__(self, multiplicities: int, hidden: int, gin: ColumnGin, *, released: bool = False) -> None:
        super().__init__()
        self.nets = nn.ModuleList(InvariantNet(hidden, size) for size in range(1, multiplicities + 1))
        self.gin, self.released = gin, released

    def forward(self, batch: SpeBatch) -> Tensor:
        """Encodings (N, p)."""
        spaces = [_Spaces.of(bucket, batch) for bucket in batch.buckets]
        outputs = [x.vectors.new_zeros(*x.vectors.shape[:2], batch.values.shape[1]) for x in batch.buckets]
        largest = max(int(found.sizes.max()) for found in spaces)
        if largest > len(self.nets):
            raise InputError(
                f"an eigenspace has {largest} dimensions, BasisNet has networks for up to {len(self.nets)}; raise "
                "encoding.multiplicities"
            )
        for size in range(1, (len(self.nets) if self.training and not self.released else largest) + 1):
            self._fill(outputs, spaces, size)
        if self.released:
            outputs = [
                _mixed(x, found, bucket) for x, found, bucket in zip(outputs, spaces, batch.buckets, strict=True)
            ]
        chunks = []
        for bucket, found in zip(batch.buckets, outputs, strict=True):
            values = batch.values[bucket.graphs][:, None].expand_as(found)
            features = torch.cat([found, values], 2)
            rows = features.new_ones(features.shape[:2]) if bucket.mask is None else bucket.mask
            weights = rows[:, :, None] if self.training and self.gin.batched else None
            chunks += pieces(
                [Chunk(bucket.adjacency, features, None, bucket.mask, weights)], 1, self.gin.last.in_features
            )
        rows = self.gin(chunks, node_start)
        return self.gin.last(torch.cat([x.flatten(0, 2) for x in rows])[batch.places])

    def _fill(self, outputs: list[Tensor], spaces: "list[_Spaces]", size: int) -> None:
        """Write what the network of one multiplicity gives into the slots of its eigenspaces."""
        chosen = [(found.sizes == size).nonzero() for found in spaces]
        present = [place for place, pairs in enumerate(chosen) if len(pairs)]
        if not present and (self.released or not self.training):
            return
        present = present or [0]  # in training every network takes part on every worker, with nothing if need be
        stacks = [spaces[p].contractions[chosen[p][:, 0], :, chosen[p][:, 1]] for p in present]
        masks = [spaces[p].mask[chosen[p][:, 0]] for p in present]
        if self.released:
            runs = [chosen[p][:, 0].unique_consecutive(return_counts=True)[1].tolist() for p in present]
            parts = [
                [self.nets[size - 1]([x], [mask])[0] for x, mask in zip(stack.split(run), mask.split(run), strict=True)]
                for stack, mask, run in zip(stacks, masks, runs, strict=True)
            ]
            results = [torch.cat(part) for part in parts]
        else:
            results = self.nets[size - 1](stacks, masks)
        for p, found in zip(present, results, strict=True):
            graph, space = chosen[p].T
            slots = spaces[p].first[graph, space][:, None] + torch.arange(size, device=graph.device)
            outputs[p][graph[:, None], :, slots] = found.mT


def _mixed(outputs: Tensor, spaces: "_Spaces", bucket: SizeBucket) -> Tensor:
    """The released reshape of (spaces * multiplicity, n) to (n, spaces * multiplicity), graph by graph."""
    found = outputs.clone()
    for graph, sizes in enumerate(spaces.sizes):
        nodes = outputs.shape[1] if bucket.mask is None else int(bucket.mask[graph].sum())
        first = 0
        for size in sizes[sizes > 0].unique().tolist():
            width = size * int((sizes == size).sum())
            block = outputs[graph, :nodes, first : first + width]
            found[graph, :nodes, first : first + width] = block.T.reshape(nodes, width)
            first += width
    return found


class _Spaces:
    """The eigenspaces of a bucket's graphs, at most k each: contractions of their projectors, sizes, first slots."""

    def __init__(self, contractions: Tensor, sizes: Tensor, first: Tensor, mask: Tensor) -> None:
        self.contractions, self.sizes, self.first, self.mask = contractions, sizes, first, mask

    @classmethod
    def of(cls, bucket: SizeBucket, batch: SpeBatch) -> "_Spaces":
        """P is never formed: its contractions come from the vectors V_g alone.

        diagonal_i = sum_r V_ir^2, trace = multiplicity, row sums = V_g (V_g^T 1), total = |V_g^T 1|^2. Slots are in
        the order of ascending multiplicity, then of the eigenvalues.
        """
        vectors, kept = bucket.vectors, batch.kept[bucket.graphs]
        slots = vectors.shape[2]
        values = torch.round(batch.values[bucket.graphs, :slots] * 10**DECIMALS)
        new = F.pad((values.diff(dim=1) != 0).long(), (1, 0))
        own = torch.arange(slots, device=kept.device) < kept[:, None]
        member = F.one_hot(new.cumsum(1), slots).to(vectors) * own[:, :, None]
        sizes = member.sum(1).round().long()
        counts = batch.counts[bucket.graphs].to(vectors)[:, None, None]
        totals = vectors.sum(1)
        contractions = torch.stack(
            [
                vectors.square() @ member,
                (sizes[:, None] / counts).expand(-1, vectors.shape[1], -1),
                (vectors * totals[:, None]) @ member / counts,
                (vectors * totals[:, None]) @ member / counts,
                ((totals.square()[:, None] @ member) / counts**2).expand(-1, vectors.shape[1], -1),
            ],
            dim=-1,
        )
        order = torch.where(sizes > 0, sizes, slots + 1).argsort(dim=1, stable=True)
        ordered = sizes.gather(1, order)
        first = torch.empty_like(sizes).scatter_(1, order, ordered.cumsum(1) - ordered)
        mask = vectors.new_ones(vectors.shape[:2]) if bucket.mask is None else bucket.mask
        return cls(contractions, sizes, first, mask)
