"""What is wrong or right with generated molecules on their own: valences, validity, and how often they repeat.

Source: EDM (Hoogeboom et al., 2022) and JODO (Huang et al., 2023), whose counts these are.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from library.diffspectra.building import Built, build, from_distances
from library.diffspectra.molecules import ELEMENTS, Structure
from library.errors import InputError

if TYPE_CHECKING:
    from rdkit.Chem import Mol

VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
CHARGED_VALENCES = {  # by formal charge; a charge that is not listed counts as none
    "H": {0: (1,), 1: (0,), -1: (0,)},
    "C": {0: (3, 4), 1: (3,), -1: (3,)},
    "N": {0: (2, 3), 1: (2, 3, 4), -1: (2,)},
    "O": {0: (2,), 1: (3,), -1: (1,)},
    "F": {0: (1,), -1: (0,)},
}


class Stability(NamedTuple):
    """How many atoms have an allowed valence, of how many."""

    stable_atoms: int
    atoms: int

    @property
    def stable(self) -> bool:
        """Whether all have."""
        return self.stable_atoms == self.atoms


class Generation(NamedTuple):
    """Shares of generated molecules.

    atom_stability      of all atoms
    molecule_stability  molecules whose atoms are all stable
    validity            that RDKit takes
    complete            that RDKit takes and that are one piece
    unique              different SMILES among their largest pieces, over the number generated
    novel               different ones that are not known, over the number generated; None where nothing is known
    """

    atom_stability: float
    molecule_stability: float
    validity: float
    complete: float
    unique: float
    novel: float | None


def stability_by_bonds(structure: Structure) -> Stability:
    """Valences by bonds and charges; carbon may have 3 without a charge, nitrogen 2, as the paper counts ("2D")."""
    orders = structure.bonds.sum(1).tolist()
    stable = 0
    for kind, charge, order in zip(structure.types.tolist(), structure.charges.tolist(), orders, strict=True):
        table = CHARGED_VALENCES[ELEMENTS[kind]]
        stable += order in table.get(charge, table[0])
    return Stability(stable, len(structure))


def stability_by_distances(structure: Structure) -> Stability:
    """Valences of the bonds that distances give, without charges ("3D")."""
    allowed = torch.tensor([VALENCES[element] for element in ELEMENTS])[structure.types]
    orders = from_distances(structure).bonds.sum(1)
    return Stability(int((orders == allowed).sum()), len(structure))


def generation_metrics(
    structures: Sequence[Structure], *, by_distances: bool = False, known: Collection[str] | None = None
) -> Generation:
    """The paper's measures of generated molecules; `known` are SMILES as `released_smiles` writes them.

    As released, hydrogens that valences lack are added before a molecule is judged. Raises InputError for no molecules.
    """
    if not structures:
        raise InputError("there are no generated molecules to measure")
    stabilities = [stability_by_distances(s) if by_distances else stability_by_bonds(s) for s in structures]
    built = [_built(structure, by_distances) for structure in structures]
    smiles = [released_smiles(_largest(one.mol)) for one in built if one.mol is not None]
    n = len(structures)
    return Generation(
        sum(one.stable_atoms for one in stabilities) / sum(one.atoms for one in stabilities),
        sum(one.stable for one in stabilities) / n,
        len(smiles) / n,
        sum(one.valid for one in built) / n,
        len(set(smiles)) / n,
        None if known is None else len(set(smiles) - set(known)) / n,
    )


def released_smiles(mol: "Mol") -> str:
    """Canonical SMILES with the hydrogens that are atoms written out, as the released code compares molecules."""
    from rdkit import Chem

    return Chem.MolToSmiles(mol)


def _built(structure: Structure, by_distances: bool) -> Built:
    if by_distances:
        return build(from_distances(structure), filled=True)
    return build(structure, filled=True, restrict_charges=True)


def _largest(mol: "Mol") -> "Mol":
    """The piece with the most atoms, the first of equal ones."""
    from rdkit import Chem

    return max(Chem.GetMolFrags(mol, asMols=True), key=lambda piece: piece.GetNumAtoms())
