"""Extreme eigenpairs: the true ones within their residuals, repeated ones as often as they occur, warm starts cheap."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.spectral.eigen import extreme_eigenpairs
from library.spectral.trace import random_probes
from tests.library.matrices import generator, with_spectrum

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hessian" / "matrix_methods.npz")


def start(n: int, columns: int, seed: int = 5) -> torch.Tensor:
    return random_probes(n, columns, generator=generator(seed), kind="gaussian")


def spike_and_bulk(n: int = 300, seed: int = 0) -> torch.Tensor:
    """Like a Hessian's: a few outliers, a crowd at zero, small negative values."""
    bulk = 0.05 * torch.randn(n - 5, generator=generator(seed), dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([3.0, 2.5, 2.4, 1.0, 0.8], dtype=torch.float64)])


@given(
    n=st.integers(2, 80),
    largest=st.integers(0, 4),
    smallest=st.integers(0, 4),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_both_ends_are_found_within_their_residuals(n, largest, smallest, columns, seed):
    largest, smallest, columns = min(largest + 1, n), min(smallest, n - min(largest + 1, n)), min(columns, n)
    spectrum = torch.randn(n, generator=generator(seed), dtype=torch.float64).sort(descending=True).values
    a = with_spectrum(spectrum, seed)
    pairs = extreme_eigenpairs(
        a, start(n, columns), largest=largest, smallest=smallest, generator=generator(), tolerance=1e-9
    )
    expected = torch.cat([spectrum[:largest], spectrum[n - smallest :]])
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-8 * float(spectrum.abs().max()))
    true = torch.linalg.vector_norm(a @ pairs.vectors - pairs.vectors * pairs.values, dim=0)
    assert (true <= pairs.residuals + 1e-10 * spectrum.abs().max()).all()
    identity = torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(pairs.vectors.mT @ pairs.vectors, identity, rtol=0, atol=1e-10)


def test_every_value_lies_within_its_residual_of_an_eigenvalue_even_when_stopped_early():
    spectrum = spike_and_bulk()
    a = with_spectrum(spectrum)
    pairs = extreme_eigenpairs(a, start(300, 2), largest=6, smallest=3, generator=generator(), limit=30)
    assert not pairs.converged.all()
    nearest = (pairs.values[:, None] - spectrum).abs().amin(1)
    assert (nearest <= pairs.residuals + 1e-13).all()
    assert pairs.products <= 32


@pytest.mark.parametrize("columns", [3, 5])
def test_a_repeated_eigenvalue_is_found_as_often_as_it_occurs(columns):
    spectrum = torch.cat([torch.full((3,), 7.0), torch.linspace(-1, 1, 197)]).double()
    pairs = extreme_eigenpairs(with_spectrum(spectrum), start(200, columns), largest=4, generator=generator())
    torch.testing.assert_close(pairs.values, torch.tensor([7.0, 7.0, 7.0, 1.0]).double(), rtol=0, atol=1e-5)


def test_an_invariant_start_goes_on_in_new_directions():
    a = torch.diag(torch.arange(1.0, 101, dtype=torch.float64))
    first = torch.zeros(100, 1, dtype=torch.float64)
    first[3] = 1
    pairs = extreme_eigenpairs(a, first, largest=2, generator=generator())
    torch.testing.assert_close(pairs.values, torch.tensor([100.0, 99.0]).double(), rtol=1e-6, atol=0)
    null = extreme_eigenpairs(lambda v: 0 * v, start(100, 2), largest=3, generator=generator())
    assert (null.values == 0).all()
    assert null.converged.all()


def test_a_warm_start_costs_a_fraction_and_still_sees_what_is_new():
    spectrum = spike_and_bulk()
    a, noise = with_spectrum(spectrum), torch.randn(300, 300, generator=generator(9), dtype=torch.float64)
    near = a + 1e-4 * (noise + noise.mT)
    options = {"largest": 5, "tolerance": 1e-5}
    cold = extreme_eigenpairs(near, start(300, 5), generator=generator(), **options)
    known = extreme_eigenpairs(a, start(300, 5), generator=generator(), **options)
    warm = extreme_eigenpairs(near, torch.cat([known.vectors, start(300, 1)], 1), generator=generator(), **options)
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-6, atol=0)
    assert warm.products < 0.7 * cold.products
    new = torch.linalg.qr(start(300, 1, 8)).Q
    grown = near + 9 * new @ new.mT
    seen = extreme_eigenpairs(grown, torch.cat([known.vectors, start(300, 1)], 1), generator=generator(), **options)
    torch.testing.assert_close(seen.values, torch.linalg.eigvalsh(grown).flip(0)[:5], rtol=1e-6, atol=0)


def test_a_small_basis_restarts_and_finds_the_same():
    a = with_spectrum(spike_and_bulk())
    wide = extreme_eigenpairs(a, start(300, 2), largest=5, smallest=1, generator=generator())
    narrow = extreme_eigenpairs(a, start(300, 2), largest=5, smallest=1, generator=generator(), basis=12)
    torch.testing.assert_close(narrow.values, wide.values, rtol=1e-5, atol=1e-6)
    assert narrow.converged.all()


def test_golden_outliers():
    a = torch.from_numpy(GOLDEN["A"])
    count = int(GOLDEN["n_outliers"])
    pairs = extreme_eigenpairs(a, start(60, 2), largest=count, generator=generator(), tolerance=1e-8)
    expected = torch.from_numpy(GOLDEN["eigs"]).flip(0)[:count]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-8, atol=0)


def test_float32_reaches_its_own_precision():
    a = with_spectrum(spike_and_bulk()).float()
    pairs = extreme_eigenpairs(a, start(300, 3).float(), largest=3, generator=generator(), tolerance=1e-4)
    torch.testing.assert_close(pairs.values, torch.tensor([3.0, 2.5, 2.4]), rtol=1e-5, atol=0)


def test_a_tolerance_of_its_own_does_not_look_at_the_other_end():
    a = torch.diag(torch.cat([torch.linspace(0, 1, 199), torch.tensor([-300.0])]).double())
    options = {"generator": generator(), "tolerance": 1e-3}
    alone, shared = (extreme_eigenpairs(a, start(200, 1), own=own, **options) for own in (True, False))
    assert alone.converged.all()
    assert alone.residuals[0] <= 1e-3 * alone.values[0] < shared.residuals[0]
    assert float(alone.values[0]) == pytest.approx(1, rel=1e-3)


A = torch.eye(100, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extreme_eigenpairs(A, start(100, 2), largest=0, generator=generator()), "0 largest and 0 smallest"),
        (lambda: extreme_eigenpairs(A, start(100, 2), largest=101, generator=generator()), "of 100 rows"),
        (lambda: extreme_eigenpairs(A, start(100, 2), basis=4, generator=generator()), "at least 5"),
        (lambda: extreme_eigenpairs(A, 0 * start(100, 2), generator=generator()), "zero or dependent"),
        (lambda: extreme_eigenpairs(A, start(100, 1).repeat(1, 2), generator=generator()), "zero or dependent"),
        (lambda: extreme_eigenpairs(A.roll(1, 0), start(100, 2), generator=generator()), "not symmetric"),
        (lambda: extreme_eigenpairs(A * float("nan"), start(100, 2), generator=generator()), "not symmetric"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_neither_lengths_of_start_columns_nor_many_rows_make_them_dependent():
    diagonal = torch.linspace(0, 1, 200_000)
    diagonal[:3] = torch.tensor([5.0, 4.0, 3.0])
    block = torch.randn(len(diagonal), 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0])
    found = extreme_eigenpairs(lambda x: diagonal[:, None] * x, block, largest=3, generator=generator(), tolerance=1e-3)
    assert found.values.tolist() == pytest.approx([5.0, 4.0, 3.0], rel=1e-3)
