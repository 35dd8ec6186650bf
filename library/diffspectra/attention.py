"""One block of the Diffusion Molecule Transformer, on dense molecules: atoms, pairs and coordinates.

What depends on a molecule alone (the modulations by noise level and spectrum) is computed once per molecule and
broadcast; what a linear map does to atoms i and j of a pair is computed per atom and added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.diffspectra.basis import GaussianBasis, modulated, per_node, per_pair

ADJACENCY_HEADS = 2
FORBIDDEN = -1e10  # the logit of a pair that an adjacency does not join


class RelationalAttention(nn.Module):
    """Attention whose scores and messages are gated by pairs; two of its heads follow given adjacencies.

    score_ij = sum_c q_ic k_jc tanh(W_0 e_ij)_c / sqrt(width / heads) for learned heads, and 1 or FORBIDDEN for the
    adjacency heads, which come first; a = softmax over the molecule's other atoms;
    out_i = sum_j a_ij v_j tanh(W_1 e_ij).
    """

    def __init__(self, width: int, pair_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.learned = heads, heads - ADJACENCY_HEADS
        self.channels = width // self.learned
        self.query, self.key = (nn.Linear(width, self.learned * self.channels) for _ in range(2))
        self.value = nn.Linear(width, width)
        self.score_gate = nn.Linear(pair_width, self.learned * self.channels, bias=False)
        self.value_gate = nn.Linear(pair_width, width, bias=False)

    def forward(self, nodes: Tensor, pairs: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        """Nodes (B, N, width), pairs (B, N, N, pair_width), adjacency and mask bool (B, N, N, 2), (B, N, N)."""
        b, n, width = nodes.shape
        query = self.query(nodes).view(b, n, 1, self.learned, self.channels)
        key = self.key(nodes).view(b, 1, n, self.learned, self.channels)
        gate = self.score_gate(pairs).tanh().view(b, n, n, self.learned, self.channels)
        learned = ((gate * query) * key).sum(-1) * (width // self.heads) ** -0.5
        given = torch.where(adjacency, 1.0, FORBIDDEN).to(learned.dtype)
        scores = torch.cat([given, learned], -1).float().masked_fill(~mask[..., None], torch.finfo(torch.float32).min)
        share = (scores.softmax(2) * mask[..., None]).to(nodes.dtype)
        message = self.value_gate(pairs).tanh().view(b, n, n, self.heads, -1)
        message = message * self.value(nodes).view(b, 1, n, self.heads, -1)
        return (share.to(message.dtype)[..., None] * message).sum(2).reshape(b, n, width)  # many tiny products else


class FeedForward(nn.Module):
    """Linear, SiLU, linear back, with dropout after both."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) to the same shape."""
        return self.dropout(self.last(self.dropout(F.silu(self.first(x)))))


class CoordinateUpdate(nn.Module):
    """x_i <- x_i + sum_j w_ij kappa (x_i - x_j) / max(|x_i - x_j|, 1e-8), w from invariants of the pair.

    w is the mean of three channels of tanh(MLP(AdaLN(Linear[h_i, h_j, e_ij, d_ij]))), the last two only where the
    adjacencies join. The first linear map is split: its parts for h_i and h_j are applied per atom. Pairs are read as
    (j, i), as the released code does: attention gathers messages at the end of an edge, this at its start.
    """

    def __init__(self, width: int, pair_width: int, condition: int) -> None:
        super().__init__()
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.pair = nn.Linear(pair_width, width, bias=False)
        self.distance = nn.Linear(pair_width, width, bias=False)
        self.modulation = nn.Linear(condition, 2 * width)
        self.hidden = nn.Linear(width, width)
        self.weight = nn.Linear(width, 1 + ADJACENCY_HEADS, bias=False)
        self.kappa = nn.Parameter(torch.full((1,), 0.01))
        whole = nn.Linear(2 * width + 2 * pair_width, width)  # the four parts are drawn as the one map that they are
        nn.init.xavier_uniform_(self.weight.weight, gain=1e-3)
        self.set_whole(whole.weight.detach(), whole.bias.detach())

    @torch.no_grad()
    def set_whole(self, weight: Tensor, bias: Tensor) -> None:
        """Set the four parts from the weight (width, 2 width + 2 pair_width) and bias of the unsplit map."""
        parts = (self.receiver, self.sender, self.pair, self.distance)
        for part, piece in zip(parts, weight.split([part.in_features for part in parts], 1), strict=True):
            part.weight.copy_(piece)
        self.receiver.bias.copy_(bias)

    def forward(
        self,
        positions: Tensor,
        nodes: Tensor,
        pairs: Tensor,
        distances: Tensor,
        adjacency: Tensor,
        mask: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """New positions (B, N, 3), not centred; `distances` (B, N, N, pair_width) are the block's basis functions."""
        shift, scale = per_pair(self.modulation(condition), 2)
        joint = self.receiver(nodes)[:, :, None] + self.sender(nodes)[:, None] + self.pair(pairs).transpose(1, 2)
        joint = modulated(joint + self.distance(distances), shift, scale)
        channels = self.weight(F.silu(self.hidden(joint))).tanh().to(positions.dtype)
        joined = torch.cat([mask[..., None], adjacency.transpose(1, 2) & mask[..., None]], -1)
        weight = (channels * joined).mean(-1)
        difference = positions[:, :, None] - positions[:, None]
        length = difference.square().sum(-1).clamp(min=1e-16).sqrt()
        step = weight * self.kappa / length
        return positions + torch.einsum("bij,bijc->bic", step, difference)


class Block(nn.Module):
    """Attention among atoms, messages to pairs, feed-forward maps of both, and (if equivariant) coordinates.

    LayerNorms have no weights; shift, scale and gate come from the condition. Residuals of the feed-forward maps are
    taken from the modulated value, as in the released code.
    """

    def __init__(
        self, width: int, pair_width: int, heads: int, condition: int, dropout: float, *, equivariant: bool = True
    ) -> None:
        super().__init__()
        self.basis = GaussianBasis(pair_width, condition)
        self.join = nn.Linear(2 * pair_width, pair_width)
        self.node_modulation = nn.Linear(condition, 6 * width)
        self.pair_modulation = nn.Linear(condition, 6 * pair_width)
        self.attention = RelationalAttention(width, pair_width, heads)
        self.message = nn.Linear(width, pair_width)
        self.node_mlp = FeedForward(width, dropout)
        self.pair_mlp = FeedForward(pair_width, dropout)
        self.coordinates = CoordinateUpdate(width, pair_width, condition) if equivariant else None

    def forward(
        self,
        nodes: Tensor,
        pairs: Tensor,
        positions: Tensor,
        adjacency: Tensor,
        node_mask: Tensor,
        mask: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes (B, N, width), pairs (B, N, N, pair_width), positions (B, N, 3, not centred) after the block.

        adjacency, node_mask, mask  bool (B, N, N, 2), (B, N), (B, N, N)
        condition                   SiLU(tau), (B, condition)
        """
        own = node_mask[..., None].to(nodes.dtype)
        squared = (positions[:, :, None] - positions[:, None]).square().sum(-1)
        distances = self.basis(squared, condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = per_node(self.node_modulation(condition), 6)
        pair_a = per_pair(self.pair_modulation(condition), 6)
        joined = modulated(self.join(torch.cat([distances, pairs], -1)), pair_a[0], pair_a[1])
        mixed = self.attention(modulated(nodes, shift_a, scale_a), joined, adjacency, mask)

        nodes = modulated(nodes + gate_a * mixed, shift_m, scale_m) * own
        nodes = (nodes + gate_m * self.node_mlp(nodes)) * own

        half = F.linear(mixed, self.message.weight)
        message = half[:, :, None] + half[:, None] + self.message.bias
        pairs = modulated(pairs + pair_a[2] * message, pair_a[3], pair_a[4])
        pairs = pairs + pair_a[5] * self.pair_mlp(pairs)
        if self.coordinates is not None:
            positions = self.coordinates(positions, nodes, pairs, distances, adjacency, mask, condition)
        return nodes, pairs, positions
