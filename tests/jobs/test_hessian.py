"""The Hessian's jobs: one grid whatever the tasks, one analysis whatever the workers, a document of what was found."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from jobs.hessian import HessianJob
from jobs.hessian_analysis import Analysis, analyse_here
from jobs.hessian_grid import EXPERIMENTS, Grid
from jobs.hessian_reproduction import HessianReproduction
from jobs.reproduce import command_line
from library.artifact import open_artifact, write_artifact
from library.errors import ArtifactError, InputError
from library.hessian.study import measure_cell
from library.recipe import seeded_model
from library.recipes import trained_model
from library.send.recipe import SendRecipe
from library.weights import state_tensors

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(shared_ray, tmp_path_factory):
    """A quick reproduction: its job, report and folder."""
    shared_ray.connection()
    folder = tmp_path_factory.mktemp("results")
    job = HessianReproduction.quick(out=folder)
    return job, job.run(), folder


def section(text: str, letter: str) -> str:
    return text[text.index(f"## {letter}. ") :].partition("\n## ")[0]


def test_the_document_holds_every_claim_its_numbers_and_its_figure(run):
    job, report, folder = run
    text = (folder / "hessian.md").read_text()
    assert [line[3] for line in text.splitlines() if line.startswith("## ")] == list("ABCDEFG")
    assert command_line(job) in text
    assert set(re.findall(r"\]\((.*)\.png\)", text)) == set(report.figures) - {"hessian"}
    assert {f"hessian-{name}" for name in EXPERIMENTS} == set(report.figures) - {"hessian"}
    for note in report.notes:
        title, _, found = note.partition(": ")
        assert f"**Outcome: {found}.**" in section(text, title[0])
    networks = report.tables["networks"]
    ends = networks[(networks["moment"] == "end") & (networks["classes"] == 3) & (networks["batch"] == 0)]
    counts = ends["outliers_by_gap"]
    assert f"| 3 | {counts.mean():.1f} ± {counts.std():.1f} |" in section(text, "C")
    barrier = report.tables["lines"].groupby("line", sort=False)["barrier"]
    assert f"{barrier.mean().iloc[0]:.4f} ± {barrier.std().iloc[0]:.4f}" in section(text, "F")


def test_a_network_is_the_same_alone_and_among_others(run):
    job, report, _ = run
    base = job.grid.base
    networks = report.tables["networks"]
    rows = networks[(networks["spread"] == base.spread) & (networks["classes"] == base.classes)]
    rows = rows[(rows["hidden"] == "6") & (rows["batch"] == 0) & (rows["data"] == "blobs")].set_index(
        ["seed", "moment"]
    )
    for seed in job.seeds:
        for alone in measure_cell(base, (seed,), ("start", "end")):
            for name in ("loss", "largest", "smallest", "trace", "residual_share"):
                assert rows.loc[(seed, alone.moment), name] == pytest.approx(alone.metrics[name], rel=1e-9, abs=1e-12)


def test_the_job_runs_chosen_experiments_and_saves_them(ray_cluster, tmp_path):
    grid = HessianReproduction.quick().grid
    job = HessianJob(experiments=("spectrum", "batches"), seeds=(3,), grid=grid, out=tmp_path / "report")
    report = job.run()
    assert set(report.figures) == {"spectrum", "batches"}
    assert set(report.tables["networks"]["moment"]) == {"start", "end"}
    assert len(report.tables["lines"]) == 3
    assert (tmp_path / "report" / "spectrum.png").is_file()


def test_cells_vary_only_what_their_experiment_says():
    grid = Grid()
    base = grid.base.model_dump()
    for experiment, varied in {
        "growth": {"hidden"},
        "classes": {"classes", "batch"},
        "separability": {"spread"},
        "gauss-newton": {"data", "hidden", "loss", "steps"},
    }.items():
        cells = [cell.model_dump() for cell in grid.cells(experiment)]
        assert {name for cell in cells for name in cell if cell[name] != base[name]} <= varied
        assert len({str(cell) for cell in cells}) == len(cells)
    assert grid.cells("batches") == []


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An untrained byte-level language model of the project's own kind."""
    recipe = SendRecipe(corpus="truthfulqa", tokenizer="bytes", context=16, tracking_texts=2, prompts=0, steps=1)
    weights = state_tensors(seeded_model(recipe))
    content = {"recipe": recipe.model_dump(mode="json"), "weights": weights, "metrics": {}, "data": ""}
    return write_artifact(tmp_path_factory.mktemp("artifact") / "send", kind="send", **content).path


SETTINGS = Analysis(samples=5, batch_size=2, top=2, steps=3, probes=2, tolerance=0.05, double=True)


def test_two_workers_find_what_one_process_finds(ray_cluster, artifact):
    report = HessianJob(artifact=str(artifact), analysis=SETTINGS, workers=2, cpus_per_task=1).run()
    alone = analyse_here(str(artifact), SETTINGS, seed=0)
    for name, value in alone.metrics().items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-6), name
    layers = report.tables["layers"]
    np.testing.assert_allclose(layers["trace"], alone.layers.traces.value, rtol=1e-6, atol=1e-9)
    assert layers["parameters"].sum() == alone.parameters
    assert set(report.figures) == {"spectrum"}


def test_the_recipes_loss_is_that_of_its_batches(artifact):
    model, recipe = trained_model(open_artifact(artifact))
    splits = recipe.datasets()
    model = model.double().eval()
    batch = splits.collate([splits.train[i] for i in range(5)], torch.arange(5))
    expected = float(recipe.losses(model, batch)["loss"].detach())
    assert analyse_here(str(artifact), SETTINGS, seed=0).loss == pytest.approx(
        expected, rel=1e-6
    )  # the recipe sums in float32


def test_bad_requests_are_refused_in_one_line(ray_cluster, artifact, tmp_path):
    foreign = write_artifact(tmp_path / "x", kind="other", recipe={}, weights={}, metrics={}, data="").path
    few = SETTINGS.model_copy(update={"samples": 1})
    for job, error, message in (
        (HessianJob(artifact=str(foreign)), InputError, "'other' is not the model of a recipe; those of .*send.* are"),
        (HessianJob(artifact=str(tmp_path / "gone")), ArtifactError, "no artifact at"),
        (HessianJob(artifact=str(artifact), analysis=few, workers=2), InputError, "1 samples cannot be shared by 2"),
        (HessianJob(artifact=str(artifact), workers=99), InputError, "99 workers of 1 CPU do not fit"),
    ):
        with pytest.raises(error, match=message):
            job.run()


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValidationError, match="no experiment 'growing'; there are spectrum, growth"):
        HessianJob(experiments=("growing",))


def test_a_report_without_vectors_keeps_its_numbers(artifact):
    report = analyse_here(str(artifact), SETTINGS, seed=0)
    bare = dataclasses.replace(report.top, vectors=report.top.vectors[:0])
    assert dataclasses.replace(report, top=bare).metrics() == report.metrics()
