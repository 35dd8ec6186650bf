"""RQGNN on Ray: two workers train what one does, the report is of the test graphs, features stream into Parquet."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from jobs.rqgnn import RqgnnJob
from jobs.rqgnn_features import RqgnnFeaturesJob, graph_features, rows_of
from jobs.training import Scaling
from library.artifact import open_artifact
from library.errors import InputError
from library.recipe import seeded_model
from library.rqgnn.data import load_graphs
from library.rqgnn.detector import GraphAnomalyDetector
from library.rqgnn.recipe import RqgnnRecipe
from library.spectral import eigenpairs, one_hot_rayleigh_terms
from library.weights import state_tensors

SMALL = RqgnnRecipe(steps=6, batch_size=101, hidden=16, depth=3, dropout=0.0, filters="learned", lr=1e-3)


@pytest.mark.ray
def test_two_workers_train_what_one_does(ray_cluster, ready_registry, tmp_path) -> None:
    """The batch of 101 graphs is shared unevenly; batch statistics and class weights are those of the whole."""
    weights, metrics, curves = [], [], []
    for workers in (1, 2):
        job = RqgnnJob(
            recipe=SMALL, scaling=Scaling(workers=workers), checkpoint_every=3, storage=str(tmp_path / str(workers))
        )
        report = job.run()
        assert report.artifact is not None
        weights.append(open_artifact(report.artifact).weights())
        metrics.append(report.metrics)
        curves.append(report.tables["curves"]["loss"].tolist())
    start = state_tensors(seeded_model(SMALL))
    one, two, before = (torch.cat([state[name].detach().flatten() for name in start]) for state in (*weights, start))
    apart = float((one - two).norm() / (one - before).norm())
    assert apart < 0.005  # Adam makes steps of full size out of gradients that are rounding alone
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-6)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    for name, tolerance in (("validation_loss", 1e-3), ("validation_auc", 2e-3), ("test_auc", 2e-3)):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=tolerance), name
    assert 0 < metrics[0]["test_ece"] < 1
    detector = GraphAnomalyDetector.from_artifact(open_artifact(report.artifact))
    material = SMALL.material()
    part = detector.margins(material.prepared, material.test)
    assert len(part) == len(material.test)
    assert (Path(report.folder) / "reliability.png").stat().st_size > 1000


def test_cut_batches_are_refused() -> None:
    with pytest.raises(ValidationError, match="cannot be cut"):
        RqgnnJob(micro_batch=8)


@pytest.mark.ray
def test_features_of_a_set_and_of_files_are_the_librarys(ray_cluster, tmp_path) -> None:
    report = RqgnnFeaturesJob(out=str(tmp_path / "named"), batch_graphs=700).run()
    data = load_graphs("tox21:SR-p53")
    assert report.metrics["graphs"] == len(data)
    assert report.metrics["faults"] == 0
    frame = pd.read_parquet(tmp_path / "named")
    energies, squares = one_hot_rayleigh_terms(data.graphs, data.kinds, len(data.vocabulary))
    totals = torch.bincount(data.kinds)
    assert report.metrics["kinds"] == int((totals > 0).sum())
    names = json.loads((tmp_path / "named" / "_kinds.json").read_text())
    place = names.index("N")
    nitrogen = energies[:, data.vocabulary.index("N")]
    assert frame["energies"].map(lambda row: row[place]).sum() == pytest.approx(float(nitrogen.sum()))
    frame["total"] = frame["squares"].map(sum)
    assert float(frame["total"].sum()) == data.graphs.num_nodes
    assert frame["energies"].map(sum).sum() == pytest.approx(float(energies.sum()))
    assert float(squares.sum()) == data.graphs.num_nodes
    assert frame["label"].sum() == int(data.labels.sum())

    rows = [
        {"id": "edge", "num_nodes": 2, "edges": [[0, 1]], "kinds": ["C", "O"]},
        {"id": "loop", "num_nodes": 2, "edges": [[1, 1]], "kinds": ["C", "O"]},
        {"id": "alone", "num_nodes": 1, "edges": [], "kinds": ["Xx"]},
        {"id": "short", "num_nodes": 2, "edges": [[0, 1]], "kinds": ["C"]},
        {"id": "null", "num_nodes": None, "edges": [[0, 1]], "kinds": ["C"]},
        {"id": "empty", "num_nodes": 0, "edges": [], "kinds": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "graphs.parquet")
    job = RqgnnFeaturesJob(
        source=(str(tmp_path / "graphs.parquet"),), out=str(tmp_path / "own"), kinds=("O", "C"), eigenvalues=True
    )
    report = job.run()
    assert report.metrics["faults"] == 4
    assert "4 of 6" in report.notes[0]
    frame = pd.read_parquet(tmp_path / "own").set_index("id")
    assert frame.loc["edge", "energies"].tolist() == [1, 1]
    assert frame.loc["edge", "eigenvalues"] == pytest.approx([0, 2], abs=1e-12)
    assert frame.loc["alone", "squares"].tolist() == [0, 0]
    assert "self-loop" in frame.loc["loop", "fault"]
    assert frame.loc["loop", "energies"] is None
    assert "2 nodes have 1 kinds" in frame.loc["short", "fault"]
    assert "null" in frame.loc["null", "fault"]
    assert "empty" in frame.loc["empty", "fault"]
    with pytest.raises(InputError, match="not empty"):
        job.run()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for source, message in (("other.parquet", "no column 'num_nodes'"), ("none.parquet", "cannot be read")):
        with pytest.raises(InputError, match=message):
            RqgnnFeaturesJob(source=(str(tmp_path / source),), out=str(tmp_path / "new")).run()
    assert not (tmp_path / "new").exists()


def test_a_batch_of_features_has_the_rows_of_its_graphs() -> None:
    data = load_graphs("tox21:SR-HSE").select(torch.arange(50))
    [table] = rows_of(data)
    found = graph_features(table, kinds=data.vocabulary, eigenvalues=True)
    energies, squares = one_hot_rayleigh_terms(data.graphs, data.kinds, len(data.vocabulary))
    assert torch.tensor(found["energies"].to_pylist(), dtype=torch.float64) == pytest.approx(energies)
    assert torch.tensor(found["squares"].to_pylist(), dtype=torch.float64) == pytest.approx(squares)
    values = [value for row in found["eigenvalues"].to_pylist() for value in row]
    assert values == pytest.approx(eigenpairs(data.graphs).values.tolist())
    assert found["num_edges"].to_pylist() == data.graphs.edge_counts.tolist()
    with pytest.raises(InputError, match="not kinds"):
        rows_of(load_graphs("simulated"))


def test_a_set_that_cannot_be_had_is_refused_before_any_worker_starts(tmp_path) -> None:
    with pytest.raises(InputError, match="no graphs at 'some/where'"):
        RqgnnJob(recipe=RqgnnRecipe(data="some/where", tu_root=str(tmp_path))).run()
