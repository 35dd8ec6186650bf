"""The endpoints `graph-property` and `graph-encoding` over real HTTP: what the library says, and bodies refused."""

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.artifact import Artifact
from library.errors import InputError
from library.recipe import fit
from library.spe.predictor import GraphPredictor
from library.spe.recipe import SpeRecipe
from library.spe.settings import Backbone, Encoding
from serving.app import Served, serve_endpoints
from serving.client import ask, example
from serving.spe import RING, GraphEncoding, GraphProperty

SIZES = {"eigenpairs": 8, "width": 4, "channels": 2, "rho_layers": 1, "rho_hidden": 8, "mlp_hidden": 8}
RECIPE = SpeRecipe(
    steps=2, batch_size=8, train_graphs=16, encoding=Encoding(**SIZES), backbone=Backbone(layers=1, hidden=8)
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return fit(RECIPE, path=tmp_path_factory.mktemp("spe") / "artifact")


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    names = ("graph-property", "graph-encoding")
    with serve_endpoints(artifacts=dict.fromkeys(names, str(artifact.path)), port=free_port) as served:
        yield served


def post(served: Served, endpoint: str, **request: object) -> httpx.Response:
    return httpx.post(f"{served.url}/{endpoint}/predict", timeout=60, trust_env=False, **request)


def test_molecules_and_graphs_get_what_the_library_says(served, artifact):
    predictor = GraphPredictor.from_artifact(artifact)
    given = predictor.molecule("CC(=O)Oc1ccccc1")
    [expected] = predictor.answer([given])
    whole = {"nodes": given.nodes.tolist(), "edges": given.edges.T.tolist(), "edge_types": given.attributes.tolist()}
    body = {"graphs": [{"smiles": "CC(=O)Oc1ccccc1"}, whole], "explain": True}
    answer = ask("graph-property", body, served.url)
    assert answer["model"] == artifact.version
    assert answer["unit"] == "standard deviations"
    for found in answer["properties"]:
        assert found["nodes"] == 10
        assert found["prediction"] == {"penalised_logp": pytest.approx(float(expected.values[0]), rel=1e-4)}
        explanation = found["explanation"]
        assert explanation["eigenvalues"] == pytest.approx(expected.eigenvalues.tolist(), abs=1e-9)
        assert explanation["multiplicities"] == expected.multiplicities
        assert sum(explanation["multiplicities"]) == len(explanation["eigenvalues"])
        assert explanation["gap"] == pytest.approx(expected.gap, abs=1e-9)
        np.testing.assert_allclose(explanation["encodings"], expected.encodings, rtol=1e-3, atol=1e-4)
        assert len(explanation["functions"]) == 2
        assert len(explanation["sensitivities"]) == 10
    plain = ask("graph-property", {"graphs": [{"smiles": "CCO"}]}, served.url)
    assert plain["properties"][0]["explanation"] is None
    encoded = ask("graph-encoding", {"graphs": [whole]}, served.url)
    assert encoded["width"] == 4
    assert encoded["graphs"][0]["gap"] == pytest.approx(expected.gap, abs=1e-9)
    np.testing.assert_allclose(encoded["graphs"][0]["encodings"], expected.encodings, rtol=1e-3, atol=1e-4)
    small = ask("graph-encoding", {"graphs": [RING]}, served.url)["graphs"][0]
    assert small["gap"] is None
    assert small["multiplicities"] == [1, 2, 2, 1]


def test_examples_and_limits(served):
    for endpoint in (GraphProperty, GraphEncoding):
        assert example(endpoint.name) in endpoint.examples.values()
        for body in endpoint.examples.values():
            assert post(served, endpoint.name, json=body).status_code == 200
        info = httpx.get(f"{served.url}/{endpoint.name}/info", trust_env=False).json()
        assert info["limits"]["eigenpairs"] == 8
        assert info["limits"]["cost_unit"] == "node pairs"


BAD = {
    "nothing": ({"graphs": []}, "graphs"),
    "no form": ({"graphs": [{}]}, "graphs[0]"),
    "two forms": ({"graphs": [{"smiles": "C", **RING}]}, "graphs[0]"),
    "no edges": ({"graphs": [{"nodes": [0]}]}, "graphs[0]"),
    "not a molecule": ({"graphs": [{"smiles": "C"}, {"smiles": "C("}]}, "graphs[1]"),
    "an atom that the model does not know": ({"graphs": [{"smiles": "[U]"}]}, "graphs[0]"),
    "a type that is not there": ({"graphs": [{**RING, "nodes": [99] * 6}]}, "graphs[0]"),
    "a node that is not there": ({"graphs": [{**RING, "nodes": [0] * 5}]}, "graphs[0]"),
    "a self-loop": ({"graphs": [{"nodes": [0, 0], "edges": [[1, 1]], "edge_types": [1]}]}, "graphs[0]"),
    "an edge twice": ({"graphs": [{"nodes": [0, 0], "edges": [[0, 1], [1, 0]], "edge_types": [1, 1]}]}, "graphs[0]"),
    "types missing": ({"graphs": [{"nodes": [0, 0], "edges": [[0, 1]]}]}, "graphs[0]"),
    "features for types": ({"graphs": [{**RING, "nodes": [[0.5]] * 6}]}, "graphs[0]"),
    "more parts than eigenpairs": ({"graphs": [{"nodes": [0] * 12, "edges": [], "edge_types": []}]}, "graphs[0]"),
    "unknown": ({"graphs": [RING], "color": 1}, "color"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_name_their_field(served, name):
    body, field = BAD[name]
    for endpoint in ("graph-property", "graph-encoding"):
        response = post(served, endpoint, json=body)
        assert response.status_code == 422, response.text
        assert field in [entry["field"] for entry in response.json()["fields"]], response.text
        with pytest.raises(InputError, match=f"{endpoint}: "):
            ask(endpoint, body, served.url)


def test_what_is_too_large_is_413(served):
    for endpoint in ("graph-property", "graph-encoding"):
        response = post(served, endpoint, json={"graphs": [{"nodes": [0] * 1000, "edges": []}] * 5})
        assert response.status_code == 413
        assert "5000000 node pairs are asked for" in response.json()["error"]
    explained = {"graphs": [{"nodes": [0] * 1000, "edges": [], "edge_types": []}] * 3, "explain": True}
    assert post(served, "graph-property", json=explained).status_code == 413
    limit = httpx.get(f"{served.url}/graph-property/info", trust_env=False).json()["limits"]["max_body_bytes"]
    response = post(served, "graph-property", content=b" " * (limit + 1))
    assert response.status_code == 413


VALUES = st.none() | st.booleans() | st.integers(-3, 30) | st.floats(allow_nan=False) | st.text(max_size=8)
LISTS = VALUES | st.lists(VALUES | st.lists(st.integers(-1, 7), max_size=3), max_size=6)
BODIES = st.dictionaries(st.sampled_from(["smiles", "nodes", "edges", "edge_types", "x"]), LISTS, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(BODIES | st.just(RING) | st.builds(lambda b: RING | b, BODIES), max_size=2), st.booleans())
def test_no_body_whatever_gets_a_5xx(served, graphs, explain):
    response = post(served, "graph-property", content=json.dumps({"graphs": graphs, "explain": explain}))
    assert response.status_code in (200, 422), response.text
