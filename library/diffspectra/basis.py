"""Features of distances and noise levels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseLevelFeatures(nn.Module):
    """[l, sin(2 pi l w), cos(2 pi l w)] of noise levels l (B,) with learned frequencies w: (B, 2 frequencies + 1)."""

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(frequencies))

    def forward(self, level: Tensor) -> Tensor:
        """The features of each level."""
        angle = level[:, None] * self.frequencies * 2 * math.pi
        return torch.cat([level[:, None], angle.sin(), angle.cos()], -1)


class GaussianBasis(nn.Module):
    """Squared distances r2 as [u, N(u; mu_k, |s_k| + 1e-5)], u = r2 (1 + scale) + shift, conditioned per molecule.

    (scale, shift) = Linear(SiLU(condition)); mu and s are learned. Not of the root: nothing is singular at 0.
    """

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.empty(width - 1).uniform_(0, 3))
        self.deviations = nn.Parameter(torch.empty(width - 1).uniform_(0, 3))
        self.modulation = nn.Linear(condition, 2)

    def forward(self, squared: Tensor, condition: Tensor) -> Tensor:
        """r2 (B, N, N) and activated conditions SiLU(tau) (B, condition) to features (B, N, N, width)."""
        scale, shift = self.modulation(condition)[:, :, None, None].unbind(1)
        u = (squared * (1 + scale) + shift)[..., None]
        deviation = self.deviations.abs() + 1e-5
        bells = torch.exp(-0.5 * ((u - self.means) / deviation).square()) / (math.sqrt(2 * math.pi) * deviation)
        return torch.cat([u, bells], -1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift over the last axis, the norm without weights, epsilon 1e-6."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def per_node(condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Conditions of molecules (B, parts c) as `parts` tensors (B, 1, c)."""
    return condition[:, None].chunk(parts, -1)


def per_pair(condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Conditions of molecules (B, parts c) as `parts` tensors (B, 1, 1, c)."""
    return condition[:, None, None].chunk(parts, -1)
