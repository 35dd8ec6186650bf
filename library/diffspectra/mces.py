"""The distance by the maximum common edge subgraph, exactly.

Two molecules without hydrogens, edges weighted by bond order (1.5 where aromatic). Atoms are mapped one to one onto
atoms of the same element; a bond that is mapped costs the difference of orders, any other its order:

    d = sum_e w_e + sum_f w_f - max sum_(e -> f) 2 min(w_e, w_f)

Source: Kretschmer, Seipp, Ludwig, Klau, Boecker, "Coverage bias in small molecule machine learning", 2025.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rdkit.Chem import Mol

SECONDS = 60.0


class MCES(NamedTuple):
    """A distance, and whether it is proven; where time ran out it is that of the best mapping that was found."""

    distance: float
    proven: bool


def mces_distance(first: "Mol", second: "Mol", *, seconds: float = SECONDS) -> MCES:
    """The distance of two molecules, by an integer programme.

    With y_ij for atom i on atom j and c_ef for bond e = (u, v) on bond f = (j, l):
    sum_j y_ij <= 1, sum_i y_ij <= 1, sum_(f at j) c_ef <= y_uj + y_vj for every bond e and atom j, and the same from
    the other side.

    >>> from rdkit import Chem
    >>> mces_distance(Chem.MolFromSmiles("CCO"), Chem.MolFromSmiles("COC"))
    MCES(distance=2.0, proven=True)
    """
    from scipy.optimize import LinearConstraint, milp

    one, two = _graph(first), _graph(second)
    total = one.weights.sum() + two.weights.sum()
    atoms = np.argwhere(one.elements[:, None] == two.elements[None])
    bonds = np.argwhere(_kinds(one)[:, None] == _kinds(two)[None])
    if not len(bonds):
        return MCES(float(total), True)
    gains = 2 * np.minimum(one.weights[bonds[:, 0]], two.weights[bonds[:, 1]])
    matrix, limits = _constraints(one, two, atoms, bonds)
    found = milp(
        np.concatenate([np.zeros(len(atoms)), -gains]),
        integrality=np.ones(len(atoms) + len(bonds)),
        bounds=(0, 1),
        constraints=LinearConstraint(matrix, -np.inf, limits),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    gain = 0.0 if found.x is None else round(-found.fun, 6)
    return MCES(float(total - gain), found.status == 0)


def empty_distance(mol: "Mol") -> float:
    """The distance of a molecule to nothing at all: the sum of its bond orders."""
    return float(_graph(mol).weights.sum())


class _Graph(NamedTuple):
    """elements (atoms,), edges (bonds, 2), weights (bonds,)."""

    elements: np.ndarray
    edges: np.ndarray
    weights: np.ndarray


def _graph(mol: "Mol") -> _Graph:
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        heavy = Chem.RemoveHs(mol)
    return _Graph(
        np.array([atom.GetAtomicNum() for atom in heavy.GetAtoms()], dtype=int),
        np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in heavy.GetBonds()], dtype=int).reshape(-1, 2),
        np.array([bond.GetBondTypeAsDouble() for bond in heavy.GetBonds()]),
    )


def _kinds(graph: _Graph) -> np.ndarray:
    """One number for the pair of elements of each bond."""
    ends = np.sort(graph.elements[graph.edges], axis=1)
    return 1000 * ends[:, 0] + ends[:, 1]


def _constraints(one: _Graph, two: _Graph, atoms: np.ndarray, bonds: np.ndarray) -> tuple[object, np.ndarray]:
    """The rows of the programme, sparse, and their upper limits."""
    from scipy.sparse import csr_array, vstack

    m, n, e, f = len(one.elements), len(two.elements), len(one.edges), len(two.edges)
    columns = len(atoms) + len(bonds)
    y, c = np.arange(len(atoms)), len(atoms) + np.arange(len(bonds))
    place = np.full((m, n), -1)
    place[atoms[:, 0], atoms[:, 1]] = y

    def rows(number: int, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> object:
        return csr_array((value, (row, column)), shape=(number, columns))

    def supported(edges: np.ndarray, own: np.ndarray, others: np.ndarray, count: int, table: np.ndarray) -> object:
        """For each bond and atom of the other molecule: bonds mapped to the atom, minus its ends mapped there."""
        ends = [others[:, side] for side in (0, 1)]
        row = np.concatenate([own * count + end for end in ends])
        bond, atom = np.divmod(np.arange(len(edges) * count), count)
        support = [table[edges[bond, side], atom] for side in (0, 1)]
        known = [part >= 0 for part in support]
        return rows(
            len(edges) * count,
            np.concatenate([row, *(np.flatnonzero(part) for part in known)]),
            np.concatenate([np.tile(c, 2), *(part[have] for part, have in zip(support, known, strict=True))]),
            np.concatenate([np.ones(len(row)), *(-np.ones(int(have.sum())) for have in known)]),
        )

    blocks = [
        rows(m, atoms[:, 0], y, np.ones(len(y))),
        rows(n, atoms[:, 1], y, np.ones(len(y))),
        supported(one.edges, bonds[:, 0], two.edges[bonds[:, 1]], n, place),
        supported(two.edges, bonds[:, 1], one.edges[bonds[:, 0]], m, place.T),
    ]
    return vstack(blocks, format="csr"), np.concatenate([np.ones(m + n), np.zeros(e * n + f * m)])
