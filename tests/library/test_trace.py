"""Trace estimates: exactness where theory gives it, no bias, honest standard errors."""

import doctest
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.spectral import density, trace
from library.spectral.trace import (
    Estimate,
    block_traces,
    hutch_plus_plus,
    hutchinson,
    random_probes,
    xtrace,
)
from tests.library.matrices import generator, spike_and_bulk

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hessian" / "matrix_methods.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name])).double()


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return a + a.mT


@pytest.mark.parametrize("module", [trace, density])
def test_docstring_examples_run(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


@given(n=st.integers(1, 12), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_scaled_basis_vectors_are_exact(n, seed):
    a = symmetric(n, seed)
    basis = n**0.5 * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(hutchinson(a, basis).value, a.trace(), rtol=1e-12, atol=1e-12)


@given(n=st.integers(1, 12), count=st.integers(2, 6), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_rademacher_is_exact_for_diagonal_operators_without_spread(n, count, seed):
    diagonal = torch.randn(n, generator=generator(seed), dtype=torch.float64)
    estimate = hutchinson(lambda z: diagonal[:, None] * z, random_probes(n, count, generator=generator(seed)))
    torch.testing.assert_close(estimate.value, diagonal.sum(), rtol=1e-12, atol=1e-12)
    assert estimate.standard_error < 1e-12


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_unbiased_with_the_theoretical_variance(kind):
    a = symmetric(8)
    spread = a if kind == "gaussian" else a - a.diag().diag()
    count = 40_000
    estimate = hutchinson(a, random_probes(8, count, generator=generator(), kind=kind))
    theory = (2 * spread.square().sum() / count).sqrt()
    torch.testing.assert_close(estimate.standard_error, theory, rtol=0.05, atol=0)
    assert (estimate.value - a.trace()).abs() < 4 * theory


def test_error_falls_as_the_square_root_of_the_probes():
    a, sizes = symmetric(12), (16, 64, 256)
    errors = [
        (hutchinson(a, random_probes(12, p, generator=generator(1), batch=(400,))).value - a.trace())
        .square()
        .mean()
        .sqrt()
        for p in sizes
    ]
    for few, many in itertools.pairwise(errors):
        assert few / many == pytest.approx(2, rel=0.15)


def test_standard_error_covers_the_truth_as_often_as_it_should():
    a = symmetric(12)
    estimate = hutchinson(a, random_probes(12, 64, generator=generator(2), batch=(1000,)))
    covered = ((estimate.value - a.trace()).abs() < 2 * estimate.standard_error).double().mean()
    assert covered == pytest.approx(0.95, abs=0.025)


def test_batched_operators_equal_single_ones():
    a = torch.stack([symmetric(5, 0), symmetric(5, 1)])
    probes = random_probes(5, 6, generator=generator())
    both = hutchinson(a, probes)
    assert both.value.shape == (2,)
    for i in range(2):
        torch.testing.assert_close(both.value[i], hutchinson(a[i], probes).value)
        torch.testing.assert_close(both.standard_error[i], hutchinson(a[i], probes).standard_error)


def test_hutch_plus_plus_is_exact_up_to_the_sketched_rank():
    factor = torch.randn(40, 5, generator=generator(), dtype=torch.float64)
    a = factor @ factor.mT
    estimate = hutch_plus_plus(a, random_probes(40, 10, generator=generator(1)))
    torch.testing.assert_close(estimate.value, a.trace(), rtol=1e-12, atol=0)
    assert estimate.standard_error < 1e-10 * a.trace()


def test_hutch_plus_plus_is_unbiased_and_beats_hutchinson_on_a_spike_and_bulk():
    n = 60
    a = spike_and_bulk(n)
    plus = hutch_plus_plus(a, random_probes(n, 12, generator=generator(1), batch=(300,)))
    plain = hutchinson(a, random_probes(n, 18, generator=generator(1), batch=(300,)))  # as many products
    error = plus.value - a.trace()
    assert error.mean().abs() < 4 * error.std() / 300**0.5
    assert error.std() * 10 < (plain.value - a.trace()).std()


def test_golden_estimates():
    a = golden("A")
    terms = (golden("probes") * (golden("probes") @ a)).sum(-1)
    torch.testing.assert_close(terms, golden("hutchinson_terms"), rtol=1e-8, atol=0)
    plus = hutch_plus_plus(a, torch.cat([golden("S"), golden("G")], -1))
    torch.testing.assert_close(plus.value, golden("hutchpp"), rtol=1e-8, atol=0)
    found = xtrace(a, golden("Omega"))
    torch.testing.assert_close(found.value, golden("xtrace"), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.standard_error, golden("xtrace_stderr"), rtol=1e-8, atol=0)


@given(n=st.integers(3, 20), count=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_xtrace_is_the_mean_over_the_probes_left_out(n, count, seed):
    a, probes = symmetric(n, seed), random_probes(n, min(n, count), generator=generator(seed), kind="gaussian")
    terms = []
    for i in range(probes.shape[1]):
        q = torch.linalg.qr(a @ torch.cat([probes[:, :i], probes[:, i + 1 :]], -1)).Q
        rest = probes[:, i] - q @ (q.mT @ probes[:, i])
        terms.append((q.mT @ a @ q).trace() + rest @ a @ rest)
    found = xtrace(a, probes)
    size = float(a.norm()) * n
    torch.testing.assert_close(found.value, torch.stack(terms).mean(), rtol=1e-8, atol=1e-9 * size)
    torch.testing.assert_close(
        found.standard_error, Estimate.of_samples(torch.stack(terms)).standard_error, rtol=1e-6, atol=1e-8 * size
    )


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_xtrace_is_exact_up_to_one_rank_less_than_its_probes(rank):
    factor = torch.randn(40, rank, generator=generator(), dtype=torch.float64)
    a = factor @ factor.mT
    estimate = xtrace(a, random_probes(40, 6, generator=generator(1)))
    torch.testing.assert_close(estimate.value, a.trace(), rtol=1e-11, atol=1e-12)
    assert estimate.standard_error <= 1e-10 * a.trace()


def test_xtrace_is_unbiased_with_an_honest_error_and_beats_hutchinson_on_a_spike_and_bulk():
    n = 60
    a = spike_and_bulk(n)
    found = xtrace(a, random_probes(n, 9, generator=generator(1), batch=(400,)))
    plain = hutchinson(a, random_probes(n, 18, generator=generator(1), batch=(400,)))  # as many products
    error = found.value - a.trace()
    assert error.mean().abs() < 4 * error.std() / 400**0.5
    assert error.std() * 10 < (plain.value - a.trace()).std()
    assert ((error.abs() < 3 * found.standard_error).double().mean()) > 0.9


def test_block_traces_are_unbiased_add_up_and_have_the_theoretical_variance():
    a, sizes, count = symmetric(9), [2, 4, 3], 40_000
    probes = random_probes(9, count, generator=generator())
    found = block_traces(a, probes, sizes)
    parts = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    exact = torch.stack([a[i:j, i:j].trace() for i, j in parts])
    off = a - a.diag().diag()
    own = torch.stack([2 * off[i:j, i:j].square().sum() for i, j in parts])
    shared = torch.stack([a[i:j].square().sum() - a[i:j, i:j].square().sum() for i, j in parts])
    theory = ((own + shared) / count).sqrt()
    torch.testing.assert_close(found.standard_error, theory, rtol=0.05, atol=0)
    assert ((found.value - exact).abs() < 4 * theory).all()
    torch.testing.assert_close(found.value.sum(), hutchinson(a, probes).value)


def test_one_product_serves_all_blocks():
    calls = []
    block_traces(lambda z: (calls.append(1), z)[1], torch.ones(6, 5), [1, 2, 3])
    assert calls == [1]


def test_one_probe_admits_that_its_error_is_unknown():
    estimate = Estimate.of_samples(torch.tensor([3.0]))
    assert estimate.value == 3
    assert estimate.standard_error.isnan()


def test_same_seed_same_probes_and_kinds_are_as_named():
    first, again = (random_probes(50, 4, generator=generator(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_probes(0, 3, generator=generator()), "at least one vector"),
        (lambda: random_probes(3, 3, generator=generator(), kind="uniform"), "unknown kind"),
        (lambda: hutchinson(torch.eye(3), torch.ones(4, 2)), "cannot act on vectors of length 4"),
        (lambda: hutchinson(lambda z: z[:2], torch.ones(4, 2)), "must keep the shape"),
        (lambda: hutch_plus_plus(torch.eye(4), torch.ones(4, 3)), "even number of probes"),
        (lambda: hutch_plus_plus(torch.eye(4), torch.ones(4, 10)), "from 4 to 8"),
        (lambda: xtrace(torch.eye(4), torch.ones(4, 1)), "from 2 to 4 probes"),
        (lambda: xtrace(torch.eye(4), torch.ones(4, 5)), "from 2 to 4 probes"),
        (lambda: block_traces(torch.eye(4), torch.ones(4, 2), [1, 2]), "do not make up the 4 rows"),
        (lambda: block_traces(torch.eye(4), torch.ones(4, 2), [4, 0]), "do not make up"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
