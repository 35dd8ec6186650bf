"""How well two geometries agree: the least deviation over rotations and over all ways to pair equal atoms.

Molecules with the same graph are paired by its isomorphisms, all of them. Others are paired by turns of assignment and
rotation from many starts. The released one-pass heuristic is here as well, for comparison with the paper: it finds an
RMSD of about 1.2 angstrom between a molecule and its own rotated copy.
"""

from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.molecules import ELEMENTS, Structure, check_finite
from library.errors import InputError

MOST_MATCHES = 50_000
RANDOM_STARTS = 24
MOST_TURNS = 50
OTHER_ELEMENT = 1e6  # angstrom^2: elements are exchanged only where they must be
LIGHT = ("C", "N", "O", "S")
LIGHT_PENALTY, PENALTY, CUT = 2.0, 10.0, 5.0  # angstrom, of the released heuristic
LEAST_ATOMS = 3


class Alignment(NamedTuple):
    """A pairing of two geometries.

    rmsd      root mean square deviation in angstrom, after the best rotation
    pairs     int64 (n,), the atom of the reference for each atom of the probe
    types     share of pairs of equal elements
    by_graph  whether the pairs follow the bonds; else they follow nothing but places and elements
    mirrored  whether the probe was reflected
    """

    rmsd: float
    pairs: Tensor
    types: float
    by_graph: bool
    mirrored: bool


def align(reference: Structure, probe: Structure, *, mirror: bool = False, seed: int = 0) -> Alignment:
    """The best alignment of two molecules with equally many atoms; with `mirror` the better of the probe and its image.

    Raises InputError for different numbers of atoms, and positions that are not finite.

    >>> from library.diffspectra.data import load_molecules
    >>> one = load_molecules().atoms.structure(900)
    >>> turned = Structure(one.positions[:, [1, 2, 0]] + 5, one.types, one.charges, one.bonds)
    >>> align(one, turned).rmsd < 1e-4
    True
    """
    if len(reference) != len(probe):
        raise InputError(f"molecules of {len(reference)} and {len(probe)} atoms cannot be aligned")
    check_finite(reference, "reference")
    check_finite(probe, "probe")
    target, moved = (one.positions.double() - one.positions.double().mean(0) for one in (reference, probe))
    images = [moved, moved * moved.new_tensor([-1.0, 1.0, 1.0])] if mirror else [moved]
    matches = isomorphisms(reference, probe)
    if matches is not None:
        found = [_best_match(target, image, matches) for image in images]
    else:
        found = [_iterated(target, image, reference.types, probe.types, seed) for image in images]
    place = min(range(len(found)), key=lambda i: found[i][0])
    rmsd, pairs = found[place]
    types = float((reference.types[pairs] == probe.types).double().mean())
    return Alignment(rmsd, pairs, types, matches is not None, place == 1)


def rotated_deviation(target: Tensor, moved: Tensor) -> Tensor:
    """The least RMSD over proper rotations of centred positions `moved` (..., n, 3) on `target` (..., n, 3).

    |T|^2 + |M|^2 - 2 (s_1 + s_2 + sign(det) s_3) for the singular values s of M^T T (Kabsch, 1976).
    """
    product = moved.mT @ target
    values = torch.linalg.svdvals(product)
    sign = torch.where(torch.linalg.det(product) < 0, -1.0, 1.0)
    overlap = values[..., 0] + values[..., 1] + sign * values[..., 2]
    total = target.square().sum((-1, -2)) + moved.square().sum((-1, -2)) - 2 * overlap
    return (total.clamp(min=0) / target.shape[-2]).sqrt()


def isomorphisms(reference: Structure, probe: Structure) -> Tensor | None:
    """Reference atoms for each probe atom, (matches, n), of every isomorphism; None for other graphs or too many.

    Elements and bonds must be equal; orders and charges need not, so that resonance does not hide a symmetry.
    """
    from rdkit import Chem

    if not torch.equal(torch.bincount(reference.types, minlength=5), torch.bincount(probe.types, minlength=5)):
        return None
    mols = []
    for one in (reference, probe):
        mol = Chem.RWMol()
        for kind in one.types.tolist():
            mol.AddAtom(Chem.Atom(ELEMENTS[kind]))
        for i, j in torch.triu(one.bonds, 1).nonzero().tolist():
            mol.AddBond(i, j, Chem.BondType.SINGLE)
        mols.append(mol)
    if mols[0].GetNumBonds() != mols[1].GetNumBonds():
        return None
    found = mols[0].GetSubstructMatches(mols[1], uniquify=False, maxMatches=MOST_MATCHES)
    return torch.tensor(found) if 0 < len(found) < MOST_MATCHES else None


def released_mapping(reference: Structure, probe: Structure) -> tuple[dict[int, int], float, float] | None:
    """Pairs (probe atom to reference atom), RMSD and share of equal elements as the released code finds them.

    Assignment by distances of the centred molecules as they lie, one rotation, assignment again, pairs beyond 5
    angstrom dropped; another element costs 2 angstrom among C, N, O, S, else 10. None where fewer than 3 pairs remain.
    """
    target, moved = (np.asarray(one.positions.double()) for one in (reference, probe))
    target, moved = target - target.mean(0), moved - moved.mean(0)
    penalty = _released_penalty(probe, reference)
    rows, columns = _assigned(_distances(moved, target) + penalty)
    if len(rows) >= LEAST_ATOMS:
        moved = moved @ _rotation(moved[rows], target[columns])
    cost = _distances(moved, target) + penalty
    rows, columns = _assigned(np.where(cost > CUT, 1000.0, cost))
    kept = cost[rows, columns] <= CUT
    rows, columns = rows[kept], columns[kept]
    if len(rows) < LEAST_ATOMS:
        return None
    rmsd = float(np.sqrt(np.square(moved[rows] - target[columns]).sum(1).mean()))
    equal = float((probe.types.numpy()[rows] == reference.types.numpy()[columns]).mean())
    return dict(zip(rows.tolist(), columns.tolist(), strict=True)), rmsd, equal


def _best_match(target: Tensor, moved: Tensor, matches: Tensor) -> tuple[float, Tensor]:
    deviations = rotated_deviation(target[matches], moved.expand(len(matches), -1, -1))
    best = int(deviations.argmin())
    return float(deviations[best]), matches[best]


def _iterated(target: Tensor, moved: Tensor, kinds: Tensor, own: Tensor, seed: int) -> tuple[float, Tensor]:
    """Assignment and rotation in turns, from the 24 ways to lay principal axes on each other and random rotations."""
    fixed, free = target.numpy(), moved.numpy()
    penalty = OTHER_ELEMENT * (own.numpy()[:, None] != kinds.numpy())
    best: tuple[float, np.ndarray] | None = None
    for start in _starts(fixed, free, seed):
        turned, last = free @ start, np.inf
        for _ in range(MOST_TURNS):
            _, columns = _assigned(np.square(_distances(turned, fixed)) + penalty)
            turned = free @ _rotation(free, fixed[columns])
            deviation = float(np.sqrt(np.square(turned - fixed[columns]).sum(1).mean()))
            if deviation >= last - 1e-9:
                break
            last = deviation
        rank = deviation + OTHER_ELEMENT * int((own.numpy() != kinds.numpy()[columns]).sum())
        if best is None or rank < best[0]:
            best, found = (rank, columns), deviation
    return found, torch.from_numpy(best[1])


def _starts(fixed: np.ndarray, free: np.ndarray, seed: int) -> list[np.ndarray]:
    """Rotations R that turn rows x into x R."""
    axes = [np.linalg.eigh(points.T @ points)[1] for points in (free, fixed)]
    generator = np.random.Generator(np.random.PCG64(seed))
    found = [np.linalg.qr(generator.normal(size=(3, 3)))[0] for _ in range(RANDOM_STARTS)]
    found += [
        axes[0][:, order] * [*signs, 1.0] @ axes[1].T
        for order in permutations(range(3))
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))
    ]
    return [np.sign(np.linalg.det(turn)) * turn for turn in found]


def _rotation(moved: np.ndarray, target: np.ndarray) -> np.ndarray:
    """R, proper, with the least |moved R - target|."""
    left, _, right = np.linalg.svd(moved.T @ target)
    if np.linalg.det(left @ right) < 0:
        right[-1] *= -1
    return left @ right


def _distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - columns[None], axis=-1)


def _assigned(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)


def _released_penalty(probe: Structure, reference: Structure) -> np.ndarray:
    own, other = (one.types.numpy() for one in (probe, reference))
    light = np.array([element in LIGHT for element in ELEMENTS])
    both = light[own][:, None] & light[other][None]
    return np.where(own[:, None] == other[None], 0.0, np.where(both, LIGHT_PENALTY, PENALTY))
