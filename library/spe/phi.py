"""phi: the functions on eigenvalues, `channels` independent copies of a network evaluated at once.

Every class maps eigenvalues (graphs, slots), of which the first `kept` (graphs,) are a graph's own and the rest zero
padding, to (graphs, slots, channels), and is equivariant under permutations of the kept slots. In the paper's words
these are phi_1 to phi_m; the released code calls them psi.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.spe.norms import EPSILON, BatchNorm

PhiName = Literal["mlp", "deepsets", "transformer", "spline", "one"]


class GroupedLinear(nn.Module):
    """`channels` linear layers side by side: (channels, rows, width) to (channels, rows, out)."""

    def __init__(self, channels: int, width: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(channels, width, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels, out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias[:, None], x, self.weight)


class PerceptronPhi(nn.Module):
    """A perceptron of each eigenvalue alone: `layers` - 1 times linear, batch norm if asked, ReLU; then linear.

    `masked` keeps padding out of the batch norm's statistics; it changes nothing else.
    """

    def __init__(self, channels: int, hidden: int, layers: int, *, norm: bool, masked: bool) -> None:
        super().__init__()
        widths = [1, *[hidden] * (layers - 1)]
        self.masked = masked
        self.hidden = nn.ModuleList(GroupedLinear(channels, widths[i], hidden) for i in range(layers - 1))
        self.norms = nn.ModuleList(BatchNorm(channels * hidden) for _ in range(layers - 1)) if norm else None
        self.last = GroupedLinear(channels, widths[-1], 1)

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        channels = len(self.last.weight)
        x = values.reshape(1, -1, 1).expand(channels, -1, 1)
        weights = [slot_mask(values, kept).flatten().to(values.dtype)] if self.masked else None
        for place, linear in enumerate(self.hidden):
            x = linear(x)
            if self.norms is not None:
                [rows] = self.norms[place]([x.transpose(0, 1).flatten(1)], weights)
                x = rows.unflatten(1, (channels, -1)).transpose(0, 1)
            x = F.relu(x)
        return self.last(x).squeeze(-1).T.unflatten(0, values.shape)

    def lipschitz_bound(self, slots: int) -> Tensor:
        """An upper bound on the Lipschitz constant of each channel, differentiable: (channels,).

        The product of the layers' spectral norms, each times the largest factor of its batch norm in evaluation.
        """
        bound = torch.linalg.matrix_norm(self.last.weight, ord=2)
        for place, linear in enumerate(self.hidden):
            bound = bound * torch.linalg.matrix_norm(linear.weight, ord=2)
            if self.norms is not None:
                norm = self.norms[place]
                factor = norm.weight.abs() * torch.rsqrt(norm.running_var + EPSILON)
                bound = bound * factor.unflatten(0, (len(bound), -1)).amax(1)
        return bound


class DeepSetsPhi(nn.Module):
    """Deep sets over the eigenvalues: X <- ReLU(X W + b + 1 (sum_j X_j) U), in every layer, so that phi >= 0.

    `masked` sums over a graph's own eigenvalues. Without it the sums run over padding too, which from the second
    layer on changes the result with the number of slots: as first released.
    """

    def __init__(self, channels: int, hidden: int, layers: int, *, masked: bool) -> None:
        super().__init__()
        widths = [1, *[hidden] * (layers - 1), 1]
        self.masked = masked
        self.own = nn.ModuleList(GroupedLinear(channels, widths[i], widths[i + 1]) for i in range(layers))
        self.pooled = nn.ModuleList(
            GroupedLinear(channels, widths[i], widths[i + 1], bias=False) for i in range(layers)
        )

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        graphs, slots = values.shape
        channels = len(self.own[0].weight)
        mask = slot_mask(values, kept)[None, :, :, None].to(values.dtype)
        x = values.expand(channels, graphs, slots)[..., None]
        for own, pooled in zip(self.own, self.pooled, strict=True):
            total = (x * mask if self.masked else x).sum(2)
            x = F.relu(own(x.flatten(1, 2)).unflatten(1, (graphs, slots)) + pooled(total)[:, :, None])
        return x.squeeze(-1).permute(1, 2, 0)

    def lipschitz_bound(self, slots: int) -> Tensor:
        """An upper bound on each channel's Lipschitz constant in l2 over `slots` eigenvalues: (channels,).

        A layer's linear part is I (x) W + 11^T (x) U, whose norm is max(|W|, |W + slots U|) in spectral norms.
        """
        bounds = [
            torch.maximum(
                torch.linalg.matrix_norm(own.weight, ord=2),
                torch.linalg.matrix_norm(own.weight + slots * pooled.weight, ord=2),
            )
            for own, pooled in zip(self.own, self.pooled, strict=True)
        ]
        return torch.stack(bounds).prod(0)


class TransformerPhi(nn.Module):
    """Self-attention over the eigenvalues: linear in, `layers` attentions with nothing between, linear out.

    `masked` lets nobody attend to padding.
    """

    def __init__(self, channels: int, hidden: int, layers: int, *, heads: int, masked: bool) -> None:
        super().__init__()
        self.heads, self.masked = heads, masked
        self.first = GroupedLinear(channels, 1, hidden)
        self.inputs = nn.ModuleList(GroupedLinear(channels, hidden, 3 * hidden) for _ in range(layers))
        self.outputs = nn.ModuleList(GroupedLinear(channels, hidden, hidden) for _ in range(layers))
        self.last = GroupedLinear(channels, hidden, 1)

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        graphs, slots = values.shape
        channels = len(self.first.weight)
        mask = slot_mask(values, kept)[None, :, None, None, :] if self.masked else None
        x = self.first(values.reshape(1, -1, 1).expand(channels, -1, 1))
        for into, out in zip(self.inputs, self.outputs, strict=True):
            parts = into(x).view(channels, graphs, slots, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
            x = F.scaled_dot_product_attention(*parts, attn_mask=mask)
            x = out(x.transpose(2, 3).reshape(channels, graphs * slots, -1))
        return self.last(x).squeeze(-1).T.unflatten(0, (graphs, slots))


class SplinePhi(nn.Module):
    """Cubic splines on [0, 2] of `pieces` equal pieces: phi(t) = sum_i c_i B_i(t), twice continuously differentiable.

    B_i are the pieces + 3 uniform cubic B-splines. The Lipschitz constant is at most
    max_i |c_{i+1} - c_i| * pieces / 2; more pieces can express more and allow larger constants.
    """

    def __init__(self, channels: int, pieces: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.randn(channels, pieces + 3))

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        return spline_basis(values, self.coefficients.shape[1] - 3) @ self.coefficients.T

    def lipschitz_bound(self, slots: int) -> Tensor:
        """The bound above: (channels,)."""
        pieces = self.coefficients.shape[1] - 3
        return self.coefficients.diff(dim=1).abs().amax(1) * (pieces / 2)


class OnePhi(nn.Module):
    """phi = 1: with all eigenpairs Q is the identity, and rho sees marked nodes only. No parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        return values.new_ones(*values.shape, self.channels)


def spline_basis(values: Tensor, pieces: int) -> Tensor:
    """The uniform cubic B-splines of `pieces` pieces on [0, 2] at `values` (...): (..., pieces + 3), summing to 1.

    Values outside [0, 2] are taken at its nearer end.

    >>> spline_basis(torch.tensor([0.0, 2.0]).double(), 2).round(decimals=3).tolist()
    [[0.167, 0.667, 0.167, 0.0, 0.0], [0.0, 0.0, 0.167, 0.667, 0.167]]
    """
    place = values.clamp(0, 2) * (pieces / 2)
    piece = place.floor().clamp(max=pieces - 1)
    t = place - piece
    local = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=-1)
    index = piece.long()[..., None] + torch.arange(4, device=values.device)
    return values.new_zeros(*values.shape, pieces + 3).scatter(-1, index, local / 6)


def slot_mask(values: Tensor, kept: Tensor) -> Tensor:
    """Which slots hold a graph's own eigenvalues: bool (graphs, slots)."""
    return torch.arange(values.shape[1], device=values.device) < kept[:, None]
