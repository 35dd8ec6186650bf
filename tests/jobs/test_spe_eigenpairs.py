"""Eigenpairs stream into Parquet as the library computes them; what cannot be computed keeps its row and says why."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster import storage
from jobs.spe_eigenpairs import GRAPH, SpeEigenpairsJob, graph_eigenpairs, rows_of
from library.errors import InputError
from library.molecules import Molecule
from library.spe.data import counting_data
from library.spectral import Graphs, eigenpairs

RING = [[i, (i + 1) % 6] for i in range(6)]
ROWS = [
    {"id": "ring", "num_nodes": 6, "edges": RING},
    {"id": "loop", "num_nodes": 2, "edges": [[1, 1]]},
    {"id": "alone", "num_nodes": 1, "edges": []},
    {"id": "parts", "num_nodes": 9, "edges": []},
    {"id": "triple", "num_nodes": 3, "edges": [[0, 1, 2]]},
    {"id": "null", "num_nodes": None, "edges": []},
    {"id": "path", "num_nodes": 3, "edges": [[0, 1], [1, 2]]},
]
FAULTS = {"loop": "self-loop", "parts": "which is its first", "triple": "pairs", "null": "null"}


def test_a_batch_has_the_eigenpairs_of_its_graphs():
    data = counting_data((40, 5, 5), seed=2)
    [table] = rows_of(data)
    assert table["cycles3"].to_pylist() == data.targets[:, 0].tolist()
    found = graph_eigenpairs(table, inputs=GRAPH, count=12, split="keep").to_pylist()
    spectra = eigenpairs(data.graphs, count=12, split="keep")
    for place, row in enumerate(found):
        values, vectors = spectra.graph(place)
        assert row["eigenvalues"] == values.tolist()
        assert np.array_equal(np.reshape(row["eigenvectors"], vectors.shape), vectors)
        gap = float(spectra.gaps[place])
        assert row["gap"] == (gap if gap < np.inf else None)
        assert row["multiplicities"] == spectra.multiplicities(place)
        assert row["num_edges"] == int(data.graphs.edge_counts[place])
    assert any(row["gap"] is None for row in found)
    assert any(row["gap"] is not None for row in found)


def test_a_remote_folder_that_is_not_empty_is_refused_before_any_work():
    place = "memory://bucket/eigenpairs"
    storage.write_bytes(f"{place}/part.parquet", b"of another run")
    try:
        with pytest.raises(InputError, match=f"out: {place} exists and is not empty"):
            SpeEigenpairsJob(source=("zinc12k",), out=place).run()
        assert storage.list(place) == ["part.parquet"]
    finally:
        storage.remove(place)


def test_what_is_wrong_with_a_graph_stays_with_it():
    table = pa.Table.from_pylist(ROWS)
    found = graph_eigenpairs(table, inputs=GRAPH, count=5, split="shrink").to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    for row in found:
        assert (row["fault"] is None) == (row["id"] not in FAULTS)
        assert FAULTS.get(row["id"], "") in (row["fault"] or "")
        assert (row["eigenvalues"] is None) == (row["id"] in FAULTS)
    ring, path = found[0], found[-1]
    assert ring["eigenvalues"] == pytest.approx([0, 0.5, 0.5, 1.5, 1.5], abs=1e-12)
    assert (ring["multiplicities"], ring["gap"]) == ([1, 2, 2], pytest.approx(0.5))
    assert path["eigenvalues"] == pytest.approx([0, 1, 2], abs=1e-12)
    assert graph_eigenpairs(table.slice(0, 0), inputs=GRAPH, count=5, split="shrink").num_rows == 0


@pytest.mark.ray
def test_files_of_graphs_and_of_molecules(ray_cluster, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "graphs.parquet")
    job = SpeEigenpairsJob(source=(str(tmp_path / "graphs.parquet"),), out=str(tmp_path / "own"), eigenpairs=5)
    report = job.run()
    assert (report.metrics["graphs"], report.metrics["faults"]) == (len(ROWS), len(FAULTS))
    assert "4 of 7 graphs are malformed" in report.notes[0]
    written = pd.read_parquet(tmp_path / "own").set_index("id")
    assert written.loc["ring", "eigenvalues"].tolist() == pytest.approx([0, 0.5, 0.5, 1.5, 1.5], abs=1e-12)
    assert set(written.index[written["fault"].notna()]) == set(FAULTS)

    smiles = ["CC(=O)Oc1ccccc1C(=O)O", "C(", None, "CCO"]
    pq.write_table(pa.table({"smiles": smiles, "name": ["a", "b", "c", "d"]}), tmp_path / "molecules.parquet")
    SpeEigenpairsJob(source=(str(tmp_path / "molecules.parquet"),), out=str(tmp_path / "molecules"), eigenpairs=8).run()
    written = pd.read_parquet(tmp_path / "molecules").set_index("name")
    assert "not a SMILES" in written.loc["b", "fault"]
    assert "null" in written.loc["c", "fault"]
    aspirin = Molecule.from_smiles(smiles[0])
    expected = eigenpairs(Graphs.from_edges([len(aspirin)], torch.from_numpy(aspirin.edges)), count=8)
    assert written.loc["a", "num_nodes"] == 13
    assert written.loc["a", "eigenvalues"].tolist() == pytest.approx(expected.values.tolist(), abs=1e-12)
    assert written.loc["d", "num_nodes"] == 3

    pq.write_table(pa.table({"num_nodes": [1]}), tmp_path / "other.parquet")
    for source, message in (
        (tmp_path / "other.parquet", "no column 'edges'; there are num_nodes"),
        (tmp_path / "none.parquet", "cannot be read"),
        ("nothing", "no graphs at 'nothing'; there are zinc12k"),
    ):
        with pytest.raises(InputError, match=message):
            SpeEigenpairsJob(source=(str(source),), out=str(tmp_path / "new")).run()
    with pytest.raises(InputError, match="not empty"):
        job.run()
    assert not (tmp_path / "new").exists()
