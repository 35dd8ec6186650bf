"""Similarities, distances, valences and geometries equal the golden ones of the released evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem

from library.diffspectra.building import constitution_smiles
from library.diffspectra.data import load_molecules
from library.diffspectra.geometry import Geometry, geometry, geometry_distance, mmd
from library.diffspectra.mces import empty_distance, mces_distance
from library.diffspectra.molecules import Structure
from library.diffspectra.similarity import connectivity, functional_group_similarity, functional_groups, similarity
from library.diffspectra.stability import (
    generation_metrics,
    released_smiles,
    stability_by_bonds,
    stability_by_distances,
)
from library.errors import InputError

FOLDER = Path(__file__).parents[1] / "golden" / "diffspectra"
PAIRS = json.loads((FOLDER / "metrics_pairs.json").read_text())["pairs"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "stability_geometry.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def molecules(golden) -> list[Structure]:
    parts = ("pos", "type", "fc", "bond")
    return [Structure(*(torch.from_numpy(golden[f"{i}_{name}"]) for name in parts)) for i in range(int(golden["n"]))]


def mols(pair: dict) -> list[Chem.Mol]:
    found = [Chem.MolFromSmiles(pair[name]) for name in ("true", "pred")]
    return [Chem.AddHs(mol) for mol in found] if pair["hydrogens"] == "explicit" else found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['true']} {pair['pred']} {pair['hydrogens']}")
def test_similarities_are_the_golden_ones(pair: dict) -> None:
    truth, found = mols(pair)
    got = similarity(truth, found)
    expected = (pair["tanimoto_morgan"], pair["cosine_morgan"], pair["tanimoto_maccs"], pair["fraggle"])
    assert got == pytest.approx((*expected, pair["functional_group"]), abs=1e-6)
    assert functional_groups(truth) == pair["fg_true"]
    assert functional_groups(found) == pair["fg_pred"]
    assert functional_group_similarity(found, truth) == pytest.approx(pair["functional_group"])
    assert (connectivity(truth) == connectivity(found)) is pair["connectivity_match"]
    assert (constitution_smiles(truth) == constitution_smiles(found)) is pair["exact_smiles"]  # none has stereo
    if "mces" in pair:
        assert mces_distance(truth, found) == (pair["mces"], True)


def test_the_distance_is_a_metric_on_these_and_counts_bonds() -> None:
    some = [Chem.MolFromSmiles(smiles) for smiles in ("CC#N", "C=CC=O", "c1cc[nH]c1", "CC(C)(F)O", "N")]
    distances = np.array([[mces_distance(a, b).distance for b in some] for a in some])
    assert (np.diag(distances) == 0).all()
    assert (distances == distances.T).all()
    assert (distances[:, None] <= distances[:, :, None] + distances[None]).all()
    assert distances[:, -1].tolist() == [empty_distance(mol) for mol in some]
    assert empty_distance(some[0]) == 4


def test_the_distance_is_that_of_trying_all_mappings() -> None:
    """Against the best of all one-to-one maps, by force, on small molecules."""
    from itertools import permutations

    names = ("CC(=O)N", "NC=CO", "OCC#N", "CNC=O")
    some = [Chem.MolFromSmiles(smiles) for smiles in names]

    def weights(mol: Chem.Mol) -> np.ndarray:
        return Chem.GetAdjacencyMatrix(mol, useBO=True)

    for a in some:
        for b in some:
            kinds = [np.array([atom.GetSymbol() for atom in mol.GetAtoms()]) for mol in (a, b)]
            best = 0.0
            for order in permutations(range(4)):
                same = kinds[0] == kinds[1][list(order)]
                other = weights(b)[np.ix_(order, order)] * np.outer(same, same)
                best = max(best, np.minimum(weights(a), other).sum())  # each bond twice: sum of 2 min(w, w')
            expected = weights(a).sum() / 2 + weights(b).sum() / 2 - best
            assert mces_distance(a, b).distance == pytest.approx(expected)


def test_stabilities_are_the_golden_ones(golden, molecules) -> None:
    for i, structure in enumerate(molecules):
        for name, found in (("2d", stability_by_bonds(structure)), ("3d", stability_by_distances(structure))):
            assert [found.stable, found.stable_atoms, found.atoms] == golden[f"{i}_stable{name}"].tolist()


def test_shares_of_generated_molecules_are_the_golden_ones(golden, molecules) -> None:
    by_distance = generation_metrics(molecules, by_distances=True)
    np.testing.assert_allclose([by_distance.validity, by_distance.complete, by_distance.unique], golden["eval3d"])
    assert by_distance.novel is None
    by_bonds = generation_metrics(molecules, known=golden["novelty_reference_smiles"].tolist())
    found = [by_bonds.validity, by_bonds.complete, by_bonds.unique, by_bonds.novel]
    np.testing.assert_allclose(found, golden["eval2d"])
    with pytest.raises(InputError, match="no generated molecules"):
        generation_metrics([])


def test_repeats_are_not_unique(molecules) -> None:
    found = generation_metrics([molecules[0]] * 4)
    assert (found.validity, found.unique, found.molecule_stability) == (1, 0.25, 1)
    known = [released_smiles(Chem.AddHs(Chem.MolFromSmiles("CCO")))]
    assert generation_metrics([molecules[0]] * 4, known=known).novel == 0


def test_shipped_molecules_are_stable_but_for_what_the_table_leaves_out() -> None:
    data = load_molecules()
    stable = [stability_by_bonds(data.atoms.structure(i)).stable for i in range(len(data))]
    assert sum(stable) / len(stable) > 0.99


@pytest.mark.parametrize("kind", ["bond", "angle", "dihedral"])
def test_geometries_are_the_golden_ones(golden, molecules, kind: str) -> None:
    found = getattr(geometry(molecules), f"{kind}s")
    assert len(found) == 8
    for name, values in found.items():
        np.testing.assert_allclose(np.sort(values), golden[f"{kind}_{name}"], rtol=1e-6, atol=1e-5)


def test_the_discrepancy_is_the_golden_one(golden) -> None:
    x, y = (torch.from_numpy(golden[name]) for name in ("mmd_x", "mmd_y"))
    assert mmd(x, y) == pytest.approx(float(golden["mmd"]), abs=1e-10)
    assert mmd(y, x) == pytest.approx(float(golden["mmd"]), abs=1e-10)
    assert mmd(x, x) == pytest.approx(0, abs=1e-12)
    assert mmd(x[:1], x[:1]) == 0
    with pytest.raises(InputError, match="at least one value"):
        mmd(x, y[:0])


def test_geometries_of_equal_sets_do_not_differ_and_larger_ones_do(molecules) -> None:
    here = geometry(molecules)
    wide = geometry([Structure(2 * one.positions, one.types, one.charges, one.bonds) for one in molecules])
    assert geometry_distance(here, here) == pytest.approx((0, 0, 0), abs=1e-12)
    bonds, angles, dihedrals = geometry_distance(wide, here)
    assert bonds > 0.5
    assert (angles, dihedrals) == pytest.approx((0, 0), abs=1e-6)
    nothing = Geometry(*({name: np.zeros(0) for name in table} for table in here))
    assert np.isnan(geometry_distance(nothing, here)).all()
