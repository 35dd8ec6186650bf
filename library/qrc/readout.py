"""The read-out: ridge regression with a free intercept, solved once for all regularisations.

With features X (T, D) centred and, by default, scaled to unit deviation, and targets y centred (T, O),

    w(alpha) = (X' X + alpha T I)^(-1) X' y,

so `alpha` is per sample: it means the same for a short and for a long series. `ridge_path` takes it from one singular
value decomposition of X, with the exact error of leaving one sample out; `Moments.path` from moments that were summed
over shards, with one eigendecomposition. Everything is float64.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from library.errors import InputError

ALPHAS = tuple(10.0**power for power in range(-10, 1))
FREE = 1e-12  # shares of freedom below this are rounding: nothing is left to tell an error by
RANK = 1e-13  # singular values below this share of the largest are zero: they get no weight when alpha is 0


@dataclass(frozen=True)
class ReadOut:
    """A linear map of features: `weights` (D, O) and `intercept` (O,) in the features' own units, `alpha` (O,)."""

    weights: Tensor
    intercept: Tensor
    alpha: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Predictions (..., O) for features (..., D)."""
        return features @ self.weights + self.intercept

    def to(self, device: str) -> "ReadOut":
        """The same on a torch device."""
        return ReadOut(self.weights.to(device), self.intercept.to(device), self.alpha.to(device))


@dataclass(frozen=True)
class RidgePath:
    """Ridge solutions for A values of alpha.

    alphas     (A,), per sample
    weights    (A, D, O) and intercepts (A, O), in the features' own units
    freedom    (A,) effective number of fitted numbers per output, the intercept among them
    gcv        (A, O) generalised cross-validation error T RSS / (T - freedom)^2
    loo        (A, O) mean squared error of each sample when it is left out; None when made from moments

    Both errors are infinite where the fit goes through samples whatever their targets are: they tell nothing there.
    """

    alphas: Tensor
    weights: Tensor
    intercepts: Tensor
    freedom: Tensor
    gcv: Tensor
    loo: Tensor | None

    def at(self, chosen: Tensor) -> ReadOut:
        """The read-out with alpha number `chosen[o]` for output o."""
        outputs = torch.arange(self.weights.shape[-1], device=self.weights.device)
        return ReadOut(
            self.weights[chosen, :, outputs].T.contiguous(), self.intercepts[chosen, outputs], self.alphas[chosen]
        )

    def least(self, errors: Tensor, floor: float = 0.0) -> ReadOut:
        """The read-out whose alpha, at least `floor`, has the least of `errors` (A, O) for each output.

        Where none of the alphas reaches the floor, the largest counts.
        """
        allowed = self.alphas >= floor
        if not allowed.any():
            allowed = self.alphas == self.alphas.max()
        return self.at(torch.where(allowed[:, None], errors, math.inf).argmin(0))

    def predictions(self, features: Tensor) -> Tensor:
        """Predictions (A, ..., O) of all solutions for features (..., D)."""
        shape = (len(self.alphas), *(1,) * (features.ndim - 1), self.intercepts.shape[-1])
        return torch.tensordot(features, self.weights, ([-1], [1])).movedim(-2, 0) + self.intercepts.reshape(shape)


@dataclass(frozen=True)
class Moments:
    """All that a ridge fit needs of features and targets; `+` joins those of two shards, as if fitted together.

    count      samples
    mean       (D + O,) of features, then targets
    scatter    (D + O, D + O) sum of (z - mean)(z - mean)'
    width      D
    """

    count: int
    mean: Tensor
    scatter: Tensor
    width: int

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> Self:
        """The moments of features (..., D) and targets (..., O)."""
        x, y = _rows(features, targets)
        z = torch.cat([x, y], 1)
        mean = z.mean(0)
        centred = z - mean
        return cls(len(z), mean, centred.T @ centred, x.shape[1])

    def __add__(self, other: Self) -> Self:
        """Chan, Golub and LeVeque's pairwise update, which loses no digits to large means."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return type(self)(count, self.mean + apart * (other.count / count), scatter, self.width)

    @classmethod
    def total(cls, shards: Iterable[Self]) -> Self:
        """The moments of all shards together; InputError for none."""
        parts = list(shards)
        if not parts:
            raise InputError("shards: none given; moments need at least one")
        return functools.reduce(cls.__add__, parts)

    def chosen(self, columns: Sequence[int] | Tensor) -> Self:
        """The moments with these features alone, in this order."""
        device = self.mean.device
        outputs = torch.arange(self.width, len(self.mean), device=device)
        keep = torch.cat([torch.as_tensor(columns, dtype=torch.int64, device=device), outputs])
        return type(self)(self.count, self.mean[keep], self.scatter[keep][:, keep], len(keep) - len(outputs))

    def deviation(self) -> Tensor:
        """Standard deviation (D + O,) of features and targets."""
        return (self.scatter.diagonal() / self.count).clamp(min=0).sqrt()

    def about(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Mean (D + O, D + O) of (z - mean)(z - mean)' / (scale scale')."""
        apart = self.mean - mean
        return (self.scatter / self.count + torch.outer(apart, apart)) / torch.outer(scale, scale)

    def path(self, alphas: Sequence[float] = ALPHAS, *, standardize: bool = True) -> RidgePath:
        """Ridge solutions for all alphas, from one eigendecomposition of the features' moments.

        It squares the condition number: where features are all but dependent, prefer `ridge_path`.
        """
        grid = checked_alphas(alphas, self.mean.device)
        mean, scale = self.mean[: self.width], _scale(self.deviation()[: self.width], standardize)
        inner = self.scatter[: self.width, : self.width] / torch.outer(scale, scale)
        cross = self.scatter[: self.width, self.width :] / scale[:, None]
        values, vectors = torch.linalg.eigh(inner)
        values = values.clamp(min=0)
        along = vectors.T @ cross
        factor = _inverse(values, grid[:, None] * self.count, RANK**0.5)
        weights = torch.einsum("dj,aj,jo->ado", vectors, factor, along)
        total = self.scatter.diagonal()[self.width :]
        rest = total - torch.einsum("aj,jo->ao", factor * (2 - values * factor), along**2)
        freedom = 1 + (values * factor).sum(1)
        gcv = _gcv(rest.clamp(min=0), freedom, self.count)
        raw = weights / scale[:, None]
        return RidgePath(grid, raw, self.mean[self.width :] - mean @ raw, freedom, gcv, None)

    def error(self, readout: ReadOut) -> Tensor:
        """Mean squared error (O,) of a read-out on the samples behind these moments."""
        weights = torch.cat([-readout.weights, torch.eye(len(readout.intercept)).to(readout.weights)])
        spread = torch.einsum("io,ij,jo->o", weights, self.scatter / self.count, weights)
        return spread + (self.mean @ weights - readout.intercept) ** 2


def ridge_path(
    features: Tensor, targets: Tensor, alphas: Sequence[float] = ALPHAS, *, standardize: bool = True
) -> RidgePath:
    """Ridge solutions for all `alphas` from one singular value decomposition.

    features (..., D) and targets (..., O) have the same leading axes; samples are their product. `standardize` scales
    features to unit deviation first, so that alpha acts on all alike; a constant feature gets no weight. The error of
    leaving sample t out is r_t / (1 - h_t), with residual r and leverage h, intercept included.

    Raises InputError for shapes that do not fit, values that are not finite, alphas below 0, fewer than two samples.

    >>> x = torch.arange(6.0)[:, None]
    >>> ridge_path(x, 2 * x + 1, [0.0]).weights.round(decimals=6).flatten().tolist()
    [2.0]
    """
    x, y = _rows(features, targets)
    grid = checked_alphas(alphas, x.device)
    count = len(x)
    mean, centre = x.mean(0), y.mean(0)
    scale = _scale((x - mean).square().mean(0).sqrt(), standardize)
    left, values, right = torch.linalg.svd((x - mean) / scale, full_matrices=False)
    along = left.T @ (y - centre)
    factor = _inverse(values**2, grid[:, None] * count, RANK)
    weights = torch.einsum("jd,aj,jo->ado", right, factor * values, along) / scale[:, None]
    share = values**2 * factor  # (A, D): how much of each direction is fitted
    residuals = (y - centre) - torch.einsum("tj,aj,jo->ato", left, share, along)
    leverage = 1 / count + share @ (left**2).T
    freedom = 1 + share.sum(1)
    return RidgePath(
        grid,
        weights,
        centre - mean @ weights,
        freedom,
        _gcv(residuals.square().sum(1), freedom, count),
        _left_out(residuals, leverage).square().mean(1),
    )


def checked_alphas(alphas: Sequence[float], device: torch.device | None = None) -> Tensor:
    """The alphas as a float64 tensor. Raises InputError unless there are some, all finite and at least 0."""
    grid = torch.as_tensor(alphas, dtype=torch.float64, device=device)
    if grid.ndim != 1 or not len(grid) or not torch.isfinite(grid).all() or (grid < 0).any():
        raise InputError(f"alphas: {list(alphas)[:4]}; allowed are one or more finite numbers of at least 0")
    return grid


def _rows(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim < 2 or features.shape[:-1] != targets.shape[:-1]:
        raise InputError(
            f"features {tuple(features.shape)} and targets {tuple(targets.shape)}: all axes but the last must agree"
        )
    x = features.reshape(-1, features.shape[-1]).to(torch.float64)
    y = targets.reshape(-1, targets.shape[-1]).to(x)
    if len(x) < 2:
        raise InputError(f"{len(x)} samples; a read-out needs at least 2")
    for name, values in (("features", x), ("targets", y)):
        if not torch.isfinite(values).all():
            raise InputError(f"{name}: {int((~torch.isfinite(values)).sum())} values are not finite")
    return x, y


def _gcv(squares: Tensor, freedom: Tensor, count: int) -> Tensor:
    """T RSS / (T - freedom)^2 (A, O) of sums of squares (A, O); infinite where nothing is left free."""
    left = (count - freedom)[:, None]
    return torch.where(left > FREE * count, count * squares / left**2, math.inf)


def _left_out(residuals: Tensor, leverage: Tensor) -> Tensor:
    """r / (1 - h) (A, T, O); infinite at leverage 1, where the formula has 0 / 0."""
    left = (1 - leverage)[..., None]
    return torch.where(left > FREE, residuals / left, math.inf)


def _scale(deviation: Tensor, standardize: bool) -> Tensor:
    """What features are divided by: their deviation, where that can be told from rounding."""
    if not standardize:
        return torch.ones_like(deviation)
    return torch.where(deviation > 1e-14, deviation, torch.inf)


def _inverse(squares: Tensor, penalty: Tensor, rank: float) -> Tensor:
    """1 / (squares + penalty) (A, D), and 0 where the direction itself is zero."""
    real = squares > (rank**2) * squares.max().clamp(min=1e-300)
    return torch.where(real, 1 / (squares + penalty).clamp(min=1e-300), 0.0)
