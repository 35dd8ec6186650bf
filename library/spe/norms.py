"""Normalisations inside perceptrons: layer norm, none, or a batch norm over rows of many tensors and all workers."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import collective
from library.errors import InputError

NormName = Literal["layer", "batch", "none"]
MOMENTUM = 0.1  # of the running statistics
EPSILON = 1e-5  # added to the variance


class BatchNorm(nn.Module):
    """Batch normalisation of rows (rows, width) that may come in several tensors and with weights.

    In training the statistics are those of all rows of all tensors on all workers, so that neither the layout of a
    batch nor the number of workers changes them:

        mean = sum_r w_r x_r / sum_r w_r,   var = sum_r w_r (x_r - mean)^2 / sum_r w_r.

    The weights say how often a row counts (0 for padding); None is 1 each. Running statistics as in
    `torch.nn.BatchNorm1d`. Raises InputError for fewer than two rows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The normalised tensors, each (..., width); `weights` are one tensor (rows,) for each of them."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + EPSILON)
            shift = self.bias - self.running_mean * scale
            return [torch.addcmul(shift, x, scale) for x in rows]
        if weights is None and len(rows) == 1 and not collective.active():
            return [self._plain(rows[0])]
        flat = [x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) for x in rows]
        known = weights or [x.new_ones(len(x)) for x in flat]
        total = collective.differentiable_sum(torch.stack([w.sum() for w in known]).sum())
        if not any(len(x) for x in flat) and not float(total):  # nothing anywhere, but its weights take part
            return [torch.addcmul(self.bias, x, self.weight) for x in rows]
        self._require_rows(float(total))
        mean = collective.differentiable_sum(sum(w @ x for w, x in zip(known, flat, strict=True))) / total
        centred = [x - mean for x in flat]
        variance = (
            collective.differentiable_sum(sum(w @ x.square() for w, x in zip(known, centred, strict=True))) / total
        )
        self._follow(mean, variance * (total / (total - 1)))
        scale = self.weight * torch.rsqrt(variance + EPSILON)
        return [torch.addcmul(self.bias, x, scale).view_as(like) for x, like in zip(centred, rows, strict=True)]

    def _plain(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        self._require_rows(len(flat))
        found = F.batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, True, MOMENTUM, EPSILON)
        return found.view_as(x)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean), MOMENTUM)
        self.running_var.lerp_(variance.to(self.running_var), MOMENTUM)

    def _require_rows(self, rows: float) -> None:
        if rows < 2:
            raise InputError(
                "batch norm needs at least two rows to train on, this batch has one; use larger batches or norm layer"
            )


class LayerNorm(nn.Module):
    """Layer normalisation of each row: no row sees another one. The weights of rows make no difference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        return [F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPSILON) for x in rows]


class NoNorm(nn.Module):
    """No normalisation."""

    def forward(self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        return list(rows)


def make_norm(name: NormName, width: int) -> BatchNorm | LayerNorm | NoNorm:
    """A normalisation by name."""
    return NoNorm() if name == "none" else {"batch": BatchNorm, "layer": LayerNorm}[name](width)
