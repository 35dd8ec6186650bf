"""The endpoint `spectrum` over real HTTP: what the library finds, verdicts, and bodies that are refused."""

import base64
import io
import json
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from library import farms
from library.artifact import Artifact, write_artifact
from library.errors import InputError
from library.farms.allocation import allocate
from serving.app import Served, serve_endpoints
from serving.client import ask, example
from serving.endpoint import NPY
from serving.payloads import read
from serving.spectrum import Spectrum


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def npy(array: np.ndarray, **options: object) -> str:
    content = io.BytesIO()
    np.save(content, array, **options)
    return base64.b64encode(content.getvalue()).decode()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    """A model of an untrained layer and a heavy-tailed one, of very different shapes."""
    heavy = torch.distributions.StudentT(1.5)
    torch.manual_seed(0)
    state = {"fresh.weight": gaussian(256, 32), "heavy.weight": heavy.sample((64, 64)), "bias": gaussian(4)}
    folder = tmp_path_factory.mktemp("spectrum") / "artifact"
    return write_artifact(folder, kind="farms", recipe={}, weights=state, metrics={}, data="none")


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"spectrum": str(artifact.path)}, port=free_port) as served:
        yield served


def test_a_layer_gets_what_the_library_finds_and_a_verdict(served, artifact):
    table = farms.analyze(artifact, window=32, ops=5).set_index("layer")
    for name, verdict in (("fresh", "like-untrained"), ("heavy", "heavier-tailed")):
        answer = ask("spectrum", {"layer": name, "window": 32, "ops": 5}, served.url)
        row = table.loc[name]
        assert answer["model"] == artifact.version
        assert answer["verdict"] == verdict
        for field, column in {
            "alpha": "alpha",
            "median_alpha": "alpha",
            "standard_error": "standard_error",
            "ks_distance": "D",
            "mp_alpha": "mp_alpha",
            "n_eigenvalues": "num_evals",
            "windows": "windows",
            "spectral_norm": "spectral_norm",
        }.items():
            assert answer[field] == pytest.approx(row[column], rel=1e-9), field
        assert answer["stable_rank"] == pytest.approx(row["stable_rank"] / row["windows"])
        assert sum(answer["histogram"]["counts"]) == answer["n_eigenvalues"]
        assert answer["aspect_ratio"] == row[["rows", "columns"]].max() / row[["rows", "columns"]].min()


def test_a_matrix_gets_the_same_however_it_is_sent(served):
    weight = gaussian(40, 24).double()
    expected = farms.analyze({"weight": weight}, method="plain", rule="ks")["alpha"][0]
    for body in ({"matrix": weight.tolist()}, {"npy": npy(weight.numpy())}, {"npy": npy(weight.numpy().astype(">f8"))}):
        answer = ask("spectrum", body | {"method": "plain", "rule": "ks"}, served.url)
        assert answer["alpha"] == pytest.approx(expected, rel=1e-9)
        assert answer["median_alpha"] != answer["alpha"]
    assert example("spectrum")["window"] == 8
    for name, body in Spectrum.examples.items():
        assert np.isfinite(ask("spectrum", body, served.url)[FIRST.get(name, "alpha")])
    info = httpx.get(f"{served.url}/spectrum/info", trust_env=False).json()
    assert info["limits"]["layers"] == 2


FIRST = {"hessian": "loss", "allocate": "achieved"}  # a number of answers that have no alpha
GOOD = gaussian(20, 20).tolist()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"matrix": GOOD, "layer": "fresh"}, "body"),
        ({"matrix": [[1.0, 2.0], [3.0]]}, "matrix"),
        ({"matrix": [[1.0] * 3] * 3}, "matrix"),
        ({"matrix": torch.eye(20).tolist()}, "matrix"),
        ({"matrix": GOOD, "window": 4}, "window"),
        ({"matrix": GOOD, "ops": 1}, "ops"),
        ({"matrix": GOOD, "ratio": 900.0}, "matrix"),
        ({"matrix": GOOD, "rule": "hill"}, "rule"),
        ({"layer": "third"}, "layer"),
        ({"npy": "???"}, "npy"),
        ({"npy": base64.b64encode(b"nonsense").decode()}, "npy"),
        ({"npy": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)}, "npy"),
        ({"npy": npy(np.ones((3, 3), dtype=np.int64))}, "npy"),
        ({"npy": npy(np.ones((3, 3, 3)))}, "npy"),
        ({"npy": npy(np.full((20, 20), np.nan))}, "npy"),
        ({"npy": npy(np.ones((0, 3)))}, "npy"),
        ({"allocate": {"alphas": [2.0], "parameters": [1, 2], "sparsity": 0.5}}, "allocate"),
        ({"allocate": {"alphas": [2.0], "parameters": [1], "sparsity": 0.9999}}, "allocate"),
        ({"allocate": {"alphas": [2.0], "parameters": [1], "sparsity": 1.5}}, "allocate"),
        ({"allocate": {"alphas": [2.0], "parameters": [1], "sparsity": 0.5}, "ops": 3}, "ops"),
    ],
)
def test_bad_bodies_name_their_field(served, body, field):
    response = httpx.post(f"{served.url}/spectrum/predict", json=body, timeout=60, trust_env=False)
    assert response.status_code == 422, response.text
    assert field in [entry["field"].partition("[")[0].partition(".")[0] for entry in response.json()["fields"]]
    with pytest.raises(InputError, match="spectrum: "):
        ask("spectrum", body, served.url)


def test_chance_does_not_look_like_training():
    untrained = [(side, side * ratio) for side in (16, 32, 64) for ratio in (1, 4)]
    for shape in untrained:
        weights = [gaussian(*shape, seed=seed).tolist() for seed in range(20)]
        endpoint = Spectrum([], "version")
        for method in ("plain", "farms"):
            found = endpoint.answer([Spectrum.Request(matrix=w, window=16, ops=4, method=method) for w in weights])
            assert sum(answer.verdict == "like-untrained" for answer in found) >= 18


def test_pruning_ratios_are_the_librarys_and_keep_the_budget(served):
    question = {"alphas": [2.0, 3.0, 4.0, 2.5], "parameters": [100, 100, 200, 50], "sparsity": 0.6, "epsilon": 0.3}
    for blocks in ({}, {"blocks": [0, 0, 1, 1]}):
        found = ask("spectrum", {"allocate": question | blocks}, served.url)
        expected = allocate(*(question[name] for name in ("alphas", "parameters", "sparsity")), epsilon=0.3, **blocks)
        assert found["ratios"] == pytest.approx(expected.tolist())
        assert found["achieved"] == pytest.approx(0.6)


def test_more_entries_than_allowed_are_refused_by_their_number():
    endpoint = Spectrum([], "version")
    assert endpoint.cost(Spectrum.Request(matrix=GOOD)) == 400
    assert endpoint.cost(Spectrum.Request(npy=npy(np.ones((100, 100), dtype=np.float16)))) >= 10_000


@pytest.mark.parametrize(
    ("shape", "settings", "windows", "rows"),
    [
        ((2048, 2048), {}, 15 * 15, 2000),  # what is left out is as the paper has it
        ((2000, 2000), {"window": 1000, "ops": 32}, 32 * 32, 1000),
        ((2000, 2000), {"method": "plain"}, 1, 2000),
        ((64, 40), {"window": 8, "ops": 4}, 16, 8),
    ],
)
def test_windows_cost_what_their_eigenvalues_take(shape, settings, windows, rows):
    endpoint, matrix = Spectrum([], "version"), np.zeros(shape, np.float16)
    expected = max(matrix.size, windows * rows**3 // 8192)
    query = {name: str(value) for name, value in settings.items()}
    file = io.BytesIO()
    np.save(file, matrix)
    for request in (Spectrum.Request(npy=npy(matrix), **settings), read(Spectrum, NPY, query, file.getvalue())):
        assert endpoint.cost(request) == expected
    assert (expected > endpoint.request_cost) == (windows > 100)


def test_a_layers_windows_and_a_convolutions_blocks_are_counted(artifact):
    endpoint = Spectrum.load(artifact, "cpu")
    assert endpoint.cost(Spectrum.Request(layer="heavy")) == 64 * 64  # one window
    kernel = SimpleNamespace(name="conv", shape=(512, 512, 3, 3))
    assert Spectrum([kernel], "v").cost(Spectrum.Request(layer="conv")) == 512 * 512 * 9
    assert endpoint.cost(Spectrum.Request(layer="third")) == 1  # refused by the answer, with the names of those there


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": [10**400, 1, 1]},
        {"parameters": [10**308, 1, 1]},
        {"blocks": [0, 0, 10**30]},
        {"alphas": [1e308, -1e308, 0.0]},
    ],
)
def test_numbers_that_no_layer_has_are_refused_by_field(changes):
    question = {"alphas": [2.0, 3.0, 4.0], "parameters": [1, 1, 1], "sparsity": 0.5} | changes
    with pytest.raises(ValidationError, match=rf"allocate\.{next(iter(changes))}\."):
        Spectrum.Request.model_validate({"allocate": question})


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
FIELDS = sorted(Spectrum.Request.model_fields)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([{"matrix": GOOD}, {"layer": "fresh"}, {}]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(st.lists(VALUES, max_size=3), max_size=3), max_size=3),
)
def test_no_body_whatever_gets_a_5xx(served, base, changes):
    content = json.dumps(base | changes)
    response = httpx.post(f"{served.url}/spectrum/predict", content=content, timeout=60, trust_env=False)
    assert response.status_code in (200, 422), response.text
