"""Harmonic vibrations, IR intensities and Raman activities of a molecule, from gradients and dipoles alone.

All of it by finite differences of a `Surface`: the Hessian and the dipole's derivatives from displaced positions, the
polarisability's from gradients in electric fields, since d alpha_ij / d R = - d^2 g / d F_i d F_j. That is 6 n + 19
gradients for n atoms.
"""

from typing import NamedTuple, Protocol

import numpy as np

from library.diffspectra.lines import Lines
from library.errors import InputError

BOHR = 0.529177210903  # angstrom
ELECTRON_MASSES = 1822.888486209  # in an atomic mass unit
WAVENUMBER = 219474.6313632  # cm-1 in a hartree
KM_PER_MOL = 974.8801  # of (e / sqrt(amu))^2
MASSES = {1: 1.00782503, 6: 12.0, 7: 14.00307400, 8: 15.99491462, 9: 18.99840316}  # of the most frequent isotopes
DISPLACEMENT = 0.01  # bohr
FIELD = 0.004  # atomic units, the length of each field
GRADIENT_GOAL, GRADIENT_LIMIT = 2e-5, 2e-4  # hartree / bohr
STEPS = 500
SOFTEST = -20.0  # cm-1: a mode below is a saddle point


class Point(NamedTuple):
    """What a surface gives: energy in hartree, gradient (n, 3) in hartree / bohr, dipole (3,) in e bohr."""

    energy: float
    gradient: np.ndarray
    dipole: np.ndarray


class Surface(Protocol):
    """The energy of a molecule at positions (n, 3) in bohr, in a uniform electric field (3,) in atomic units."""

    def __call__(self, positions: np.ndarray, field: np.ndarray | None = None) -> Point: ...


class Modes(NamedTuple):
    """Vibrations of a molecule, 3 n - 6 or, on a line, 3 n - 5.

    wavenumbers   (modes,) in cm-1; an imaginary one is negative
    intensities   (modes,) of IR in km / mol
    activities    (modes,) of Raman in angstrom^4 / amu
    """

    wavenumbers: np.ndarray
    intensities: np.ndarray
    activities: np.ndarray

    def lines(self) -> dict[str, Lines]:
        """The IR and the Raman lines."""
        import torch

        positions, *strengths = (torch.from_numpy(part).float() for part in self)
        return {name: Lines(positions, part) for name, part in zip(("ir", "raman"), strengths, strict=True)}


def relax(surface: Surface, positions: np.ndarray) -> np.ndarray:
    """Positions (n, 3) in bohr of the minimum near `positions`, by L-BFGS.

    Raises InputError when the largest component of the gradient stays above 2e-4 hartree / bohr.
    """
    from scipy.optimize import minimize

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = surface(flat.reshape(-1, 3))
        return point.energy, point.gradient.ravel()

    options = {"gtol": GRADIENT_GOAL, "ftol": 0.0, "maxiter": STEPS, "maxfun": 2 * STEPS, "maxcor": 30}
    found = minimize(value, positions.ravel(), jac=True, method="L-BFGS-B", options=options)
    if np.abs(found.jac).max() > GRADIENT_LIMIT:
        raise InputError(f"the geometry does not converge: a gradient of {np.abs(found.jac).max():.1e} is left")
    return found.x.reshape(-1, 3)


def vibrations(surface: Surface, numbers: np.ndarray, positions: np.ndarray) -> Modes:
    """The modes at a minimum: positions (n, 3) in bohr of atoms with atomic `numbers` (n,).

    With L the modes over sqrt(mass): A = 974.88 |d mu / d Q|^2, and S = 45 a'^2 + 7 gamma'^2 from the mean and the
    anisotropy of d alpha / d Q. Raises InputError for a mode below -20 cm-1.
    """
    hessian, dipoles = _second_derivatives(surface, positions)
    masses = np.repeat([MASSES[int(number)] for number in numbers], 3)
    scaled = hessian / np.sqrt(masses[:, None] * masses[None])
    inner = _internal(positions, masses)
    values, vectors = np.linalg.eigh(inner.T @ scaled @ inner)
    wavenumbers = np.sign(values) * np.sqrt(np.abs(values) / ELECTRON_MASSES) * WAVENUMBER
    if len(wavenumbers) and wavenumbers[0] < SOFTEST:
        raise InputError(f"the geometry is no minimum: a mode is at {wavenumbers[0]:.0f} cm-1")
    along = (inner @ vectors) / np.sqrt(masses)[:, None]
    intensities = KM_PER_MOL * np.square(along.T @ dipoles).sum(1)
    tensors = np.einsum("kij,km->mij", _polarisability_derivatives(surface, positions), along) * BOHR**2
    mean = np.trace(tensors, axis1=1, axis2=2) / 3
    symmetric = (tensors + tensors.transpose(0, 2, 1)) / 2
    anisotropy = 1.5 * np.square(symmetric - mean[:, None, None] * np.eye(3)).sum((1, 2))
    return Modes(wavenumbers, intensities, 45 * mean**2 + 7 * anisotropy)


def _second_derivatives(surface: Surface, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Hessian (3 n, 3 n) and the dipole's derivatives (3 n, 3), by central differences."""
    size = positions.size
    gradients, dipoles = np.empty((size, size)), np.empty((size, 3))
    for place in range(size):
        ends = []
        for sign in (1, -1):
            moved = positions.copy()
            moved.flat[place] += sign * DISPLACEMENT
            ends.append(surface(moved))
        gradients[place] = (ends[0].gradient - ends[1].gradient).ravel() / (2 * DISPLACEMENT)
        dipoles[place] = (ends[0].dipole - ends[1].dipole) / (2 * DISPLACEMENT)
    return (gradients + gradients.T) / 2, dipoles


def _polarisability_derivatives(surface: Surface, positions: np.ndarray) -> np.ndarray:
    """d alpha_ij / d R, (3 n, 3, 3), by differences of gradients in 18 fields and in none."""

    def gradient(*components: tuple[int, float]) -> np.ndarray:
        field = np.zeros(3)
        for axis, value in components:
            field[axis] = value
        return surface(positions, field).gradient.ravel()

    none = surface(positions).gradient.ravel()
    found = np.empty((positions.size, 3, 3))
    for i in range(3):
        found[:, i, i] = -(gradient((i, FIELD)) + gradient((i, -FIELD)) - 2 * none) / FIELD**2
        for j in range(i):
            step = FIELD / np.sqrt(2)
            mixed = sum(
                first * second * gradient((i, first * step), (j, second * step))
                for first in (1, -1)
                for second in (1, -1)
            )
            found[:, i, j] = found[:, j, i] = -mixed / (4 * step**2)
    return found


def _internal(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """An orthonormal basis (3 n, modes) of mass-weighted displacements without translations and rotations."""
    weights = masses.reshape(-1, 3)[:, :1]
    centred = positions - (weights * positions).sum(0) / weights.sum()
    outer = [np.tile(axis, (len(positions), 1)) for axis in np.eye(3)]
    outer += [np.cross(axis, centred) for axis in np.eye(3)]
    moves = np.stack([(np.sqrt(weights) * part).ravel() for part in outer], axis=1)
    left, values, _ = np.linalg.svd(moves, full_matrices=True)
    return left[:, int((values > 1e-2 * values[0]).sum()) :]
