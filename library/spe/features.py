"""What molecules become for a network: types of atoms and bonds by a vocabulary, or the features of DrugOOD."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.molecules import Molecule

SYMBOLS = ("B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "As", "Se", "Br", "Te", "I", "At")
ATOM_FEATURES = 39  # 16 symbols, 6 degrees, charge, radicals, 6 hybridisations, aromatic, 5 hydrogens, 3 of stereo
BOND_FEATURES = 10  # 4 types, conjugated, in a ring, 4 of stereo
CHARGE_OFFSET = 8  # of the charges in compact arrays


def atom_token(molecule: Molecule, atom: int) -> str:
    """Symbol, written hydrogens and charge of an atom, as ZINC-12k has them: `C`, `C H1`, `N H3 +`, `O -`.

    >>> atom_token(Molecule.from_smiles("C[NH3+]", kekulized=True), 1)
    'N H3 +'
    """
    hydrogens, charge = int(molecule.explicit_h[atom]), int(molecule.charges[atom])
    sign = ("+" if charge > 0 else "-") * bool(charge) + (str(abs(charge)) if abs(charge) > 1 else "")
    return " ".join(filter(None, (molecule.symbols[atom], f"H{hydrogens}" if hydrogens else "", sign)))


def token_graph(molecule: Molecule, vocabulary: Sequence[str], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Atom types (n,), edges (2, e) and bond types (e,), 1 to 3, of a kekulised molecule.

    Raises InputError, beginning with `name`, for an atom that is not in the vocabulary.
    """
    known = {token: place for place, token in enumerate(vocabulary)}
    tokens = [atom_token(molecule, atom) for atom in range(len(molecule))]
    unknown = next((place for place, token in enumerate(tokens) if token not in known), None)
    if unknown is not None:
        raise InputError(
            f"{name}: atom {unknown}, {tokens[unknown]!r}, is none of the {len(vocabulary)} types that the model knows "
            f"({', '.join(vocabulary)})"
        )
    types = torch.tensor([known[token] for token in tokens])
    return types, torch.from_numpy(molecule.edges), torch.from_numpy(molecule.bonds + 1)


def feature_graph(molecule: Molecule) -> tuple[Tensor, Tensor, Tensor]:
    """Atom features (n, 39), edges (2, e) and bond features (e, 10) of a molecule with aromatic bonds."""
    symbols = [SYMBOLS.index(s) if s in SYMBOLS else len(SYMBOLS) for s in molecule.symbols]
    atoms = np.stack(
        [
            symbols,
            molecule.degrees,
            molecule.charges + CHARGE_OFFSET,
            molecule.radicals,
            molecule.hybridisation,
            molecule.aromatic,
            molecule.implicit_h,
            molecule.stereo,
        ],
        1,
    )
    bonds = np.stack([molecule.bonds, molecule.conjugated, molecule.in_ring, molecule.bond_stereo], 1)
    return atom_features(atoms), torch.from_numpy(molecule.edges), bond_features(bonds)


def atom_features(atoms: np.ndarray) -> Tensor:
    """Compact arrays (n, 8), columns as in the sample's README, as float32 (n, 39)."""
    symbol, degree, charge, radicals, hybridisation, aromatic, hydrogens, stereo = torch.from_numpy(
        atoms.astype(np.int64)
    ).T
    return torch.cat(
        [
            _one_hot(symbol, 16),
            _one_hot(degree, 6),
            torch.stack([charge - CHARGE_OFFSET, radicals], 1).float(),
            _one_hot(hybridisation, 6),
            aromatic[:, None].float(),
            _one_hot(hydrogens, 5),
            torch.stack([stereo % 2, stereo // 2 % 2, stereo // 4], 1).float(),
        ],
        1,
    )


def bond_features(bonds: np.ndarray) -> Tensor:
    """Compact arrays (e, 4) as float32 (e, 10)."""
    kind, conjugated, ring, stereo = torch.from_numpy(bonds.astype(np.int64)).T
    flags = torch.stack([conjugated, ring], 1).float()
    return torch.cat([_one_hot(kind, 4), flags, _one_hot(stereo, 4)], 1)


def _one_hot(values: Tensor, count: int) -> Tensor:
    """One-hot rows; what is larger counts as the largest."""
    return torch.nn.functional.one_hot(values.clamp(max=count - 1), count).float()
