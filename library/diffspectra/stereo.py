"""Whether two geometries of one constitution are the same stereoisomer, or mirror images.

By geometry and not by labels, so that inverted bridgeheads of cages, which labels lose, are told apart as well. Centres
with four neighbours and double bonds are looked at; axes (allenes, hindered single bonds) are not.
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
    heavy, own = ((one.types != 0).nonzero().flatten() for one in (reference, probe))
    matches = isomorphisms(reference.permuted(heavy), probe.permuted(own))
    if matches is None:
        return False
    hydrogens = [(one.bonds[:, one.types == 0] > 0).sum(1) for one in (reference, probe)]
    matches = matches[(hydrogens[0][heavy][matches] == hydrogens[1][own]).all(1)]
    probe_of = torch.full((len(matches), len(reference)), -1)
    probe_of.scatter_(1, heavy[matches], own.expand(len(matches), -1))
    kept = turned = torch.ones(len(matches), dtype=torch.bool)
    for centre, near in _centres(reference):
        paired = _neighbours(probe, probe_of, centre, near, reference)
        same = _volume(reference.positions[near]).sign() == _volume(probe.positions[paired]).sign()
        kept, turned = kept & same, turned & ~same
    for path in _double_bonds(reference):
        same = _cosine(reference.positions[path]).sign() == _cosine(probe.positions[probe_of[:, path]]).sign()
        kept, turned = kept & same, turned & same
    return bool((kept | turned).any())


def _centres(structure: Structure) -> list[tuple[int, Tensor]]:
    """Heavy atoms with four neighbours of which at most one is hydrogen, which comes last."""
    found = []
    for centre in (structure.types != 0).nonzero().flatten().tolist():
        near = structure.bonds[centre].nonzero().flatten()
        near = near[(structure.types[near] == 0).long().argsort(stable=True)]
        if len(near) == 4 and int((structure.types[near] == 0).sum()) <= 1:
            found.append((centre, near))
    return found


def _neighbours(probe: Structure, probe_of: Tensor, centre: int, near: Tensor, reference: Structure) -> Tensor:
    """The probe's neighbours of a centre in the order of the reference's, (matches, 4)."""
    paired = probe_of[:, near]
    if reference.types[near[-1]] == 0:
        hydrogens = ((probe.bonds > 0) & (probe.types == 0)).long().argmax(1)
        paired[:, -1] = hydrogens[probe_of[:, centre]]
    return paired


def _double_bonds(structure: Structure) -> list[Tensor]:
    """Paths of heavy atoms a, b, c, d about double bonds b = c, one for each."""
    found = []
    for b, c in (torch.triu(structure.bonds, 1) == 2).nonzero().tolist():
        ends = [
            [a for a in structure.bonds[i].nonzero().flatten().tolist() if a != j and structure.types[a] != 0]
            for i, j in ((b, c), (c, b))
        ]
        if all(ends):
            found.append(torch.tensor([ends[0][0], b, c, ends[1][0]]))
    return found


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
