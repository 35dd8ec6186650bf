"""Molecules as the diffusion sees them: elements, formal charges, bond orders and positions, alone and in batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from library.errors import InputError

ELEMENTS = ("H", "C", "N", "O", "F")
ATOMIC_NUMBERS = (1, 6, 7, 8, 9)
MOST_ORDER = 3
MOST_CHARGE = 1
MOST_ATOMS = 29  # of QM9, hydrogens included


@dataclass(frozen=True, eq=False)
class Structure:
    """One molecule with its geometry. Hydrogens are atoms like others, bonds are kekulized.

    positions  float32 (n, 3), angstrom
    types      int64 (n,), places in ELEMENTS
    charges    int64 (n,), formal
    bonds      int64 (n, n), orders 0 to 3; symmetric, with a diagonal of zeros
    """

    positions: Tensor
    types: Tensor
    charges: Tensor
    bonds: Tensor

    def __len__(self) -> int:
        return len(self.types)

    def permuted(self, order: Tensor) -> "Structure":
        """The same molecule with its atoms in another order."""
        return Structure(self.positions[order], self.types[order], self.charges[order], self.bonds[order][:, order])

    def formula(self) -> dict[str, int]:
        """How many atoms of each element there are; elements that are absent are left out."""
        counts = torch.bincount(self.types, minlength=len(ELEMENTS)).tolist()
        return {element: count for element, count in zip(ELEMENTS, counts, strict=True) if count}


@dataclass(frozen=True, eq=False)
class Atoms:
    """Molecules as ragged arrays: molecule i has atoms `offsets[i]` to `offsets[i + 1]`, and bonds likewise.

    positions  float32 (atoms, 3), angstrom
    types      uint8 (atoms,), places in ELEMENTS
    charges    int8 (atoms,), formal
    bonds      uint8 (bonds, 3): two atoms, from 0 in each molecule, and the order
    """

    offsets: Tensor
    positions: Tensor
    types: Tensor
    charges: Tensor
    bond_offsets: Tensor
    bonds: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Tensor:
        """Atoms of each molecule, int64."""
        return self.offsets.diff()

    def structure(self, index: int) -> Structure:
        """Molecule `index` with dense bond orders."""
        atoms = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ends = self.bonds[int(self.bond_offsets[index]) : int(self.bond_offsets[index + 1])].long()
        n = atoms.stop - atoms.start
        bonds = torch.zeros(n, n, dtype=torch.int64)
        bonds[ends[:, 0], ends[:, 1]] = bonds[ends[:, 1], ends[:, 0]] = ends[:, 2]
        return Structure(self.positions[atoms], self.types[atoms].long(), self.charges[atoms].long(), bonds)

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> "Atoms":
        """The ragged arrays of some molecules."""
        pairs = [torch.triu(one.bonds).nonzero() for one in structures]
        orders = [one.bonds[p[:, 0], p[:, 1], None] for one, p in zip(structures, pairs, strict=True)]
        return cls(
            _offsets([len(one) for one in structures]),
            torch.cat([one.positions for one in structures]).float(),
            torch.cat([one.types for one in structures]).to(torch.uint8),
            torch.cat([one.charges for one in structures]).to(torch.int8),
            _offsets([len(p) for p in pairs]),
            torch.cat([torch.cat(both, 1) for both in zip(pairs, orders, strict=True)]).to(torch.uint8),
        )


class MoleculeBatch(NamedTuple):
    """Molecules of one batch, padded with zeros to the largest, N atoms.

    positions  float32 (B, N, 3), angstrom, as they came (not centred)
    types      int64 (B, N), places in ELEMENTS
    charges    int64 (B, N), formal
    bonds      int64 (B, N, N), orders 0 to 3
    node_mask  bool (B, N), true at atoms
    spectra    modality -> float32 (B, points), log10(1 + intensity)
    keys       int64 (B,), from which the noise of each molecule is to be drawn
    index      int64 (B,), which molecule of its data set each is
    """

    positions: Tensor
    types: Tensor
    charges: Tensor
    bonds: Tensor
    node_mask: Tensor
    spectra: dict[str, Tensor]
    keys: Tensor
    index: Tensor

    @property
    def counts(self) -> Tensor:
        """Atoms of each molecule: int64 (B,)."""
        return self.node_mask.sum(1)

    @property
    def edge_mask(self) -> Tensor:
        """True for the ordered pairs of different atoms of a molecule: bool (B, N, N)."""
        mask = self.node_mask
        off_diagonal = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        return mask[:, :, None] & mask[:, None, :] & off_diagonal

    def select(self, chosen: Tensor) -> "MoleculeBatch":
        """Some of the molecules, padded to the largest among them."""
        size = int(self.counts[chosen].max())
        return MoleculeBatch(
            self.positions[chosen, :size],
            self.types[chosen, :size],
            self.charges[chosen, :size],
            self.bonds[chosen, :size, :size],
            self.node_mask[chosen, :size],
            {name: spectrum[chosen] for name, spectrum in self.spectra.items()},
            self.keys[chosen],
            self.index[chosen],
        )

    def buckets(self, width: int) -> list[tuple[Tensor, "MoleculeBatch"]]:
        """The molecules by size: those whose atom counts round up to one multiple of `width`, and their places.

        Pairs of atoms are what a step costs, so that buckets of similar sizes waste little on padding.
        """
        if width < 1:
            raise InputError(f"buckets of {width} atoms: the width must be at least 1")
        group = (self.counts + width - 1) // width
        return [(places, self.select(places)) for g in group.unique() for places in [(group == g).nonzero().flatten()]]

    def structures(self) -> list[Structure]:
        """The molecules without their padding."""
        return [
            Structure(self.positions[i, :n], self.types[i, :n], self.charges[i, :n], self.bonds[i, :n, :n])
            for i, n in enumerate(self.counts.tolist())
        ]


def batch_of(
    structures: Sequence[Structure],
    spectra: Mapping[str, Tensor],
    *,
    keys: Tensor | None = None,
    index: Iterable[int] | None = None,
) -> MoleculeBatch:
    """Pad molecules into a batch; `keys` and `index` are counted from 0 where they are not given.

    Raises InputError for no molecules, or spectra that are not as many.
    """
    if not structures:
        raise InputError("a batch needs at least one molecule")
    for name, spectrum in spectra.items():
        if len(spectrum) != len(structures):
            raise InputError(f"{len(structures)} molecules have {len(spectrum)} {name} spectra")
    size = max(map(len, structures))
    short = [size - len(structure) for structure in structures]
    together = list(zip(structures, short, strict=True))
    numbers = torch.arange(len(structures))
    return MoleculeBatch(
        torch.stack([pad(structure.positions, (0, 0, 0, k)) for structure, k in together]),
        torch.stack([pad(structure.types, (0, k)) for structure, k in together]),
        torch.stack([pad(structure.charges, (0, k)) for structure, k in together]),
        torch.stack([pad(structure.bonds, (0, k, 0, k)) for structure, k in together]),
        torch.arange(size) < torch.tensor([len(structure) for structure in structures])[:, None],
        dict(spectra),
        numbers if keys is None else keys,
        numbers if index is None else torch.tensor(list(index)),
    )


def check_structure(structure: Structure, name: str = "molecule", most_atoms: int = MOST_ATOMS) -> None:
    """Raise InputError, beginning with `name`, for what the diffusion cannot represent or learn from.

    Checked are shapes, the number of atoms, finite positions, elements, charges beyond ±1, bond orders, symmetry, and
    that the molecule is connected.
    """
    n = len(structure.types)
    if not 1 <= n <= most_atoms:
        raise InputError(f"{name}: {n} atoms; 1 to {most_atoms} are allowed, hydrogens included")
    shapes = (tuple(structure.positions.shape), tuple(structure.charges.shape), tuple(structure.bonds.shape))
    if shapes != ((n, 3), (n,), (n, n)):
        raise InputError(f"{name}: {n} atoms need positions ({n}, 3), charges ({n},), bonds ({n}, {n}), not {shapes}")
    check_finite(structure, name)
    if int(structure.types.min()) < 0 or int(structure.types.max()) >= len(ELEMENTS):
        raise InputError(f"{name}: types must be places in {', '.join(ELEMENTS)}")
    if int(structure.charges.abs().max()) > MOST_CHARGE:
        raise InputError(f"{name}: formal charges of -{MOST_CHARGE} to {MOST_CHARGE} are allowed")
    bonds = structure.bonds
    if int(bonds.min()) < 0 or int(bonds.max()) > MOST_ORDER:
        raise InputError(f"{name}: bond orders must be 0 to {MOST_ORDER}, kekulized")
    if not torch.equal(bonds, bonds.T) or bool(bonds.diagonal().any()):
        raise InputError(f"{name}: bond orders must be symmetric with zeros on the diagonal")
    if pieces(bonds) > 1:
        raise InputError(f"{name}: it falls into {pieces(bonds)} parts; give each as a molecule of its own")


def check_finite(structure: Structure, name: str = "molecule") -> None:
    """Raise InputError, beginning with `name`, for positions that are not finite."""
    if not torch.isfinite(structure.positions).all():
        raise InputError(f"{name}: a position is not finite")


def pieces(bonds: Tensor) -> int:
    """Into how many connected parts a molecule of bonds (n, n) falls."""
    reached = (bonds > 0) | torch.eye(len(bonds), dtype=torch.bool, device=bonds.device)
    for _ in range(max(1, (len(bonds) - 1).bit_length())):
        reached = (reached.float() @ reached.float()) > 0
    return len(reached.unique(dim=0))


def _offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)
