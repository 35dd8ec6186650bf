"""Molecules from SMILES: atoms, bonds and what RDKit knows of them, as plain arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from library.errors import InputError

BONDS = ("single", "double", "triple", "aromatic")
HYBRIDISATIONS = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
STEREO = ("STEREONONE", "STEREOANY", "STEREOZ", "STEREOE")


@dataclass(frozen=True, eq=False)
class Molecule:
    """The heavy atoms and bonds of one molecule, in the order of its SMILES.

    Hydrogens that the SMILES writes as atoms are counted at their neighbours, as RDKit does; those that are more than a
    hydrogen stay atoms: isotopes, charged or single ones, and those that say on which side of a double bond they are.

    symbols         of the atoms
    charges         int64 (atoms,), formal
    explicit_h      int64 (atoms,), hydrogens that the SMILES writes, or that kekulisation leaves written
    implicit_h      int64 (atoms,), hydrogens that follow from valence
    degrees         int64 (atoms,), bonded heavy atoms
    radicals        int64 (atoms,), unpaired electrons
    hybridisation   int64 (atoms,), place in HYBRIDISATIONS, or their number where it is another
    aromatic        bool (atoms,)
    stereo          int64 (atoms,): 1 for a possible stereo centre, and 2 more for R, 4 more for S
    edges           int64 (2, bonds), atoms from 0
    bonds           int64 (bonds,), place in BONDS
    conjugated, in_ring  bool (bonds,)
    bond_stereo     int64 (bonds,), 0 none, 1 any, 2 Z, 3 E
    """

    symbols: tuple[str, ...]
    charges: np.ndarray
    explicit_h: np.ndarray
    implicit_h: np.ndarray
    degrees: np.ndarray
    radicals: np.ndarray
    hybridisation: np.ndarray
    aromatic: np.ndarray
    stereo: np.ndarray
    edges: np.ndarray
    bonds: np.ndarray
    conjugated: np.ndarray
    in_ring: np.ndarray
    bond_stereo: np.ndarray

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def from_smiles(cls, smiles: str, *, kekulized: bool = False, name: str = "") -> "Molecule":
        """The molecule of a SMILES; with `kekulized`, aromatic bonds become single and double ones.

        Raises InputError, beginning with `name` (which of many it is), for what cannot be parsed, has no atoms, or has
        a bond that is none of BONDS: dative, of order zero or four.

        >>> water = Molecule.from_smiles("CC(=O)[O-]")
        >>> water.symbols, water.edges.tolist(), water.charges.tolist()
        (('C', 'C', 'O', 'O'), [[0, 1, 1], [1, 2, 3]], [0, 0, 0, -1])
        """
        from rdkit import Chem, rdBase

        where = f"{name}: " if name else ""
        shown = smiles if len(smiles) <= 60 else f"{smiles[:57]}..."
        with rdBase.BlockLogs():
            found = Chem.MolFromSmiles(smiles, sanitize=False)
            if found is None:
                raise InputError(f"{where}{shown!r} is not a SMILES that can be parsed")
            try:
                found = Chem.RemoveHs(found)  # and sanitised
                Chem.AssignStereochemistry(found, cleanIt=True, force=True, flagPossibleStereoCenters=True)
                if kekulized:
                    Chem.Kekulize(found, clearAromaticFlags=True)
            except (ValueError, RuntimeError) as error:
                raise InputError(f"{where}{shown!r} is no valid molecule: {str(error).splitlines()[0]}") from error
        if found.GetNumAtoms() == 0:
            raise InputError(f"{where}the SMILES has no atoms")
        atoms = [found.GetAtomWithIdx(place) for place in range(found.GetNumAtoms())]  # iterating over them is slow
        bonds = [found.GetBondWithIdx(place) for place in range(found.GetNumBonds())]
        kinds = [str(bond.GetBondType()).lower() for bond in bonds]
        other = next((kind for kind in kinds if kind not in BONDS), None)
        if other is not None:
            raise InputError(f"{where}{shown!r} has a bond of type {other}; bonds may be {', '.join(BONDS)}")
        return cls(
            symbols=tuple(atom.GetSymbol() for atom in atoms),
            charges=_integers(atom.GetFormalCharge() for atom in atoms),
            explicit_h=_integers(atom.GetNumExplicitHs() for atom in atoms),
            implicit_h=_integers(atom.GetNumImplicitHs() for atom in atoms),
            degrees=_integers(atom.GetDegree() for atom in atoms),
            radicals=_integers(atom.GetNumRadicalElectrons() for atom in atoms),
            hybridisation=_integers(_place(HYBRIDISATIONS, str(atom.GetHybridization())) for atom in atoms),
            aromatic=_integers(atom.GetIsAromatic() for atom in atoms).astype(bool),
            stereo=_integers(_stereo(atom) for atom in atoms),
            edges=_integers(end for b in bonds for end in (b.GetBeginAtomIdx(), b.GetEndAtomIdx())).reshape(-1, 2).T,
            bonds=_integers(BONDS.index(kind) for kind in kinds),
            conjugated=_integers(bond.GetIsConjugated() for bond in bonds).astype(bool),
            in_ring=_integers(bond.IsInRing() for bond in bonds).astype(bool),
            bond_stereo=_integers(_place(STEREO, str(bond.GetStereo())) for bond in bonds),
        )


def read_molecules(smiles: Sequence[str], *, kekulized: bool = False) -> list[Molecule]:
    """The molecules of many SMILES. Raises InputError that names the first at fault by its place, from 0."""
    return [
        Molecule.from_smiles(text, kekulized=kekulized, name=f"molecule {place}") for place, text in enumerate(smiles)
    ]


def scaffold(smiles: str) -> str:
    """The Bemis-Murcko scaffold of a molecule as SMILES without stereo; empty for one without rings."""
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return MurckoScaffold.MurckoScaffoldSmiles(smiles=smiles, includeChirality=False)


def _integers(values: object) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _place(names: tuple[str, ...], name: str) -> int:
    """The place of a name; the number of names for another one."""
    return names.index(name) if name in names else len(names)


def _stereo(atom: object) -> int:
    code = atom.GetProp("_CIPCode") if atom.HasProp("_CIPCode") else ""
    return atom.HasProp("_ChiralityPossible") + {"R": 2, "S": 4}.get(code, 0)
