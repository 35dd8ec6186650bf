"""Molecules from SMILES: what is read, and what is refused by name."""

import gzip

import numpy as np
import pytest
import torch

from library.errors import InputError
from library.molecules import Molecule, read_molecules, scaffold
from library.samples import sample_file
from library.spe.data import load_graphs
from library.spe.features import feature_graph, token_graph


def test_shipped_smiles_give_the_shipped_graphs():
    data = load_graphs("zinc12k")
    with sample_file("spe", "zinc12k_smiles.txt.gz").open("rb") as stream, gzip.open(stream, "rt") as text:
        smiles = text.read().split()
    assert len(smiles) == len(data.graphs)
    for place in range(0, 12_000, 97):
        own = data.graphs.select([place])
        molecule = Molecule.from_smiles(smiles[place], kekulized=True)
        types, edges, bonds = token_graph(molecule, data.schema.vocabulary, "it")
        assert torch.equal(types, data.nodes[data.graphs.nodes_of(torch.tensor([place]))])
        assert torch.equal(edges.sort(0).values, own.edges)
        assert torch.equal(bonds, data.attributes[data.graphs.edges_of(torch.tensor([place]))])


def test_atoms_and_bonds_of_a_known_molecule():
    alanine = Molecule.from_smiles("C[C@H](N)C(=O)[O-]")
    assert alanine.symbols == ("C", "C", "N", "C", "O", "O")
    assert alanine.charges.tolist() == [0, 0, 0, 0, 0, -1]
    assert (alanine.explicit_h + alanine.implicit_h).tolist() == [3, 1, 2, 0, 0, 0]
    assert alanine.degrees.tolist() == [1, 3, 1, 3, 1, 1]
    assert alanine.stereo[1] in (3, 5)
    assert alanine.bonds.tolist() == [0, 0, 0, 1, 0]
    benzene = Molecule.from_smiles("c1ccccc1")
    assert benzene.aromatic.all()
    assert benzene.in_ring.all()
    assert set(benzene.bonds) == {3}
    assert sorted(Molecule.from_smiles("c1ccccc1", kekulized=True).bonds) == [0, 0, 0, 1, 1, 1]
    assert Molecule.from_smiles("F/C=C/F").bond_stereo.tolist() == [0, 3, 0]
    assert Molecule.from_smiles("[CH3]").radicals.tolist() == [1]
    assert Molecule.from_smiles("[He]").edges.shape == (2, 0)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("[H]OC", "OC"),
        ("[H]C([H])([H])C(=O)N([H])C", "CC(=O)NC"),
        ("[H]n1cccc1", "[nH]1cccc1"),
        ("[H][C@](F)(Cl)Br", "[C@H](F)(Cl)Br"),
        ("[H][N+]([H])([H])C", "[NH3+]C"),
    ],
)
@pytest.mark.parametrize("kekulized", [False, True])
def test_written_hydrogens_are_counted_and_are_no_atoms(written, plain, kekulized):
    found, expected = (Molecule.from_smiles(text, kekulized=kekulized) for text in (written, plain))
    assert found.symbols == expected.symbols
    assert np.array_equal(found.explicit_h + found.implicit_h, expected.explicit_h + expected.implicit_h)
    for name in ("edges", "bonds", "degrees", "charges", "radicals", "hybridisation", "aromatic", "stereo"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_features_are_one_hot_and_counted():
    atoms, edges, bonds = feature_graph(Molecule.from_smiles("C[N+](C)(C)CC(=O)[O-]"))
    assert atoms.shape == (8, 39)
    assert bonds.shape == (7, 10)
    assert edges.shape == (2, 7)
    for block in (atoms[:, :16], atoms[:, 16:22], atoms[:, 24:30], atoms[:, 31:36], bonds[:, :4], bonds[:, 6:]):
        assert torch.equal(block.sum(1), torch.ones(len(block)))
    assert atoms[:, 22].tolist() == [0, 1, 0, 0, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("C(", "not a SMILES that can be parsed"),
        ("C(C)(C)(C)(C)C", "no valid molecule: Explicit valence"),
        ("c1cccc1", "no valid molecule: Can't kekulize"),
        ("", "has no atoms"),
        ("C$C", "'C.C' has a bond of type quadruple; bonds may be single, double, triple, aromatic"),
        ("C~C", "a bond of type unspecified"),
        ("[Cu]->N", "a bond of type dative"),
    ],
)
def test_what_is_no_molecule_is_refused_by_its_place(smiles, message, capfd):
    with pytest.raises(InputError, match=f"^molecule 1: .*{message}"):
        read_molecules(["CCO", smiles])
    assert not capfd.readouterr().err


def test_scaffolds_leave_out_side_chains():
    assert scaffold("Cc1ccccc1CC2CC2") == scaffold("c1ccccc1CC2CC2(F)")
    assert scaffold("CCO") == ""
    assert np.array_equal(Molecule.from_smiles("CCO").degrees, [1, 2, 1])
