"""Molecules of people: SDF files, SMILES, and geometries that belong to a SMILES."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from library.diffspectra.building import constitution_smiles
from library.diffspectra.molecules import ATOMIC_NUMBERS, ELEMENTS, MOST_ATOMS, Structure, check_structure
from library.errors import InputError
from library.molecules import Molecule

if TYPE_CHECKING:
    from rdkit.Chem import Mol

LOOSE = 1.25  # times the sum of covalent radii up to which two atoms are bonded


class Entry(NamedTuple):
    """A molecule of a file: its title, its canonical SMILES without stereo, and what the diffusion needs of it."""

    name: str
    smiles: str
    structure: Structure


def read_sdf(path: Path, *, most_atoms: int = MOST_ATOMS) -> list[Entry]:
    """The molecules of an SDF file. Its hydrogens must be written, with positions in three dimensions.

    Raises InputError that names the first molecule at fault and what is wrong with it.
    """
    from rdkit import Chem, rdBase

    if not path.is_file():
        raise InputError(f"there is no SDF file {path}")
    with rdBase.BlockLogs():
        found = list(Chem.SDMolSupplier(str(path), removeHs=False, sanitize=True))
    if not found:
        raise InputError(f"{path} holds no molecules")
    entries = []
    for place, mol in enumerate(found):
        where = f"{path.name}: molecule {place}"
        if mol is None:
            raise InputError(f"{where} cannot be read, or breaks the rules of valence")
        title = mol.GetProp("_Name").strip() if mol.HasProp("_Name") else ""
        where = f"{where} ({title})" if title else where
        entries.append(
            Entry(title or str(place), constitution_smiles(mol), structure_of(mol, where, most_atoms=most_atoms))
        )
    return entries


def structure_of(mol: "Mol", name: str = "molecule", *, most_atoms: int = MOST_ATOMS) -> Structure:
    """What the diffusion needs of an RDKit molecule with explicit hydrogens and a conformer; aromatic bonds kekulized.

    Raises InputError, beginning with `name`, for missing hydrogens or positions, an element other than H, C, N, O, F,
    radicals, bonds that disagree with the distances, and what `check_structure` refuses.
    """
    from rdkit import Chem

    foreign = sorted({atom.GetSymbol() for atom in mol.GetAtoms()} - set(ELEMENTS))
    if foreign:
        raise InputError(f"{name}: the element {foreign[0]} is not allowed; there are {', '.join(ELEMENTS)}")
    if any(atom.GetTotalNumHs() for atom in mol.GetAtoms()):
        raise InputError(f"{name}: hydrogens are missing; write them all as atoms with positions")
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        raise InputError(f"{name}: it is a radical; only closed shells are allowed")
    if not mol.GetNumConformers() or not mol.GetConformer().Is3D():
        raise InputError(f"{name}: it has no positions in three dimensions")
    kekulized = Chem.Mol(mol)
    Chem.Kekulize(kekulized, clearAromaticFlags=True)
    n = mol.GetNumAtoms()
    bonds = torch.zeros(n, n, dtype=torch.int64)
    for bond in kekulized.GetBonds():
        i, j, order = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), bond.GetBondTypeAsDouble()
        if order != int(order):
            raise InputError(f"{name}: the bond of atoms {i} and {j} is {bond.GetBondType()}, not of order 1, 2 or 3")
        bonds[i, j] = bonds[j, i] = int(order)
    structure = Structure(
        torch.from_numpy(np.array(mol.GetConformer().GetPositions())).float(),
        torch.tensor([ELEMENTS.index(atom.GetSymbol()) for atom in mol.GetAtoms()]),
        torch.tensor([atom.GetFormalCharge() for atom in kekulized.GetAtoms()]),
        bonds,
    )
    check_structure(structure, name, most_atoms)
    check_distances(structure, name)
    return structure


def check_distances(structure: Structure, name: str = "molecule") -> None:
    """Raise InputError when the bonds are not those of the distances: radii sums times 1.25 part bonded pairs."""
    bonded = bonded_by_distance(structure)
    wrong = torch.triu(bonded != (structure.bonds > 0), 1).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        length = float((structure.positions[i] - structure.positions[j]).norm())
        have = "have a bond" if structure.bonds[i, j] else "have no bond"
        raise InputError(f"{name}: atoms {i} and {j} {have} but are {length:.2f} angstrom apart; check units and bonds")


def bonded_by_distance(structure: Structure) -> torch.Tensor:
    """Which pairs are closer than 1.25 times the sum of their covalent radii: bool (n, n)."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    radii = torch.tensor([table.GetRcovalent(number) for number in ATOMIC_NUMBERS])[structure.types]
    distances = torch.cdist(structure.positions.double(), structure.positions.double())
    near = distances < LOOSE * (radii[:, None] + radii[None])
    return near & ~torch.eye(len(structure), dtype=torch.bool)


def from_smiles(
    smiles: Sequence[str], *, seed: int = 7, conformers: int = 4, most_atoms: int = MOST_ATOMS
) -> list[Entry]:
    """Molecules of SMILES with hydrogens and a geometry: the lowest of some embedded conformers by MMFF94.

    Raises InputError that names the first molecule at fault.
    """
    found = []
    for place, text in enumerate(smiles):
        mol = embedded(text, f"molecule {place}", seed=seed, conformers=conformers, most_atoms=most_atoms)
        structure = structure_of(mol, f"molecule {place} ({text[:60]})", most_atoms=most_atoms)
        found.append(Entry(text, constitution_smiles(mol), structure))
    return found


def embedded(
    smiles: str, name: str = "molecule", *, seed: int = 7, conformers: int = 4, most_atoms: int = MOST_ATOMS
) -> "Mol":
    """The RDKit molecule of a SMILES with hydrogens and one conformer. Raises InputError when there is none."""
    from rdkit import Chem, rdBase
    from rdkit.Chem import AllChem

    parsed = Molecule.from_smiles(smiles, name=name)
    size = len(parsed) + int((parsed.explicit_h + parsed.implicit_h).sum())
    if size > most_atoms:
        raise InputError(f"{name}: {size} atoms; 1 to {most_atoms} are allowed, hydrogens included")
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    with rdBase.BlockLogs():
        ids = list(AllChem.EmbedMultipleConfs(mol, conformers, randomSeed=seed))
        if not ids:
            raise InputError(f"{name}: {smiles[:60]!r} cannot be given a geometry")
        energies = [energy for _, energy in AllChem.MMFFOptimizeMoleculeConfs(mol)]
    best = ids[int(np.argmin(energies))]
    for other in ids:
        if other != best:
            mol.RemoveConformer(other)
    return mol


def matched(smiles: str, numbers: np.ndarray, positions: np.ndarray, name: str = "molecule") -> Structure:
    """Bonds and charges of a SMILES on atoms (n,) with positions (n, 3) in another order.

    The bonds by distance must be the graph of the SMILES. Raises InputError, beginning with `name`, when they are not.
    """
    from rdkit import Chem

    Molecule.from_smiles(smiles, name=name)
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    foreign = sorted(set(map(int, numbers)) - set(ATOMIC_NUMBERS))
    if foreign:
        raise InputError(f"{name}: atomic number {foreign[0]} is none of {', '.join(map(str, ATOMIC_NUMBERS))}")
    if sorted(atom.GetAtomicNum() for atom in mol.GetAtoms()) != sorted(map(int, numbers)):
        raise InputError(f"{name}: its atoms are not those of {smiles[:60]!r}")
    types = torch.tensor([ATOMIC_NUMBERS.index(int(number)) for number in numbers])
    zeros = torch.zeros(len(numbers), dtype=torch.int64)
    given = Structure(torch.from_numpy(np.array(positions)).float(), types, zeros, torch.diag(zeros))
    order = _isomorphism(mol, given)
    if order is None:
        raise InputError(f"{name}: its distances do not give the bonds of {smiles[:60]!r}")
    conformer = Chem.Conformer(len(numbers))
    conformer.SetPositions(given.positions[order].double().numpy())
    mol.AddConformer(conformer)
    return structure_of(mol, name).permuted(torch.argsort(torch.tensor(order)))


def _isomorphism(mol: "Mol", given: Structure) -> list[int] | None:
    """For each atom of `mol`, that of `given` with the same element and the same bonds, orders apart."""
    from rdkit import Chem

    plain, other = Chem.RWMol(), Chem.RWMol()
    for atom in mol.GetAtoms():
        plain.AddAtom(Chem.Atom(atom.GetSymbol()))
    for bond in mol.GetBonds():
        plain.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    for kind in given.types.tolist():
        other.AddAtom(Chem.Atom(ELEMENTS[kind]))
    ends = torch.triu(bonded_by_distance(given), 1).nonzero().tolist()
    for i, j in ends:
        other.AddBond(i, j, Chem.BondType.SINGLE)
    if len(ends) != mol.GetNumBonds():
        return None
    return list(other.GetSubstructMatch(plain)) or None
