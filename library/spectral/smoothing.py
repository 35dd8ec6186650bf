"""Spectral densities as curves with error bands, from the point masses of a quadrature; outliers kept exact.

A density estimated by stochastic Lanczos quadrature gives an outlier the weight (u^T z)^2 / n of its probe, a random
number with mean 1/n. `deflated_quadrature` takes the known eigenpairs out first, with weight 1/n each, and estimates
only the rest: sharp outliers and a smooth bulk.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.density import Quadrature, Tridiagonal, exact_quadrature, lanczos
from library.spectral.eigen import Eigenpairs
from library.spectral.trace import Estimate, Operator, product


def deflated_quadrature(
    operator: Operator,
    pairs: Eigenpairs,
    probes: Tensor,
    steps: int,
    *,
    run: Callable[[Operator, Tensor, int], Tridiagonal] = lanczos,
) -> Quadrature:
    """The spectral density with the eigenpairs exact and Lanczos quadrature on their orthogonal complement.

    With P = I - U U^T: nodes are the k values with weight 1/n each and, per probe z, the Gauss nodes of P A P from P z
    with weights that sum to (n - k)/n. With steps >= n - k the operator is diagonalised instead: no error.
    `probes` has shape (n, p). `run` is the form of Lanczos, such as `library.spectral.sharded.sharded_lanczos` for a
    basis that is shared over workers. Raises what `library.spectral.density.lanczos` raises.
    """
    n, count = probes.shape
    known = pairs.vectors.shape[1]
    if steps >= n - known:
        return exact_quadrature(operator, probes)
    basis = pairs.vectors

    def outside(block: Tensor) -> Tensor:
        return block - basis @ (basis.mT @ block)

    nodes, vectors = run(lambda block: outside(product(operator, outside(block))), outside(probes), steps).eigh()
    values = pairs.values.expand(count, known)
    weights = torch.full_like(values, 1 / n)
    share = (n - known) / n
    return Quadrature(torch.cat([nodes, values], -1), torch.cat([share * vectors[..., 0, :] ** 2, weights], -1))


def smoothed_density(quadrature: Quadrature, points: Tensor, bandwidth: float) -> Estimate:
    """The density per unit of eigenvalue at `points` (g,), each mass a Gaussian of standard deviation `bandwidth`.

    rho(t) = sum_j w_j exp(-(t - theta_j)^2 / (2 s^2)) / (s sqrt(2 pi)), averaged over probes, whose spread gives the
    standard error (g,). It integrates to 1. Raises InputError unless the bandwidth is positive.
    """
    if not bandwidth > 0:
        raise InputError(f"the bandwidth of a density must be positive, got {bandwidth}")
    distance = (points - quadrature.nodes.unsqueeze(-1)) / bandwidth
    return _over_probes(quadrature, torch.exp(-0.5 * distance * distance) / (bandwidth * math.sqrt(2 * math.pi)))


def cumulative_density(quadrature: Quadrature, points: Tensor) -> Estimate:
    """The share of eigenvalues that are at most each of `points` (g,): an estimate (g,), free of any bandwidth."""
    return _over_probes(quadrature, (quadrature.nodes.unsqueeze(-1) <= points).to(quadrature.weights.dtype))


def spectral_grid(quadrature: Quadrature, count: int, margin: float = 0.01) -> Tensor:
    """`count` equally spaced points from `margin` below the smallest node to `margin` above the largest.

    The ends are means over probes of each probe's extreme nodes.
    """
    low, high = quadrature.nodes.amin(-1).mean(), quadrature.nodes.amax(-1).mean()
    return torch.linspace(
        float(low) - margin, float(high) + margin, count, dtype=quadrature.nodes.dtype, device=quadrature.nodes.device
    )


def wasserstein_distance(first: Quadrature, second: Quadrature) -> float:
    """The distance int |F(t) - G(t)| dt between two spectra, each averaged over its probes, in units of eigenvalue."""
    nodes, masses = [], []
    for quadrature, sign in ((first, 1.0), (second, -1.0)):
        nodes.append(quadrature.nodes.flatten())
        masses.append(sign * quadrature.weights.flatten() / math.prod(quadrature.nodes.shape[:-1]))
    places, order = torch.cat(nodes).sort()
    difference = torch.cat(masses)[order].cumsum(0)[:-1]
    return float((difference.abs() * places.diff()).sum())


def _over_probes(quadrature: Quadrature, values: Tensor) -> Estimate:
    """`values` (..., p, m, g) of the masses, weighted and averaged over probes."""
    samples = (quadrature.weights.unsqueeze(-1) * values).sum(-2)
    return Estimate.exact(samples.squeeze(-2)) if quadrature.exact else Estimate.of_samples(samples.mT)
