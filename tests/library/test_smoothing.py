"""Densities with bands: they integrate to one, keep outliers exact, and cover the truth."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import InputError
from library.spectral.density import (
    Quadrature,
    chebyshev_moments,
    exact_quadrature,
    jackson_factors,
    kpm_density,
    lanczos,
    lanczos_quadrature,
)
from library.spectral.eigen import extreme_eigenpairs
from library.spectral.smoothing import (
    cumulative_density,
    deflated_quadrature,
    smoothed_density,
    spectral_grid,
    wasserstein_distance,
)
from library.spectral.trace import random_probes
from tests.library.matrices import generator

FOLDER = Path(__file__).parents[1] / "golden" / "hessian"
METHODS, NETWORK = np.load(FOLDER / "matrix_methods.npz"), np.load(FOLDER / "pyhessian_mlp.npz")


def methods(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(METHODS[name])).double()


def network(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(NETWORK[name])).double()


def spike_and_bulk(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    bulk = 0.1 * torch.randn(n - 4, generator=generator(), dtype=torch.float64)
    spectrum = torch.cat([bulk, torch.tensor([2.0, 1.5, 1.4, 1.0], dtype=torch.float64)])
    q = torch.linalg.qr(torch.randn(n, n, generator=generator(1), dtype=torch.float64)).Q
    return spectrum, (q * spectrum) @ q.mT


def renormalised(density: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return density / (density.sum() * (grid[1] - grid[0]))


def test_golden_lanczos_and_its_smoothed_density():
    a, probes = methods("A"), methods("probes").mT
    run = lanczos(a, probes, 14)
    torch.testing.assert_close(run.diagonal, methods("lanczos_alpha"), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(run.off_diagonal, methods("lanczos_beta"), rtol=1e-8, atol=1e-12)
    rule = lanczos_quadrature(a, probes, 14)
    torch.testing.assert_close(rule.nodes, methods("nodes"), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(rule.weights, methods("weights"), rtol=1e-8, atol=1e-12)
    grid = spectral_grid(rule, 400)
    torch.testing.assert_close(grid, methods("sd_grid"), rtol=1e-8, atol=1e-10)
    width = (float(METHODS["sd_sigma_squared"]) * max(1.0, float(grid[-1] - grid[0]))) ** 0.5
    density = smoothed_density(rule, grid, width).value
    torch.testing.assert_close(renormalised(density, grid), methods("sd_density"), rtol=1e-8, atol=1e-10)


def test_golden_chebyshev_density():
    low, high = float(METHODS["cheb_lo"]), float(METHODS["cheb_hi"])
    a = (methods("A") - (low + high) / 2 * torch.eye(60).double()) * (2 / (high - low))
    moments = chebyshev_moments(a, methods("probes").mT, 40)
    torch.testing.assert_close(moments, methods("cheb_moments"), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(jackson_factors(40), methods("jackson"), rtol=1e-10, atol=1e-12)
    density = kpm_density(moments.mean(0), methods("kpm_grid"), low, high)
    torch.testing.assert_close(density, methods("kpm_density"), rtol=1e-8, atol=1e-10)


def test_golden_network_density_within_the_references_float32():
    hessian, probes = network("hessian"), network("slq_probes").mT
    rule = lanczos_quadrature(hessian, probes, int(NETWORK["slq_steps"]))
    torch.testing.assert_close(rule.nodes, network("slq_nodes"), rtol=1e-4, atol=1e-6)
    grid = network("grid")
    spread = float(rule.nodes.amax(-1).mean() - rule.nodes.amin(-1).mean()) + 0.02
    density = smoothed_density(rule, grid, (1e-3 * max(1.0, spread)) ** 0.5).value
    torch.testing.assert_close(renormalised(density, grid), network("slq_density_sigma2_1e3"), rtol=1e-4, atol=1e-4)
    exact = smoothed_density(exact_quadrature(hessian, probes), grid, (1e-3 * max(1.0, spread)) ** 0.5).value
    torch.testing.assert_close(renormalised(exact, grid), network("exact_density_sigma2_1e3"), rtol=1e-6, atol=1e-8)


def test_deflation_keeps_the_outliers_exact_and_the_first_moments():
    spectrum, a = spike_and_bulk()
    pairs = extreme_eigenpairs(
        a, random_probes(400, 4, generator=generator()), largest=4, generator=generator(), tolerance=1e-10
    )
    rule = deflated_quadrature(a, pairs, random_probes(400, 12, generator=generator(2)), 30)
    torch.testing.assert_close(rule.weights.sum(-1), torch.ones(12).double())
    beyond = cumulative_density(rule, torch.tensor([0.8, 1.2, 1.45, 1.7, 2.1]).double())
    torch.testing.assert_close(400 * (1 - beyond.value), torch.tensor([4.0, 3, 2, 1, 0]).double(), rtol=0, atol=1e-9)
    assert (beyond.standard_error < 1e-12).all()
    for power in (1, 2):
        moment = rule.mean(lambda x, power=power: x**power)
        assert (moment.value - (spectrum**power).mean()).abs() < 4 * moment.standard_error


def test_deflation_beats_plain_quadrature_in_distance_and_in_error():
    spectrum, a = spike_and_bulk()
    pairs = extreme_eigenpairs(a, random_probes(400, 4, generator=generator()), largest=4, generator=generator())
    exact = Quadrature(spectrum[None], torch.full((1, 400), 1 / 400).double(), exact=True)
    distances = {"plain": [], "deflated": []}
    for seed in range(8):
        probes = random_probes(400, 2, generator=generator(seed))
        distances["plain"].append(wasserstein_distance(lanczos_quadrature(a, probes, 20), exact))
        distances["deflated"].append(wasserstein_distance(deflated_quadrature(a, pairs, probes, 20), exact))
    assert sum(distances["deflated"]) < 0.8 * sum(distances["plain"])


def test_the_band_covers_the_truth():
    spectrum, a = spike_and_bulk()
    points = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64)
    rule = lanczos_quadrature(a, random_probes(400, 24, generator=generator(4)), 60)
    exact = Quadrature(spectrum[None], torch.full((1, 400), 1 / 400).double(), exact=True)
    found, true = smoothed_density(rule, points, 0.03), smoothed_density(exact, points, 0.03)
    assert (true.standard_error == 0).all()
    assert ((found.value - true.value).abs() < 3.5 * found.standard_error + 1e-6).double().mean() > 0.95


def test_a_density_integrates_to_one_and_follows_a_shift_and_a_scale():
    _, a = spike_and_bulk(60)
    rule = lanczos_quadrature(a, random_probes(60, 3, generator=generator()), 9)
    grid = torch.linspace(-3, 5, 8001, dtype=torch.float64)
    density = smoothed_density(rule, grid, 0.1).value
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.tensor(1.0).double(), rtol=1e-10, atol=0)
    moved = Quadrature(2 * rule.nodes + 1, rule.weights)
    torch.testing.assert_close(smoothed_density(moved, 2 * grid + 1, 0.2).value, density / 2)


def test_small_complements_are_diagonalised():
    spectrum, a = spike_and_bulk(30)
    pairs = extreme_eigenpairs(a, random_probes(30, 2, generator=generator()), largest=4, generator=generator())
    rule = deflated_quadrature(a, pairs, random_probes(30, 2, generator=generator()), 26)
    assert rule.exact
    torch.testing.assert_close(rule.nodes[0], spectrum.sort().values, rtol=1e-9, atol=1e-12)


def test_distance_is_that_of_sorted_values_and_of_a_shift():
    first, second = (torch.randn(50, generator=generator(s), dtype=torch.float64).sort().values for s in (0, 1))
    rules = [Quadrature(values[None], torch.full((1, 50), 0.02).double(), exact=True) for values in (first, second)]
    assert wasserstein_distance(*rules) == pytest.approx(float((first - second).abs().mean()))
    assert wasserstein_distance(rules[0], rules[0]) == 0


def test_bandwidth_must_be_positive():
    rule = Quadrature(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(InputError, match="positive, got 0"):
        smoothed_density(rule, torch.zeros(1), 0)
