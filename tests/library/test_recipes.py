"""Artifacts back to the recipes that made them, and the curvature of what they hold, taken apart."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs import JOBS, job_class
from jobs.training import TrainingJob
from library import recipes
from library.artifact import Artifact, write_artifact
from library.errors import ArtifactError, InputError
from library.hessian.recipes import analyze_recipe, curvature_batches, recipe_hessian
from library.images.recipe import ClassifierRecipe
from library.recipe import seeded_model
from library.send.recipe import SendRecipe
from library.spectral import GaussNewton, dense_matrix
from library.weights import state_tensors

PACKED = {"hawq", "hawq-lm"}  # kinds whose artifacts hold integers in place of what was trained


def written(folder, kind: str, recipe: object, model: nn.Module) -> Artifact:
    weights = state_tensors(model)
    return write_artifact(folder, kind=kind, recipe=recipe, weights=weights, metrics={}, data="none")


def test_every_training_job_makes_artifacts_that_are_read_back_by_their_kind():
    trained = {name: job for name in JOBS if issubclass(job := job_class(name), TrainingJob)}
    kinds = {job.model_fields["recipe"].annotation.kind: job for job in trained.values()}
    assert set(kinds) - PACKED == set(recipes.RECIPES)
    for kind, job in kinds.items():
        if kind not in PACKED:
            made = job.model_fields["recipe"].default
            found = recipes.recipe_of(_manifest(kind, made.model_dump(mode="json")))
            assert found == made
            assert type(found) is type(made)


def _manifest(kind: str, recipe: dict) -> Artifact:
    """What `recipe_of` reads of an artifact."""
    return SimpleNamespace(kind=kind, recipe=recipe, path="somewhere")


def test_a_recipe_that_does_not_fit_its_kind_is_named():
    with pytest.raises(ArtifactError, match=r"its recipe does not fit 'send' \(model: Extra inputs"):
        recipes.recipe_of(_manifest("send", {"model": 1}))
    with pytest.raises(InputError, match="'hawq' is not the model of a recipe; those of classifier, "):
        recipes.recipe_of(_manifest("hawq", {}))


def test_the_weights_of_an_artifact_are_the_models(tmp_path):
    recipe = ClassifierRecipe(train_images=40)
    model = seeded_model(recipe)
    with torch.no_grad():
        model.head.weight.mul_(3)
    found, same = recipes.trained_model(written(tmp_path / "a", "classifier", recipe.model_dump(mode="json"), model))
    assert same == recipe
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_classifiers_curvature_is_taken_apart_and_belongs_to_classes():
    recipe = ClassifierRecipe(train_images=60)
    model, splits = seeded_model(recipe).double().eval(), recipe.datasets()
    batches = curvature_batches(splits, splits.train, 10, 6)
    report = analyze_recipe(recipe, model, batches, exact_below=0, steps=4, probes=2, top=3, tolerance=0.02)
    pixels, labels = (torch.cat([getattr(batch, name) for _, batch in batches]) for name in ("pixels", "labels"))
    newton = GaussNewton(model, F.cross_entropy, [(pixels.double(), labels)])
    leading = report.gauss_newton.vectors[:, 0]
    assert float(leading @ (newton @ leading[:, None])[:, 0]) == pytest.approx(
        float(report.gauss_newton.values[0]), rel=1e-6
    )
    assert report.classes == 10
    assert report.attribution.overlap.shape == (3, 10)
    assert report.residual_share > 0
    assert report.loss == pytest.approx(float(F.cross_entropy(model(pixels.double()), labels).detach()), rel=1e-9)
    assert report.layers.names[0].startswith("model.")


def test_a_language_models_curvature_is_taken_apart_without_classes():
    recipe = SendRecipe(corpus="truthfulqa", tokenizer="bytes", context=8, tracking_texts=2, prompts=0, steps=1)
    model, splits = seeded_model(recipe).double().eval(), recipe.datasets()
    batches = curvature_batches(splits, splits.train, 2, 1)
    report = analyze_recipe(recipe, model, batches, exact_below=0, steps=2, probes=2, top=2, tolerance=0.5)
    operator = recipe_hessian(recipe, model, batches)
    assert report.loss == pytest.approx(operator.loss_and_gradient()[0], rel=1e-6)  # the recipe's is in float32
    assert report.gauss_newton.values[0] >= 0
    assert report.attribution is None
    assert report.classes is None


def test_outputs_and_targets_give_the_loss():
    for recipe in (ClassifierRecipe(train_images=40), SendRecipe(corpus="truthfulqa", tokenizer="bytes", context=8)):
        model, splits = seeded_model(recipe).eval(), recipe.datasets()
        batch = splits.collate([splits.train[i] for i in range(4)], torch.arange(4))
        targets = recipe.targets(batch)
        assert len(targets) == recipe.count(batch)
        loss = F.cross_entropy(recipe.outputs(model, batch), targets)
        torch.testing.assert_close(loss, recipe.losses(model, batch)["loss"])


def test_dense_matrices_are_exact_for_a_tiny_part():
    """What is small is diagonalised: eigenvalues are then those of the dense Hessian of the recipe's loss."""
    recipe = ClassifierRecipe(train_images=40)
    model, splits = seeded_model(recipe).double().eval(), recipe.datasets()
    batches = curvature_batches(splits, splits.train, 8, 8)
    report = analyze_recipe(recipe, model, batches, parameters=["model.head.weight", "model.head.bias"])
    values = torch.linalg.eigvalsh(
        dense_matrix(recipe_hessian(recipe, model, batches, parameters=["model.head.weight", "model.head.bias"]))
    )
    assert report.spectrum.exact
    torch.testing.assert_close(report.spectrum.nodes[0], values, rtol=1e-4, atol=1e-6 * float(values.abs().max()))
    assert report.residual_share == pytest.approx(0, abs=1e-6)  # the loss is convex in the last layer
