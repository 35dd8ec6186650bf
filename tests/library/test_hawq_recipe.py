import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import ResNetConfig, ResNetForImageClassification

from library.artifact import open_artifact, write_artifact
from library.errors import ArtifactError, InputError
from library.hawq.calibration import calibration_error, fit_temperature
from library.hawq.network import quantized_layers
from library.hawq.packing import pack, stated_bytes, unpack
from library.hawq.quantizers import WeightQuantizer
from library.hawq.recipe import HawqRecipe
from library.hawq.store import load_sensitivity, save_sensitivity, tempered
from library.hawq.trained import load_hawq
from library.images import image_network
from library.images.data import stacked
from library.images.recipe import ClassifierRecipe, load_classifier
from library.recipe import fit, seeded_model

CLASSIFIER = ClassifierRecipe(steps=40, batch_size=64, train_images=2500, validation_fraction=0.03)
SMALL = {"classifier": CLASSIFIER, "steps": 6, "batch_size": 32, "probe_images": 64, "probe_batch": 32, "probes": 10}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(CLASSIFIER, path=tmp_path_factory.mktemp("classifier") / "a", device="cpu")


def recipe(trained, **changes) -> HawqRecipe:
    return HawqRecipe(**(SMALL | {"weights": str(trained.path)} | changes))


@pytest.mark.parametrize("bits", range(2, 17))
def test_packing_is_exact_and_as_small_as_stated(bits):
    values = torch.randint(0, 2**bits, (1001,), generator=torch.Generator().manual_seed(bits))
    values[:2] = torch.tensor([0, 2**bits - 1])
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-1001 * bits // 8)
    assert torch.equal(unpack(packed, bits, 1001), values)
    with pytest.raises(InputError, match=f"from 0 to {2**bits - 1}"):
        pack(values + 1, bits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantizer": WeightQuantizer(symmetric=False, clipping="mse"), "activation_bits": None},
        {"quantizer": WeightQuantizer(granularity="tensor"), "stages": 3, "steps": 12},
    ],
    ids=["default", "asymmetric", "staged"],
)
def test_fine_tuning_packs_and_loads_what_was_evaluated(trained, tmp_path, changes):
    made = recipe(trained, **changes)
    seen = {}
    artifact = fit(made, path=tmp_path / "a", device="cpu", callbacks=[seen.__setitem__])
    plan = made.plan()
    assert plan.size <= 0.375 * 8 * sum(plan.layers.n_params)
    found = load_hawq(open_artifact(tmp_path / "a"))
    splits = made.datasets()
    batch = stacked(splits, splits.validation)
    with torch.no_grad():
        logits = found.model(batch.pixels)
    accuracy = float((logits.argmax(1) == batch.labels).float().mean())
    assert accuracy == pytest.approx(artifact.metrics["accuracy"], abs=2e-3)
    assert float(torch.nn.functional.cross_entropy(logits, batch.labels)) == pytest.approx(
        artifact.metrics["loss"], rel=1e-4
    )
    size = (tmp_path / "a" / "weights.safetensors").stat().st_size
    assert size == pytest.approx(found.layout["bytes"], rel=0.05)
    assert size == pytest.approx(1024 * artifact.metrics["kib"], rel=0.05)
    assert size < 0.2 * (trained.path / "weights.safetensors").stat().st_size
    if "stages" in changes:
        counts = [seen[step]["quantized_layers"] for step in range(1, 13)]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (3, 8)
    pixels = torch.stack([splits.test[i][0] for i in range(50)])
    probabilities = found.probabilities(pixels)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50))
    with pytest.raises(InputError, match=r"images must be uint8 \(n, 1, 28, 28\)"):
        found.probabilities(pixels.float())


def test_layers_that_wait_compute_in_full_precision(trained):
    made = recipe(trained, stages=8, steps=16, activation_bits=None)
    model = seeded_model(made)
    active = [bool(layer.active) for layer in quantized_layers(model).values()]
    assert sum(active) == 1
    plan, found = made.plan(), made.sensitivity()
    terms = [found.omega[i, found.bits.index(c.weight)] for i, c in enumerate(plan.choices)]
    assert active.index(True) == int(torch.stack(terms).argmax())
    for step in range(1, 9):
        made.after_step(model, step)
    assert all(bool(layer.active) for layer in quantized_layers(model).values())


def test_distillation_mixes_the_published_terms(trained):
    made = recipe(trained, distillation=0.95)
    model = seeded_model(made)
    splits = made.datasets()
    batch = stacked(splits, splits.train, 16)
    found = made.losses(model, batch)
    teacher = load_classifier(trained)[0](batch.pixels)
    p, q = (logits / 6).softmax(1) if (logits := teacher) is not None else None, (model(batch.pixels) / 6).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.95 * 36 * divergence + 0.05 * found["cross_entropy"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert "cross_entropy" not in made.model_copy(update={"distillation": 0.0}).losses(model, batch)


def test_curvature_is_measured_once_and_found_by_content(trained, tmp_path, monkeypatch):
    made = recipe(trained, cache=str(tmp_path))
    first = made.sensitivity()
    monkeypatch.setattr("library.hawq.analysis.quadratic_forms", lambda *_, **__: pytest.fail("measured again"))
    again = made.sensitivity()
    assert torch.equal(first.omega, again.omega)
    coarse = made.model_copy(update={"quantizer": WeightQuantizer(granularity="tensor"), "bits": (4, 8)})
    assert torch.equal(coarse.sensitivity().curvature, first.curvature)
    assert coarse.sensitivity().perturbation.shape == (8, 2)
    [entry] = tmp_path.iterdir()
    (entry / "weights.safetensors").write_bytes(b"damaged")
    monkeypatch.undo()
    assert torch.equal(made.sensitivity().omega, first.omega)
    assert load_sensitivity(entry).probes == first.probes


def test_power_moves_between_the_method_and_the_plain_error(trained, tmp_path):
    found = recipe(trained, curvature="ggn").sensitivity()
    torch.testing.assert_close(tempered(found, 1.0).omega, found.omega)
    torch.testing.assert_close(tempered(found, 0.0).omega, found.perturbation)
    save_sensitivity(found, tmp_path / "s")
    back = load_sensitivity(tmp_path / "s")
    assert back.layers == found.layers
    assert back.metric == "ggn"
    assert torch.equal(back.omega, found.omega)
    write_artifact(tmp_path / "other", kind="send", recipe={}, weights={}, metrics={}, data="")
    with pytest.raises(ArtifactError, match="not of 'hawq-sensitivity'"):
        load_sensitivity(tmp_path / "other")


def test_chosen_ends_ties_and_latency(trained, tmp_path):
    plan = recipe(trained, ends=8, ties=("blocks.1.conv+blocks.2.conv",), fraction=0.5, curvature="unweighted").plan()
    assert [plan.choices[0].weight, plan.choices[-1].weight] == [8, 8]
    assert plan.bits["blocks.1.conv"] == plan.bits["blocks.2.conv"]
    explicit = recipe(trained, chosen=(8, 5, 5, 4, 3, 3, 2, 8)).plan()
    assert list(explicit.bits.values()) == [8, 5, 5, 4, 3, 3, 2, 8]
    table = tmp_path / "latency.csv"
    table.write_text("\n".join(",".join(str(0.1 * b) for b in (2, 8)) for _ in range(8)))
    timed = recipe(trained, bits=(2, 8), budget="latency", latency_table=str(table), fraction=0.5, curvature="ggn")
    assert timed.plan().selection.cost <= 0.5 * 8 * 0.8
    table.write_text("a,b")
    with pytest.raises(InputError, match="is not a CSV of numbers"):
        timed.plan()


def test_temperature_is_the_one_of_least_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = fit_temperature(logits, labels)
    assert found["temperature"] == pytest.approx(2.5, rel=0.15)
    assert found["cross_entropy"] < found["cross_entropy_before"]
    assert found["calibration_error"] < 0.3 * found["calibration_error_before"]
    sure = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    assert calibration_error(sure, torch.tensor([0, 1, 2, 1])) == pytest.approx(0.25)


def test_recipes_that_cannot_work_are_refused(trained):
    with pytest.raises(InputError, match="name the artifact of a trained classifier"):
        seeded_model(HawqRecipe())
    with pytest.raises(ValidationError, match="whole numbers from 2 to 16"):
        HawqRecipe(bits=(1, 8))
    with pytest.raises(ValidationError, match="each once"):
        HawqRecipe(bits=(8, 8))
    with pytest.raises(ValidationError, match="budget=latency needs one"):
        HawqRecipe(budget="latency")
    with pytest.raises(InputError, match=r"budget fraction 0\.2 cannot be met; the least is 0\.25"):
        recipe(trained, fraction=0.2, curvature="unweighted").plan()
    with pytest.raises(InputError, match="3 bit numbers for 8 layers"):
        recipe(trained, chosen=(8, 8, 8)).plan()
    with pytest.raises(InputError, match="ends: 7 bits must be among"):
        recipe(trained, ends=7, curvature="unweighted").plan()
    with pytest.raises(InputError, match="is a cnn8 on fashion-mnist, not the resnet20"):
        recipe(trained, classifier=ClassifierRecipe(network="resnet20")).model()


def test_a_network_of_transformers_on_a_folder_of_images_is_quantised(tmp_path):
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.png")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    classifier = ClassifierRecipe(
        network=str(tmp_path / "resnet"), images=str(tmp_path / "images"), image_size=32, validation_fraction=0.25
    )
    changes = {"classifier": classifier, "probe_images": 8, "probe_batch": 4, "batch_size": 4, "steps": 2}
    made = HawqRecipe(**(SMALL | changes))
    artifact = fit(made, path=tmp_path / "a", device="cpu")
    assert len(made.plan().bits) == 7
    shutil.rmtree(tmp_path / "resnet")
    found = load_hawq(artifact)
    assert found.classes == ("cat", "dog")
    assert found.probabilities(made.datasets().test[0][0][None]).shape == (1, 2)
    with pytest.raises(InputError, match="knows 2 classes, the images have 10"):
        image_network_of(config, tmp_path)


def image_network_of(config, folder):
    ResNetForImageClassification(config).save_pretrained(folder / "again")
    return image_network(str(folder / "again"), 3, 10)


def test_a_damaged_or_foreign_artifact_is_refused(trained, tmp_path):
    made = recipe(trained, chosen=(4,) * 8, steps=1)
    artifact = fit(made, path=tmp_path / "a", device="cpu")
    with pytest.raises(ArtifactError, match="not of 'hawq'"):
        load_hawq(trained)
    layout = json.loads(artifact.text("bits.json"))
    layout["layers"][0]["weight_bits"] = 8
    weights, texts = artifact.weights(), {"bits.json": json.dumps(layout), "task.json": artifact.text("task.json")}
    content = {"kind": "hawq", "recipe": artifact.recipe, "metrics": {}, "data": ""}
    changed = write_artifact(tmp_path / "b", weights=weights, texts=texts, **content)
    with pytest.raises(ArtifactError, match=r"of another network: .* entries in 'integers'"):
        load_hawq(changed)
    del texts["task.json"]
    with pytest.raises(ArtifactError, match=r"holds no task\.json"):
        load_hawq(write_artifact(tmp_path / "c", weights=weights, texts=texts, **content))
    model = load_hawq(artifact).model
    assert stated_bytes(model) == json.loads(artifact.text("bits.json"))["bytes"]
