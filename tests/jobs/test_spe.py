"""SPE on Ray Train: two workers give what one gives, with any engine and norm; runs resume, register, are searched."""

import json
from typing import Any

import pytest
import torch

from jobs.spe import SpeJob, held_out
from jobs.tuning import tune_job
from library import collective
from library.artifact import open_artifact
from library.recipe import fit, make_batch, seeded_model
from library.spe.predictor import GraphPredictor
from library.spe.recipe import SpeRecipe
from library.spe.settings import Backbone, Encoding
from tests.jobs.toy import run_stopped, run_workers

SMALL = {"eigenpairs": 8, "width": 4, "channels": 2, "rho_layers": 2, "rho_hidden": 8, "mlp_hidden": 8, "norm": "layer"}
Case = tuple[str, dict, str]
CASES: dict[str, Case] = {
    "ddp": ("ddp", {}, "layer"),
    "fsdp": ("fsdp", {"rho": "gin_deepsets", "phi": "deepsets"}, "layer"),
    "zero2": ("zero2", {"method": "signnet"}, "layer"),
}
BATCH_NORMS: dict[str, Case] = {
    "spe": ("ddp", {"norm": "batch", "between": True, "masked": False}, "batch"),
    "mlp": ("ddp", {"norm": "batch", "rho": "mlp"}, "batch"),
    "signnet": ("ddp", {"method": "signnet", "norm": "batch", "summed": False}, "batch"),
    "basisnet": ("ddp", {"method": "basisnet", "multiplicities": 8, "norm": "batch"}, "batch"),
}


def recipe(encoding: dict, norm: str = "layer", steps: int = 8) -> SpeRecipe:
    backbone = Backbone(layers=2, hidden=8, norm=norm, inject="every_layer")
    return SpeRecipe(
        steps=steps, batch_size=16, train_graphs=80, encoding=Encoding(**SMALL | encoding), backbone=backbone, warmup=2
    )


def trained(case: Case, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and history of a run, stopped and resumed when asked."""
    engine, encoding, norm = case
    job = SpeJob(recipe=recipe(encoding, norm), engine=engine, checkpoint_every=4)
    return run_stopped(job, stop_at)


def each(*runs: tuple[Case, int | None]) -> list[tuple[dict[str, torch.Tensor], dict]]:
    return [trained(*run) for run in runs]


def test_two_workers_equal_one_and_a_stopped_run_one_that_was_not():
    alone = run_workers(1, each, *((case, None) for case in CASES.values()), (CASES["ddp"], 5))
    together = run_workers(2, each, *((case, None) for case in CASES.values()))
    for name, (own, history), (shared, curve) in zip(CASES, alone, together, strict=False):
        assert own.keys() == shared.keys()
        for key in ("loss", "gradient_norm"):
            one, two = ([value for _, value in found[key]] for found in (history, curve))
            assert two == pytest.approx(one, rel=5e-4), name
    (whole, _), (resumed, _) = alone[0], alone[-1]
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def doubled(part: Any) -> Any:
    """A batch in float64."""
    if isinstance(part, torch.Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, list):
        return [doubled(inner) for inner in part]
    return type(part)(*map(doubled, part)) if hasattr(part, "_fields") else part


def gradients(*cases: Case) -> list[dict[str, torch.Tensor]]:
    """The gradients of one batch's loss, of which this worker has its share."""
    found = []
    for _, encoding, norm in cases:
        made = recipe(encoding, norm)
        splits, model = made.datasets(), seeded_model(made).double().train()
        ranks, own = collective.world_size(), list(collective.share(16))
        made.losses(model, doubled(make_batch(splits, splits.train, own, own)))["loss"].backward()
        found.append({name: collective.all_sum(p.grad) / ranks for name, p in model.named_parameters()})
    return found


def test_batch_statistics_are_those_of_all_workers():
    alone = run_workers(1, gradients, *BATCH_NORMS.values())
    together = run_workers(2, gradients, *BATCH_NORMS.values())
    for one, two in zip(alone, together, strict=True):
        whole = sum(value.square().sum() for value in one.values()).sqrt()
        for name, value in one.items():
            assert (two[name] - value).norm() < 1e-9 * whole, name


@pytest.mark.ray
def test_a_run_on_ray_registers_what_predicts(ray_cluster, ready_registry, tmp_path):
    job = SpeJob(recipe=recipe({}), scaling={"workers": 2}, storage=str(tmp_path))
    report = job.run()
    assert report.registered == "models:/spe/1"
    artifact = open_artifact(report.artifact, kind="spe")
    assert artifact.metrics["mae"] == pytest.approx(report.metrics["validation_mae"])
    alone = fit(job.recipe, path=tmp_path / "alone")  # one process gives what two workers do
    assert artifact.metrics["mae"] == pytest.approx(alone.metrics["mae"], rel=1e-3)
    start = seeded_model(job.recipe).state_dict()
    one, two, before = (
        torch.cat([w[name].flatten() for name in start]) for w in (alone.weights(), artifact.weights(), start)
    )
    assert (one - two).norm() < 0.02 * (one - before).norm()  # Adam makes full steps of gradients that are rounding
    found = held_out(report.artifact, job.recipe)
    assert found.keys() >= {"test_mae", "test_error"}
    assert {name: report.metrics[name] for name in found} == pytest.approx(found)
    predictor = GraphPredictor.from_artifact(artifact)
    [answer] = predictor.answer([predictor.molecule("CC(=O)Nc1ccccc1")])
    assert answer.values.isfinite().all()
    assert answer.encodings.shape == (10, 4)


def test_other_scaffolds_are_measured_apart(tmp_path):
    made = recipe({}, steps=1).model_copy(update={"data": "hiv-scaffold"})
    found = held_out(str(fit(made, path=tmp_path / "artifact").path), made)
    assert 0 <= found["ood_test_auroc"] <= 1
    assert found["ood_test_auroc"] != found["test_auroc"]


@pytest.mark.ray
def test_a_search_on_ray_keeps_the_best(ray_cluster, ready_registry, tmp_path):
    base = {"recipe": recipe({}, steps=2).model_dump(mode="json"), "storage": str(tmp_path / "runs")}
    search = tune_job("spe")(base=base, samples=2, searcher="random", name="s", storage=str(tmp_path / "searches"))
    report = search.run()
    assert report.registered == "models:/spe/1"
    best = json.loads((tmp_path / "searches" / "s" / "best.json").read_text())
    assert best["recipe"]["lr"] != 2e-3
    assert report.metrics["best_trial"] in (0, 1)
