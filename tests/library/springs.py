"""A stand-in for quantum chemistry whose derivatives are known exactly: springs, point charges, polarisable pairs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.excitations import Orbitals
from library.diffspectra.vibrations import Point, Surface
from library.errors import InputError

CHARGES = {1: 0.2, 6: -0.1, 7: -0.4, 8: -0.5, 9: -0.3}
STIFFNESS = 0.3  # hartree / bohr^2
POLARISABILITY = 1.5


class Springs:
    """E = 1/2 k sum (r_ij - r0_ij)^2 - mu F - 1/2 F alpha F, mu = sum q_i R_i, alpha = c sum_(i<j) r_ij r_ij^T / r_ij.

    Lengths at rest are those of the first positions that it is asked for, or of `rest`.
    """

    def __init__(self, numbers: np.ndarray, rest: np.ndarray | None = None) -> None:
        self.charges = torch.tensor([CHARGES[int(number)] for number in numbers], dtype=torch.float64)
        self.lengths = None if rest is None else self.pairs(torch.from_numpy(rest)).norm(dim=1)

    def pairs(self, positions: Tensor) -> Tensor:
        i, j = torch.triu_indices(len(positions), len(positions), 1)
        return positions[i] - positions[j]

    def dipole(self, positions: Tensor) -> Tensor:
        return (self.charges[:, None] * positions).sum(0)

    def polarisability(self, positions: Tensor) -> Tensor:
        pairs = self.pairs(positions)
        return POLARISABILITY * (pairs[:, :, None] * pairs[:, None] / pairs.norm(dim=1)[:, None, None]).sum(0)

    def energy(self, positions: Tensor, field: Tensor) -> Tensor:
        stretch = self.pairs(positions).norm(dim=1) - self.lengths
        induced = field @ self.polarisability(positions) @ field / 2
        return STIFFNESS * stretch.square().sum() / 2 - self.dipole(positions) @ field - induced

    def __call__(self, positions: np.ndarray, field: np.ndarray | None = None) -> Point:
        at = torch.from_numpy(positions.copy()).requires_grad_()
        if self.lengths is None:
            self.lengths = self.pairs(at.detach()).norm(dim=1)
        energy = self.energy(at, torch.zeros(3).double() if field is None else torch.from_numpy(field))
        (gradient,) = torch.autograd.grad(energy, at)
        return Point(float(energy.detach()), gradient.numpy(), self.dipole(at.detach()).numpy())


@dataclass(frozen=True)
class SpringTheory:
    """Springs, and one occupied and one empty orbital; what holds fluorine fails."""

    def surface(self, numbers: np.ndarray) -> Surface:
        if 9 in numbers:
            raise InputError("there are no springs for fluorine")
        return Springs(numbers)

    def orbitals(self, numbers: np.ndarray, positions: np.ndarray) -> Orbitals:
        orthogonal = np.eye(len(numbers), 2)
        dipoles = np.full((3, 2, 2), 0.3)
        return Orbitals(numbers, positions, np.array([-0.3, 0.1]), orthogonal, np.arange(len(numbers)), dipoles, 1)
