"""Following curvature in a training: the true eigenvalues, cheaply, and a training that does not notice."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.history import read_history
from jobs.training import TrainingJob, train
from library.hessian.recipes import CurvatureFollower, analyze_recipe, curvature_batches, recipe_hessian
from library.recipe import seeded_model
from library.spectral import dense_matrix
from library.weights import load_tensors
from tests.jobs.toy import ToyRecipe

pytestmark = pytest.mark.usefixtures("group")


def run(folder: Path, every: int | None) -> checkpoints.Checkpoint:
    job = TrainingJob(recipe=ToyRecipe(steps=20, dropout=0.2), checkpoint_every=20, curvature_every=every)
    assert train(job, str(folder), torch.device("cpu"), Poster(None)).reason == "finished"
    return checkpoints.Checkpoint(checkpoints.complete(folder / "checkpoints")[0])


def test_the_curve_holds_the_largest_eigenvalues_and_the_training_is_the_same(tmp_path: Path) -> None:
    followed, plain = run(tmp_path / "followed", 5), run(tmp_path / "plain", None)
    for name in plain.index.tensors:
        assert torch.equal(followed.tensor(name), plain.tensor(name))
    curves = read_history(str(tmp_path / "followed"))
    assert [step for step, _ in curves["hessian_1"]] == [5, 10, 15, 20]
    recipe = ToyRecipe(steps=20, dropout=0.2)
    model, splits = seeded_model(recipe), recipe.datasets()
    load_tensors(model, dict(checkpoints.model_weights(followed)))
    hessian = recipe_hessian(recipe, model, curvature_batches(splits, splits.train, 128, 32))
    exact = torch.linalg.eigvalsh(dense_matrix(hessian)).flip(0)
    for i in range(3):
        assert curves[f"hessian_{i + 1}"][-1][1] == pytest.approx(float(exact[i]), rel=2e-2)


def test_a_warm_start_takes_fewer_products() -> None:
    recipe = ToyRecipe()
    model, splits = seeded_model(recipe), recipe.datasets()
    follower = CurvatureFollower(recipe, splits, every=10, tolerance=1e-3, limit=500)
    assert follower(model, 7) == {}
    first, again = follower(model, 10), follower(model, 20)
    assert again["hessian_products"] < 0.6 * first["hessian_products"]
    assert again["hessian_1"] == pytest.approx(first["hessian_1"], rel=1e-3)


def test_a_recipes_report_is_that_of_its_loss() -> None:
    recipe = ToyRecipe(dropout=0.5)
    model, splits = seeded_model(recipe), recipe.datasets()
    batches = curvature_batches(splits, splits.train, 40, 16)
    report = analyze_recipe(recipe, model, batches, exact_below=0, steps=8, probes=3, top=2)
    assert report.gauss_newton is None
    exact = torch.linalg.eigvalsh(dense_matrix(recipe_hessian(recipe, model, batches)))
    assert report.largest == pytest.approx(float(exact[-1]), rel=1e-3)
    assert report.parameters == len(exact)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ValidationError, match="engine ddp, not zero3"):
        TrainingJob(recipe=ToyRecipe(), engine="zero3", curvature_every=5)
