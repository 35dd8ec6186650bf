"""Turned, permuted and mirrored copies are recognised exactly; the released heuristic is reproduced beside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffspectra.alignment import align, released_mapping, rotated_deviation
from library.diffspectra.data import MoleculeData, load_molecules
from library.diffspectra.molecules import ATOMIC_NUMBERS, Structure
from library.diffspectra.sdf import from_smiles
from library.diffspectra.stereo import same_stereo
from library.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "diffspectra" / "hungarian_rmsd.npz"


@pytest.fixture(scope="module")
def data() -> MoleculeData:
    return load_molecules()


def copy(structure: Structure, seed: int, *, mirror: bool = False) -> Structure:
    """The molecule turned, moved, its atoms in another order, and reflected where asked."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    turn = turn * turn.det().sign() * (-1 if mirror else 1)
    shuffled = structure.permuted(torch.randperm(len(structure), generator=generator))
    return Structure(shuffled.positions @ turn.T + 2, shuffled.types, shuffled.charges, shuffled.bonds)


def unbonded(structure: Structure) -> Structure:
    """The same atoms with one bond taken away, so that no graph helps to pair them."""
    bonds = structure.bonds.clone()
    i, j = bonds.nonzero()[0].tolist()
    bonds[i, j] = bonds[j, i] = 0
    return Structure(structure.positions, structure.types, structure.charges, bonds)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1334), st.integers(0, 2**31))
def test_copies_align_exactly(number: int, seed: int) -> None:
    structure = load_molecules().atoms.structure(number)
    turned, reflected = copy(structure, seed), copy(structure, seed, mirror=True)
    found = align(structure, turned)
    assert found.rmsd < 1e-4
    assert found.by_graph
    assert found.types == 1
    assert sorted(found.pairs.tolist()) == list(range(len(structure)))
    assert align(structure, reflected, mirror=True).rmsd < 1e-4
    assert align(unbonded(structure), turned).rmsd < 1e-4
    assert not align(unbonded(structure), turned).by_graph
    assert same_stereo(structure, turned)
    assert same_stereo(structure, reflected)


def test_mirror_images_of_chiral_molecules_are_seen(data: MoleculeData) -> None:
    chiral = from_smiles(["C[C@H](O)F"])[0].structure
    image = copy(chiral, 3, mirror=True)
    assert align(chiral, image).rmsd > 0.1
    assert align(chiral, image, mirror=True).rmsd < 1e-4
    assert align(chiral, image, mirror=True).mirrored


def test_the_released_heuristic_is_reproduced_and_fails_on_copies(data: MoleculeData) -> None:
    with np.load(GOLDEN) as golden:
        for i in range(int(golden["n"])):
            ends = []
            for name in ("ref", "prb"):
                types = torch.tensor([ATOMIC_NUMBERS.index(int(z)) for z in golden[f"{i}_{name}_z"]])
                nothing = torch.zeros(len(types), len(types)).long()
                ends.append(Structure(torch.from_numpy(golden[f"{i}_{name}_pos"]), types, nothing[0], nothing))
            pairs, rmsd, types = released_mapping(*ends)
            assert sorted(pairs.items()) == sorted(map(tuple, golden[f"{i}_map"].tolist()))
            assert rmsd == pytest.approx(float(golden[f"{i}_rmsd"]), abs=1e-5)
            assert types == pytest.approx(float(golden[f"{i}_type_acc"]))
    structures = [data.atoms.structure(i) for i in range(0, 1335, 45)]
    released = [released_mapping(one, copy(one, i))[1] for i, one in enumerate(structures)]
    assert np.mean(released) > 0.8
    two = from_smiles(["C#C"])[0].structure
    far = Structure(two.positions * 20, two.types, two.charges, two.bonds)
    assert released_mapping(two, far) is None


def test_the_deviation_is_least_over_rotations() -> None:
    generator = torch.Generator().manual_seed(0)
    target, moved = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    target, moved = target - target.mean(0), moved - moved.mean(0)
    least = float(rotated_deviation(target, moved))
    turns, _ = torch.linalg.qr(torch.randn(5000, 3, 3, generator=generator, dtype=torch.float64))
    turns = turns * turns.det().sign()[:, None, None]
    tried = (moved @ turns.mT - target).square().sum((1, 2)).div(7).sqrt()
    assert least <= float(tried.min())
    assert least == pytest.approx(float(tried.min()), rel=0.05)
    assert float(rotated_deviation(target, target * torch.tensor([-1.0, 1, 1]))) > 0.1


def test_stretched_copies_deviate_by_the_stretch(data: MoleculeData) -> None:
    structure = data.atoms.structure(700)
    wide = Structure(1.1 * structure.positions, structure.types, structure.charges, structure.bonds)
    centred = structure.positions.double() - structure.positions.double().mean(0)
    expected = 0.1 * float(centred.square().sum(1).mean().sqrt())
    assert align(structure, copy(wide, 1)).rmsd == pytest.approx(expected, rel=1e-4)


def test_other_molecules_are_paired_by_element_first() -> None:
    ethanol, ether, amine = (entry.structure for entry in from_smiles(["CCO", "COC", "CN"]))
    found = align(ethanol, ether)
    assert not found.by_graph
    assert found.types == 1
    assert 0.1 < found.rmsd < 2
    with pytest.raises(InputError, match="molecules of 9 and 7 atoms"):
        align(ethanol, amine)
    nowhere = Structure(ethanol.positions * float("nan"), ethanol.types, ethanol.charges, ethanol.bonds)
    with pytest.raises(InputError, match="probe: a position is not finite"):
        align(ethanol, nowhere)
    with pytest.raises(InputError, match="reference: a position is not finite"):
        align(nowhere, ether)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("C/C=C/C", r"C/C=C\C", False),
        ("C/C=C/C", "C/C=C/C", True),
        ("C[C@H](O)F", "C[C@@H](O)F", True),
        ("C[C@H](O)[C@H](N)F", "C[C@@H](O)[C@@H](N)F", True),
        ("C[C@H](O)[C@H](N)F", "C[C@@H](O)[C@H](N)F", False),
        ("C[C@H]1CC[C@H](C)C1", "C[C@H]1CC[C@@H](C)C1", False),
        ("CCO", "COC", False),
        ("CC(C)(C)C", "CC(C)(C)C", True),
        ("[H][H]", "[H][H]", True),
        ("[H][H]", "F", False),
        ("[H]/N=C/C", r"[H]/N=C\C", False),
        ("[H]/N=N/[H]", r"[H]/N=N\[H]", False),
        ("CC=N", "CC=N", True),
        ("C=CF", "C=CF", True),
    ],
)
def test_stereoisomers_are_told_apart_up_to_mirror_images(first: str, second: str, same: bool) -> None:
    one, two = (entry.structure for entry in from_smiles([first, second]))
    assert same_stereo(one, copy(two, 5)) is same
    assert same_stereo(copy(two, 6, mirror=True), one) is same


@pytest.mark.parametrize("smiles", ["CC=C=CC", "CC=C=O", "CN=C=O", "CN=[N+]=[N-]", "CC=[N+]=[N-]", "CN=C=N"])
def test_cumulated_double_bonds_have_no_sides(smiles: str) -> None:
    """Their atoms lie on a line, so that a little noise turns the dihedrals over."""
    one = from_smiles([smiles])[0].structure
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.03 * torch.randn(one.positions.shape, generator=generator)
        assert same_stereo(one, Structure(one.positions + noise, one.types, one.charges, one.bonds))
