"""The endpoints of HAWQ-V2 over real HTTP on Ray Serve: right answers, good and bad bodies."""

import base64
import io
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from library.errors import InputError
from library.hawq.recipe import HawqRecipe
from library.hawq.trained import load_hawq
from library.images import load_images
from library.images.recipe import ClassifierRecipe
from library.recipe import fit
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.endpoint import TooLarge, answer_batch, check_cost
from serving.hawq import Advise, AdviseRequest, Classify, ClassifyRequest

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


GREY = Classify(SimpleNamespace(shape=(1, 8, 8)), "v")


def asked(image: Image.Image | bytes, kind: str = "png") -> ClassifyRequest:
    file = io.BytesIO(image if isinstance(image, bytes) else b"")
    if not isinstance(image, bytes):
        image.save(file, format=kind)
    return ClassifyRequest(image=base64.b64encode(file.getvalue()).decode())


def dds(code: bytes) -> bytes:
    """A DirectDraw surface of 4 x 4 whose pixels are in a format of that name."""
    head = struct.pack("<7I44x", 124, 0x1007, 4, 4, 0, 0, 0) + struct.pack("<2I4s5I", 32, 4, code, *[0] * 5)
    return b"DDS " + head.ljust(124, b"\0") + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        dds(b"ABCD"),
        b"BLP2" + struct.pack("<iBBBB2I", 1, 9, 0, 0, 0, 4, 4) + bytes(1200),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    ],
    ids=["dds", "blp", "eps"],
)
def test_only_the_usual_formats_are_opened(content):
    with pytest.raises(ValidationError, match=r"image: not an image file \(PNG, JPEG, WEBP, GIF, BMP, TIFF\)"):
        asked(content)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    [pixels] = GREY._pixels(asked(Image.fromarray(values), kind))
    np.testing.assert_array_equal(pixels[0], values >> 8)
    [colours] = Classify(SimpleNamespace(shape=(3, 8, 8)), "v")._pixels(asked(Image.fromarray(values), kind))
    np.testing.assert_array_equal(colours, np.stack([values >> 8] * 3))


def test_images_of_32_bits_are_refused():
    for dtype in (np.int32, np.float32):
        request = asked(Image.fromarray(np.ones((8, 8), dtype)), "tiff")
        with pytest.raises(InputError, match="image: its values have 32 bits; an image of 8 or 16 bits"):
            GREY._pixels(request)


def test_the_pixels_of_files_are_what_they_cost_before_any_is_decoded():
    large = asked(Image.new("1", (4096, 4096)))
    assert len(large.image) < 4096
    assert GREY.cost(large) == 4096 * 4096 // 64
    several = ClassifyRequest(images=[large.image] * 64)
    with pytest.raises(TooLarge):
        check_cost(GREY, GREY.cost(several), GREY.request_cost)
    assert GREY.cost(asked(Image.new("L", (9, 9)))) == 8 * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"n_params": [10**400, 10, 10]},
        {"macs": [10**400, 10, 10]},
        {"latency": [[1e308, 1e308]] * 3},
        {"perturbation": [[1e308, 1e308]] * 3},
        {"traces": [1e308] * 3},
    ],
)
def test_numbers_that_no_network_has_are_refused_by_field(changes):
    network = {"traces": [1.0] * 3, "n_params": [10] * 3, "bits": [2, 4], "perturbation": [[1.0, 0.1]] * 3}
    with pytest.raises(ValidationError, match=rf"^\d.*\n{next(iter(changes))}\."):
        AdviseRequest.model_validate(network | changes)


@pytest.mark.parametrize("budget", ["size", "bops", "latency"])
def test_the_largest_numbers_that_are_taken_are_added_up(budget):
    most, layers = 1 << 44, 200
    network = {"traces": [1e100] * layers, "n_params": [most] * layers, "macs": [most] * layers, "bits": [2, 16]}
    tables = {"perturbation": [[1e100, 1.0]] * layers, "latency": [[1.0, 1e100]] * layers}
    [answer] = Advise(None, "v").answer([AdviseRequest.model_validate(network | tables | {"budget": budget})])
    numbers = [answer.omega, answer.cost, answer.limit, answer.slack, answer.lower_bound]
    assert np.isfinite(numbers).all()
    assert 0 < answer.cost <= answer.limit


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
