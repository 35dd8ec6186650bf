"""The endpoints of HAWQ-V2 over real HTTP on Ray Serve: right answers, good and bad bodies."""

import base64
import io
from collections.abc import Iterator

import httpx
import pytest
import torch
from PIL import Image

from library.hawq.recipe import HawqRecipe
from library.hawq.trained import load_hawq
from library.images import load_images
from library.images.recipe import ClassifierRecipe
from library.recipe import fit
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.endpoint import answer_batch
from serving.hawq import Advise, AdviseRequest

CLASSIFIER = ClassifierRecipe(steps=40, batch_size=64, train_images=2500, validation_fraction=0.03)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hawq")
    weights = fit(CLASSIFIER, path=folder / "classifier", device="cpu").path
    recipe = HawqRecipe(
        classifier=CLASSIFIER, weights=str(weights), steps=4, batch_size=32, probe_images=64, probe_batch=32, probes=10
    )
    return fit(recipe, path=folder / "hawq", device="cpu")


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    folder = str(artifact.path)
    with serve_endpoints(artifacts={"classify": folder, "advise": folder}, port=free_port) as served:
        yield served


def as_png(pixels: torch.Tensor) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.ray
def test_images_are_classified_as_the_library_does(served, artifact):
    found = load_hawq(artifact)
    images = load_images().test.pixels[:4]
    expected = found.probabilities(images)
    answer = ask("classify", {"images": [as_png(image) for image in images], "explain": True}, served.url)
    assert answer["model"] == artifact.version
    for result, row in zip(answer["results"], expected, strict=True):
        assert result["label"] == found.classes[int(row.argmax())]
        assert list(result["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
    assert answer["bits"] == {entry["name"]: entry["weight_bits"] for entry in found.layout["layers"]}
    plain = ask("classify", {"pixels": images[0, 0].tolist()}, served.url)
    alone = found.probabilities(images[:1])  # in a batch a value on the border of two integers may round the other way
    assert plain["results"][0]["probability"] == pytest.approx(float(alone.max()), abs=1e-5)
    assert (plain["bits"], plain["results"][0]["probabilities"]) == (None, None)
    assert ask("classify", None, served.url)["results"]
    info = httpx.get(f"{served.url}/classify/info", timeout=30, trust_env=False).text
    assert '"bits head"' in info
    assert f'"bytes":{found.layout["bytes"]}' in info.replace(" ", "")


@pytest.mark.ray
def test_bits_are_advised_for_the_served_network_and_for_numbers(served, artifact):
    recipe = HawqRecipe.model_validate(artifact.recipe)
    answer = ask("advise", {"fraction": recipe.fraction}, served.url)
    assert dict(zip(answer["layers"], answer["bits"], strict=True)) == recipe.plan().bits
    assert answer["lower_bound"] <= answer["omega"]
    assert answer["slack"] == pytest.approx(answer["limit"] - answer["cost"])
    assert 0 <= answer["stability"] <= 1
    assert len(ask("advise", None, served.url)["bits"]) == 3


def test_small_questions_share_a_call_and_larger_ones_do_not_wait_for_each_other(artifact):
    endpoint = Advise.load(artifact, "cpu")

    def asked(layers: int, **more: object) -> AdviseRequest:
        network = {"traces": [1.0] * layers, "n_params": [10] * layers, "perturbation": [[1.0, 0.1]] * layers}
        return AdviseRequest.model_validate({"bits": [2, 4], "fraction": 1.0} | network | more)

    large, tested = [asked(60), asked(60)], [asked(3, errors=[0.1] * 3), asked(3, errors=[0.1] * 3)]
    requests = [asked(3), *large, asked(4), *tested]
    answered = {tuple(places): outcomes for places, outcomes in answer_batch(endpoint, requests)}
    assert sorted(answered) == [(0, 3), (1,), (2,), (4,), (5,)]
    for places, outcomes in answered.items():
        assert outcomes == endpoint.answer([requests[place] for place in places])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("classify", {}, "give one of image, images and pixels"),
        ("classify", {"image": "not base64"}, "image"),
        ("classify", {"pixels": [[0, 0], [0, 0]]}, "pixels"),
        ("classify", {"pixels": [[300]]}, "pixels"),
        ("classify", {"pixels": [[0]], "colour": True}, "colour"),
        ("advise", {"fraction": 0.1}, "the least is 0.25"),
        ("advise", {"traces": [1.0]}, "n_params"),
        ("advise", {"budget": "latency"}, "latency"),
        ("advise", {"ties": [[0, 99]]}, "ties"),
        ("advise", {"fraction": 1.5}, "fraction"),
    ],
)
def test_bad_bodies_are_refused_by_field(served, name, body, field):
    reply = httpx.post(f"{served.url}/{name}/predict", json=body, timeout=30, trust_env=False)
    assert reply.status_code == 422
    assert field in reply.text
    assert "Traceback" not in reply.text
