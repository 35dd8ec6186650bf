"""Extreme eigenpairs of large symmetric operators with their error bounds, from products with blocks of vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.density import exact_eigenpairs
from library.spectral.operators import require_symmetric
from library.spectral.trace import Operator, product, random_probes


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs of a symmetric A, values in falling order.

    `values` (k,), `vectors` (n, k) with orthonormal columns, `residuals` (k,) = |A u - theta u|: an eigenvalue of A
    lies within the residual of each value. `converged` (k,) says which reached the tolerance that was asked for, and
    `products` how many vectors A was applied to.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int

    def select(self, chosen: slice | Tensor) -> "Eigenpairs":
        """Some of the pairs, in their order."""
        parts = self.values[chosen], self.vectors[:, chosen], self.residuals[chosen], self.converged[chosen]
        return Eigenpairs(*parts, self.products)


def extreme_eigenpairs(
    operator: Operator,
    start: Tensor,
    *,
    largest: int = 1,
    smallest: int = 0,
    generator: torch.Generator,
    tolerance: float = 1e-6,
    own: bool = False,
    basis: int | None = None,
    limit: int = 2000,
) -> Eigenpairs:
    """The `largest` eigenpairs from the top and the `smallest` from the bottom, by thick-restart block Lanczos.

    The Rayleigh-Ritz pairs of a growing orthonormal basis are taken; the residuals of as many unfinished ones as
    `start` has columns extend it, which spans the block Krylov space. A full basis is cut down to the Ritz vectors at
    the wanted ends. A pair has converged when its residual is at most `tolerance` times the largest |value|, or with
    `own` times its own |value| (never less than 100 roundings of the largest); after
    `limit` products the pairs are returned as they are, `converged` says which are good.

    `start` (n, b) is a block of random vectors, or of earlier eigenvectors and a random one (a warm start must not be
    orthogonal to what is new). An eigenvalue of multiplicity m is found m times when b >= m. `basis` is the most
    vectors held, twice over: by default 3 (largest + smallest) + b, at least 24. Once that reaches n, the operator is
    formed and diagonalised. `generator` draws new directions where a Krylov space ends before the pairs are found.

    Raises InputError for a zero, dependent or non-finite start, more pairs than n, a basis too small for pairs and
    block, and an operator that is not symmetric.
    Source: Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", 2000.

    >>> a = torch.diag(torch.arange(200, dtype=torch.float64))
    >>> generator = torch.Generator().manual_seed(0)
    >>> start = random_probes(200, 2, generator=generator)
    >>> extreme_eigenpairs(a, start, largest=2, smallest=1, generator=generator).values.round().tolist()
    [199.0, 198.0, 0.0]
    """
    n, block = start.shape
    wanted = largest + smallest
    if largest < 0 or smallest < 0 or not 1 <= wanted <= n:
        raise InputError(f"{largest} largest and {smallest} smallest eigenpairs asked of a matrix of {n} rows")
    room = max(3 * wanted + block, 24) if basis is None else basis
    if room < wanted + 2 * block:
        raise InputError(
            f"basis {room} is too small for {wanted} pairs and blocks of {block}: at least {wanted + 2 * block}"
        )
    if room >= n:
        return _exact(operator, start, largest, smallest)
    if not bool(torch.isfinite(start).all()) or _rank(start) < block:
        raise InputError("the start block must be finite, without zero or dependent columns")
    require_symmetric(operator, torch.cat([start[:, :1], _random(start, 1, generator)], 1))

    vectors = torch.linalg.qr(start).Q
    images = product(operator, vectors)
    products = block + 2
    while True:
        small = vectors.mT @ images
        values, rotation = torch.linalg.eigh((small + small.mT) / 2)
        order = _by_distance_to_the_ends(len(values), largest, smallest).to(values.device)
        values, rotation = values[order], rotation[:, order]
        near = min(wanted, len(values))
        ritz, ritz_images = vectors @ rotation[:, :near], images @ rotation[:, :near]
        rest = ritz_images - ritz * values[:near]
        residuals = torch.linalg.vector_norm(rest, dim=0)
        done = residuals <= _allowed(values, near, tolerance, own)
        if (near == wanted and bool(done.all())) or products >= limit:
            break
        if len(values) + block > room:
            kept = max(wanted, (room - block + wanted) // 2)
            vectors, images = vectors @ rotation[:, :kept], images @ rotation[:, :kept]
        new = _extension(vectors, rest[:, ~done][:, :block], generator, block)
        vectors, images = torch.cat([vectors, new], 1), torch.cat([images, product(operator, new)], 1)
        products += new.shape[1]
    falling = values[:near].argsort(descending=True)
    return Eigenpairs(values[:near][falling], ritz[:, falling], residuals[falling], done[falling], products)


def _rank(block: Tensor) -> int:
    """Of the columns, whatever their lengths; sums over n rows are taken to err by sqrt(n) roundings, not by n."""
    lengths = torch.linalg.vector_norm(block, dim=0)
    unit = block / torch.where(lengths > 0, lengths, 1)
    return int(torch.linalg.matrix_rank(unit, rtol=10 * torch.finfo(block.dtype).eps * len(block) ** 0.5))


def _allowed(values: Tensor, near: int, tolerance: float, own: bool) -> Tensor:
    """The residuals at which the first `near` of all Ritz values count as converged."""
    largest = values.abs().max()
    if not own:
        return tolerance * largest
    return torch.maximum(tolerance * values[:near].abs(), 100 * torch.finfo(values.dtype).eps * largest)


def _extension(vectors: Tensor, directions: Tensor, generator: torch.Generator, block: int) -> Tensor:
    """At least one orthonormal column, orthogonal to `vectors`: what is new in the directions, else random ones."""
    for candidates in (directions, _random(vectors, block, generator)):
        if not candidates.shape[1]:
            continue
        scale = torch.linalg.vector_norm(candidates, dim=0).clamp(min=torch.finfo(candidates.dtype).tiny)
        rest = candidates / scale
        for _ in range(2):
            rest = rest - vectors @ (vectors.mT @ rest)
        left, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
        new = left[:, sizes > 1e3 * torch.finfo(rest.dtype).eps]
        if new.shape[1]:
            new = new - vectors @ (vectors.mT @ new)
            return torch.linalg.qr(new).Q
    raise InputError("the start block and its images span no new direction: the operator is not finite")


def _by_distance_to_the_ends(count: int, largest: int, smallest: int) -> Tensor:
    """Places of ascending values: the wanted ones of both ends first, then inwards in the same proportion."""
    rank = torch.arange(count, dtype=torch.float64)
    infinite = torch.full_like(rank, float("inf"))
    from_top = (count - rank) / largest if largest else infinite
    from_bottom = (rank + 1) / smallest if smallest else infinite
    return torch.minimum(from_top, from_bottom).argsort(stable=True)


def _exact(operator: Operator, start: Tensor, largest: int, smallest: int) -> Eigenpairs:
    values, vectors = exact_eigenpairs(operator, start)
    chosen = torch.cat([torch.arange(largest), torch.arange(len(values) - smallest, len(values))]).unique()
    chosen = chosen.to(values.device)
    values, vectors = values.flip(-1)[chosen], vectors.flip(-1)[:, chosen]
    rounding = len(start) * torch.finfo(values.dtype).eps * values.abs().max()
    done = torch.ones_like(values, dtype=torch.bool)
    return Eigenpairs(values, vectors, torch.full_like(values, float(rounding)), done, len(start))


def _random(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return random_probes(
        like.shape[0], count, generator=generator, kind="gaussian", dtype=like.dtype, device=like.device
    )
