"""Spectra on any axis come onto the grid with their area and place, and what is wrong with one is said."""

import io

import numpy as np
import pytest
import torch

from library.diffspectra.broadening import broaden
from library.diffspectra.entries import Entry, checked, read_entries
from library.diffspectra.lines import MODALITIES, POINTS, Lines, grid
from library.diffspectra.measured import EV_NM, on_grid
from library.errors import InputError

BAND = Lines(torch.tensor([1000.0, 1700.0, 2950.0]), torch.tensor([50.0, 120.0, 30.0]))
ON_GRID = broaden([BAND], "ir")[0].double().numpy()
GRID = grid("ir").double().numpy()


def band(x: np.ndarray) -> np.ndarray:
    return np.interp(x, GRID, ON_GRID)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_spectrum_on_the_grid_stays_as_it_is(modality: str) -> None:
    y = np.random.default_rng(0).random(POINTS[modality]) ** 8
    found = on_grid(modality, y)
    np.testing.assert_allclose(found.intensities.numpy(), y.astype(np.float32))
    assert found.warnings == []
    also = on_grid(modality, y[::-1], grid(modality).numpy()[::-1])
    np.testing.assert_allclose(also.intensities.numpy(), y, atol=1e-4)


@pytest.mark.parametrize("spacing", [0.1, 0.5, 2.0])
def test_finer_and_coarser_points_give_the_same_bands(spacing: float) -> None:
    x = np.arange(495, 4005, spacing)
    found = on_grid("ir", band(x), x).intensities.numpy()
    np.testing.assert_allclose(found[1:-1], ON_GRID[1:-1], atol=0.03 * ON_GRID.max())
    assert found[1:-1].sum() == pytest.approx(ON_GRID[1:-1].sum(), rel=2e-3)


def test_axes_in_other_units_are_the_same_places() -> None:
    x = np.arange(499, 4002, 0.5)
    plain = on_grid("ir", band(x), x).intensities
    torch.testing.assert_close(on_grid("ir", band(x), 1e4 / x, axis="um").intensities, plain, rtol=1e-5, atol=1e-5)
    energies = np.linspace(0.9, 15.1, 4000)
    peak = np.exp(-((energies - 6.0) ** 2) / 0.02)
    in_ev = on_grid("uv", peak, energies).intensities
    torch.testing.assert_close(
        on_grid("uv", peak, EV_NM / energies, axis="nm").intensities, in_ev, rtol=1e-5, atol=1e-5
    )
    assert float(grid("uv")[in_ev.argmax()]) == pytest.approx(6.0, abs=0.011)


def test_transmittance_becomes_absorbance() -> None:
    absorbance = 0.8 * ON_GRID / ON_GRID.max()
    fraction = on_grid("ir", 10**-absorbance, values="transmittance").intensities
    percent = on_grid("ir", 100 * 10**-absorbance, values="percent transmittance").intensities
    np.testing.assert_allclose(fraction.numpy(), absorbance, atol=1e-6)
    torch.testing.assert_close(percent, fraction)


def test_an_area_sets_the_scale() -> None:
    for factor in (1e-3, 1.0, 50.0):
        found = on_grid("uv", factor * np.exp(-((grid("uv").numpy() - 7) ** 2)), area=3.0).intensities
        assert float(found.double().sum()) * 0.02 == pytest.approx(3.0, rel=1e-5)


def test_doubts_are_warnings() -> None:
    upside_down = on_grid("ir", 10 ** (-ON_GRID), values="absorbance")
    assert "transmittance" in upside_down.warnings[0]
    noise = ON_GRID.copy()
    noise[10] = -0.001 * noise.max()
    found = on_grid("ir", noise)
    assert found.warnings == ["ir: 1 points below zero were set to zero"]
    assert float(found.intensities.min()) == 0
    x = np.arange(600, 3600.0)
    found = on_grid("ir", band(x), x)
    assert "14% of the grid was not measured" in found.warnings[0]
    assert not found.intensities[:100].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ir", [1.0] * 700), r"700 points; the grid has 3501, 500 to 4000 cm-1 by 1. Give x"),
        (("uv", [1.0] * 3501), "3501 points; the grid has 701, 1 to 15 eV by 0.02"),
        (("nmr", [1.0]), "no modality 'nmr'"),
        (("ir", [0.0] * 3501), "is zero everywhere"),
        (("ir", [float("nan")] * 3501), "finite numbers"),
        (("ir", []), "ir: a list of finite numbers is needed"),
        (("ir", ["a"] * 3501), "ir: a list of finite numbers is needed"),
        (("ir", [1.0] * 3, ["a"] * 3), "ir: a list of finite numbers is needed"),
        (("ir", [-1.0, *[1.0] * 3500]), "falls to -1"),
        (("ir", [1.0, 2.0], [500.0]), "1 places for 2 values"),
        (("ir", [1.0] * 3, [500.0, 700.0, 600.0]), "rise or fall throughout; it does not at point 2"),
        (("ir", [1.0] * 2, [500.0, 1000.0]), "cover 14% of the grid 500 to 4000; at least 50%"),
    ],
)
def test_bad_spectra_are_one_clear_line(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_grid(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": list(range(3501)), "axis": "THz"}, "x in 'THz'; there are cm-1, um"),
        ({"x": list(range(3501)), "axis": "um"}, "not positive"),
        ({"values": "reflectance"}, "there are intensity, absorbance, transmittance, percent transmittance"),
        ({"area": -1.0}, "area -1; it must be positive and finite"),
        ({"area": float("nan")}, "area nan; it must be"),
        ({"values": "transmittance"}, "transmittances from 2 to 2; they lie between 0 and 1"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_grid("ir", [2.0] * 3501, **options)


def test_no_transmittance_is_refused() -> None:
    with pytest.raises(InputError, match="ir: a list of finite numbers is needed"):
        on_grid("ir", [], values="transmittance")


def entries_of(columns: str, *rows: str) -> list[Entry]:
    text = "\n".join((f"molecule,modality,x,y,{columns}", *rows))
    return [checked(entry) for entry in read_entries(io.BytesIO(text.encode()), "a.csv")]


def test_tables_say_whether_a_spectrum_is_absolute() -> None:
    rows = [f"{word},ir,{x},1,{word}" for word in ("no", "yes", "False", "true") for x in (500, 600)]
    found = [entry.spectra["ir"].absolute for entry in entries_of("absolute", *rows)]
    assert found == [False, True, False, True]


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("atoms", ("A,ir,500,1,5.7", "A,ir,501,1,5.7"), "atoms: .*integer"),
        ("atoms", ("A,ir,500,1,5", "A,uv,2,1,7"), "atoms is both 5 and 7 for molecule A"),
        ("axis", ("A,ir,500,1,cm-1", "A,ir,501,1,um"), "axis is both cm-1 and um for molecule A"),
        ("absolute", ("A,ir,500,1,maybe",), "absolute: .*boolean"),
        ("atoms", ("A,ir,500,1,5", ",ir,501,1,5"), "row 2 has no molecule"),
        ("atoms", ("A,,500,1,5", "A,ir,501,1,5"), "row 1 has no modality"),
    ],
)
def test_tables_that_do_not_fit_are_refused(columns: str, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        entries_of(columns, *rows)
