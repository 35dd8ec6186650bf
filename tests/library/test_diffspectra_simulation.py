"""Vibrations by differences equal the exact ones, excitations their closed forms, and shipped lines are made again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.diffspectra.data import load_molecules
from library.diffspectra.excitations import EV, HARDNESS, Orbitals, excitations
from library.diffspectra.molecules import ATOMIC_NUMBERS
from library.diffspectra.simulation import Xtb, check_packages, simulate, write_line_lists
from library.diffspectra.vibrations import BOHR, ELECTRON_MASSES, MASSES, WAVENUMBER, relax, vibrations
from library.errors import InputError
from tests.library.springs import STIFFNESS, Springs, SpringTheory

WATER = np.array([[0.0, 0.0, 0.22], [0.0, 1.43, -0.89], [0.0, -1.43, -0.89]])
SHAPES = {
    "water": (np.array([8, 1, 1]), WATER),
    "carbon dioxide": (np.array([6, 8, 8]), np.array([[0.0, 0, 0], [2.2, 0, 0], [-2.2, 0, 0]])),
    "methane": (
        np.array([6, 1, 1, 1, 1]),
        2.06 / np.sqrt(3) * np.array([[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]),
    ),
    "skew": (np.array([6, 8, 7, 1]), np.array([[0.0, 0, 0], [2.3, 0.1, 0], [-0.4, 2.2, 0.9], [0.3, -1, 1.8]])),
}


def exact(surface: Springs, numbers: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavenumbers, IR and Raman with all derivatives by autograd, over modes that are no translation or rotation."""
    at, none = torch.from_numpy(positions), torch.zeros(3).double()
    size = positions.size
    hessian = torch.autograd.functional.hessian(lambda x: surface.energy(x, none), at).reshape(size, size)
    dipole = torch.autograd.functional.jacobian(surface.dipole, at).reshape(3, size)
    tensor = torch.autograd.functional.jacobian(surface.polarisability, at).reshape(3, 3, size)
    masses = torch.tensor([MASSES[int(n)] for n in numbers]).double().repeat_interleave(3)
    values, vectors = torch.linalg.eigh(hessian / (masses[:, None] * masses).sqrt())
    along = vectors / masses.sqrt()[:, None]
    alpha = torch.einsum("ijk,km->mij", tensor, along) * BOHR**2
    xx, yy, zz, xy, yz, zx = (alpha[:, i, j] for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)))
    squares = ((xx - yy) ** 2 + (yy - zz) ** 2 + (zz - xx) ** 2 + 6 * (xy**2 + yz**2 + zx**2)) / 2
    activities = 45 * ((xx + yy + zz) / 3) ** 2 + 7 * squares
    wavenumbers = values.clamp(min=0).div(ELECTRON_MASSES).sqrt() * WAVENUMBER
    return wavenumbers.numpy(), (974.8801 * (dipole @ along).square().sum(0)).numpy(), activities.numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_vibrations_are_the_exact_ones(shape: str) -> None:
    """Degenerate modes mix at will, so their strengths are compared summed."""
    numbers, positions = SHAPES[shape]
    surface = Springs(numbers, positions)
    found = vibrations(surface, numbers, positions)
    linear = shape == "carbon dioxide"
    assert len(found.wavenumbers) == positions.size - (5 if linear else 6)
    wavenumbers, infrared, raman = exact(surface, numbers, positions)
    if linear:  # springs do not resist bending: two of the modes have no frequency
        kept = wavenumbers > 1
        np.testing.assert_allclose(found.wavenumbers[-2:], wavenumbers[kept], rtol=1e-4)
        np.testing.assert_allclose(found.intensities[-2:], infrared[kept], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.activities[-2:], raman[kept], rtol=1e-3, atol=1e-3)
        assert (found.intensities[-2:] * found.activities[-2:]).max() < 1e-3 * found.activities.max()
        return
    real = slice(-len(found.wavenumbers), None)
    np.testing.assert_allclose(found.wavenumbers, wavenumbers[real], rtol=1e-4)
    group = np.unique(np.round(wavenumbers[real], 1), return_inverse=True)[1]
    for mine, theirs in ((found.intensities, infrared[real]), (found.activities, raman[real])):
        np.testing.assert_allclose(np.bincount(group, mine), np.bincount(group, theirs), rtol=2e-3, atol=1e-3)


def test_a_diatomic_is_its_closed_form() -> None:
    numbers, positions = np.array([9, 1]), np.array([[0.0, 0, 0], [0, 0, 1.73]])
    found = vibrations(Springs(numbers, positions), numbers, positions)
    reduced = MASSES[9] * MASSES[1] / (MASSES[9] + MASSES[1])
    expected = np.sqrt(STIFFNESS / (reduced * ELECTRON_MASSES)) * WAVENUMBER
    assert found.wavenumbers == pytest.approx([expected], rel=1e-4)
    moment = (0.2 * np.sqrt(reduced) / MASSES[1] + 0.3 * np.sqrt(reduced) / MASSES[9]) ** 2
    assert found.intensities == pytest.approx([974.8801 * moment], rel=1e-4)


def test_vibrations_do_not_depend_on_orientation() -> None:
    numbers, positions = SHAPES["skew"]
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    one, two = (vibrations(Springs(numbers, at), numbers, at) for at in (positions, positions @ turn + 1))
    for mine, other in zip(one, two, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)


def test_geometries_relax_and_saddle_points_are_refused() -> None:
    numbers, positions = SHAPES["skew"]
    surface = Springs(numbers, positions)
    moved = positions + np.random.default_rng(1).normal(size=positions.shape) * 0.1
    found = relax(surface, moved)
    assert np.abs(surface(found).gradient).max() < 2e-5
    np.testing.assert_allclose(surface.pairs(torch.from_numpy(found)).norm(dim=1), surface.lengths, atol=1e-3)
    with pytest.raises(InputError, match=r"is no minimum: a mode is at -\d+ cm-1"):
        vibrations(surface, numbers, positions * 0.5)


def test_one_excitation_is_its_closed_form() -> None:
    """Two orbitals on two atoms: A = gap + 2 q K q - q_oo J q_vv, and f = 2/3 w |sqrt 2 mu|^2."""
    c, s = np.cos(0.3), np.sin(0.3)
    positions = np.array([[0.0, 0, 0], [0, 0, 2.0]])
    dipoles = np.zeros((3, 2, 2))
    dipoles[2] = [[0, 0.7], [0.7, 0]]
    orbitals = Orbitals(
        np.array([6, 8]), positions, np.array([-0.4, 0.05]), np.array([[c, -s], [s, c]]), np.arange(2), dipoles, 1
    )
    eta = np.array([[HARDNESS[6], (HARDNESS[6] + HARDNESS[8]) / 2], [(HARDNESS[6] + HARDNESS[8]) / 2, HARDNESS[8]]])
    r = np.array([[0, 2.0], [2.0, 0]])
    y, z = 0.566, 1.516
    coulomb, exchange = (r**y + (0.2 * eta) ** -y) ** (-1 / y), (r**z + eta**-z) ** (-1 / z)
    own, other, between = np.array([c * c, s * s]), np.array([s * s, c * c]), np.array([-c * s, c * s])
    energy = 0.45 + 2 * between @ exchange @ between - own @ coulomb @ other
    energies, strengths = excitations(orbitals)
    assert energies == pytest.approx([energy * EV])
    assert strengths == pytest.approx([2 / 3 * energy * 2 * 0.49])


def test_simulated_molecules_are_read_back(tmp_path: Path) -> None:
    found = [simulate(smiles, SpringTheory()) for smiles in ("CCO", "C#N", "C=O", "O")]
    assert [one.smiles for one in found] == ["CCO", "C#N", "C=O", "O"]
    parts = {"train": torch.tensor([2, 0]), "validation": torch.tensor([1]), "test": torch.tensor([3])}
    write_line_lists(tmp_path / "mine.npz", [one.record() for one in found], parts)
    data = load_molecules(str(tmp_path / "mine.npz"))
    assert {name: part.tolist() for name, part in data.parts.items()} == {
        "train": [0, 2],
        "validation": [1],
        "test": [3],
    }
    for index, one in enumerate(found):
        structure = data.atoms.structure(index)
        for name in ("positions", "types", "charges", "bonds"):
            assert torch.equal(getattr(structure, name), getattr(one.structure, name))
        for modality, lines in one.lines.items():
            stored = data.signals[modality](index)
            assert torch.equal(stored.positions, lines.positions)
            assert torch.equal(stored.strengths, lines.strengths)
    with pytest.raises(InputError, match="no simulated molecules"):
        write_line_lists(tmp_path / "none.npz", [], parts)


def test_charged_molecules_are_refused() -> None:
    with pytest.raises(InputError, match=r"has the charge -1; neutral ones alone"):
        simulate("CC(=O)[O-]", SpringTheory())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.diffspectra.simulation.PACKAGES", ("no_such_package", "tblyte"))
    with pytest.raises(InputError, match=r"no_such_package and tblyte are not installed: pip install"):
        check_packages()


@pytest.mark.parametrize("smiles", ["C#C", "C=O", "CCO"])
def test_shipped_lines_are_made_again(smiles: str) -> None:
    """Where the extra `simulate` is installed: the very lines of the shipped sample."""
    pytest.importorskip("tblite")
    pytest.importorskip("pyscf")
    data = load_molecules()
    index = data.smiles.index(smiles)
    found = simulate(smiles, Xtb())
    numbers = torch.tensor(ATOMIC_NUMBERS)[found.structure.types]
    assert torch.equal(numbers, torch.tensor(ATOMIC_NUMBERS)[data.atoms.structure(index).types])
    for modality, places, strengths in (("ir", 0.05, 0.05), ("raman", 0.05, 0.2), ("uv", 0.006, 0.005)):
        lines = data.signals[modality](index)
        torch.testing.assert_close(found.lines[modality].positions, lines.positions, atol=places, rtol=0)
        torch.testing.assert_close(found.lines[modality].strengths, lines.strengths, atol=strengths, rtol=2e-3)
