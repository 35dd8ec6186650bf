"""Graphs with targets: shipped, simulated, from files and from PyTorch Geometric; counts of cycles; cuts by domain."""

import json
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data

from library.errors import InputError
from library.spe.counting import SHAPES, cycle_counts, enumerated_cycles, simulated_graphs
from library.spe.data import counting_data, load_graphs
from library.spe.recipe import SpeRecipe
from library.spe.settings import Schema
from library.spe.sources import domain_split, from_pyg
from library.spectral.graphs import Graphs

SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "C1CCCCC1", "CCN", "c1ccncc1", "CCCC", "C1CC1C", "CO", "c1ccccc1C"] * 4


def complete(size: int) -> Graphs:
    return Graphs.from_edges([size], torch.triu_indices(size, size, 1))


def by_brute_force(graphs: Graphs, length: int) -> int:
    """Cycles of one graph, by trying all arrangements of all subsets of its nodes."""
    edges = {tuple(edge) for edge in graphs.edges.T.tolist()}

    def closed(nodes: tuple[int, ...]) -> bool:
        return all((min(pair), max(pair)) in edges for pair in zip(nodes, (*nodes[1:], nodes[0]), strict=True))

    found = 0
    for chosen in combinations(range(graphs.num_nodes), length):
        found += sum(closed((chosen[0], *rest)) for rest in permutations(chosen[1:]))
    return found // 2


def test_cycles_are_counted_exactly():
    graphs = simulated_graphs(3, 5, shapes=((10, 5),))
    for length in (3, 4, 5, 6):
        expected = [by_brute_force(graphs.select([place]), length) for place in range(3)]
        assert cycle_counts(graphs, length).tolist() == expected
        assert enumerated_cycles(graphs, length).tolist() == expected
        assert length == 3 or sum(expected) > 0
    many = simulated_graphs(60, 1)
    for length in (3, 4, 5):
        assert torch.equal(cycle_counts(many, length), enumerated_cycles(many, length))
    for size, counts in {5: (10, 15, 12, 0), 6: (20, 45, 72, 60)}.items():
        assert [int(cycle_counts(complete(size), length)) for length in (3, 4, 5, 6)] == list(counts)
    bipartite = Graphs.from_edges([6], [[0, 0, 0, 1, 1, 1, 2, 2, 2], [3, 4, 5] * 3])
    assert [int(cycle_counts(bipartite, length)) for length in (3, 4, 5, 6)] == [0, 9, 0, 6]
    with pytest.raises(InputError, match="at least 3"):
        cycle_counts(bipartite, 2)


def test_simulated_graphs_are_regular_ones_without_as_many_edges_as_nodes():
    graphs = simulated_graphs(200, 3)
    assert set(graphs.sizes.tolist()) == {nodes for nodes, _ in SHAPES}
    for size, count in zip(graphs.sizes.tolist(), graphs.edge_counts.tolist(), strict=True):
        assert count in {nodes * degree // 2 - nodes for nodes, degree in SHAPES if nodes == size}
    assert graphs.degrees.max() <= 6
    again = simulated_graphs(200, 3)
    assert torch.equal(graphs.edges, again.edges)
    assert not torch.equal(graphs.edges[:, :50], simulated_graphs(200, 4).edges[:, :50])


def test_shipped_sets_are_what_their_readme_says():
    zinc = load_graphs("zinc12k")
    assert {name: len(part) for name, part in zinc.parts.items()} == {"train": 10_000, "validation": 1000, "test": 1000}
    for name in ("hiv-scaffold", "hiv-size"):
        hiv = load_graphs(name)
        assert hiv.targets.mean() == pytest.approx(0.1275, abs=1e-3)
        assert sum(map(len, hiv.parts.values())) == len(hiv.graphs) == 9578
        assert hiv.nodes.shape[1] == 39
    sizes = hiv.graphs.sizes
    assert sizes[hiv.parts["train"]].min() >= sizes[hiv.parts["ood_validation"]].max()
    assert sizes[hiv.parts["ood_validation"]].min() >= sizes[hiv.parts["ood_test"]].max()
    with pytest.raises(InputError, match="no graphs at 'nothing'; there are zinc12k"):
        load_graphs("nothing")
    with pytest.raises(InputError, match="zinc needs root"):
        load_graphs("zinc")


def test_one_target_alone_and_standardised_scales():
    data = counting_data((20, 5, 5), seed=1)
    one = data.of_target("cycles5")
    assert torch.equal(one.targets[:, 0], data.targets[:, 2])
    centre, scale = one.target_scale()
    train = one.targets[one.parts["train"]]
    assert float(centre) == pytest.approx(float(train.mean()), rel=1e-6)
    assert float(scale) == pytest.approx(float(train.std(correction=0)), rel=1e-6)
    assert one.fingerprint != data.fingerprint
    with pytest.raises(InputError, match="none of those of counting: cycles3"):
        data.of_target("cycles9")


def test_data_objects_of_pytorch_geometric():
    """Both directions of the edges, in any order; attributes follow their edge."""
    first = Data(
        x=torch.tensor([[3], [1], [2]]),
        edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
        edge_attr=torch.tensor([5, 5, 7, 7]),
        y=torch.tensor([0.5]),
    )
    second = Data(
        x=torch.tensor([[0], [4]]),
        edge_index=torch.tensor([[1, 0], [0, 1]]),
        edge_attr=torch.tensor([9, 9]),
        y=torch.tensor([1.5]),
    )
    schema = Schema(node_types=5, edge_types=10)
    data = from_pyg({"train": [first], "test": [second]}, schema, standardized=False, name="made up")
    assert data.graphs.edges.tolist() == [[0, 1, 3], [1, 2, 4]]
    assert data.attributes.tolist() == [5, 7, 9]
    assert data.nodes.tolist() == [3, 1, 2, 0, 4]
    assert {name: part.tolist() for name, part in data.parts.items()} == {"train": [0], "test": [1]}
    broken = Data(x=first.x, edge_index=torch.tensor([[0], [1]]), edge_attr=torch.tensor([5]), y=first.y)
    with pytest.raises(InputError):
        from_pyg({"train": [broken]}, schema, standardized=False, name="made up")


def test_tables_of_smiles(tmp_path):
    frame = pd.DataFrame({"smiles": SMILES, "mass": np.arange(40.0), "label": [0, 1] * 20})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    csv = load_graphs(str(tmp_path / "t.csv"), target_columns=("mass",))
    parquet = load_graphs(str(tmp_path / "t.parquet"), target_columns=("mass",))
    assert csv.fingerprint == parquet.fingerprint
    assert [len(part) for part in csv.parts.values()] == [32, 4, 4]
    assert csv.standardized
    binary = load_graphs(str(tmp_path / "t.csv"), target_columns=("label",), by="size")
    assert binary.schema.task == "binary"
    assert set(binary.parts) == {"train", "validation", "test", "ood_validation", "ood_test"}
    both = SpeRecipe(data=str(tmp_path / "t.csv"), target_columns=("mass", "label"), cut="scaffold")
    assert both.graph_data().targets.shape == (40, 2)
    for changes, message in (
        ({}, "needs target_columns"),
        ({"target_columns": ("weight",)}, "no column 'weight'; it has smiles, mass, label"),
        ({"target_columns": ("smiles",)}, "must be numbers"),
        ({"target_columns": ("mass",), "by": "colour"}, "cut by random, scaffold or size"),
    ):
        with pytest.raises(InputError, match=message):
            load_graphs(str(tmp_path / "t.csv"), **changes)
    frame.loc[7, "smiles"] = "C("
    frame.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(InputError, match=r"molecule 7: 'C\(' is not a SMILES"):
        load_graphs(str(tmp_path / "bad.csv"), target_columns=("mass",))


def test_files_of_drugood(tmp_path):
    names = ("train", "iid_val", "iid_test", "ood_val", "ood_test")
    rows = [{"smiles": text, "cls_label": place % 2, "domain_id": place} for place, text in enumerate(SMILES)]
    content = {"cfg": {}, "split": {name: rows[8 * i : 8 * i + 8] for i, name in enumerate(names)}}
    (tmp_path / "lbap.json").write_text(json.dumps(content))
    data = load_graphs(str(tmp_path / "lbap.json"))
    assert data.parts["ood_test"].tolist() == list(range(32, 40))
    assert data.targets[:4, 0].tolist() == [0, 1, 0, 1]
    (tmp_path / "other.json").write_text(json.dumps({"split": {"train": []}}))
    with pytest.raises(InputError, match="not a file of DrugOOD: 'iid_val' is missing"):
        load_graphs(str(tmp_path / "other.json"))


def test_cuts_by_domain_keep_domains_whole():
    domains = np.random.default_rng(0).integers(0, 40, 500)
    for by in ("count", "value"):
        parts = domain_split(domains, by=by, seed=1)
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(500))
        inside = {name: set(domains[own]) for name, own in parts.items()}
        known = inside["train"] | inside["validation"] | inside["test"]
        assert not known & inside["ood_validation"]
        assert not known & inside["ood_test"]
        assert not inside["ood_validation"] & inside["ood_test"]
        assert len(parts["train"]) == pytest.approx(180, abs=15)
        if by == "value":
            assert min(known) > max(inside["ood_validation"])
    with pytest.raises(InputError, match="leave nothing for"):
        domain_split(["a"] * 10, by="count", seed=0)
