"""Distributions of bond lengths, angles and dihedrals, and how far two of them are apart.

Source: JODO (Huang et al., 2023). A kind of bond is named C2O, of angle C1C-C1H, of dihedral H1C-C1C-C1O: elements, and
bond orders between them.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.molecules import ELEMENTS, Structure
from library.errors import InputError

BONDS = ("C1H", "C1C", "C1O", "N1C", "N1H", "C2O", "O1H", "C2C")
ANGLES = ("C1C-C1H", "C1C-C1C", "C1C-C1O", "C1C-C1N", "C1N-N1C", "C1O-O1C", "O1C-C1H", "C2C-C1C")
DIHEDRALS = (
    "H1C-C1C-C1C",
    "C1C-C1C-C1C",
    "H1C-C1C-C1H",
    "H1C-C1C-C1O",
    "C1C-C1C-C1O",
    "C1N-N1C-C1C",
    "H1C-C1N-N1C",
    "H1C-C1C-C1N",
)
MOST_VALUES = 20_000
KERNELS, FACTOR = 5, 2.0
CHUNK_VALUES = 1 << 23


class Geometry(NamedTuple):
    """Values by kind: lengths in angstrom, angles and dihedrals in degrees (-180 to 180)."""

    bonds: dict[str, np.ndarray]
    angles: dict[str, np.ndarray]
    dihedrals: dict[str, np.ndarray]


class GeometryDistance(NamedTuple):
    """Maximum mean discrepancies, each the mean over the kinds that both sets have; nan where there is none."""

    bonds: float
    angles: float
    dihedrals: float


def geometry(structures: Iterable[Structure]) -> Geometry:
    """All values of the kinds in BONDS, ANGLES and DIHEDRALS, over molecules as they were generated, valid or not.

    As released: a bond (i, j) with i < j counts once, the angles at its end j each once, and the dihedrals about it
    each once.
    """
    tables = tuple({kind: [] for kind in kinds} for kinds in (BONDS, ANGLES, DIHEDRALS))
    for structure in structures:
        symbols = [ELEMENTS[kind] for kind in structure.types.tolist()]
        orders, positions = structure.bonds.tolist(), structure.positions.double().numpy()
        for table, found, measure in zip(tables, _paths(orders), (_lengths, _angles, _dihedrals), strict=True):
            if not found:
                continue
            for path, value in zip(found, measure(positions[np.array(found)]).tolist(), strict=True):
                kinds = (_name(way, symbols, orders) for way in (path, path[::-1]))
                kind = next((kind for kind in kinds if kind in table), None)
                if kind is not None:
                    table[kind].append(value)
    return Geometry(*({kind: np.array(values) for kind, values in table.items()} for table in tables))


def geometry_distance(generated: Geometry, reference: Geometry, *, seed: int = 0) -> GeometryDistance:
    """How far two sets are apart in bonds, angles and dihedrals."""
    return GeometryDistance(
        *(_mean_distance(mine, other, seed) for mine, other in zip(generated, reference, strict=True))
    )


def mmd(first: Tensor, second: Tensor) -> float:
    """Squared maximum mean discrepancy of two samples (n,) and (m,), the biased estimate, in float64.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = sum_(i = 0..4) exp(-(a - b)^2 / (2^(i - 2) h)),

    with h the mean squared difference of two different values of the joint sample. Raises InputError for a sample
    without values.
    """
    if not len(first) or not len(second):
        raise InputError("a discrepancy needs at least one value in either sample")
    x, y = first.double(), second.double()
    both = torch.cat([x, y])
    bandwidth = 2 * both.var()
    if bandwidth == 0:
        return 0.0
    narrowest, widest = bandwidth * FACTOR ** -(KERNELS // 2), FACTOR ** (KERNELS - 1)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        for part in a.split(max(1, CHUNK_VALUES // len(b))):
            value = torch.exp((part[:, None] - b).square_().div_(-narrowest * widest))
            total += value.sum()
            for _ in range(KERNELS - 1):  # each kernel is half as wide as the one before, that is, its square
                total += value.square_().sum()
        return total / (len(a) * len(b))

    return float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def _mean_distance(generated: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], seed: int) -> float:
    generator = np.random.Generator(np.random.PCG64(seed))
    found = []
    for kind, values in generated.items():
        pair = [
            part if len(part) <= MOST_VALUES else generator.choice(part, MOST_VALUES, replace=False)
            for part in (values, reference[kind])
        ]
        if all(len(part) for part in pair):
            found.append(mmd(*map(torch.from_numpy, pair)))
    return float(np.mean(found)) if found else float("nan")


def _paths(orders: list[list[int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The atoms of bonds, of angles and of dihedrals."""
    near = [[j for j, order in enumerate(row) if order] for row in orders]
    bonds = [(i, j) for i, found in enumerate(near) for j in found if i < j]
    angles = [(i, j, k) for i, j in bonds for k in near[j] if k != i]
    dihedrals = [(h, i, j, k) for i, j in bonds for k in near[j] if k != i for h in near[i] if h != j]
    return bonds, angles, dihedrals


def _name(path: tuple[int, ...], symbols: list[str], orders: list[list[int]]) -> str:
    return "-".join(f"{symbols[i]}{orders[i][j]}{symbols[j]}" for i, j in pairwise(path))


def _lengths(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, 0] - points[:, 1], axis=-1)


def _angles(points: np.ndarray) -> np.ndarray:
    left, right = points[:, 0] - points[:, 1], points[:, 2] - points[:, 1]
    across = np.linalg.norm(np.cross(left, right), axis=-1)
    return np.degrees(np.arctan2(across, (left * right).sum(-1)))


def _dihedrals(points: np.ndarray) -> np.ndarray:
    first, second, third = (points[:, k + 1] - points[:, k] for k in range(3))
    left, right = np.cross(first, second), np.cross(second, third)
    across = (np.linalg.norm(second, axis=-1, keepdims=True) * first * right).sum(-1)
    return np.degrees(np.arctan2(across, (left * right).sum(-1)))
