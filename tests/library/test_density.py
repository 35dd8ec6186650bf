"""Chebyshev moments, Lanczos and quadrature against dense eigen-decompositions and their theory."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.spectral.density import (
    chebyshev_coefficients,
    chebyshev_moments,
    exact_moments,
    exact_quadrature,
    jackson_factors,
    kpm_density,
    lanczos,
    lanczos_quadrature,
    spectral_bounds,
)
from library.spectral.trace import Estimate, random_probes
from tests.library.matrices import generator, with_spectrum

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "send" / "eigenscore_ees.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def spread(n: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(n, generator=generator(seed), dtype=torch.float64) - 1


def test_golden_moments():
    gram = golden("A").mT @ golden("A")
    moments = chebyshev_moments(gram, golden("probes"), 20)
    torch.testing.assert_close(moments.mean(-2), golden("d_m_official"), rtol=1e-8, atol=1e-8)
    vectors = golden("Tm_probe0")
    torch.testing.assert_close(moments[0], vectors @ golden("probes")[:, 0] / 10, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(exact_moments(golden("eig_AtA"), 20), golden("d_m_exact"), rtol=1e-9, atol=1e-9)


@given(degree=st.integers(0, 33), n=st.integers(1, 12), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_two_moments_per_product_equal_the_plain_recurrence(degree, n, seed):
    a = with_spectrum(spread(n, seed), seed)
    z = random_probes(n, 3, generator=generator(seed), kind="gaussian")
    before, current, plain = z, a @ z, [z, a @ z]
    for _ in range(degree):
        before, current = current, 2 * a @ current - before
        plain.append(current)
    expected = torch.stack([(z * t).sum(0) / n for t in plain[: degree + 1]], -1)
    torch.testing.assert_close(chebyshev_moments(a, z, degree), expected, rtol=1e-10, atol=1e-10)


def test_half_as_many_products_as_moments():
    calls = []
    chebyshev_moments(lambda z: (calls.append(1), 0.5 * z)[1], torch.ones(4, 2), 20)
    assert len(calls) == 10


def test_basis_probes_give_the_exact_traces():
    spectrum = spread(9)
    basis = 3 * torch.eye(9, dtype=torch.float64)
    moments = chebyshev_moments(with_spectrum(spectrum), basis, 15).mean(-2)
    torch.testing.assert_close(moments, exact_moments(spectrum, 15), rtol=1e-10, atol=1e-12)


def test_moments_are_unbiased_and_bounded():
    spectrum = spread(10)
    moments = chebyshev_moments(with_spectrum(spectrum), random_probes(10, 4000, generator=generator()), 12)
    estimate = Estimate.of_samples(moments.mT)
    assert (moments.abs() <= 1 + 1e-12).all()
    assert ((estimate.value - exact_moments(spectrum, 12)).abs() <= 4 * estimate.standard_error + 1e-12).all()


def test_batched_moments_and_lanczos_equal_single_ones():
    a = torch.stack([with_spectrum(spread(8, s), s) for s in range(3)])
    z = random_probes(8, 4, generator=generator())
    moments = chebyshev_moments(a, z, 7)
    run = lanczos(a, z.expand(3, 8, 4), 5)
    for i in range(3):
        torch.testing.assert_close(moments[i], chebyshev_moments(a[i], z, 7))
        torch.testing.assert_close(run.diagonal[i], lanczos(a[i], z, 5).diagonal)


def test_coefficients_reproduce_polynomials_and_converge_geometrically():
    coefficients = chebyshev_coefficients(lambda x: 4 * x**3 - 3 * x, 5)
    torch.testing.assert_close(coefficients, torch.tensor([0.0, 0, 0, 1, 0, 0]).double(), rtol=0, atol=1e-14)
    x = torch.linspace(0.5, 4, 101, dtype=torch.float64)
    t = (x - 2.25) / 1.75
    values = chebyshev_coefficients(torch.log, 40, 0.5, 4.0) @ torch.cos(torch.arange(41)[:, None] * torch.arccos(t))
    torch.testing.assert_close(values, torch.log(x), rtol=0, atol=1e-12)


def test_jackson_density_is_positive_and_integrates_to_one():
    a, b, count, degree = -2.0, 6.0, 200, 60
    spectrum = 2 + 4 * spread(30)
    angles = math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    points = (a + b) / 2 + (b - a) / 2 * torch.cos(angles)
    density = kpm_density(exact_moments((spectrum - 2) / 4, degree), points, a, b)
    assert (density > 0).all()
    gauss = math.pi / count * (b - a) / 2 * torch.sin(angles)
    torch.testing.assert_close((density * gauss).sum(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        (density * gauss * points).sum(), 2 + 4 * ((spectrum - 2) / 4).mean() * jackson_factors(degree)[1]
    )


def test_lanczos_over_the_whole_space_gives_the_spectrum_and_first_moment():
    spectrum = torch.linspace(-3, 5, 14, dtype=torch.float64)
    a, v = with_spectrum(spectrum), random_probes(14, 2, generator=generator(), kind="gaussian")
    values, vectors = lanczos(a, v, 14).eigh()
    torch.testing.assert_close(values, spectrum.expand(2, 14), rtol=1e-10, atol=1e-10)
    weights = vectors[:, 0, :] ** 2
    torch.testing.assert_close(weights.sum(-1), torch.ones(2).double())
    torch.testing.assert_close((weights * values).sum(-1), (v * (a @ v)).sum(0) / v.square().sum(0))


def test_quadrature_is_exact_up_to_degree_2m_minus_1_and_extremes_are_monotone():
    spectrum, steps = spread(20), 4
    a, z = with_spectrum(spectrum), random_probes(20, 3, generator=generator())
    rule = lanczos_quadrature(a, z, steps)
    power = z
    for degree in range(2 * steps):
        samples = (rule.weights * rule.nodes**degree).sum(-1)
        torch.testing.assert_close(samples, (z * power).sum(0) / 20, rtol=1e-11, atol=1e-12)
        power = a @ power
    tops = torch.stack([lanczos_quadrature(a, z, m).nodes.amax(-1) for m in range(1, 12)])
    assert (tops.diff(dim=0) >= -1e-12).all()
    assert (tops <= spectrum.max() + 1e-12).all()


@pytest.mark.parametrize("function", [torch.exp, lambda x: (x + 1.1).log()])
def test_quadrature_estimates_the_mean_of_a_function_within_its_error(function):
    spectrum = spread(200)
    estimate = lanczos_quadrature(
        with_spectrum(spectrum), random_probes(200, 64, generator=generator(), kind="gaussian"), 30
    ).mean(function)
    assert 0 < estimate.standard_error < 0.05
    assert (estimate.value - function(spectrum).mean()).abs() < 4 * estimate.standard_error


def test_repeated_eigenvalues_end_the_recurrence_and_keep_the_weights():
    spectrum = torch.tensor([1.0] * 10 + [3.0] * 5 + [4.0]).double()
    z = random_probes(16, 5, generator=generator())
    run = lanczos(with_spectrum(spectrum), z, 12)
    assert run.diagonal.shape[-1] < 12
    assert (run.residual == 0).all()
    estimate = lanczos_quadrature(with_spectrum(spectrum), z, 12).mean(lambda x: (x - 1) * (x - 3) * (x - 4))
    assert estimate.value.abs() < 1e-10


def test_columns_that_stop_early_leave_the_others_alone():
    a = torch.diag(torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0], dtype=torch.float64))
    start = torch.ones(6, 2, dtype=torch.float64)
    start[1:, 0] = 0  # an eigenvector: its space is invariant after one step
    rule = lanczos_quadrature(a, start, 5)
    values = (rule.weights * rule.nodes.log()).sum(-1)
    torch.testing.assert_close(values[0], torch.tensor(2.0).double().log())
    alone = lanczos_quadrature(a, start[:, 1:], 5)
    torch.testing.assert_close(values[1], (alone.weights * alone.nodes.log()).sum())


def test_small_operators_are_diagonalised_without_error():
    spectrum = spread(12)
    rule = lanczos_quadrature(lambda z: with_spectrum(spectrum) @ z, random_probes(12, 3, generator=generator()), 12)
    assert rule.exact
    estimate = rule.mean(torch.exp)
    torch.testing.assert_close(estimate.value, spectrum.exp().mean(), rtol=1e-12, atol=0)
    assert estimate.standard_error == 0
    torch.testing.assert_close(rule.nodes, exact_quadrature(with_spectrum(spectrum), torch.ones(12, 1).double()).nodes)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@example(n=43, seed=11554, scale=1e-6)  # the second eigenvalue is found late
@example(n=54, seed=54, scale=1.0)  # the first one is: the start has little of it
@settings(max_examples=40, deadline=None)
def test_bounds_hold_the_spectrum_tightly(n, seed, scale):
    spectrum = scale * spread(n, seed)
    low, high = spectral_bounds(
        with_spectrum(spectrum, seed), random_probes(n, 1, generator=generator(1), kind="gaussian")
    )
    size = spectrum.abs().max()
    assert spectrum.min() - 1e-6 * size <= low <= spectrum.min() + 1e-12 * size
    assert spectrum.max() - 1e-12 * size <= high <= spectrum.max() + 1e-6 * size


def test_bounds_of_a_large_crowded_spectrum_and_of_zero():
    rows = torch.randn(300, 900, generator=generator(), dtype=torch.float64)
    top = torch.linalg.matrix_norm(rows, 2) ** 2
    start = random_probes(300, 1, generator=generator(3), kind="gaussian")
    high = spectral_bounds(lambda z: rows @ (rows.mT @ z), start)[1]
    torch.testing.assert_close(high, top, rtol=2e-6, atol=0)
    assert high >= top * (1 - 1e-12)
    assert [float(b) for b in spectral_bounds(lambda z: 0 * z, start)] == [0, 0]


def test_an_upper_bound_alone_is_as_tight_and_waits_for_no_crowded_lower_end():
    rows = torch.randn(400, 400, generator=generator(), dtype=torch.float64)
    top = torch.linalg.matrix_norm(rows, 2) ** 2
    start = random_probes(400, 1, generator=generator(3), kind="gaussian")
    products = {}
    for upper_only in (False, True):
        seen = []

        def gram(block, seen=seen):
            seen.append(block.shape[-1])
            return rows @ (rows.mT @ block)

        high = spectral_bounds(gram, start, upper_only=upper_only)[1]
        torch.testing.assert_close(high, top, rtol=2e-6, atol=0)
        assert high >= top * (1 - 1e-12)
        products[upper_only] = sum(seen)
    assert products[True] * 2 < products[False]


EYE = torch.eye(4, dtype=torch.float64)
SKEW = EYE.roll(1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chebyshev_moments(1.13 * EYE, EYE, 20), "leaves"),
        (lambda: chebyshev_moments(lambda z: z * float("nan"), EYE, 4), "not finite"),
        (lambda: chebyshev_moments(SKEW, EYE[:, :1], 4), "not symmetric"),
        (lambda: chebyshev_moments(lambda z: SKEW @ z, EYE[:, :2], 4), "not symmetric"),
        (lambda: chebyshev_moments(EYE, EYE, -1), "at least 0"),
        (lambda: exact_moments(torch.tensor([0.5, 1.2]), 3), "eigenvalue is 1.2 times"),
        (lambda: kpm_density(torch.ones(3), torch.tensor([1.0])), "strictly inside"),
        (lambda: chebyshev_coefficients(torch.log, 4, 1.0, 1.0), "low < high"),
        (lambda: chebyshev_coefficients(torch.log, 4, -1.0, 1.0), "not finite at every"),
        (lambda: lanczos(EYE, torch.zeros(4, 1), 2), "zero or non-finite"),
        (lambda: lanczos(EYE, EYE, 0), "at least one step"),
        (lambda: lanczos(lambda z: SKEW @ z, EYE, 2), "not symmetric"),
        (lambda: lanczos(EYE.expand(2, 4, 4), EYE, 2), "leading dimensions"),
        (lambda: exact_quadrature(lambda z: SKEW @ z, EYE), "not symmetric"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
