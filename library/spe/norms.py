"""Normalisations inside perceptrons: layer norm, none, or a batch norm over rows of many tensors and all workers."""

from collections.abc import Sequence
from typing import Any, Literal

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

    def forward(
        self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        """The normalised tensors, each (..., width), with `relu` their ReLU; `weights` are (rows,) for each of them."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + EPSILON)
            shift = self.bias - self.running_mean * scale
            return _rectified([torch.addcmul(shift, x, scale) for x in rows], relu)
        flat = [x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) for x in rows]
        total, mean, variance = _statistics([x.detach() for x in flat], weights)
        if total < 2:
            if not total and not any(map(len, flat)):  # nothing anywhere, but its weights take part
                return _rectified([torch.addcmul(self.bias, x, self.weight) for x in rows], relu)
            raise InputError(
                "batch norm needs at least two rows to train on, this batch has one; use larger batches or norm layer"
            )
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), MOMENTUM)
            self.running_var.lerp_((variance * (total / (total - 1))).to(self.running_var), MOMENTUM)
        found = _Normalized.apply(relu, weights, (total, mean, variance), self.weight, self.bias, *flat)
        return [x.view_as(like) for x, like in zip(found, rows, strict=True)]


@torch.no_grad()
def _statistics(rows: Sequence[Tensor], weights: Sequence[Tensor] | None) -> tuple[float, Tensor, Tensor]:
    """Total weight, mean and variance of the rows of all workers.

    Each tensor is read once, for its own mean m_i and M_i = sum w (x - m_i)^2; then M = sum_i M_i + W_i (m_i - mean)^2.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    counts = weights or [rows[0].new_ones(1).expand(len(x)) for x in rows]
    sizes = torch.stack([w.sum() for w in counts]).to(rows[0])
    sums, spreads = [], []
    for x, w, size in zip(rows, counts, sizes, strict=True):
        w = w.to(x).contiguous()
        sums.append(torch.mv(x.mT, w))
        spreads.append(torch.mv((x - sums[-1] / size.clamp(min=1)).square_().mT, w))
    total = collective.all_sum(sizes.sum())
    mean = collective.all_sum(torch.stack(sums).sum(0)) / total
    apart = torch.stack(sums) / sizes.clamp(min=1)[:, None] - mean
    spread = collective.all_sum((torch.stack(spreads) + sizes[:, None] * apart.square()).sum(0))
    return float(total), mean, spread / total


class _Normalized(torch.autograd.Function):
    """gain (x - mean) / sqrt(var + eps) + bias, and its ReLU if asked; derivatives pass through the statistics too.

    With z the result before ReLU, z' its derivative and hats for (x - mean) / sqrt(var + eps):

        x' = scale (z' - w / W (sum z' + x^ sum z' x^)),   gain' = sum z' x^,   bias' = sum z'.

    Sums in x' run over all workers' rows. Few passes over memory: what this function is for. Where derivatives of the
    derivatives are wanted, they come from the formula itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        relu: bool,
        weights: Sequence[Tensor] | None,
        statistics: tuple[float, Tensor, Tensor],
        gain: Tensor,
        bias: Tensor,
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        _, mean, variance = statistics
        scale = gain * torch.rsqrt(variance + EPSILON)
        shift = bias - mean * scale
        found = _rectified([torch.addcmul(shift, x, scale) for x in rows], relu)
        ctx.save_for_backward(gain, bias, *rows, *(found if relu else ()))
        ctx.relu, ctx.weights, ctx.statistics = relu, weights, statistics
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gain, bias, *saved = ctx.saved_tensors
        (total, mean, variance), rows = ctx.statistics, saved[: len(gradients)]
        if torch.is_grad_enabled():
            inputs, needed = (gain, bias, *rows), ctx.needs_input_grad[3:]
            found = _by_formula(ctx.relu, ctx.weights, *inputs)
            wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
            derivatives = iter(torch.autograd.grad(found, wanted, gradients, create_graph=True))
            return None, None, None, *(next(derivatives) if need else None for need in needed)
        if ctx.relu:
            found = saved[len(rows) :]
            gradients = [torch.ops.aten.threshold_backward(g, y, 0) for g, y in zip(gradients, found, strict=True)]
        sums = mean.new_zeros(2, len(mean))
        for x, g in zip(rows, gradients, strict=True):
            ones = x.new_ones(len(x))
            sums[0] += torch.mv(g.mT, ones)
            sums[1] += torch.mv((x - mean).mul_(g).mT, ones)
        inverse = torch.rsqrt(variance + EPSILON)
        scale, whole = gain * inverse, collective.all_sum(sums)
        slope = -scale * inverse.square() * whole[1] / total
        constant = -scale * whole[0] / total - slope * mean
        results = [torch.addcmul(constant, x, slope) for x in rows]
        if ctx.weights is not None:
            results = [x.mul_(w[:, None]) for x, w in zip(results, ctx.weights, strict=True)]
        results = [x.addcmul_(g, scale) for x, g in zip(results, gradients, strict=True)]
        return None, None, None, sums[1] * inverse, sums[0], *results


def _by_formula(
    relu: bool, weights: Sequence[Tensor] | None, gain: Tensor, bias: Tensor, *rows: Tensor
) -> list[Tensor]:
    """What `_Normalized` gives, step by step."""
    counts = torch.cat(weights) if weights else rows[0].new_ones(sum(map(len, rows)))
    x = torch.cat(rows)
    total = collective.all_sum(counts.sum())
    centred = x - collective.differentiable_sum(counts @ x) / total
    variance = collective.differentiable_sum(counts @ centred.square()) / total
    found = torch.addcmul(bias, centred, gain * torch.rsqrt(variance + EPSILON))
    return list((found.relu() if relu else found).split([len(part) for part in rows]))


def _rectified(rows: list[Tensor], relu: bool) -> list[Tensor]:
    return [x.relu_() for x in rows] if relu else rows


class LayerNorm(nn.Module):
    """Layer normalisation of each row: no row sees another one. The weights of rows make no difference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        found = [F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPSILON) for x in rows]
        return _rectified(found, relu)


class NoNorm(nn.Module):
    """No normalisation."""

    def forward(
        self, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        return [F.relu(x) for x in rows] if relu else list(rows)


def make_norm(name: NormName, width: int) -> BatchNorm | LayerNorm | NoNorm:
    """A normalisation by name."""
    return NoNorm() if name == "none" else {"batch": BatchNorm, "layer": LayerNorm}[name](width)
