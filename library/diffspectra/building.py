"""RDKit molecules from what the diffusion gives: by its bonds and charges, or by the distances of its atoms alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffspectra.molecules import ELEMENTS, Structure, pieces

if TYPE_CHECKING:
    from rdkit.Chem import Mol

# Lengths in pm of single, double and triple bonds between H C N O F; 0 where there is none (as EDM and JODO use them).
SINGLE = (
    (74, 109, 101, 96, 92),
    (109, 154, 147, 143, 135),
    (101, 147, 145, 140, 136),
    (96, 143, 140, 148, 142),
    (92, 135, 136, 142, 142),
)
DOUBLE = ((0, 0, 0, 0, 0), (0, 134, 129, 120, 0), (0, 129, 125, 121, 0), (0, 120, 121, 121, 0), (0, 0, 0, 0, 0))
TRIPLE = ((0, 0, 0, 0, 0), (0, 120, 116, 113, 0), (0, 116, 110, 0, 0), (0, 113, 0, 0, 0), (0, 0, 0, 0, 0))
MARGINS = (10.0, 5.0, 3.0)  # pm by which a bond may be longer
CHARGED = {("N", 1), ("N", -1), ("C", 1), ("C", -1), ("O", -1)}  # atoms whose charge the released code accepts


@dataclass(frozen=True, eq=False)
class Built:
    """A molecule, or why there is none.

    mol       sanitised, with all its hydrogens as atoms and the positions as conformer; None where it is no molecule
    problem   what RDKit refuses; empty for a molecule
    parts     how many connected parts it has
    radicals  unpaired electrons: with all hydrogens given, an atom short of valence is one
    """

    mol: "Mol | None"
    problem: str
    parts: int
    radicals: int

    @property
    def valid(self) -> bool:
        """Whether it is one connected molecule that RDKit takes."""
        return self.mol is not None and self.parts == 1

    @property
    def smiles(self) -> str | None:
        """Canonical SMILES of the constitution, hydrogens implicit; None where there is no molecule."""
        return None if self.mol is None else constitution_smiles(self.mol)


def build(structure: Structure, *, filled: bool = False, restrict_charges: bool = False) -> Built:
    """The molecule of predicted bonds and charges.

    `filled` lets RDKit add the hydrogens that valences miss, as the released code does, instead of leaving radicals;
    `restrict_charges` drops charges other than those of N, C by ±1 and O by -1, likewise.

    >>> from library.diffspectra.data import load_molecules
    >>> build(load_molecules().atoms.structure(0)).smiles
    'C#C'
    """
    from rdkit import Chem, rdBase
    from rdkit.Geometry import Point3D

    kinds = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for kind, charge in zip(structure.types.tolist(), structure.charges.tolist(), strict=True):
        atom = Chem.Atom(ELEMENTS[kind])
        if not restrict_charges or (ELEMENTS[kind], charge) in CHARGED:
            atom.SetFormalCharge(charge)
        atom.SetNoImplicit(not filled)
        mol.AddAtom(atom)
    for i, j in torch.triu(structure.bonds, 1).nonzero().tolist():
        mol.AddBond(i, j, kinds[int(structure.bonds[i, j])])
    conformer = Chem.Conformer(len(structure))
    conformer.Set3D(True)
    for place, position in enumerate(structure.positions.double().tolist()):
        conformer.SetAtomPosition(place, Point3D(*position))
    mol.AddConformer(conformer)
    parts = pieces(structure.bonds)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(mol)
        except (ValueError, RuntimeError) as error:
            return Built(None, str(error).splitlines()[0], parts, 0)
    radicals = sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    return Built(mol.GetMol(), "", parts, radicals)


def build_from_distances(structure: Structure, *, filled: bool = False) -> Built:
    """The molecule whose bonds are read off the distances; charges are zero."""
    return build(from_distances(structure), filled=filled)


def from_distances(structure: Structure) -> Structure:
    """The same atoms with the bonds of `distance_orders` and no charges."""
    orders = distance_orders(structure.positions, structure.types)
    return Structure(structure.positions, structure.types, torch.zeros_like(structure.charges), orders)


def distance_orders(positions: Tensor, types: Tensor) -> Tensor:
    """Bond orders by length: positions (..., n, 3) in angstrom and types (..., n) to int64 (..., n, n).

    A pair is bonded where it is shorter than a single bond plus 10 pm; double where it is also shorter than a double
    one plus 5 pm; triple where also than a triple one plus 3 pm.
    """
    difference = positions.double()[..., :, None, :] - positions.double()[..., None, :, :]
    length = 100 * difference.norm(dim=-1)
    tables = torch.tensor((SINGLE, DOUBLE, TRIPLE), dtype=torch.float64, device=positions.device)
    limits = torch.where(tables > 0, tables + tables.new_tensor(MARGINS)[:, None, None], 0.0)
    pairs = limits[:, types[..., :, None], types[..., None, :]]
    single, double, triple = (length < limit for limit in pairs)
    orders = single.long() + (single & double) + (single & double & triple)
    return orders * ~torch.eye(positions.shape[-2], dtype=torch.bool, device=positions.device)


def constitution_smiles(mol: "Mol") -> str:
    """Canonical SMILES without stereo, hydrogens implicit where a heavy atom carries them."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False)


def with_stereo(mol: "Mol") -> "Mol":
    """A copy whose stereo centres and double bonds are assigned from its conformer."""
    from rdkit import Chem

    found = Chem.Mol(mol)
    Chem.AssignStereochemistryFrom3D(found)
    return found
