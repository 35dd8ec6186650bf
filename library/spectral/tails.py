"""Tails of empirical spectral densities: Hill exponents, Kolmogorov-Smirnov distances, threshold rules.

A spectrum is the last dimension of a tensor (..., N): non-negative eigenvalues in any order, usually the squared
singular values of a weight matrix. Leading dimensions are independent spectra. With lambda_0 <= ... <= lambda_{N-1},
a threshold index i and n = N - i, the tail's exponent and its distance from a power law are

    alpha_i = 1 + n / sum_{j >= i} ln(lambda_j / lambda_i),
    D_i     = max_{j >= i} | 1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / n |.

A larger alpha is a lighter tail. Sources: Hill, 1975; Clauset, Shalizi, Newman, SIAM Review 2009, eqs. 3.1 and 3.9.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from library.errors import InputError

Rule = Literal["median", "fixfinger", "ks"]
LowerBound = Literal["log", "linear"]
RULES: tuple[Rule, ...] = ("median", "fixfinger", "ks")
CHUNK = 1 << 18  # numbers in one step of a search, which fit into a processor's cache
FIRST_POINTS, MORE_POINTS = 64, 8  # a search looks at so many places of a spectrum first, and then so many times more
ALL_THRESHOLDS = 20_000  # of a longer spectrum a search may leave thresholds out


@dataclass(frozen=True)
class TailFit:
    """The fitted tails of spectra of shape (..., N); every field has shape (...,).

    alpha         the exponent
    ks_distance   D, how far the tail is from a power law
    threshold     lambda_i, the smallest eigenvalue of the tail
    tail          n, how many eigenvalues the tail has
    positive      how many eigenvalues took part: those above the floor
    """

    alpha: Tensor
    ks_distance: Tensor
    threshold: Tensor
    tail: Tensor
    positive: Tensor

    @property
    def sampling_error(self) -> Tensor:
        """(alpha - 1) / sqrt(n): the standard error of alpha if the tail were n independent draws of a power law."""
        return (self.alpha - 1) / self.tail.to(torch.float64).sqrt()


def squared_singular_values(matrices: Tensor) -> Tensor:
    """The min(m, n) squared singular values of each matrix, ascending: (..., m, n) -> (..., min(m, n)), float64.

    They are the eigenvalues of the smaller Gram matrix, formed in float64: each is right to about
    max(m, n) 2^-52 lambda_max, and what is smaller than that cannot be told from zero and is returned as 0. Raises
    InputError for what is no real matrix, and when an entry is not finite.

    >>> squared_singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    tensor([4., 9.], dtype=torch.float64)
    """
    _check_real(matrices, "matrices")
    if matrices.ndim < 2:
        raise InputError(f"matrices must have shape (..., m, n), got {tuple(matrices.shape)}")
    rows, columns = matrices.shape[-2:]
    matrices = matrices.to(torch.float64)
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    if not torch.isfinite(gram).all():
        raise InputError(f"a matrix of {rows} x {columns} has entries that are not finite, or whose squares are not")
    values = torch.linalg.eigvalsh(gram)
    resolution = max(rows, columns) * torch.finfo(torch.float64).eps * values[..., -1:]
    return torch.where(values > resolution, values, 0.0)


def hill_scan(spectra: Tensor) -> Tensor:
    """alpha_i at every threshold i of each spectrum, in time O(N) from one suffix sum: (..., N) -> (..., N), float64.

    With l_j = ln lambda_j and S_i = sum_{j >= i} l_j: alpha_i = 1 + n / (S_i - n l_i). It is infinite where all of
    the tail is equal, which includes the last index, and nan below the first positive eigenvalue.

    >>> hill_scan(torch.tensor([1.0, torch.e, torch.e**2]))
    tensor([2.0000, 3.0000,    inf], dtype=torch.float64)
    """
    values, first = _sorted(spectra, floor=0.0)
    logs = _logs(values, first)
    alphas = _alphas(logs)
    below = torch.arange(values.shape[-1], device=values.device) < first[..., None]
    return alphas.masked_fill(below, torch.nan)


def fit_tail(
    spectra: Tensor,
    rule: Rule = "median",
    *,
    position: float = 2.0,
    bins: int = 100,
    lower_bound: LowerBound = "log",
    floor: float = 0.0,
) -> TailFit:
    """Choose the threshold of each spectrum by a rule and fit its tail.

    median      i = int(N / position)
    fixfinger   of the thresholds near the peak of the histogram of log10 lambda over `bins` bins, the one of least D.
                With x the left edge of the fullest bin, near is lambda_i <= 1.5 x and lambda_i >= log10(0.95 x). That
                lower bound compares an eigenvalue with a logarithm, an old slip which published numbers rest on;
                `lower_bound="linear"` is lambda_i >= 0.95 x
    ks          of all thresholds, the one of least D

    Eigenvalues at or below `floor` are left out first. The search for the least D is exact up to 20,000 eigenvalues:
    thresholds are dropped when a lower bound of their D, from part of the tail, exceeds an upper bound of another's.
    Of a longer spectrum it takes every s-th of the thresholds that are left, when more are left than it can look at
    with 4e8 numbers at each step: nearly all of them, as of a power law. The D found is then above the least one by at
    most N / (400 n) for N below 780,000, n being the tail of the least one. Raises InputError for an unknown rule or
    lower bound, `position` not above 1, bins that are no whole number from 1, a floor that is no number, a spectrum
    that is not real, fewer than 2 eigenvalues above the floor, and a tail of equal eigenvalues.

    Sources: WeightWatcher's default fit (ks); "fix fingers" of Yang et al., 2023, as in AlphaPruning (fixfinger);
    TempBalance, Zhou et al., 2023 (median).

    >>> spectrum = (1 - (torch.arange(1, 1001) - 0.5) / 1000) ** (-1 / 2.0)  # quantiles of a density ~ lambda^-3
    >>> round(fit_tail(spectrum, "ks").alpha.item(), 1)
    3.0
    """
    if rule not in RULES:
        raise InputError(f"threshold rule {rule!r} is unknown; allowed: {', '.join(RULES)}")
    if not position > 1:
        raise InputError(f"position of the median rule must be above 1 (2 is the median), got {position}")
    if lower_bound not in ("log", "linear"):
        raise InputError(f"lower_bound {lower_bound!r} is unknown; allowed: log, linear")
    _check_bins(bins)
    values, first = _sorted(spectra, floor=floor)
    shape, n = values.shape[:-1], values.shape[-1]
    values, first = values.reshape(-1, n), first.reshape(-1)
    if (few := int((n - first).min())) < 2:
        raise InputError(f"a spectrum has {few} eigenvalues above {floor:g}; at least 2 are needed for a tail")
    logs = _logs(values, first)
    alphas = _alphas(logs)
    rows = torch.arange(len(values), device=values.device)
    if rule == "median":
        starts = first + ((n - first) / position).long()
        distances = _distances(logs, alphas, rows, starts)
    else:
        allowed = torch.arange(n, device=values.device) >= first[:, None]
        allowed &= torch.isfinite(alphas)
        if rule == "fixfinger":
            allowed &= _near_peak(values, first, bins, lower_bound)
        starts, distances = _least_distance(logs, alphas, allowed)
    alpha = alphas[rows, starts]
    if not torch.isfinite(alpha).all():
        raise InputError(f"the tail of a spectrum holds {n - int(starts[~torch.isfinite(alpha)][0])} equal eigenvalues")
    found = (alpha, distances, values[rows, starts], n - starts, n - first)
    return TailFit(*(value.reshape(shape) for value in found))


@dataclass(frozen=True)
class Histogram:
    """Counts of log10 eigenvalues: `edges` (..., bins + 1) of equal bins between the extremes, `counts` (..., bins)."""

    edges: Tensor
    counts: Tensor

    @property
    def density(self) -> Tensor:
        """Counts over their sum and the width of a bin: integrates to 1 over log10 lambda."""
        width = (self.edges[..., -1:] - self.edges[..., :1]) / self.counts.shape[-1]
        return self.counts / (self.counts.sum(-1, keepdim=True) * width)


def log_histogram(spectra: Tensor, bins: int = 100, *, floor: float = 0.0) -> Histogram:
    """The empirical spectral density over log10 lambda, of the eigenvalues above `floor`: (..., N) -> edges and counts.

    Raises InputError for no bins, or a spectrum without two different eigenvalues above the floor.
    """
    _check_bins(bins)
    values, first = _sorted(spectra, floor=floor)
    return _histogram(values, first, bins)


def _check_real(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor) or values.is_complex():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name} must be a tensor of real numbers, got {got}")


def _check_bins(bins: int) -> None:
    if not isinstance(bins, Integral) or bins < 1:
        raise InputError(f"a histogram needs at least 1 bin, and a whole number of them, got {bins}")


def _sorted(spectra: Tensor, *, floor: float) -> tuple[Tensor, Tensor]:
    """The spectra ascending in float64, and the index of the first eigenvalue above the floor."""
    _check_real(spectra, "spectra")
    if spectra.ndim == 0 or not spectra.numel():
        raise InputError(f"a spectrum without eigenvalues has no tail, got spectra of shape {tuple(spectra.shape)}")
    if math.isnan(floor):
        raise InputError("the floor of a spectrum must be a number, got nan")
    values = spectra.to(torch.float64).sort(-1).values
    if not torch.isfinite(values[..., [0, -1]]).all():
        raise InputError("a spectrum has eigenvalues that are not finite")
    if (least := float(values.min())) < 0:
        raise InputError(f"a spectrum has the negative eigenvalue {least:g}; squared singular values are needed")
    return values, (values <= floor).sum(-1)


def _logs(values: Tensor, first: Tensor) -> Tensor:
    """ln(lambda_j / lambda_max), 0 below the first eigenvalue that counts; the scale drops out of all that follows."""
    below = torch.arange(values.shape[-1], device=values.device) < first[..., None]
    return torch.where(below, 1.0, values / values[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)).log()


def _alphas(logs: Tensor) -> Tensor:
    n = torch.arange(logs.shape[-1], 0, -1, device=logs.device)
    sums = logs.flip(-1).cumsum(-1).flip(-1) - n * logs
    return torch.where(sums > n * torch.finfo(torch.float64).eps, 1 + n / sums, torch.inf)


def _histogram(values: Tensor, first: Tensor, bins: int) -> Histogram:
    counted = torch.arange(values.shape[-1], device=values.device) >= first[..., None]
    logs = torch.where(counted, values, values[..., -1:]).log10()
    low, high = logs.amin(-1, keepdim=True), logs[..., -1:]
    if not (high > low).all():
        raise InputError("a spectrum without two different positive eigenvalues has no histogram")
    places = ((logs - low) / (high - low) * bins).long().clamp(max=bins - 1)
    counts = torch.zeros((*values.shape[:-1], bins), dtype=torch.float64, device=values.device)
    counts.scatter_add_(-1, places, counted.to(torch.float64))
    steps = torch.arange(bins + 1, dtype=torch.float64, device=values.device) / bins
    return Histogram(low + (high - low) * steps, counts)


def _near_peak(values: Tensor, first: Tensor, bins: int, lower_bound: LowerBound) -> Tensor:
    histogram = _histogram(values, first, bins)
    fullest = histogram.counts.argmax(-1, keepdim=True)
    peak = 10 ** histogram.edges.gather(-1, fullest)
    low = 0.95 * peak if lower_bound == "linear" else (0.95 * peak).log10()
    return (values >= low) & (values <= 1.5 * peak)


def _distances(logs: Tensor, alphas: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """D of threshold `starts` of spectrum `rows`: all of shape (pairs,)."""
    return _bounds(logs, alphas, rows, starts, torch.arange(logs.shape[-1], device=logs.device))[0]


def _bounds(logs: Tensor, alphas: Tensor, rows: Tensor, starts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """A lower and an upper bound of D from some `places` of the spectra, the first and last among them.

    The lower one is D when these are all places. Both F(j) = 1 - (lambda_j / lambda_i)^(1 - alpha) and
    G(j) = (j - i) / n grow with j, so that between neighbouring places a < b |F - G| is at most
    max(F(b) - G(a), G(b) - F(a)). Places below a tail count as its start, where both are 0.
    """
    lower, upper = (torch.empty(len(rows), dtype=torch.float64, device=logs.device) for _ in range(2))
    seen, every = logs[:, places], len(places) == logs.shape[-1]
    for part in torch.arange(len(rows), device=logs.device).split(max(1, CHUNK // len(places))):
        row, start = rows[part], starts[part, None]
        first = int(torch.searchsorted(places, start.min(), right=True)) - 1
        steps = (seen[row, first:] - logs[row, starts[part]][:, None]).clamp_(min=0)
        fitted = steps.mul_((1 - alphas[row, starts[part]])[:, None]).expm1_().neg_()
        empirical = (places[first:] - start).clamp_(min=0) / (logs.shape[-1] - start).to(torch.float64)
        lower[part] = (fitted - empirical).abs_().amax(-1)
        if not every:
            across = torch.maximum(fitted[:, 1:] - empirical[:, :-1], empirical[:, 1:] - fitted[:, :-1])
            upper[part] = torch.maximum(lower[part], across.amax(-1))
    return lower, lower if every else upper


def _least_distance(logs: Tensor, alphas: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The allowed threshold of least D of each spectrum, the first one on a tie, and that D."""
    count, n = logs.shape
    if not allowed.any(-1).all():
        raise InputError("a spectrum has no threshold that the rule allows; use the median rule, or lower_bound='log'")
    rows, starts = allowed.nonzero(as_tuple=True)
    points = FIRST_POINTS
    while points < n:
        places = torch.arange(points, device=logs.device) * (n - 1) // (points - 1)
        lower, upper = _bounds(logs, alphas, rows, starts, places)
        best = _least(upper, rows, count)
        kept = lower <= best[rows]
        points *= MORE_POINTS
        if n > ALL_THRESHOLDS:
            kept &= _thinned(rows, kept, count, min(points, n)) | (upper == best[rows])
        rows, starts = rows[kept], starts[kept]
    distances = _distances(logs, alphas, rows, starts)
    least = _least(distances, rows, count)
    reached = distances == least[rows]
    chosen = torch.full((count,), n, device=logs.device)
    chosen.scatter_reduce_(0, rows[reached], starts[reached], "amin")
    return chosen, least


def _least(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The least value of each of `count` spectra."""
    return torch.full((count,), torch.inf, dtype=values.dtype, device=values.device).scatter_reduce(
        0, rows, values, "amin"
    )


def _thinned(rows: Tensor, kept: Tensor, count: int, points: int) -> Tensor:
    """Every s-th of the kept thresholds of each spectrum, s being what `points` of each allow; `rows` ascend."""
    many = torch.bincount(rows[kept], minlength=count)
    rank = kept.cumsum(0) - 1 - (many.cumsum(0) - many)[rows]
    stride = (many * points + ALL_THRESHOLDS**2 - 1) // ALL_THRESHOLDS**2
    return rank % stride.clamp(min=1)[rows] == 0
