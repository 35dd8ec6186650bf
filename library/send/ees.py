"""Efficient EigenScore (EES): a log-determinant of the answers' correlations without their eigenvalues.

The K x K matrix is A = X X^T / sigma_max^2, where X (K, d) holds the embeddings standardised per feature over the
answers (population standard deviation; a feature that all answers share becomes 0) and sigma_max is its largest
singular value, so that A has its spectrum in [0, 1]. Source: "Hallucination Detox: Sensitivity Dropout", 2024.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from library.errors import InputError
from library.send.eigenscore import ALPHA, check_alpha, checked_answers
from library.spectral.density import chebyshev_moments, exact_moments, lanczos_quadrature, spectral_bounds
from library.spectral.trace import Estimate, random_probes

Kind = Literal["paper", "regularised"]
Method = Literal["exact", "kpm", "slq"]

MOMENTS = 20
"""Degree of the paper's truncated series, in its figures and training runs."""
PROBES = 20
"""Random vectors per estimate, in the paper's figures and training runs."""
RESIDUAL = 1e-12
"""Largest relative error of sigma_max^2 that Lanczos stops at."""
TRUNCATION = 1e-4
"""Largest error of the truncated series of log(x + alpha) on [0, 1] that the default degree leaves."""


@dataclass(frozen=True)
class EfficientScore:
    """EES of a batch of prompts; every tensor has the leading shape of the embeddings.

    `standard_error` is that of the random probes (0 when `method` is "exact"); it does not include the truncation
    of the series. `identical` marks prompts whose answers are all equal: sigma_max is 0, A is undefined, and the
    value is the floor, that of A = 0.
    """

    value: Tensor
    standard_error: Tensor
    identical: Tensor
    method: Method
    moments: int
    probes: int


@dataclass(frozen=True)
class Choice:
    """Which method computes EES for given sizes, and why, in one line."""

    method: Method
    reason: str


def choose_method(
    answers: int, features: int, *, kind: Kind = "paper", moments: int = MOMENTS, probes: int = PROBES
) -> Choice:
    """The rule: exact up to min(K, d) = 2 N_z M, then "kpm" for the paper's kind and "slq" for the regularised one.

    Exact costs K d min(K, d) multiplications for the Gram matrix of the smaller side, and its eigenvalues; N_z probes
    to degree M cost K d N_z M, and a few dozen products for the largest singular value. Exact has no sampling error.
    On one CPU core the times cross later, between 2.5 and 4 N_z M, because a Gram matrix is one large product
    (`benchmarks/eigenscore.py`).
    """
    side, limit = min(answers, features), 2 * probes * moments
    sizes = f"min(K, d) = {side} for K = {answers} answers of d = {features} features"
    if side <= limit:
        return Choice("exact", f"exact: {sizes} is at most 2 N_z M = {limit}, so probes would save nothing")
    method: Method = "kpm" if kind == "paper" else "slq"
    return Choice(method, f"{method}: {sizes} is above 2 N_z M = {limit}, so {probes} random probes multiply less")


def ees(
    embeddings: Tensor,
    *,
    kind: Kind = "paper",
    method: Method | Literal["auto"] = "auto",
    moments: int | None = None,
    probes: int | Tensor = PROBES,
    alpha: float = ALPHA,
    seed: int = 0,
) -> EfficientScore:
    """The Efficient EigenScore of each prompt, for embeddings (..., K, d); float64.

    kind "paper": tr f_M(A) / K with f_M the Chebyshev series of log(x) [x > 0] on [-1, 1] cut after degree M. It is
    bounded where the log-determinant is not: A always has the eigenvalue 0, at which f_M is about -log M. Compare
    runs with it; it does not approximate EigenScore.
    kind "regularised": log det(A + alpha I) / K.

    method "exact" takes all eigenvalues; "kpm" takes Chebyshev moments from random probes; "slq" takes stochastic
    Lanczos quadrature (regularised only); "auto" follows `choose_method`. `moments` is the degree M up to which the
    probes are exact, 20 for the paper's kind and `regularised_degree(alpha)` for the other; "slq" reaches it in
    (M + 1) / 2 Lanczos steps. `probes` is how many Rademacher vectors to draw from `seed`, the same for every prompt
    so that no score depends on its batch, or the probes themselves, (K, N_z) with identity covariance.

    Raises InputError for K < 2, d < 2, non-finite embeddings (naming the prompt), alpha <= 0, moments or probes that
    are no whole number from 1, probes of the wrong shape, or an unknown or unsuitable kind or method.

    >>> ees(torch.eye(4, 8), kind="regularised", alpha=1.0).method
    'exact'
    """
    if kind not in ("paper", "regularised"):
        raise InputError(f"unknown kind of EES {kind!r}; allowed: 'paper', 'regularised'")
    check_alpha(alpha)
    degree = (MOMENTS if kind == "paper" else regularised_degree(alpha)) if moments is None else moments
    rows = _standardised(checked_answers(embeddings))
    answers, features = rows.shape[-2:]
    count = _probe_count(probes, answers)
    if not isinstance(degree, Integral) or degree < 1 or count < 1:
        raise InputError(f"EES needs at least one moment and one probe, got {degree} moments and {count} probes")
    if method == "auto":
        method = choose_method(answers, features, kind=kind, moments=degree, probes=count).method
    if method not in ("exact", "kpm", "slq") or (method == "slq" and kind == "paper"):
        allowed = "'auto', 'exact', 'kpm'" + (", 'slq'" if kind == "regularised" else "")
        raise InputError(f"EES of the {kind} kind cannot be computed by {method!r}; allowed: {allowed}")
    identical = (rows == 0).all(-1).all(-1)
    if method == "exact":
        estimate = Estimate.exact(_exact(rows, kind, degree, alpha))
    else:
        vectors = _probes(probes, answers, seed, rows)
        estimate = (_kpm if method == "kpm" else _slq)(rows, vectors, kind, degree, alpha)
    floor = _floor(kind, degree, alpha)
    return EfficientScore(
        value=torch.where(identical, floor, estimate.value),
        standard_error=torch.where(identical, 0.0, estimate.standard_error),
        identical=identical,
        method=method,
        moments=degree,
        probes=estimate.probes,
    )


def paper_coefficients(degree: int) -> Tensor:
    """Chebyshev coefficients c_0..c_degree on [-1, 1] of log(x) for x > 0 and 0 elsewhere: float64, (degree + 1,).

    c_m = int_0^1 log(x) T_m(x) 2 / ((1 + [m = 0]) pi sqrt(1 - x^2)) dx. In closed form c_0 = -(log 2) / 2;
    c_{2k} = (-1)^(k+1) / (2k); for odd m, c_m = (-1)^((m-1)/2) 2 j_m / (pi m) with
    j_m = log 2 + 1/m - 2 (1 + 1/3 + ... + 1/m). Raises InputError for a negative degree.
    """
    _check_degree(degree)
    m = torch.arange(degree + 1, dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(degree + 1) // 2 % 2).double()
    inverse = 1 / m.clamp(min=1)
    odd_sums = torch.where(m % 2 == 1, inverse, 0.0).cumsum(0)
    odd = sign * 2 / math.pi * inverse * (math.log(2) + inverse - 2 * odd_sums)
    coefficients = torch.where(m % 2 == 1, odd, -sign * inverse)
    coefficients[0] = -math.log(2) / 2
    return coefficients


def regularised_coefficients(degree: int, alpha: float) -> Tensor:
    """Chebyshev coefficients of log(x + alpha) in t = 2x - 1, x in [0, 1]: float64, (degree + 1,).

    c_0 = -log(4 r) and c_m = -2 (-r)^m / m, with r = 1 / (sqrt(1 + alpha) + sqrt(alpha))^2. The series cut after
    degree M errs most at x = 0, by 2 sum_{m > M} r^m / m. Raises InputError for alpha <= 0 or a negative degree.
    """
    check_alpha(alpha)
    _check_degree(degree)
    log_ratio = _log_ratio(alpha)
    m = torch.arange(degree + 1, dtype=torch.float64)
    coefficients = -2 * (1 - 2 * (m % 2)) * torch.exp(m * log_ratio) / m.clamp(min=1)
    coefficients[0] = -math.log(4) - log_ratio
    return coefficients


def regularised_degree(alpha: float, tolerance: float = TRUNCATION) -> int:
    """The smallest degree M with 2 r^(M+1) / ((M + 1) (1 - r)) <= tolerance, a bound of the truncation error.

    r is that of `regularised_coefficients`. Raises InputError for alpha <= 0.
    """
    check_alpha(alpha)
    log_ratio = _log_ratio(alpha)

    def reached(degree: int) -> bool:
        order = degree + 1
        return 2 * math.exp(order * log_ratio) / (order * -math.expm1(log_ratio)) <= tolerance

    high = 1
    while not reached(high):
        high *= 2
    return bisect_left(range(high), True, key=reached)


def _log_ratio(alpha: float) -> float:
    return -2 * math.asinh(math.sqrt(alpha))


def _standardised(values: Tensor) -> Tensor:
    """Zero mean and unit population deviation per feature over the answers; a feature they share becomes 0.

    Sharing is decided by equality, because the rounded deviation of equal numbers need not be 0. Deviations are
    divided by their largest before they are squared, so that features of any magnitude keep their square.
    """
    constant = values.amax(-2, keepdim=True) == values.amin(-2, keepdim=True)
    deviations = values - values.mean(-2, keepdim=True)
    deviations = deviations / deviations.abs().amax(-2, keepdim=True)
    scale = deviations.square().mean(-2, keepdim=True).sqrt()
    return torch.where(constant, 0.0, deviations / scale)


def _exact(rows: Tensor, kind: Kind, degree: int, alpha: float) -> Tensor:
    answers, features = rows.shape[-2:]
    gram = rows @ rows.mT if answers <= features else rows.mT @ rows
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0)
    top = spectrum[..., -1:]
    spectrum = spectrum / torch.where(top > 0, top, 1.0)
    spectrum = torch.nn.functional.pad(spectrum, (max(answers - features, 0), 0))
    if kind == "regularised":
        return (spectrum + alpha).log().mean(-1)
    return exact_moments(spectrum, degree) @ paper_coefficients(degree).to(rows)


def _kpm(rows: Tensor, vectors: Tensor, kind: Kind, degree: int, alpha: float) -> Estimate:
    gram = _gram(rows / _largest_singular_value(rows))
    if kind == "paper":
        samples = chebyshev_moments(gram, vectors, degree)
        return Estimate.of_samples(samples @ paper_coefficients(degree).to(rows))
    samples = chebyshev_moments(lambda z: 2 * gram(z) - z, vectors, degree)
    return Estimate.of_samples(samples @ regularised_coefficients(degree, alpha).to(rows))


def _slq(rows: Tensor, vectors: Tensor, kind: Kind, degree: int, alpha: float) -> Estimate:
    gram = _gram(rows / _largest_singular_value(rows))
    return lanczos_quadrature(gram, vectors, (degree + 2) // 2).mean(lambda nodes: (nodes.clamp(min=0) + alpha).log())


def _gram(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """X X^T as a function on blocks of columns, written for blocks stored column by column (three times as fast)."""
    return lambda block: (block.mT @ rows @ rows.mT).mT


def _largest_singular_value(rows: Tensor) -> Tensor:
    """sigma_max of each prompt as (..., 1, 1), from Lanczos with a fixed random start; 1 where the matrix is 0.

    The bound of sigma_max^2 is off by its residual, and the moments by that times their degree.
    """
    start = random_probes(rows.shape[-2], 1, generator=torch.Generator().manual_seed(0), kind="gaussian")
    start = start.to(rows).expand(*rows.shape[:-1], 1)
    high = spectral_bounds(_gram(rows), start, tolerance=RESIDUAL, upper_only=True)[1]
    return torch.where(high > 0, high, 1.0).sqrt()[..., None, None]


def _check_degree(degree: int) -> None:
    if degree < 0:
        raise InputError(f"degree of a series must be at least 0, got {degree}")


def _probe_count(probes: int | Tensor, answers: int) -> int:
    if isinstance(probes, Integral):
        return int(probes)
    shape = tuple(probes.shape) if isinstance(probes, Tensor) else repr(probes)
    if not isinstance(probes, Tensor) or probes.ndim != 2 or len(probes) != answers:
        raise InputError(f"probes must be a number or have shape (K, N_z) with K = {answers}, got {shape}")
    return probes.shape[1]


def _probes(probes: int | Tensor, answers: int, seed: int, rows: Tensor) -> Tensor:
    if not isinstance(probes, Tensor):
        probes = random_probes(answers, int(probes), generator=torch.Generator().manual_seed(seed))
    by_column = probes.to(rows).mT.contiguous()
    return by_column.expand(*rows.shape[:-2], *by_column.shape).mT


def _floor(kind: Kind, degree: int, alpha: float) -> float:
    """The value at A = 0, which has all its eigenvalues 0."""
    if kind == "regularised":
        return math.log(alpha)
    return float(exact_moments(torch.zeros(1, dtype=torch.float64), degree) @ paper_coefficients(degree))
