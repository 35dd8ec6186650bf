"""Molecules come back from their bonds exactly, and files of people are read or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem

from library.diffspectra.building import build, build_from_distances, constitution_smiles, distance_orders
from library.diffspectra.data import MoleculeData, load_molecules
from library.diffspectra.molecules import ATOMIC_NUMBERS, Structure, pieces
from library.diffspectra.sdf import embedded, from_smiles, matched, read_sdf, structure_of
from library.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "diffspectra" / "stability_geometry.npz"


@pytest.fixture(scope="module")
def data() -> MoleculeData:
    return load_molecules()


@pytest.fixture(scope="module")
def golden() -> list[tuple[Structure, np.ndarray]]:
    with np.load(GOLDEN) as arrays:
        return [
            (
                Structure(*(torch.from_numpy(arrays[f"{i}_{name}"]) for name in ("pos", "type", "fc", "bond"))),
                arrays[f"{i}_distance_bond_order"],
            )
            for i in range(int(arrays["n"]))
        ]


def test_bonds_by_distance_are_the_golden_ones(golden) -> None:
    for structure, orders in golden:
        assert np.array_equal(distance_orders(structure.positions, structure.types).numpy(), orders)


def test_bonds_by_distance_of_a_padded_stack_are_those_of_each(golden) -> None:
    alike = [structure for structure, _ in golden if len(structure) == 9]
    together = distance_orders(torch.stack([one.positions for one in alike]), torch.stack([one.types for one in alike]))
    for one, orders in zip(alike, together, strict=True):
        assert torch.equal(distance_orders(one.positions, one.types), orders)


def test_every_shipped_molecule_is_built_to_its_smiles(data: MoleculeData) -> None:
    for index, smiles in enumerate(data.smiles):
        built = build(data.atoms.structure(index))
        assert built.valid
        assert built.radicals == 0
        assert built.smiles == constitution_smiles(Chem.MolFromSmiles(smiles))


def test_what_rdkit_refuses_is_said(data: MoleculeData) -> None:
    ethyne = data.atoms.structure(data.smiles.index("C#C"))
    wrong = Structure(ethyne.positions, ethyne.types, ethyne.charges, (ethyne.bonds > 0) * 3)
    built = build(wrong)
    assert not built.valid
    assert built.smiles is None
    assert "valence" in built.problem.lower()


def test_missing_hydrogens_are_radicals_unless_filled(data: MoleculeData) -> None:
    methanol = from_smiles(["CO"])[0].structure
    short = Structure(
        *(part[:-1] for part in (methanol.positions, methanol.types, methanol.charges)), methanol.bonds[:-1, :-1]
    )
    assert build(short).radicals == 1
    assert build(short, filled=True).radicals == 0
    assert build(short, filled=True).smiles == "CO"
    assert build(short).smiles != "CO"


def test_two_molecules_are_not_one(data: MoleculeData) -> None:
    a, b = (data.atoms.structure(i) for i in (0, 5))
    both = Structure(
        torch.cat([a.positions, b.positions + 10]),
        torch.cat([a.types, b.types]),
        torch.cat([a.charges, b.charges]),
        torch.block_diag(a.bonds, b.bonds),
    )
    built = build(both)
    assert built.mol is not None
    assert built.parts == pieces(both.bonds) == 2
    assert not built.valid


def test_relaxed_geometries_mostly_give_their_bonds(data: MoleculeData) -> None:
    """The table of lengths was made for other geometries: it is a measure, not a law."""
    numbers = data.parts["test"].tolist()
    right = [
        build_from_distances(structure).smiles == build(structure).smiles
        for structure in map(data.atoms.structure, numbers)
        if not structure.charges.any()
    ]
    assert 0.7 < sum(right) / len(right) < 1


def test_bonds_follow_atoms_in_any_order(data: MoleculeData) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(0, len(data), 25):
        structure = data.atoms.structure(index)
        shuffled = structure.permuted(torch.randperm(len(structure), generator=generator))
        numbers = np.array(ATOMIC_NUMBERS)[shuffled.types.numpy()]
        found = matched(data.smiles[index], numbers, shuffled.positions.numpy())
        assert torch.equal(found.types, shuffled.types)
        torch.testing.assert_close(found.positions, shuffled.positions)
        assert build(found).smiles == build(structure).smiles


def test_smiles_get_a_geometry_and_kekulized_bonds() -> None:
    furan, zwitterion = from_smiles(["c1ccoc1", "C[N+]#[C-]"])
    assert sorted(furan.structure.bonds[furan.structure.bonds > 0].tolist())[-4:] == [2, 2, 2, 2]
    assert build(furan.structure).smiles == furan.smiles == "c1ccoc1"
    assert sorted(zwitterion.structure.charges.tolist()) == [-1, 0, 0, 0, 0, 1]
    again = from_smiles(["c1ccoc1"])[0]
    assert torch.equal(again.structure.positions, furan.structure.positions)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("CCl", r"molecule 0 \(CCl\): the element Cl is not allowed; there are H, C, N, O, F"),
        ("C[Si](C)C", "the element Si is not allowed"),
        ("C1CC", "is not a SMILES that can be parsed"),
        ("CC.O", "falls into 2 parts"),
        ("C[CH2]", "is a radical"),
        ("CCCCCCCCCCCC", "38 atoms; 1 to 29 are allowed"),
        ("[O-2]", "formal charges of -1 to 1"),
        ("C(C)(C)(C)(C)C", "is no valid molecule"),
    ],
)
def test_smiles_that_cannot_be_used_are_named(smiles: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_smiles([smiles])


def test_sdf_files_are_read_with_their_titles(tmp_path: Path) -> None:
    mols = [embedded(smiles) for smiles in ("c1ccoc1", "CC(=O)[O-]")]
    mols[0].SetProp("_Name", "furan")
    with Chem.SDWriter(str(tmp_path / "mine.sdf")) as writer:
        writer.SetKekulize(False)
        for mol in mols:
            writer.write(mol)
    furan, acetate = read_sdf(tmp_path / "mine.sdf")
    assert (furan.name, furan.smiles, acetate.name, acetate.smiles) == ("furan", "c1ccoc1", "1", "CC(=O)[O-]")
    assert build(furan.structure).smiles == "c1ccoc1"
    torch.testing.assert_close(furan.structure.positions, structure_of(mols[0]).positions, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mol: Chem.RemoveHs(mol), "hydrogens are missing"),
        (lambda mol: _moved(mol, 0, 9.0), "have a bond but are"),
        (lambda mol: _collapsed(mol), "have no bond but are"),
        (lambda mol: _flat(mol), "no positions in three dimensions"),
    ],
)
def test_molecules_of_files_are_checked(tmp_path: Path, change, message: str) -> None:
    with Chem.SDWriter(str(tmp_path / "mine.sdf")) as writer:
        writer.write(change(embedded("CCO")))
    with pytest.raises(InputError, match=rf"mine.sdf: molecule 0: .*{message}"):
        read_sdf(tmp_path / "mine.sdf")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no SDF file"):
        read_sdf(tmp_path / "none.sdf")
    (tmp_path / "bad.sdf").write_text("name\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\nnonsense\n$$$$\n")
    with pytest.raises(InputError, match=r"bad.sdf: molecule 0 cannot be read"):
        read_sdf(tmp_path / "bad.sdf")


def test_geometries_of_other_molecules_are_refused() -> None:
    ethanol, ether = (from_smiles([smiles])[0].structure for smiles in ("CCO", "COC"))
    numbers = np.array(ATOMIC_NUMBERS)[ether.types.numpy()]
    with pytest.raises(InputError, match="its distances do not give the bonds of 'CCO'"):
        matched("CCO", numbers, ether.positions.numpy())
    with pytest.raises(InputError, match="its atoms are not those of 'CC'"):
        matched("CC", numbers, ethanol.positions.numpy())
    with pytest.raises(InputError, match="atomic number 17"):
        matched("CCl", np.array([6, 17, 1, 1, 1]), np.zeros((5, 3)))


def _moved(mol: Chem.Mol, atom: int, by: float) -> Chem.Mol:
    positions = mol.GetConformer().GetPositions()
    positions[atom] += by
    mol.GetConformer().SetPositions(positions)
    return mol


def _collapsed(mol: Chem.Mol) -> Chem.Mol:
    positions = mol.GetConformer().GetPositions()
    positions[3] = positions[4] + 0.3
    mol.GetConformer().SetPositions(positions)
    return mol


def _flat(mol: Chem.Mol) -> Chem.Mol:
    mol.GetConformer().Set3D(False)
    mol.GetConformer().SetPositions(mol.GetConformer().GetPositions() * (1.0, 1.0, 0.0))
    return mol
