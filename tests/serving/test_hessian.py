"""Hessian answers of the endpoint `spectrum`: those of dense autograd, of the served model's own loss, and refusals."""

import copy
import math
import shutil
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from cluster import registry
from library.artifact import Artifact, write_artifact
from library.errors import InputError
from library.hessian import interpolate
from library.images.recipe import ClassifierRecipe
from library.recipe import seeded_model
from library.spectral import Hessian, dense_matrix
from library.weights import state_tensors
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.endpoint import TooLarge, check_cost
from serving.hessian_answers import HessianAnswers
from serving.spectrum import Spectrum, SpectrumRequest

QUESTION = copy.deepcopy(Spectrum.examples["hessian"]["hessian"])


def with_biases(question: dict, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    weights = [draw.normal(size=(6, 2)).tolist(), draw.normal(size=(2, 6)).tolist()]
    biases = [draw.normal(size=6).tolist(), draw.normal(size=2).tolist()]
    return question | {"network": {"weights": weights, "biases": biases, "activation": "tanh"}}


def answer(question: dict, artifact: Artifact | None = None) -> dict:
    request = SpectrumRequest.model_validate({"hessian": question})
    endpoint = Spectrum([], "version", HessianAnswers(artifact, "cpu"))
    return endpoint.answer([request])[0].model_dump()


def exact(question: dict, loss=F.cross_entropy) -> tuple[nn.Module, tuple, torch.Tensor]:
    network = SpectrumRequest.model_validate({"hessian": question}).hessian.network
    targets = torch.tensor(question["targets"])
    data = torch.tensor(question["inputs"], dtype=torch.float64), targets
    model = network.module()
    return model, data, dense_matrix(Hessian(model, loss, data))


def test_all_eigenvalues_the_largest_and_the_trace_are_those_of_the_dense_hessian():
    question = with_biases(QUESTION | {"what": ["exact", "top", "trace", "layers"], "probes": 64, "top": 4})
    found = answer(question)
    _, _, matrix = exact(question)
    values = torch.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found["eigenvalues"], values, atol=1e-12)
    assert found["parameters"] == 32
    assert found["samples"] == 4
    for entry, value in zip(found["top"], values.flip(0), strict=False):
        assert abs(entry["value"] - float(value)) <= max(entry["residual"], 1e-9)
    assert abs(found["trace"]["value"] - float(values.sum())) < 4 * found["trace"]["standard_error"]
    assert sum(block["trace"]["value"] for block in found["layers"]) == pytest.approx(found["trace"]["value"])
    assert [block["parameters"] for block in found["layers"]] == [12, 6, 12, 2]
    assert found["outliers"]["above_negative"] is not None
    assert found["slq"] is found["kpm"] is found["line"] is None


def test_densities_integrate_to_one_and_have_the_hessians_mean():
    question = with_biases(QUESTION | {"what": ["slq", "kpm"], "steps": 20, "probes": 64})
    found = answer(question)
    mean = float(exact(question)[2].diag().mean())
    for name in ("slq", "kpm"):
        grid, density = np.array(found[name]["grid"]), np.array(found[name]["density"])
        error = np.array(found[name]["standard_error"])
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.02)
        spread = np.trapezoid(np.abs(grid) * error, grid)
        assert np.trapezoid(grid * density, grid) == pytest.approx(mean, abs=spread + 0.02 * np.ptp(grid))
    np.testing.assert_allclose(np.sum(found["slq"]["weights"], axis=1), 1, rtol=1e-9)
    assert found["kpm"]["nodes"] is None


def test_squared_errors_are_summed_over_outputs():
    targets = [[0.0, 1.0], [1.0, 0.5], [0.2, -1.0], [2.0, 0.0]]
    question = QUESTION | {"what": ["exact"], "loss": "mse", "targets": targets}
    _, _, matrix = exact(question, lambda output, target: (output - target).square().sum(1).mean())
    np.testing.assert_allclose(answer(question)["eigenvalues"], torch.linalg.eigvalsh(matrix), atol=1e-12)


def test_a_line_to_another_network_is_the_librarys():
    question = with_biases(QUESTION | {"what": [], "points": 5})
    question["towards"] = with_biases(QUESTION, seed=1)["network"]
    model, data, _ = exact(question)
    last, _, _ = exact(question | {"network": question["towards"]})
    line = interpolate(model, F.cross_entropy, [data], model.state_dict(), last.state_dict(), points=5)
    found = answer(question)["line"]
    np.testing.assert_allclose(found["losses"], line.losses)
    assert found["barrier"] == pytest.approx(line.barrier)
    assert found["accuracies"] == line.accuracies.tolist()


def test_cost_is_parameters_times_products():
    endpoint = Spectrum([], "version", HessianAnswers(None, "cpu"))
    cost = endpoint.cost(SpectrumRequest.model_validate({"hessian": QUESTION | {"what": ["trace"], "probes": 7}}))
    assert cost == 12 * 8
    both = {"what": ["exact", "slq"], "probes": 3, "steps": 10}
    assert endpoint.cost(SpectrumRequest.model_validate({"hessian": QUESTION | both})) == 12 * (12 + 30 + 1)


def test_cost_grows_with_the_samples_and_the_units_that_they_pass():
    wide = {"weights": [[[0.1]] * 2000, [[0.1] * 2000]]}
    data = {"inputs": [[1.0]] * 65_536, "targets": [[1.0]] * 65_536}
    question = {"network": wide, "loss": "mse", "what": ["trace"]}
    endpoint = Spectrum([], "version", HessianAnswers(None, "cpu"))
    small = endpoint.cost(SpectrumRequest.model_validate({"hessian": question | {k: v[:1] for k, v in data.items()}}))
    assert small == 4000 * (4 + 1)
    large = SpectrumRequest.model_validate({"hessian": question | data})
    assert endpoint.cost(large) == (4000 + 2002) * 65_536 // 64 * (4 + 1)
    with pytest.raises(TooLarge):
        check_cost(endpoint, endpoint.cost(large), endpoint.request_cost)
    served = SpectrumRequest.model_validate({"hessian": {"samples": 256, "what": ["trace"]}}).hessian
    assert served.cost(1000) == 1000 * 4 * (4 + 1)


def test_samples_that_go_through_the_network_in_parts_give_the_same(monkeypatch):
    question = with_biases(QUESTION | {"what": ["exact", "trace"], "towards": with_biases(QUESTION, seed=1)["network"]})
    whole = answer(question)
    monkeypatch.setattr("serving.hessian_answers.ACTIVATIONS", 3 * 10)  # three of four samples, ten units each
    point = HessianAnswers(None, "cpu")._point(SpectrumRequest.model_validate({"hessian": question}).hessian)
    assert [len(inputs) for inputs, _ in point.data] == [3, 1]
    parts = answer(question)
    assert parts["samples"] == whole["samples"] == 4
    np.testing.assert_allclose(parts["eigenvalues"], whole["eigenvalues"], atol=1e-12)
    np.testing.assert_allclose(parts["line"]["losses"], whole["line"]["losses"])


@pytest.mark.parametrize(
    ("weight", "number", "says"),
    [(1e200, 1.0, "the loss is inf"), (1e-100, 1e150, "its gradient is too large")],
)
def test_numbers_beyond_double_precision_are_the_clients_fault(weight, number, says):
    question = {"network": {"weights": [[[weight] * 2]]}, "inputs": [[number] * 2], "targets": [[1.0]], "loss": "mse"}
    with pytest.raises(InputError, match=f"^hessian: .*{says}"):
        answer(question | {"what": ["exact", "top"]})


def test_too_many_parameters_for_all_eigenvalues():
    wide = {"weights": [np.ones((1001, 2)).tolist()]}
    with pytest.raises(InputError, match=r"hessian\.what: exact is for up to 2000 parameters, these are 2002"):
        answer(QUESTION | {"network": wide, "what": ["exact"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": []}, "what: name what is asked"),
        ({"targets": [0, 1, 2, 0]}, "targets: class 2 of a network with outputs 0 to 1"),
        ({"targets": [0, 1]}, "targets: 2 for 4 inputs"),
        ({"targets": [[0.0, 1.0]] * 4}, "targets: cross_entropy needs a class"),
        ({"loss": "mse"}, "targets: mse needs rows of numbers"),
        ({"loss": "mse", "targets": [[0.0]] * 4}, "targets: every row must have 2 numbers"),
        ({"inputs": [[1.0]] * 4}, "inputs: every row must have 2 numbers"),
        ({"network": {"weights": [[[1.0, 2.0]], [[1.0, 2.0]]]}}, r"weights\[1\]: every row must have 1 numbers"),
        ({"network": {"weights": [[[1.0, 2.0]] * 2], "biases": [[1.0]]}}, "biases: needed are vectors of 2 numbers"),
        ({"towards": "models:/send/1"}, "towards: a network's line ends at another network"),
        ({"towards": {"weights": [[[1.0, 2.0]]]}}, "towards: a network of the same sizes"),
        ({"samples": 3}, "samples: is about the served model's data"),
        ({"probes": 1}, "greater than or equal to 2"),
        ({"inputs": [[math.inf, 1.0]] * 4}, "finite"),
    ],
)
def test_bad_questions_are_refused_with_their_field(changes, message):
    with pytest.raises(ValidationError, match=message):
        SpectrumRequest.model_validate({"hessian": QUESTION | changes})


def test_a_question_about_the_served_model_takes_no_data_of_its_own():
    for question, message in (
        ({"targets": [1]}, "targets: belongs to a network"),
        ({"towards": QUESTION["network"]}, "towards: the served model's line ends at another of its versions"),
    ):
        with pytest.raises(ValidationError, match=message):
            SpectrumRequest.model_validate({"hessian": question})
    with pytest.raises(ValidationError, match="window: is about the tail"):
        SpectrumRequest.model_validate({"hessian": QUESTION, "window": 8})


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[Artifact]:
    """Two versions of a classifier, before and after a change of its last layer."""
    recipe = ClassifierRecipe(train_images=40)
    model, found = seeded_model(recipe), []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp("classifier") / name
        weights = {key: value.clone() for key, value in state_tensors(model).items()}
        content = {"kind": "classifier", "recipe": recipe.model_dump(mode="json"), "metrics": {}, "data": "none"}
        found.append(write_artifact(folder, weights=weights, **content))
        with torch.no_grad():
            model.head.weight.mul_(2)
    return found


@pytest.fixture(scope="module")
def served(shared_ray, versions, empty_registry, free_port, tmp_path_factory) -> Iterator[Served]:
    """The first version, by an endpoint whose registry holds both."""
    shared_ray.connection()
    home = tmp_path_factory.mktemp("home")
    shutil.copy(empty_registry, home)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRISM_HOME", str(home))
        for artifact in versions:
            registry.register(artifact.path, "spectrum-test")
        endpoint = serve_endpoints(artifacts={"spectrum": "models:/spectrum-test/1"}, port=free_port)
    with endpoint as served:
        yield served


@pytest.mark.ray
def test_the_served_models_loss_and_curvature(served, versions):
    question = {"samples": 6, "part": "train", "what": ["trace", "layers"], "probes": 2, "points": 3}
    question["towards"] = "models:/spectrum-test/2"
    found = ask("spectrum", {"hessian": question}, served.url)
    recipe = ClassifierRecipe(train_images=40)
    model, splits = seeded_model(recipe).eval(), recipe.datasets()
    batch = splits.collate([splits.train[i] for i in range(6)], torch.arange(6))
    operator = Hessian(model, F.cross_entropy, (batch.pixels, batch.labels))
    probes = operator.probes(2, generator=torch.Generator().manual_seed(0))
    expected = float((probes * operator(probes)).sum(0).mean())
    assert found["loss"] == pytest.approx(float(F.cross_entropy(model(batch.pixels), batch.labels).detach()), rel=1e-5)
    assert found["trace"]["value"] == pytest.approx(expected, rel=1e-3)
    assert found["samples"] == 6
    assert found["line"]["losses"][0] == pytest.approx(found["loss"], rel=1e-5)
    assert found["line"]["positions"] == [0.0, 0.5, 1.0]
    assert found["notes"] == ["float32: eigenvalues below 1e-6 of the largest are rounding"]
    assert ask("spectrum", {"layer": "head", "method": "plain"}, served.url)["rows"] == 10


@pytest.mark.ray
@pytest.mark.parametrize(
    ("question", "field"),
    [
        ({"towards": "models:/spectrum-test/9"}, "hessian.towards"),
        ({"towards": "/etc/passwd"}, "hessian.towards"),
        ({"what": ["eigenvalues"]}, "hessian.what[0]"),
        ({"network": QUESTION["network"]}, "hessian.inputs"),
        ({"probes": 64, "steps": 400, "what": ["slq"]}, "body"),
    ],
)
def test_bad_bodies_name_their_field(served, question, field):
    response = httpx.post(f"{served.url}/spectrum/predict", json={"hessian": question}, timeout=60, trust_env=False)
    if field == "body":
        assert response.status_code == 413
        assert "parameters x products" in response.json()["error"]
    else:
        assert response.status_code == 422, response.text
        assert [entry["field"] for entry in response.json()["fields"]] == [field]
    with pytest.raises(InputError, match="spectrum: "):
        ask("spectrum", {"hessian": question}, served.url)
