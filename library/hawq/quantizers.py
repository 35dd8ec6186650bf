"""Uniform quantisers of weights: their grids, their integers, their error for every bit number at once.

A weight of shape (out, ...) is seen as rows: one per output channel, or a single one for the whole tensor. With scale
s and zero point z of a row, an entry w becomes q = clamp(round((1/s) w) + z, low, high) and stands for s (q - z);
rounding is to the nearest, halves to even. The reciprocal is the published code's form and decides exact halves.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from library.errors import InputError

LEAST_SCALE = 1e-8  # of a row of zeros, before it is divided by the number of steps
CLIP_FRACTIONS = torch.linspace(0.3, 1.0, 15)  # what the mse clipping tries
CHUNK = 1 << 18  # entries times bit numbers that are held at a time, so that they stay in the processor's cache


class Grid(NamedTuple):
    """Quantisation grids: `scale` and `zero` (..., rows, 1), and the integers `low` and `high` (..., 1, 1)."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor

    def integers(self, rows: Tensor) -> Tensor:
        """The integers, as floats, of entries (rows, n); shape (..., rows, n)."""
        return torch.clamp(torch.round(rows * (1 / self.scale)) + self.zero, self.low, self.high)

    def values(self, integers: Tensor) -> Tensor:
        """What the integers stand for."""
        return (integers - self.zero) * self.scale

    def row_errors(self, rows: Tensor) -> Tensor:
        """Squared error of each row, float64 of shape (..., rows)."""
        width = max(1, CHUNK // max(1, self.low.numel() * len(rows)))
        parts = (
            (self.values(self.integers(part)) - part).square().sum(-1, dtype=torch.float64)
            for part in rows.split(width, dim=1)
        )
        return torch.stack(list(parts)).sum(0)


class IntegerWeight(NamedTuple):
    """A quantised weight: `integers` int32 in the weight's shape; `scale` and `zero` (rows,); `bits`."""

    integers: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def values(self) -> Tensor:
        """The weight that it stands for."""
        rows = self.integers.reshape(len(self.scale), -1)
        return ((rows - self.zero[:, None]) * self.scale[:, None]).reshape(self.integers.shape)


class WeightQuantizer(BaseModel, frozen=True, extra="forbid"):
    """How weights are quantised.

    Symmetric: s = max(|min|, |max|, 1e-8) / (2^(b-1) - 1), z = 0, q in [-2^(b-1), 2^(b-1) - 1]. Otherwise
    s = (max - min) / (2^b - 1) over the range widened to hold 0, z = round(-min / s), q in [0, 2^b - 1], so that 0
    stays 0. `percentile` takes, per row of n entries, the k-th smallest for k = ceil(n p / 100) and
    ceil(n (100 - p) / 100) in place of the extremes; `mse` scales the range by the fraction, of 15 from 0.3 to 1,
    that leaves the least squared error in each row.

    Source of the symmetric form: the quantisers of HAWQ-V3, Yao et al., 2021.

    >>> weight = torch.tensor([[0.3, -0.7, 1.0], [0.0, 0.2, 0.1]])
    >>> WeightQuantizer().quantize(weight, 3).integers
    tensor([[ 1, -2,  3],
            [ 0,  3,  1]], dtype=torch.int32)
    """

    granularity: Literal["channel", "tensor"] = "channel"
    """One scale per output channel, or one for the whole weight."""
    symmetric: bool = True
    """Integers around 0 without a zero point; False uses the whole range between the extremes."""
    clipping: Literal["minmax", "percentile", "mse"] = "minmax"
    """What the range is: the extremes, percentiles, or the fraction of the extremes with the least squared error."""
    percentile: float = Field(99.9, gt=50, le=100)
    """The upper percentile of clipping=percentile; the lower one mirrors it."""

    def grid(self, weight: Tensor, bits: int | Sequence[int]) -> Grid:
        """The grid for one bit number, (rows, 1), or for several at once, (bits, rows, 1)."""
        several = _bit_numbers(bits, weight)
        rows = self.rows(weight.detach())
        grid = self._spread(self._range(rows), several)
        if self.clipping == "mse":
            edges = self._range(rows)
            ranges = [tuple(edge * fraction for edge in edges) for fraction in CLIP_FRACTIONS.tolist()]
            grids = [self._spread(tried, several) for tried in ranges]
            best = torch.stack([tried.row_errors(rows) for tried in grids]).argmin(0, keepdim=True).unsqueeze(-1)
            scale, zero = (torch.stack([tried[part] for tried in grids]).gather(0, best)[0] for part in (0, 1))
            grid = grid._replace(scale=scale, zero=zero)
        return grid if isinstance(bits, Sequence) else Grid(*(part[0] for part in grid))

    def quantize(self, weight: Tensor, bits: int) -> IntegerWeight:
        """The integers of a weight, its scales and zero points.

        Raises InputError for bits outside 2 to 16, and for NaN or infinity.
        """
        _require_finite(weight)
        grid = self.grid(weight, bits)
        integers = grid.integers(self.rows(weight.detach())).reshape(weight.shape).to(torch.int32)
        return IntegerWeight(integers, grid.scale.flatten(), grid.zero.flatten(), int(bits))

    def fake(self, weight: Tensor, bits: int) -> Tensor:
        """The weight as its integers stand for it; the gradient passes straight through, the grid being constant."""
        grid = self.grid(weight, bits)
        rows = self.rows(weight.detach())
        return straight_through(weight, grid.values(grid.integers(rows)).reshape(weight.shape).to(weight.dtype))

    @torch.no_grad()
    def squared_errors(self, weight: Tensor, bits: Sequence[int]) -> Tensor:
        """||Q_b(W) - W||^2 for every bit number in one pass: float64 (bits,). Raises InputError for NaN or infinity."""
        _require_finite(weight)
        return self.grid(weight, bits).row_errors(self.rows(weight)).sum(-1)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as (output channels, n), or (1, n) for one scale in all; half precision becomes float32."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight.reshape(len(weight), -1) if self.granularity == "channel" else weight.reshape(1, -1)

    def _range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.clipping == "percentile":
            n = rows.shape[1]
            lower = max(1, math.ceil(n * (100 - self.percentile) / 100 - 1e-9))
            upper = math.ceil(n * self.percentile / 100 - 1e-9)
            return rows.kthvalue(lower, 1, True).values, rows.kthvalue(upper, 1, True).values
        return rows.amin(1, True), rows.amax(1, True)

    def _spread(self, edges: tuple[Tensor, Tensor], bits: Sequence[int]) -> Grid:
        low, high = edges
        levels = 2.0 ** torch.tensor(bits, dtype=low.dtype, device=low.device)[:, None, None]
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()).clamp(min=LEAST_SCALE) / (levels / 2 - 1)
            return Grid(scale, torch.zeros_like(scale), -levels / 2, levels / 2 - 1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low).clamp(min=LEAST_SCALE) / (levels - 1)
        return Grid(scale, torch.round(-low / scale), torch.zeros_like(levels), levels - 1)


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, whose gradient to `value` is the identity everywhere, also where it was clamped."""
    return _StraightThrough.apply(value, quantized) if torch.is_grad_enabled() else quantized


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept: the gradient does not depend on the values."""

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def bit_numbers(bits: int | Sequence[int], name: str = "bits") -> list[int]:
    """One bit number or several as a list. Raises InputError when one is not a whole number from 2 to 16."""
    several = list(bits) if isinstance(bits, Sequence) else [bits]
    if not several or not all(isinstance(b, Integral) and 2 <= b <= 16 for b in several):
        raise InputError(f"{name} must be whole numbers from 2 to 16, got {bits}")
    return [int(b) for b in several]


def _require_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise InputError("a weight has entries that are not finite")


def _bit_numbers(bits: int | Sequence[int], weight: Tensor) -> list[int]:
    several = bit_numbers(bits)
    if weight.numel() == 0:
        raise InputError(f"a weight of shape {tuple(weight.shape)} has no entries to quantise")
    return several
