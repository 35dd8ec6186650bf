"""Whether two geometries of one constitution are the same stereoisomer, or mirror images.

By geometry and not by labels, so that inverted bridgeheads of cages, which labels lose, are told apart as well. Centres
with four neighbours and double bonds are looked at; axes (cumulated double bonds, hindered single bonds) are not.
"""

import torch
from torch import Tensor

from library.diffspectra.alignment import isomorphisms
from library.diffspectra.molecules import Structure


def same_stereo(reference: Structure, probe: Structure) -> bool:
    """Whether some pairing of equal atoms keeps all centres, or turns them all around, and keeps all double bonds.

    The handedness of a centre is the sign of the volume that its four neighbours span; a double bond's, the sign of the
    cosine of the dihedral. False where the bonds or the hydrogens differ.
    """
    if not (reference.types != 0).any():
        return isomorphisms(reference, probe) is not None
    probe_of = _pairings(reference, probe)
    kept = turned = torch.ones(len(probe_of), dtype=torch.bool)
    for near in _centres(reference):
        same = _volume(reference.positions[near]).sign() == _volume(probe.positions[probe_of[:, near]]).sign()
        kept, turned = kept & same, turned & ~same
    for path in _double_bonds(reference):
        same = _cosine(reference.positions[path]).sign() == _cosine(probe.positions[probe_of[:, path]]).sign()
        kept, turned = kept & same, turned & same
    return bool((kept | turned).any())


def _pairings(reference: Structure, probe: Structure) -> Tensor:
    """The probe's atom for each of the reference's, (pairings, n); -1 for hydrogens that share their heavy atom."""
    heavy, own = ((one.types != 0).nonzero().flatten() for one in (reference, probe))
    matches = isomorphisms(reference.permuted(heavy), probe.permuted(own))
    if matches is None:
        return torch.zeros(0, len(reference), dtype=torch.int64)
    bonded = [(one.bonds > 0) & (one.types == 0) for one in (reference, probe)]
    counts, others = (one.sum(1) for one in bonded)
    matches = matches[(counts[heavy][matches] == others[own]).all(1)]
    found = torch.full((len(matches), len(reference)), -1)
    found.scatter_(1, heavy[matches], own.expand(len(matches), -1))
    alone = heavy[counts[heavy] == 1]
    hydrogen, other = (one.long().argmax(1) for one in bonded)
    found[:, hydrogen[alone]] = other[found[:, alone]]
    return found


def _centres(structure: Structure) -> list[Tensor]:
    """The neighbours of heavy atoms that have four, of which at most one is hydrogen."""
    found = []
    for centre in (structure.types != 0).nonzero().flatten().tolist():
        near = structure.bonds[centre].nonzero().flatten()
        if len(near) == 4 and int((structure.types[near] == 0).sum()) <= 1:
            found.append(near)
    return found


def _double_bonds(structure: Structure) -> list[Tensor]:
    """Paths of atoms a, b, c, d about double bonds b = c, one for each that does not share an end with another one.

    Atoms a and d are heavy, or the one hydrogen of their end. Where two double bonds meet, the atoms lie on a line.
    """
    found = []
    doubles = (structure.bonds == 2).sum(1)
    for b, c in (torch.triu(structure.bonds, 1) == 2).nonzero().tolist():
        ends = [_side(structure, i, j) for i, j in ((b, c), (c, b))]
        if None not in ends and int(doubles[b]) == int(doubles[c]) == 1:
            found.append(torch.tensor([ends[0], b, c, ends[1]]))
    return found


def _side(structure: Structure, end: int, across: int) -> int | None:
    """What tells the sides of one end of a double bond apart; None for two hydrogens, or nothing."""
    near = [a for a in structure.bonds[end].nonzero().flatten().tolist() if a != across]
    heavy = [a for a in near if structure.types[a] != 0]
    return heavy[0] if heavy else near[0] if len(near) == 1 else None


def _volume(points: Tensor) -> Tensor:
    """Of the tetrahedra (..., 4, 3), six times and signed."""
    edges = points[..., 1:, :].double() - points[..., :1, :].double()
    return torch.linalg.det(edges)


def _cosine(points: Tensor) -> Tensor:
    """Of the dihedrals of (..., 4, 3), up to a positive factor."""
    edges = points[..., 1:, :].double() - points[..., :-1, :].double()
    left = torch.linalg.cross(edges[..., 0, :], edges[..., 1, :])
    right = torch.linalg.cross(edges[..., 1, :], edges[..., 2, :])
    return (left * right).sum(-1)
