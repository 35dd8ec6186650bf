"""HAWQ-V2 on a real Ray cluster: measured, chosen, fine-tuned by two workers, packed, searched, reproduced."""

import json

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from cluster import registry
from jobs import flags
from jobs.hawq import ClassifierJob, HawqJob, frontier_figure
from jobs.hawq_claims import choosing
from jobs.hawq_lm import HawqLanguageJob
from jobs.hawq_reproduction import HawqReproduction
from jobs.reproduce import reproduction_class
from jobs.training import Scaling
from jobs.trial import changed
from jobs.tuning import TuneJob
from library.artifact import open_artifact
from library.errors import InputError
from library.hawq.language import HawqLanguageRecipe
from library.hawq.recipe import HawqRecipe
from library.hawq.study import FIRST, INVERSE, METHOD, METRICS, PLAIN, RANDOM, Study, random_plans, spearman
from library.hawq.trained import load_hawq
from library.images.recipe import ClassifierRecipe
from library.recipe import fit
from library.send.recipe import SendRecipe

CLASSIFIER = ClassifierRecipe(steps=30, batch_size=64, train_images=2000, validation_fraction=0.02)
SMALL = {"classifier": CLASSIFIER, "steps": 4, "batch_size": 32, "probe_images": 64, "probe_batch": 32, "probes": 10}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(CLASSIFIER, path=tmp_path_factory.mktemp("classifier") / "a", device="cpu")


def test_without_weights_the_classifier_is_trained_with_what_the_job_takes():
    job = HawqJob(scaling=Scaling(workers=2), engine="zero2", recipe=HawqRecipe(**SMALL))
    assert job._classifier() == ClassifierJob(scaling=Scaling(workers=2), engine="zero2", recipe=CLASSIFIER)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_two_workers_give_the_numbers_and_the_bits_of_one(trained, tmp_path, private_home):
    recipe = HawqRecipe(**SMALL, weights=str(trained.path), stages=2)
    job = HawqJob(recipe=recipe, scaling=Scaling(workers=2), storage=str(tmp_path / "runs"), name="r")
    report = job.run()
    artifact = open_artifact(report.artifact, kind="hawq")
    alone = fit(recipe, path=tmp_path / "alone", device="cpu")
    assert artifact.text("bits.json") == alone.text("bits.json")
    assert report.metrics["validation_loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    table = report.tables["bits"]
    here = recipe.sensitivity()
    assert table["hessian"].tolist() == pytest.approx(here.curvature.tolist(), rel=1e-4), "measured by tasks"
    assert [entry["weight_bits"] for entry in json.loads(artifact.text("bits.json"))["layers"]] == list(table["bits"])
    assert 0 <= report.metrics["stability"] <= 1
    assert report.registered == "models:/hawq/1"
    assert len(list((private_home / "hawq").iterdir())) == 1
    assert load_hawq(open_artifact(registry.resolve("models:/hawq@champion"))).classes[9] == "Ankle boot"
    saved = pd.read_parquet(tmp_path / "runs" / "r" / "report" / "bits.parquet")
    assert saved["bits"].tolist() == table["bits"].tolist()
    assert frontier_figure(recipe, here, recipe.plan()).axes[0].get_xlabel().startswith("size")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_two_workers_train_the_classifier_that_one_trains(tmp_path):
    recipe = CLASSIFIER.model_copy(update={"steps": 2, "batch_size": 15})
    with pytest.raises(ValidationError, match="cannot be cut"):
        ClassifierJob(recipe=recipe, micro_batch=4)
    report = ClassifierJob(recipe=recipe, scaling=Scaling(workers=2), storage=str(tmp_path / "runs")).run()
    alone = fit(recipe, path=tmp_path / "alone", device="cpu")
    expected = dict(alone.iter_weights())
    assert any(name.endswith("running_var") for name in expected)
    for name, tensor in open_artifact(report.artifact).iter_weights():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_language_model_is_quantised_by_two_workers_as_by_one(tmp_path):
    texts = {"corpus": "truthfulqa", "context": 16, "batch_size": 4}
    plain = SendRecipe(**texts, tokenizer="bytes", steps=2, tracking_texts=2, prompts=0, calibration_cases=0)
    lm = str(fit(plain, path=tmp_path / "send", device="cpu").path)
    measured = {"probe_blocks": 4, "probe_batch": 2, "probes": 4, "validation_blocks": 8}
    recipe = HawqLanguageRecipe(**texts, **measured, lm=lm, steps=2)
    report = HawqLanguageJob(recipe=recipe, scaling=Scaling(workers=2), storage=str(tmp_path / "runs")).run()
    alone = fit(recipe, path=tmp_path / "alone", device="cpu")
    artifact = open_artifact(report.artifact, kind="hawq-lm")
    assert artifact.text("bits.json") == alone.text("bits.json")
    assert report.metrics["validation_loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    assert report.tables["bits"]["bits"].tolist() == list(recipe.plan().bits.values())
    assert report.registered == "models:/hawq-lm/1"
    with pytest.raises(InputError, match="nobody"):
        HawqLanguageJob(recipe=recipe.model_copy(update={"lm": "models:/nobody/1"})).run()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_search_draws_its_front_beside_the_baselines_and_registers_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tune_spaces.hawq.FRACTIONS", (0.375,))
    monkeypatch.setattr("tune_spaces.hawq.UNIFORM", (3,))
    monkeypatch.setattr("tune_spaces.hawq.RANDOM_SETTINGS", 1)
    recipe = {**SMALL, "classifier": CLASSIFIER.model_dump(), "steps": 9, "weights": str(trained.path)}
    base = {"recipe": recipe, "checkpoint_every": 9, "evaluate_every": 3}
    job = TuneJob(space="hawq", base=base, samples=4, concurrent=2, storage=str(tmp_path), name="s")
    report = job.run()
    trials = report.tables["trials"]
    assert trials["group"].value_counts().to_dict() == {
        "search": 4,
        "exact Omega": 1,
        "equal bits": 1,
        "random bits": 1,
    }
    assert (trials[trials["group"] != "search"]["state"] == "finished").all()
    ended = trials[(trials["group"] == "search") & (trials["state"] == "finished")]
    front = trials[trials["front"]]
    assert set(front["trial"]) <= set(ended["trial"])
    for row in front.itertuples():
        beaten = (ended["validation_accuracy"] >= row.validation_accuracy) & (
            ended["validation_kib"] <= row.validation_kib
        )
        beaten &= ended["validation_megabops"] <= row.validation_megabops
        better = (ended["validation_accuracy"] > row.validation_accuracy) | (
            ended["validation_kib"] < row.validation_kib
        )
        assert not (beaten & better).any()
    assert 0 <= report.metrics["area_search"] <= 1
    assert (tmp_path / "s" / "report" / "front.png").stat().st_size > 10_000
    assert len(registry.list_versions("hawq")) == min(3, len(front))
    assert int(report.metrics["best_trial"]) in set(front["trial"])
    artifact = open_artifact(report.artifact, kind="hawq")
    row = trials.set_index("trial").loc[int(report.metrics["best_trial"])]
    assert artifact.metrics["accuracy"] == pytest.approx(row["validation_accuracy"])
    size = sum(f.stat().st_size for f in artifact.path.glob("weights*"))
    assert size == pytest.approx(1024 * row["validation_kib"], rel=0.05)
    prepared = json.loads((tmp_path / "s" / "prepared.json").read_text())
    repeated = flags.from_record(HawqJob, flags.load_record(tmp_path / "s" / "best.json"), source="best.json")
    assert repeated.recipe.cache == prepared["recipe"]["cache"]
    again = TuneJob(space="hawq", resume="s", storage=str(tmp_path)).run()
    assert again.metrics["best_trial"] == report.metrics["best_trial"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_reproduction_writes_its_document(tmp_path):
    report = HawqReproduction.quick(out=tmp_path).run()
    text = (tmp_path / "hawq.md").read_text()
    assert "prism reproduce hawq --seeds 0" in text
    for figure in ("hawq", "hawq-validity"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
        assert f"({figure}.png)" in text
    settings = report.tables["settings"]
    sizes = settings[settings["mean_bits"] == 3]["size"]
    assert (sizes <= 3 + 1e-9).all()
    assert set(report.tables["ranks"]["metric"]) > set(METRICS)
    assert report.metrics["loss_v2"] == pytest.approx(settings[settings["choice"] == METHOD]["loss"].mean())


def test_the_rule_names_what_was_compared():
    choices = {METHOD: 0.5, FIRST: 0.6, PLAIN: 0.7, INVERSE: 0.8, RANDOM: 0.9}
    row = {"seed": 0, "bits": "2 3", "accuracy": 0.8, "tuned_accuracy": 0.9}
    settings = pd.DataFrame([row | {"mean_bits": 2.5, "choice": name, "loss": loss} for name, loss in choices.items()])
    claim = choosing(settings, Study(mean_bits=(2.5,)))
    assert claim.verdict == "holds in all 1 seeds"
    assert "is the least of HAWQ-V2 and HAWQ-V1, at 2.5 bits" in claim.measured
    assert "After fine-tuning the two differ" in claim.findings[-1]


def test_whole_bits_that_no_layer_may_have_are_refused_before_any_work():
    with pytest.raises(ValidationError, match=r"study.mean_bits: 7 is whole, but none of the recipe's bits, 2, 3, 4"):
        HawqReproduction.quick(study=Study(mean_bits=(2.5, 7.0)))


def test_published_networks_need_no_cluster():
    report = HawqJob(model="resnet50-published").run()
    assert report.metrics == {"settings": 9.0, "equal_to_published": 8.0}
    assert "size 0.25: the published bits differ in layer 39, and their Omega is 0.0831" in report.notes[0]
    assert HawqJob(model="resnet18-published").run().metrics["equal_to_published"] == 9


def test_random_settings_are_different_and_of_the_asked_size(trained):
    recipe = HawqRecipe(**SMALL, weights=str(trained.path), curvature="unweighted")
    found = recipe.sensitivity()
    plans = random_plans(found, 3.0, 20, 0.03, seed=1)
    assert all(2.91 <= plan.mean_bits <= 3 for plan in plans)
    assert len({tuple(plan.bits.values()) for plan in plans}) == 20
    assert [p.bits for p in random_plans(found, 3.0, 20, 0.03, seed=1)] == [p.bits for p in plans]
    with pytest.raises(InputError, match="random settings of 8 bits per weight were found"):
        random_plans(found, 8.0, 3, 0.001, seed=0)
    assert spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]) == pytest.approx(0.8)


def test_a_record_repeats_the_job():
    job = HawqJob(recipe=HawqRecipe(bits="2 4 8", chosen=(8,) * 8))
    assert job.recipe.bits == (2, 4, 8)
    assert flags.from_record(HawqJob, job.record(), source="record") == job
    assert changed(job, {"recipe.quantizer.clipping": "mse"}).recipe.quantizer.clipping == "mse"
    assert reproduction_class("hawq") is HawqReproduction
