"""The endpoint `graph-anomaly` over real HTTP: what the library finds, the evidence, and bodies that are refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import torch
from fastapi.exceptions import RequestValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.artifact import Artifact, open_artifact
from library.errors import InputError
from library.recipe import fit
from library.rqgnn import GraphAnomalyDetector, RqgnnRecipe
from library.spectral import Graphs
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.endpoint import ARROW, answer_batch
from serving.payloads import read
from serving.rqgnn import ETHANOL, GraphAnomaly
from tests.serving.test_payloads import arrow_bytes

RING = {"kinds": ["C"] * 6, "edges": [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]]}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    recipe = RqgnnRecipe(steps=10, batch_size=256, hidden=16, depth=4)
    return fit(recipe, path=tmp_path_factory.mktemp("rqgnn") / "artifact")


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"graph-anomaly": str(artifact.path)}, port=free_port) as served:
        yield served


def test_graphs_get_what_the_library_finds(served, artifact) -> None:
    answer = ask("graph-anomaly", {"graphs": [RING, ETHANOL, {"kinds": ["Xx"], "edges": []}]}, served.url)
    detector = GraphAnomalyDetector.from_artifact(open_artifact(artifact.path))
    graphs = Graphs.from_edges([6, 3, 1], torch.tensor(RING["edges"] + ETHANOL["edges"]).mT, edge_counts=[6, 2, 0])
    found = detector.detect(graphs, kinds=[RING["kinds"], ETHANOL["kinds"], ["Xx"]])
    assert answer["model"] == artifact.version
    for own, expected in zip(answer["results"], found, strict=True):
        assert own["anomaly_probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert own["is_anomalous"] == expected.anomalous
        assert own["threshold"] == detector.decision.threshold
        assert own["explanation"] is None
    assert answer["results"][0]["rayleigh_quotient"] == {"C": pytest.approx(0, abs=1e-6)}
    assert set(answer["results"][1]["rayleigh_quotient"]) == {"C", "O"}
    assert [own["without_edges"] for own in answer["results"]] == [False, False, True]
    certain = ask("graph-anomaly", {"graphs": [RING], "threshold": 0.0}, served.url)
    assert certain["results"][0]["is_anomalous"]


def test_the_evidence_is_asked_for(served) -> None:
    for body in GraphAnomaly.examples.values():
        answer = ask("graph-anomaly", body, served.url)
        assert len(answer["results"]) == len(body["graphs"])
    shown = answer["results"][0]["explanation"]
    assert len(shown["eigenvalues"]) == len(shown["node_scores"]) == 13
    assert shown["eigenvalues"][0] == pytest.approx(0, abs=1e-9)
    curve = shown["accumulated_energy"]["O"]
    assert len(curve["graph"]) == len(curve["normal_mean"]) == len(shown["points"]) == 41
    assert curve["graph"][-1] == pytest.approx(1)
    assert 0 <= shown["rayleigh_percentile"]["C"] <= 100
    info = httpx.get(f"{served.url}/graph-anomaly/info", trust_env=False).json()
    assert info["limits"]["features"] == 16


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "graphs"),
        ({"graphs": []}, "graphs"),
        ({"graphs": [{"edges": []}]}, "graphs"),
        ({"graphs": [{"kinds": ["C"], "features": [[1.0]], "edges": []}]}, "graphs"),
        ({"graphs": [{"features": [[1.0]], "edges": []}]}, "graphs"),
        ({"graphs": [{"kinds": [], "edges": []}]}, "graphs"),
        ({"graphs": [{"kinds": ["C", "C"], "edges": [[0, 2]]}]}, "graphs"),
        ({"graphs": [{"kinds": ["C", "C"], "edges": [[0, 0]]}]}, "graphs"),
        ({"graphs": [{"kinds": ["C", "C"], "edges": [[0, 1], [1, 0]]}]}, "graphs"),
        ({"graphs": [{"kinds": ["C", "C"], "edges": [[0, 1, 1]]}]}, "graphs"),
        ({"graphs": [{"kinds": ["C", "C"], "edges": [[0, -1]]}]}, "graphs"),
        ({"graphs": [RING], "threshold": 2.0}, "threshold"),
        ({"graphs": [RING], "explain": "yes"}, "explain"),
        ({"graphs": [RING], "explian": True}, "explian"),
        ({"graphs": [{"kinds": ["C"] * 1001, "edges": []}], "explain": True}, "explain"),
    ],
)
def test_bad_bodies_name_their_field(served, body, field) -> None:
    response = httpx.post(f"{served.url}/graph-anomaly/predict", json=body, timeout=60, trust_env=False)
    assert response.status_code == 422, response.text
    assert field in [entry["field"].partition("[")[0].partition(".")[0] for entry in response.json()["fields"]]


def test_too_many_nodes_are_too_large(served) -> None:
    body = {"graphs": [{"kinds": ["C"] * 15_000, "edges": []}] * 2}
    response = httpx.post(f"{served.url}/graph-anomaly/predict", json=body, timeout=60, trust_env=False)
    assert response.status_code == 413, response.text
    assert "30000 nodes are asked for; one request may ask for at most 20000" in response.json()["error"]


def test_requests_of_one_batch_do_not_see_each_other(artifact) -> None:
    endpoint = GraphAnomaly.load(artifact, "cpu")
    bad = {"graphs": [{"kinds": ["C", "C"], "edges": [[0, 1], [0, 1]]}]}
    bodies = [{"graphs": [RING, ETHANOL]}, bad, {"graphs": [ETHANOL], "threshold": 1.0}]
    requests = [GraphAnomaly.Request.model_validate(body) for body in bodies]
    [(_, (first, second, third))] = answer_batch(endpoint, requests)
    assert isinstance(second, InputError)
    alone = endpoint.answer([requests[2]])[0]
    assert third.results[0].anomaly_probability == pytest.approx(alone.results[0].anomaly_probability, abs=1e-6)
    assert not third.results[0].is_anomalous
    assert len(first.results) == 2


PAIRS = pa.list_(pa.list_(pa.int64(), 2))
GRAPHS = [RING, ETHANOL, {"kinds": ["N"], "edges": []}]


@pytest.mark.parametrize("pairs", [PAIRS, pa.large_list(pa.list_(pa.uint8()))])
def test_a_table_of_graphs_gets_the_answer_of_the_same_graphs_in_json(served, pairs) -> None:
    edges = pa.array([graph["edges"] for graph in GRAPHS], pairs)
    graphs = pa.table({"kinds": [graph["kinds"] for graph in GRAPHS], "edges": edges})
    content = arrow_bytes(pa.concat_tables([graphs[:2], graphs[2:]]))
    url = f"{served.url}/graph-anomaly/predict?threshold=0.5&explain=true"
    response = httpx.post(url, content=content, headers={"Content-Type": ARROW}, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    wanted = ask("graph-anomaly", {"graphs": GRAPHS, "threshold": 0.5, "explain": True}, served.url)
    assert response.json() == wanted


def test_the_documents_example_runs(served, monkeypatch, capsys) -> None:
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    [example] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exec(example.replace("http://127.0.0.1:8000", served.url), {})
    assert re.fullmatch(r"\[(True|False), (True|False)\]\n", capsys.readouterr().out)


def test_rows_of_features_come_in_a_table_too() -> None:
    edges = pa.array([[[0, 1]], []], PAIRS)
    rows = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    found = read(GraphAnomaly, ARROW, {"explain": "true"}, arrow_bytes(pa.table({"features": rows, "edges": edges})))
    body = {"graphs": [{"features": rows[0], "edges": [[0, 1]]}, {"features": rows[1], "edges": []}]}
    listed = GraphAnomaly.Request.model_validate(body | {"explain": True}).listed()
    assert found.explain
    assert (found.bulk.sizes, found.bulk.edge_counts, found.bulk.kinds) == ([2, 1], [1, 0], None)
    for name in ("ends", "features"):
        assert getattr(found.bulk, name).tolist() == getattr(listed, name).tolist()


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"kinds": [["C"]]}, "columns `edges` and `kinds`, or `edges` and `features`"),
        ({"kinds": [["C"]], "edges": pa.array([[]], PAIRS), "name": ["x"]}, "columns `edges` and `kinds`"),
        ({"kinds": ["C"], "edges": pa.array([[]], PAIRS)}, "column kinds is of string; a list for each graph"),
        ({"kinds": [[["C"]]], "edges": pa.array([[]], PAIRS)}, "column kinds holds lists of list"),
        ({"kinds": [["C", ""]], "edges": pa.array([[]], PAIRS)}, "texts of 1 to 64 characters"),
        ({"kinds": [["C" * 65]], "edges": pa.array([[]], PAIRS)}, "texts of 1 to 64 characters"),
        ({"kinds": [["C", None]], "edges": pa.array([[]], PAIRS)}, "column kinds has missing entries in a list"),
        ({"kinds": [["C"], None], "edges": pa.array([[], []], PAIRS)}, "column kinds has missing entries"),
        ({"kinds": [["C"] * 3], "edges": [[[0, 1], [1]]]}, "column edges holds rows of 1 to 2 numbers"),
        ({"kinds": [["C"] * 3], "edges": [[[0, 1, 2]]]}, "column edges holds 3 node numbers in a row"),
        ({"kinds": [["C"] * 3], "edges": [[[0.0, 1.0]]]}, "lists of rows of node numbers are needed"),
        ({"kinds": [["C"] * 3], "edges": [[0, 1]]}, "lists of rows of node numbers are needed"),
        ({"kinds": [["C"] * 3], "edges": [[[0, None]]]}, "column edges has missing entries in a list"),
        ({"features": [[[1.0], [1.0, 2.0]]], "edges": pa.array([[]], PAIRS)}, "rows of 1 to 2 numbers"),
        ({"features": [[["C"]]], "edges": pa.array([[]], PAIRS)}, "lists of rows of numbers are needed"),
        ({"kinds": [["C"]] * 5000, "edges": pa.array([[]] * 5000, PAIRS)}, "5000 graphs; at most 4096"),
        ({"kinds": [["C"]], "edges": [[]]}, "numbers, texts and lists of them are read"),
        ({"kinds": [["C"]], "edges": pa.array([[]], pa.list_(pa.list_(pa.int64(), 0)))}, "are read"),
        ({"kinds": [["C"]], "edges": pa.array([[]], pa.list_(pa.list_(pa.list_(pa.int64()))))}, "are read"),
    ],
)
def test_a_wrong_table_of_graphs_is_told_so(columns, line) -> None:
    with pytest.raises(InputError, match=line):
        read(GraphAnomaly, ARROW, {}, arrow_bytes(pa.table(columns)))


@pytest.mark.parametrize(
    ("edges", "line"),
    [([[0, 3]], "node"), ([[0, -1]], "node"), ([[1, 1]], "self-loop"), ([[0, 1], [1, 0]], "twice")],
)
def test_edges_of_a_table_are_checked_like_those_of_json(artifact, edges, line) -> None:
    asked = read(
        GraphAnomaly, ARROW, {}, arrow_bytes(pa.table({"kinds": [["C"] * 3], "edges": pa.array([edges], PAIRS)}))
    )
    with pytest.raises(InputError, match=rf"^graphs: .*({line})"):
        GraphAnomaly.load(artifact, "cpu").answer([asked])


def test_graphs_come_once() -> None:
    content = arrow_bytes(pa.table({"kinds": [["C"]], "edges": pa.array([[]], PAIRS)}))
    with pytest.raises(RequestValidationError) as raised:
        read(GraphAnomaly, ARROW, {"graphs": '[{"kinds": ["C"], "edges": []}]'}, content)
    assert "they are the body already" in str(raised.value.errors())


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
FIELDS = sorted([*GraphAnomaly.Request.model_fields, "kinds", "edges"])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(st.lists(VALUES, max_size=3), max_size=3), max_size=3),
    st.booleans(),
)
def test_no_body_whatever_gets_a_5xx(served, changes, inside) -> None:
    content = json.dumps({"graphs": [RING | changes]} if inside else {"graphs": [RING]} | changes)
    response = httpx.post(f"{served.url}/graph-anomaly/predict", content=content, timeout=60, trust_env=False)
    assert response.status_code in (200, 422), response.text
