"""Electronic excitations by the simplified Tamm-Dancoff approximation, from orbitals.

    A_(ia, jb) = delta_ij delta_ab (e_a - e_i) + 2 q_ia G^K q_jb - q_ij G^J q_ab

with transition charges q by Loewdin's partition and damped Coulomb and exchange kernels between atoms,

    G^J = (R^y + (a_x eta)^-y)^(-1 / y),  y = 0.20 + 1.83 a_x,      G^K = (R^z + eta^-z)^(-1 / z),  z = 1.42 + 0.48 a_x,

eta the mean hardness of two atoms, a_x the functional's share of exact exchange. Configurations above 0.6 hartree are
left out, as they were for the shipped line lists.
Source: Grimme, "A simplified Tamm-Dancoff density functional approach for the electronic excitation spectra of very
large molecules", 2013.
"""

from typing import NamedTuple

import numpy as np

EV = 27.211386245988  # in a hartree
EXACT_EXCHANGE = 0.20  # of B3LYP
HARDNESS = {1: 0.47259, 6: 0.42195, 7: 0.50438, 8: 0.58692, 9: 0.66931}  # hartree
CONFIGURATIONS = 0.6  # hartree, up to which a configuration's own energy A_(ia, ia) takes part
HIGHEST = 15.2  # eV
LEAST_STRENGTH = 1e-4


class Orbitals(NamedTuple):
    """A closed shell.

    numbers    (atoms,) atomic numbers
    positions  (atoms, 3), bohr
    energies   (orbitals,), hartree, rising
    orthogonal (functions, orbitals): S^(1/2) C
    owner      (functions,), the atom of each basis function
    dipoles    (3, orbitals, orbitals), e bohr
    occupied   how many orbitals are
    """

    numbers: np.ndarray
    positions: np.ndarray
    energies: np.ndarray
    orthogonal: np.ndarray
    owner: np.ndarray
    dipoles: np.ndarray
    occupied: int


def excitations(orbitals: Orbitals) -> tuple[np.ndarray, np.ndarray]:
    """Singlet energies in eV up to 15.2 and oscillator strengths from 1e-4, f = 2/3 w |sqrt(2) sum X_ia mu_ia|^2."""
    n, atoms = orbitals.occupied, len(orbitals.numbers)
    full, empty = orbitals.orthogonal[:, :n], orbitals.orthogonal[:, n:]
    coulomb, exchange = _kernels(orbitals.numbers, orbitals.positions)

    def charges(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(atoms, left, right)."""
        found = np.zeros((atoms, left.shape[1], right.shape[1]))
        for atom in range(atoms):
            own = orbitals.owner == atom
            found[atom] = left[own].T @ right[own]
        return found

    between = charges(full, empty).reshape(atoms, -1)
    matrix = 2 * between.T @ (exchange @ between)
    shared = np.einsum("Aij,AB,Bab->iajb", charges(full, full), coulomb, charges(empty, empty), optimize=True)
    matrix -= shared.reshape(matrix.shape)
    gaps = (orbitals.energies[None, n:] - orbitals.energies[:n, None]).ravel()
    matrix[np.diag_indices_from(matrix)] += gaps
    chosen = np.flatnonzero(matrix.diagonal() <= CONFIGURATIONS)
    values, vectors = np.linalg.eigh(matrix[np.ix_(chosen, chosen)])
    moments = np.sqrt(2) * orbitals.dipoles[:, :n, n:].reshape(3, -1)[:, chosen] @ vectors
    strengths = 2 / 3 * values * np.square(moments).sum(0)
    kept = (values > 0) & (values * EV <= HIGHEST) & (strengths >= LEAST_STRENGTH)
    return values[kept] * EV, strengths[kept]


def _kernels(numbers: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G^J and G^K, (atoms, atoms)."""
    own = np.array([HARDNESS[int(number)] for number in numbers])
    hardness = (own[:, None] + own[None]) / 2
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    y, z = 0.20 + 1.83 * EXACT_EXCHANGE, 1.42 + 0.48 * EXACT_EXCHANGE
    coulomb = (distances**y + (EXACT_EXCHANGE * hardness) ** -y) ** (-1 / y)
    exchange = (distances**z + hardness**-z) ** (-1 / z)
    return coulomb, exchange
