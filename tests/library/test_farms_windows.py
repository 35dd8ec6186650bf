"""Windows and blocks against published spectra, by direct slicing, and the invariances that they have or lack."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.farms import windows as windows_module
from library.farms.windows import block_spectra, ladder, slice_spectra, window_grid, window_spectra
from library.spectral.tails import fit_tail, squared_singular_values

GOLDEN = Path(__file__).parents[1] / "golden" / "farms"
RULES = ("median", "fixfinger")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "alphas.npz"))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_published_spectra_and_exponents_of_linear_layers(golden, setting):
    rows, ratio, ops = golden["windows_rows_Q_ops"][setting]
    for i in range(5):
        weight = torch.from_numpy(golden[f"W{i}"])
        grid = window_grid(tuple(weight.shape), window=int(rows), ratio=float(ratio), ops=int(ops))
        spectra = window_spectra(weight, grid)
        pooled = spectra.flatten().sort().values
        assert len(pooled) == grid.count * min(grid.rows, grid.columns)
        assert len(pooled) == golden[f"farms{setting}_n_eigs_{i}"]
        kept = pooled if len(pooled) <= 600 else pooled[:: len(pooled) // 128]
        expected = torch.from_numpy(golden[f"farms{setting}_eigs_{i}"]).double()
        assert (kept - expected).abs().max() < 1e-4 * pooled[-1]
        assert float(pooled.sum() / pooled[-1]) == pytest.approx(golden[f"farms{setting}_stable_rank"][i], rel=1e-4)
        for rule in (*RULES, "ks") if setting == 0 else RULES:
            fit = fit_tail(pooled, rule)
            if rule == "median" or golden[f"farms{setting}_{rule}_stable"][i]:
                tolerance = 2e-4 if rule == "median" else 1e-3
                assert float(fit.alpha) == pytest.approx(golden[f"farms{setting}_{rule}_alpha"][i], abs=tolerance)
                assert float(fit.ks_distance) == pytest.approx(golden[f"farms{setting}_{rule}_D"][i], abs=5e-4)


def test_published_spectrum_of_a_fixed_stride(golden):
    rows, ratio, step = golden["step_mode_params"]
    weight = torch.from_numpy(golden["W0"])
    spectra = window_spectra(weight, window_grid((128, 128), window=int(rows), ratio=float(ratio), step=int(step)))
    assert spectra.numel() == golden["step_mode_n_eigs"]
    assert float(fit_tail(spectra.flatten()).alpha) == pytest.approx(golden["step_mode_median_alpha"][0], abs=2e-4)


def test_published_spectra_and_exponents_of_convolutions():
    golden = np.load(GOLDEN / "conv_alphas.npz")
    for i in range(4):
        weight = torch.from_numpy(golden[f"W{i}"])
        blocks, plain = block_spectra(weight), slice_spectra(weight)
        expected = torch.from_numpy(golden[f"farms_eigs_{i}"]).double()
        found = blocks.flatten(1).sort(-1).values
        assert (found - expected.reshape(found.shape).sort(-1).values).abs().max() < 1e-4 * expected.max()
        for rule in RULES:
            alpha = float(fit_tail(blocks.flatten(1), rule).alpha.mean())
            assert alpha == pytest.approx(golden[f"farms_Q1_{rule}_alpha_{i}"][0], abs=1e-3)
            alpha = float(fit_tail(plain.flatten(), rule).alpha)
            assert alpha == pytest.approx(golden[f"plain_{rule}_alpha_{i}"][0], abs=1e-3)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.integers(2, 20),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(2, 7),
    st.booleans(),
)
def test_every_window_lies_in_the_matrix_and_is_where_the_grid_says(shape, window, ratio, ops, by_step):
    grid = window_grid(shape, window=window, ratio=ratio, ops=ops, step=ops if by_step else None)
    assert grid.columns == int(grid.rows * ratio)
    assert (grid.row_count - 1) * grid.row_step + grid.rows <= shape[0]
    assert (grid.column_count - 1) * grid.column_step + grid.columns <= shape[1]
    weight = gaussian(*shape)
    expected = torch.stack(
        [
            squared_singular_values(weight[r : r + grid.rows, c : c + grid.columns])
            for r in range(0, grid.row_count * grid.row_step, grid.row_step)
            for c in range(0, grid.column_count * grid.column_step, grid.column_step)
        ]
    )
    assert torch.allclose(window_spectra(weight, grid), expected, rtol=1e-9, atol=1e-12)


def test_the_batch_does_not_change_the_spectra(monkeypatch):
    weight = gaussian(50, 70)
    grid = window_grid((50, 70), window=20, ops=4)
    together = window_spectra(weight, grid)
    monkeypatch.setattr(windows_module, "BATCH_BYTES", 1)
    assert torch.allclose(window_spectra(weight, grid), together, rtol=1e-12)


def test_a_window_as_large_as_a_square_matrix_is_plain():
    weight = gaussian(48, 48)
    for ops in (2, 5, 15):
        grid = window_grid((48, 48), window=100, ops=ops)
        assert grid.count == 1
        assert torch.equal(window_spectra(weight, grid)[0], squared_singular_values(weight))
    pointwise = weight[:, :, None, None]
    assert torch.equal(block_spectra(pointwise)[0], slice_spectra(pointwise))


def test_square_windows_see_the_transpose_alike_and_permuted_rows_differently():
    weight = gaussian(60, 90)
    grid, turned = window_grid((60, 90), window=30, ops=6), window_grid((90, 60), window=30, ops=6)
    pooled = window_spectra(weight, grid).flatten()
    assert torch.allclose(pooled.sort().values, window_spectra(weight.mT.contiguous(), turned).flatten().sort().values)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert abs(float(fit_tail(pooled).alpha - fit_tail(window_spectra(weight[order], grid).flatten()).alpha)) > 1e-4


def test_the_bias_of_the_shape_is_gone():
    plain, farms = [], []
    for shape in ((256, 256), (256, 64), (64, 256), (512, 64)):
        weight = gaussian(*shape, seed=sum(shape))
        plain.append(float(fit_tail(squared_singular_values(weight)).alpha))
        spectra = window_spectra(weight, window_grid(shape, window=64, ops=6))
        farms.append(float(fit_tail(spectra.flatten()).alpha))
    assert max(plain) - min(plain) > 1.5
    assert max(farms) - min(farms) < 0.1


def test_overlaps_are_the_shared_areas():
    grid = window_grid((20, 26), window=10, ratio=1.2, ops=3)
    marks = torch.zeros(grid.count, 20, 26)
    for number in range(grid.count):
        r, c = number // grid.column_count * grid.row_step, number % grid.column_count * grid.column_step
        marks[number, r : r + grid.rows, c : c + grid.columns] = 1
    flat = marks.flatten(1).double()
    overlaps = torch.kron(*grid.overlaps())
    assert torch.allclose(overlaps, flat @ flat.mT / (grid.rows * grid.columns))
    assert float(torch.linalg.eigvalsh(overlaps).min()) > -1e-12


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.floats(0.3, 3))
def test_a_window_is_the_largest_that_fits_with_its_ratio(rows, columns, window, ratio):
    fitting = [n for n in range(1, min(window, rows, columns) + 1) if 1 <= int(n * ratio) <= columns]
    if fitting:
        assert window_grid((rows, columns), window=window, ratio=ratio).rows == fitting[-1]


def test_windows_of_uneven_ratio_that_fit_are_kept():
    for shape, window, ratio in (((64, 64), 43, 1.5), ((64, 16), 11, 1.5), ((100, 33), 30, 1.1)):
        grid = window_grid(shape, window=window, ratio=ratio)
        assert (grid.rows, grid.columns) == (window, int(window * ratio))


def test_the_ladder_ends_at_what_was_asked():
    assert list(ladder(15)) == [3, 5, 9, 15]
    assert list(ladder(3)) == [3]
    assert list(ladder(2)) == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_grid((10, 10), window=0), "window >= 1"),
        (lambda: window_grid((10, 10), window=5, ratio=0), "ratio > 0"),
        (lambda: window_grid((10, 10), window=5, ratio=float("inf")), "finite ratio > 0"),
        (lambda: window_grid((3, 4, 5), window=3), r"\(rows, columns\), got the shape \(3, 4, 5\)"),
        (lambda: block_spectra(torch.ones(4, 4, 3, 3), float("inf")), "must be positive and finite"),
        (lambda: window_grid((10, 10), window=5, ops=1), "ops >= 2"),
        (lambda: window_grid((10, 10), window=5, step=0), "step >= 1"),
        (lambda: window_grid((10, 10), window=5, ratio=50), "no window of ratio 50"),
        (lambda: window_grid((10, 10), window=5, ratio=0.01), "no window of ratio 0.01"),
        (lambda: block_spectra(torch.ones(4, 4, 3, 3), 0), "must be positive"),
        (lambda: block_spectra(torch.ones(4, 4, 3, 3), 0.01), "no block of ratio 0.01"),
    ],
)
def test_windows_that_cannot_be_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
