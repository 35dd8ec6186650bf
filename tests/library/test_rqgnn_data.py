"""Labelled graphs: the shipped ones, the TU format with all that can be wrong in it, NPZ files, split, vocabulary."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import InputError, PrismError
from library.rqgnn import tu
from library.rqgnn.data import Vocabulary, load_graphs, stratified_split
from library.rqgnn.simulated import simulated_signal_anomaly
from library.spectral import rayleigh_quotients

TU = {  # a triangle with a tail, an edge, a single node
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n1, 3\n3, 1\n3, 4\n4, 3\n5, 6\n6, 5\n",
    "graph_indicator": "1\n1\n1\n1\n2\n2\n3\n",
    "graph_labels": "1\n-1\n0\n",
    "node_labels": "6\n6\n8\n6\n1\n1\n8\n",
}


def written(folder: Path, **changes: str | None) -> Path:
    for name, text in (TU | changes).items():
        if text is not None:
            (folder / f"SET_{name}.txt").write_text(text)
    return folder


def test_the_shipped_sets_are_what_their_readme_says() -> None:
    hiv = load_graphs("hiv")
    assert (len(hiv), int(hiv.labels.sum()), len(hiv.vocabulary)) == (41_906, 1_487, 54)
    p53 = load_graphs("tox21:SR-p53")
    assert (len(p53), int(p53.labels.sum())) == (6_902, 431)
    assert int((p53.graphs.edge_counts == 0).sum()) > 0
    assert p53.fingerprint != load_graphs("tox21:SR-HSE").fingerprint
    with pytest.raises(InputError, match="tox21:SR-p53"):
        load_graphs("tox21:SR-p54")


def test_tu_files_are_read_with_their_kinds(tmp_path) -> None:
    data = tu.read_folder(written(tmp_path))
    assert data.graphs.sizes.tolist() == [4, 2, 1]
    assert data.graphs.edges.tolist() == [[0, 1, 0, 2, 4], [1, 2, 2, 3, 5]]
    assert data.labels.tolist() == [1, 0, 0]
    assert data.vocabulary == ("1", "6", "8")
    assert data.kinds.tolist() == [1, 1, 2, 1, 0, 0, 2]
    assert data.name == "SET"
    part = data.select(torch.tensor([2, 0]))
    assert part.kinds.tolist() == [2, 1, 1, 2, 1]


def test_several_columns_of_tu_labels_are_one_kind(tmp_path) -> None:
    data = tu.read_folder(written(tmp_path, node_labels="0, 5\n0, 6\n0, 5\n1, 5\n0, 6\n0, 5\n0, 10\n"))
    assert data.vocabulary == ("0,5", "0,6", "0,10", "1,5")
    assert data.kinds.tolist() == [0, 1, 0, 3, 1, 0, 2]


def test_tu_attributes_are_features(tmp_path) -> None:
    written(tmp_path, node_labels=None, node_attributes="\n".join(["0.5, 1"] * 7))
    data = load_graphs(str(tmp_path))
    assert data.kinds is None
    assert data.features.tolist() == [[0.5, 1]] * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": TU["A"] + "4, 5\n5, 4\n"}, "joins graph 0 to graph 1"),
        ({"A": TU["A"] + "2, 4\n"}, "none comes back"),
        ({"A": TU["A"] + "1, 1\n"}, "self-loop"),
        ({"A": TU["A"] + "1, 2\n"}, "listed twice"),
        ({"A": TU["A"] + "7, 8\n"}, "line 11: nodes"),
        ({"A": "1 2\n"}, "SET_A.txt"),
        ({"graph_indicator": "1\n1\n1\n1\n3\n3\n3\n"}, "line 5: a graph before 3 has no nodes"),
        ({"graph_indicator": "2\n2\n2\n2\n2\n2\n3\n"}, "line 1: a graph before 2 has no nodes"),
        ({"graph_indicator": "1\n1\n2\n1\n2\n2\n3\n"}, "line 4: graphs must not fall"),
        ({"graph_labels": "1\n0\n"}, "each of the 3 graphs needs a label"),
        ({"graph_labels": "1\n0\n2\n"}, "0 .or -1. for normal"),
        ({"graph_labels": "1\nx\n2\n"}, "graph_labels"),
        ({"graph_labels": None}, "graph_labels.txt is missing"),
        ({"node_labels": "1\n"}, "1 lines for 7 nodes"),
        ({"node_labels": None}, "neither"),
        ({"node_labels": None, "node_attributes": "nan\n" * 7}, "NaN"),
    ],
)
def test_corrupt_tu_files_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(InputError, match=message):
        tu.read_folder(written(tmp_path, **changes))


def test_places_without_a_data_set_are_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match="no TU data set"):
        load_graphs(str(tmp_path))
    with pytest.raises(InputError, match="tu_root"):
        load_graphs("MCF-7")
    with pytest.raises(InputError, match="no graphs at"):
        load_graphs("some/where")
    import torch_geometric.datasets

    def refused(root: str, name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch_geometric.datasets, "TUDataset", refused)
    with pytest.raises(PrismError, match="'MCF-8' could not be downloaded: no route to host"):
        load_graphs("MCF-8", tu_root=str(tmp_path))


def test_a_downloaded_set_is_read_from_its_raw_files(tmp_path) -> None:
    (tmp_path / "SET" / "raw").mkdir(parents=True)
    written(tmp_path / "SET" / "raw")
    assert len(load_graphs("SET", tu_root=str(tmp_path))) == 3


def test_npz_files_are_checked(tmp_path) -> None:
    arrays = {
        "num_nodes": np.array([2, 1]),
        "num_edges": np.array([1, 0]),
        "edge": np.array([[0, 1]]),
        "label": np.array([0, 1]),
        "atom": np.array([0, 1, 1]),
    }

    def load(name: str, **changes):
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})
        return load_graphs(str(tmp_path / f"{name}.npz"))

    assert load("good").vocabulary == ("0", "1")
    assert load("floats", label=np.array([0.0, 1.0])).labels.tolist() == [0, 1]
    either = load(
        "path",
        num_nodes=np.array([3, 1]),
        num_edges=np.array([2, 0]),
        edge=np.array([[0, 1], [1, 2]]),
        atom=np.arange(4),
    )
    assert either.graphs.edges.tolist() == [[0, 1], [1, 2]]
    features = load("features", atom=None, features=np.ones((3, 2)))
    assert features.features.shape == (3, 2)
    for name, changes, message in (
        ("a", {"label": None}, "lacks label"),
        ("b", {"atom": None}, "lacks atom or features"),
        ("c", {"edge": np.array([[0, 2]])}, "whose nodes are 0 to 1"),
        ("d", {"atom": np.array([0, 1])}, "for each of the nodes"),
        ("e", {"label": np.array([0, 3])}, "needs a label"),
        ("f", {"atom": None, "features": np.full((3, 2), np.inf)}, "NaN or infinity"),
        ("g", {"edge": np.array([[0.6, 1.0]])}, "edge must be whole numbers, got float64 such as 0.6"),
        ("h", {"label": np.array([0, 0.7])}, "label must be whole numbers"),
        ("i", {"atom": np.array([0, 0.9, np.nan])}, "atom must be whole numbers"),
        ("j", {"label": np.array(["no", "yes"])}, "label must be whole numbers, got <U3 such as no"),
        ("k", {"num_nodes": np.array([2.5, 1])}, "num_nodes must be whole numbers"),
        ("l", {"atom": None, "features": np.full((3, 2), "a")}, "features must be numbers"),
        (
            "m",
            {"num_nodes": np.array([4, 1]), "num_edges": np.array([2, 0]), "edge": np.array([[0, 1], [2, 3]])},
            "2, 2",
        ),
    ):
        with pytest.raises(InputError, match=message):
            load(name, **changes)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(InputError, match="not an NPZ"):
        load_graphs(str(tmp_path / "text.npz"))


def test_the_split_is_by_class_whole_and_the_same_everywhere() -> None:
    labels = (torch.arange(1000) % 13 == 0).long()
    parts = stratified_split(labels, 2023)
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    for label in (0, 1):
        count = int((labels == label).sum())
        edges = [0, int(0.7 * count), int(0.85 * count), count]
        sizes = [int((labels[part] == label).sum()) for part in parts]
        assert sizes == [after - before for before, after in itertools.pairwise(edges)]
    assert all(torch.equal(a, b) for a, b in zip(parts, stratified_split(labels, 2023), strict=True))
    assert not torch.equal(parts[0], stratified_split(labels, 1)[0])
    for few in (torch.zeros(100, dtype=torch.int64), (torch.arange(100) < 3).long()):
        with pytest.raises(InputError, match="of class 1 cannot be split"):
            stratified_split(few, 0)


def test_a_vocabulary_keeps_what_is_frequent_in_training() -> None:
    data = load_graphs("tox21:SR-p53")
    train = torch.arange(1000)
    few = Vocabulary.of_training(data, train, 4)
    assert few.symbols == ("C", "O", "N", "other")
    assert few.numbers(("N", "Pt", "unheard")).tolist() == [2, 3, 3]
    every = Vocabulary.of_training(data, train, None)
    assert every.symbols == data.vocabulary
    with pytest.raises(InputError, match="'unheard' is none of the 50"):
        every.numbers(("C", "unheard"))


def test_a_simulated_anomaly_moves_energy_to_larger_eigenvalues() -> None:
    means = []
    for sigma in (1.0, 2.0, 5.0, 20.0):
        data = simulated_signal_anomaly(60, sigma=sigma, nodes=(40, 60), anomalous=0.5, seed=1)
        found = rayleigh_quotients(data.graphs, data.features.double())[:, 0]
        means.append([float(found[data.labels == label].mean()) for label in (0, 1)])
    assert max(abs(normal - means[0][0]) for normal, _ in means) < 0.02
    rising = [anomalous for _, anomalous in means]
    assert rising == sorted(rising)
    assert rising[-1] > 2 * means[0][0]
    with pytest.raises(InputError, match="sigma > 0"):
        simulated_signal_anomaly(sigma=0)
