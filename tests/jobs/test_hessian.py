"""The Hessian's jobs: one grid whatever the tasks, one analysis whatever the workers, a document of what was found."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from jobs.hessian import HessianJob
from jobs.hessian_analysis import Analysis, analyse_artifact, analyse_here
from jobs.hessian_claims import growth
from jobs.hessian_grid import EXPERIMENTS, Findings, Grid
from jobs.hessian_reproduction import HessianReproduction
from jobs.reproduce import command_line
from library.artifact import open_artifact, write_artifact
from library.diffspectra.pretraining_recipe import PretrainingRecipe
from library.errors import ArtifactError, InputError
from library.hessian.recipes import check_additive
from library.hessian.study import Cell, Measured, measure_cell
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
    (tmp_path / "thesis.txt").write_text("precious")
    job = HessianJob(experiments=("spectrum", "batches"), seeds=(3,), grid=grid, out=tmp_path)
    report = job.run()
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert set(report.figures) == {"spectrum", "batches"}
    assert set(report.tables["networks"]["moment"]) == {"start", "end"}
    assert len(report.tables["lines"]) == 3
    assert (tmp_path / "report" / "spectrum.png").is_file()


@pytest.mark.parametrize("data", ["moons", "images"])
def test_every_cell_of_other_data_has_its_networks_and_its_figures(ray_cluster, tmp_path, monkeypatch, data):
    quick = HessianReproduction.quick().grid
    base = quick.base.model_copy(update={"data": data, "steps": 5, "hidden": (3,)})
    grid = quick.model_copy(update={"base": base, "image_hidden": (3, 4), "image_steps": 5})
    experiments = ("spectrum", "growth", "gauss-newton")
    monkeypatch.chdir(tmp_path)
    report = HessianJob(experiments=experiments, seeds=(0,), grid=grid, out=Path()).run()
    assert set(report.figures) == set(experiments)
    cells = {cell for experiment in experiments for cell in grid.cells(experiment)}
    assert len(report.tables["networks"]) == len(cells) + 1, "the centre has its start too"
    assert (tmp_path / "report" / "growth.png").is_file()
    for experiment in ("classes", "separability"):
        with pytest.raises(InputError, match=f"experiment {experiment}: it varies blobs"):
            HessianJob(experiments=(experiment,), grid=grid).run()


def test_growth_is_judged_by_size_in_whatever_order_sizes_are_named():
    cells = [Cell(hidden=(hidden,)) for hidden in (20, 5, 10)]
    values = np.linspace(0.0, 1.0, 40)
    networks = {
        cell: [
            Measured(
                cell,
                seed,
                "end",
                {"parameters": 10.0 * cell.hidden[0], "flat_share": 0.01 * cell.hidden[0]}
                | {"outliers_by_gap": 5.0, "largest": 1.0, "steep": 3.0},
                values,
                np.ones(12),
                np.ones(12),
            )
            for seed in (0, 1)
        ]
        for cell in cells
    }
    grid = Grid(hidden=(20, 5, 10))
    assert grid.cells("growth") == cells
    assert growth(grid, Findings(networks, [], [])).verdict == "holds in all 2 seeds"


def test_what_workers_cannot_share_is_refused(ray_cluster, artifact):
    with pytest.raises(InputError, match="5 samples cannot be shared by 6 workers"):
        analyse_artifact(str(artifact), SETTINGS, seed=0, workers=6, cpus=0.1, gpu=False, retries=0)
    with pytest.raises(InputError, match=r"the loss of diffspectra-pretrain compares .* cannot be shared by 2; use 1"):
        check_additive(PretrainingRecipe(), 2)
    check_additive(PretrainingRecipe(), 1)


def test_a_part_with_fewer_samples_than_workers_is_refused_on_all_of_them(artifact, monkeypatch):
    count = len(SendRecipe.model_validate(open_artifact(artifact).recipe).datasets().validation)
    monkeypatch.setattr("library.collective.world_size", lambda: count + 1)
    settings = SETTINGS.model_copy(update={"part": "validation", "samples": count + 9})
    with pytest.raises(InputError, match=f"{count} samples cannot be shared by {count + 1} workers"):
        analyse_here(str(artifact), settings, seed=0)


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
