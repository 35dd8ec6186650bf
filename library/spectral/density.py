"""Spectral densities of symmetric operators: Chebyshev moments, the kernel polynomial method, Lanczos quadrature.

Operators are matrices or functions on blocks of vectors, as in `library.spectral.trace`. T_m is the Chebyshev
polynomial of the first kind, T_m(cos t) = cos(m t). Leading dimensions are independent problems.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.trace import Estimate, Operator, product


def chebyshev_moments(operator: Operator, probes: Tensor, degree: int) -> Tensor:
    """The moments z^T T_m(A) z / n of every probe, m = 0..degree, for a symmetric A with spectrum in [-1, 1].

    Two moments come from each product: with t_m = T_m(A) z,
    z^T T_{2m}(A) z = 2 |t_m|^2 - |z|^2 and z^T T_{2m+1}(A) z = 2 t_m . t_{m+1} - z . t_1,
    so that ceil(degree / 2) products reach `degree`. Their mean over probes estimates tr T_m(A) / n without bias.

    `probes` (..., n, p) gives moments (..., p, degree + 1). Raises InputError when A is not symmetric (seen from the
    matrix, or from two or more probes), or when a moment exceeds |z|^2 / n: the spectrum then leaves [-1, 1].
    """
    if degree < 0:
        raise InputError(f"degree of the moments must be at least 0, got {degree}")
    n = probes.shape[-2]
    before, current = probes, probes
    moments = [(probes * probes).sum(-2)]
    for order in range(1, (degree + 1) // 2 + 1):
        image = product(operator, current)
        if order == 1:
            _require_symmetric(operator, probes, image)
            before, current = probes, image
            moments.append((probes * image).sum(-2))
        else:
            before, current = current, 2 * image - before
            moments.append(2 * (before * current).sum(-2) - moments[1])
        moments.append(2 * (current * current).sum(-2) - moments[0])
    found = torch.stack(torch.broadcast_tensors(*moments[: degree + 1]), -1) / n
    _require_within(found, found[..., :1], "moment")
    return found


def exact_moments(eigenvalues: Tensor, degree: int) -> Tensor:
    """The exact moments tr T_m(A) / n, m = 0..degree, from all n eigenvalues of A, which must lie in [-1, 1].

    `eigenvalues` (..., n) gives (..., degree + 1). Raises InputError when one lies outside by more than rounding.
    """
    _require_within(eigenvalues, torch.ones_like(eigenvalues[..., :1]), "eigenvalue")
    return _chebyshev_values(eigenvalues, degree).mean(-2)


def chebyshev_coefficients(
    function: Callable[[Tensor], Tensor], degree: int, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """Coefficients c_m of the polynomial sum_m c_m T_m(t) that interpolates `function` on [low, high].

    x = (low + high) / 2 + t (high - low) / 2; the interpolation points are the degree + 1 roots of T_{degree+1}, and
    the coefficients their discrete cosine transform. Float64, shape (degree + 1,). Raises InputError unless
    low < high, degree >= 0, and the function is finite at the points.

    >>> chebyshev_coefficients(lambda x: x * x, 2)  # x^2 = (T_0 + T_2) / 2
    tensor([0.5000, 0.0000, 0.5000], dtype=torch.float64)
    """
    if degree < 0 or not low < high:
        raise InputError(f"Chebyshev interpolation needs degree >= 0 and low < high, got {degree} on [{low}, {high}]")
    count = degree + 1
    angles = math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = function((low + high) / 2 + (high - low) / 2 * torch.cos(angles))
    if not torch.isfinite(values).all():
        raise InputError(f"the function is not finite at every Chebyshev point of [{low}, {high}]")
    orders = torch.arange(count, dtype=torch.float64)
    spectrum = torch.fft.rfft(torch.cat([values, values.flip(0)]))[:count]
    cosines = (spectrum * torch.exp(-0.5j * math.pi * orders / count)).real / count
    cosines[0] /= 2
    return cosines


def jackson_factors(degree: int) -> Tensor:
    """Jackson's damping factors g_0..g_degree, which keep the truncated density non-negative: float64, (degree + 1,).

    g_k = [(N - k) cos(pi k / N) + sin(pi k / N) cot(pi / N)] / N with N = degree + 2.
    Source: Weisse, Wellein, Alvermann, Fehske, "The kernel polynomial method", 2006, equation 71.
    """
    size = degree + 2
    k = torch.arange(degree + 1, dtype=torch.float64)
    angle = math.pi * k / size
    return ((size - k) * torch.cos(angle) + torch.sin(angle) / math.tan(math.pi / size)) / size


def kpm_density(moments: Tensor, points: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The Jackson-damped density of states at `points`, per unit of eigenvalue; it integrates to moment 0.

    rho(lambda) = [g_0 mu_0 + 2 sum_k g_k mu_k T_k(t)] / (pi h sqrt(1 - t^2)), with h = (high - low) / 2 and
    t = (lambda - (low + high) / 2) / h. `moments` (..., degree + 1) are those of the operator (A - centre) / h;
    `points` (g,) gives (..., g). With the moments of single probes, `Estimate.of_samples` over them gives the error.

    Raises InputError when a point is not strictly inside (low, high).
    """
    half = (high - low) / 2
    t = (points - (low + high) / 2) / half
    if not bool((t.abs() < 1).all()):
        raise InputError(f"the density is defined strictly inside ({low}, {high}); a point lies outside")
    degree = moments.shape[-1] - 1
    weights = 2 * jackson_factors(degree).to(moments)
    weights[0] /= 2
    series = (moments * weights) @ _chebyshev_values(t, degree).to(moments).mT
    return series / (math.pi * half * torch.sqrt(1 - t * t))


@dataclass(frozen=True)
class Tridiagonal:
    """Lanczos' symmetric tridiagonal matrices, one per start vector.

    `diagonal` (..., p, m), `off_diagonal` (..., p, m - 1), and `residual` (..., p), the norm of what the last product
    left outside the Krylov space (0 when that space is invariant).
    """

    diagonal: Tensor
    off_diagonal: Tensor
    residual: Tensor

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values (..., p, m), ascending, and the eigenvectors of the tridiagonal matrix (..., p, m, m)."""
        beside = torch.diag_embed(self.off_diagonal, 1)
        return torch.linalg.eigh(torch.diag_embed(self.diagonal) + beside + beside.mT)


def lanczos(operator: Operator, start: Tensor, steps: int) -> Tridiagonal:
    """`steps` steps of Lanczos from every column of `start` (..., n, p), fully re-orthogonalised twice per step.

    When a column's Krylov space becomes invariant its recurrence stops: later diagonal entries repeat its first one
    (a Rayleigh quotient, hence inside the spectrum) and later off-diagonal entries are 0, which gives them weight 0
    in a quadrature. Holds at most (..., p, 2 steps, n) numbers. Raises InputError for a zero or non-finite start
    vector, fewer than one step, or an operator that is not symmetric.
    """
    if steps < 1:
        raise InputError(f"Lanczos needs at least one step, got {steps}")
    *_, last = _krylov(operator, start, min(steps, start.shape[-2]))
    return _tridiagonal(*last)


@dataclass(frozen=True)
class Quadrature:
    """A spectral density as point masses: `nodes` and `weights` (..., p, m), each probe's weights summing to 1.

    With `exact` there is one "probe", and the nodes are all eigenvalues with weight 1 / n.
    """

    nodes: Tensor
    weights: Tensor
    exact: bool = False

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A) / n for a function applied to each eigenvalue: sum_j w_j f(theta_j), averaged over probes."""
        samples = (self.weights * function(self.nodes)).sum(-1)
        return Estimate.exact(samples.squeeze(-1)) if self.exact else Estimate.of_samples(samples)


def lanczos_quadrature(operator: Operator, probes: Tensor, steps: int) -> Quadrature:
    """Stochastic Lanczos quadrature: per probe z, sum_j w_j f(theta_j) ~ z^T f(A) z / |z|^2.

    theta_j are the Ritz values and w_j the squared first entries of their eigenvectors; exact for polynomials of
    degree 2 steps - 1. With steps >= n the operator is formed by n products and diagonalised instead: no error.
    `probes` has shape (..., n, p). Raises what `lanczos` raises.
    Source: Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017.

    >>> a = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    >>> lanczos_quadrature(a, torch.ones(3, 1, dtype=torch.float64), 8).mean(torch.log2)
    Estimate(value=tensor(1., dtype=torch.float64), standard_error=tensor(0., dtype=torch.float64), probes=0)
    """
    n = probes.shape[-2]
    if steps >= n:
        return exact_quadrature(operator, probes)
    nodes, vectors = lanczos(operator, probes, steps).eigh()
    return Quadrature(nodes, vectors[..., 0, :] ** 2)


def exact_quadrature(operator: Operator, like: Tensor) -> Quadrature:
    """All eigenvalues of a symmetric operator, by n products and a dense diagonalisation.

    `like` (..., n, p) gives n, the leading shape, dtype and device. Raises InputError when A is not symmetric.
    """
    nodes = torch.linalg.eigvalsh(_formed(operator, like)).unsqueeze(-2)
    return Quadrature(nodes, torch.full_like(nodes, 1 / like.shape[-2]), exact=True)


def exact_eigenpairs(operator: Operator, like: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues (..., n), ascending, and eigenvectors (..., n, n), as `exact_quadrature` finds them."""
    values, vectors = torch.linalg.eigh(_formed(operator, like))
    return values, vectors


def spectral_bounds(
    operator: Operator, start: Tensor, *, tolerance: float = 1e-6, limit: int = 512, upper_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the spectrum: the extreme Ritz values, each moved outwards by its residual norm r.

    An eigenvalue is within r of a Ritz value. The smaller bound r^2 / gap of Kato and Temple needs the gap to the next
    eigenvalue, which Lanczos may not have found yet. It goes on until r at both ends, looked at every eighth step, is
    at most `tolerance` times the spectrum's magnitude, or until `limit` steps or the dimension; with `upper_only` until
    the upper one is, for spectra whose lower end is known, such as the dense one at 0 of a square Gram matrix. `start`
    (..., n, p), one column being enough; results have the leading shape. The start must not be orthogonal to the
    extreme eigenvectors: take random entries.
    Raises what `lanczos` raises.
    """
    limit = min(limit, start.shape[-2])
    for diagonal, off_diagonal in _krylov(operator, start, limit):
        steps = len(diagonal)
        invariant = not bool(off_diagonal[-1].any())
        if steps % 8 and steps < limit and not invariant:
            continue
        run = _tridiagonal(diagonal, off_diagonal)
        values, vectors = run.eigh()
        residuals = run.residual.unsqueeze(-1) * vectors[..., -1, :].abs()
        low_error, high_error = residuals[..., 0], residuals[..., -1]
        low, high = (values[..., 0] - low_error).amin(-1), (values[..., -1] + high_error).amax(-1)
        worst = (high_error if upper_only else torch.maximum(low_error, high_error)).amax(-1)
        if bool((worst <= tolerance * torch.maximum(low.abs(), high.abs())).all()):
            break
    return low, high


def _krylov(operator: Operator, start: Tensor, limit: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Diagonal and off-diagonal entries (..., p) after each step of Lanczos; the last off-diagonal is the residual."""
    n, columns = start.shape[-2:]
    norms = torch.linalg.vector_norm(start, dim=-2, keepdim=True)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise InputError("Lanczos cannot start from a zero or non-finite vector")
    vector = start / norms
    basis = start.new_zeros((*start.shape[:-2], columns, min(16, limit), n))
    diagonal, off_diagonal = [], []
    scale = start.new_zeros((*start.shape[:-2], columns))
    alive = torch.ones_like(scale, dtype=torch.bool)
    tolerance = 10 * n**0.5 * torch.finfo(start.dtype).eps
    for step in range(limit):
        if step == basis.shape[-2]:
            basis = torch.cat([basis, torch.zeros_like(basis[..., : limit - step, :])], -2)
        basis[..., step, :] = vector.mT
        image = product(operator, vector)
        if step == 0:
            if image.shape != vector.shape:
                raise InputError(f"Lanczos' start {tuple(start.shape)} lacks leading dimensions of the operator")
            _require_symmetric(operator, vector, image)
        rayleigh = (vector * image).sum(-2)
        diagonal.append(torch.where(alive, rayleigh, diagonal[0]) if diagonal else rayleigh)
        known, rest = basis[..., : step + 1, :], image.mT.unsqueeze(-1)
        for _ in range(2):
            rest = rest - known.mT @ (known @ rest)
        rest = rest.squeeze(-1).mT
        norm = torch.linalg.vector_norm(rest, dim=-2)
        scale = torch.maximum(scale, rayleigh.abs() + norm)
        alive = alive & (norm > tolerance * scale)
        off_diagonal.append(torch.where(alive, norm, 0.0))
        yield diagonal, off_diagonal
        if not bool(alive.any()):
            return
        vector = torch.where(alive, 1 / norm, 0.0).unsqueeze(-2) * rest


def _formed(operator: Operator, like: Tensor) -> Tensor:
    n = like.shape[-2]
    identity = torch.eye(n, dtype=like.dtype, device=like.device).expand(*like.shape[:-2], n, n)
    matrix = product(operator, identity)
    _require_symmetric(matrix, identity, matrix)
    return matrix


def _tridiagonal(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> Tridiagonal:
    beside = torch.stack(off_diagonal[:-1], -1) if len(diagonal) > 1 else diagonal[0].new_zeros((*diagonal[0].shape, 0))
    return Tridiagonal(torch.stack(diagonal, -1), beside, off_diagonal[-1])


def _chebyshev_values(points: Tensor, degree: int) -> Tensor:
    orders = torch.arange(degree + 1, dtype=points.dtype, device=points.device)
    return torch.cos(torch.arccos(points.clamp(-1, 1)).unsqueeze(-1) * orders)


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.5


def _require_within(values: Tensor, bound: Tensor, name: str) -> None:
    if bool((values.abs() <= bound * (1 + _rounding(values.dtype))).all()):
        return
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"a spectral {name} is not finite; the operator returns NaN or infinity")
    excess = float((values.abs() / bound).max())
    raise InputError(f"a spectral {name} is {excess:.4g} times the largest allowed: the spectrum leaves [-1, 1]")


def _require_symmetric(operator: Operator, block: Tensor, image: Tensor) -> None:
    """<u, A v> = <v, A u> for the matrix itself, or for all pairs of the probes in `block`."""
    if isinstance(operator, Tensor):
        form, size = operator, operator.abs().amax((-2, -1), keepdim=True)
    else:
        form = block.mT @ image
        norms = [torch.linalg.vector_norm(x, dim=-2) for x in (block, image)]
        size = norms[0].amax(-1)[..., None, None] * norms[1].amax(-1)[..., None, None]
    if not bool(((form - form.mT).abs() <= _rounding(form.dtype) * size).all()):
        raise InputError("the operator is not symmetric: <u, A v> and <v, A u> differ, or are not finite")
