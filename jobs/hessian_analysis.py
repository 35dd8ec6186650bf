"""The Hessian of a trained artifact's loss, data-parallel over Ray Train workers."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt

from cluster import registry
from jobs.board import Poster
from jobs.training import Scaling
from jobs.workers import Workers, check_fits
from library import collective
from library.artifact import open_artifact
from library.errors import InputError, PrismError
from library.hessian.recipes import analyze_recipe, check_additive, curvature_batches
from library.hessian.report import HessianReport
from library.recipes import recipe_of, trained_model


class Analysis(BaseModel, frozen=True, extra="forbid"):
    """What is taken of an artifact's loss."""

    part: Literal["train", "validation", "test"] = "train"
    """The data that the loss is over."""
    samples: PositiveInt = 256
    """Samples of it, the first ones."""
    batch_size: PositiveInt = 32
    """Samples in one forward pass."""
    top: PositiveInt = 10
    """Largest eigenvalues with their residuals."""
    steps: PositiveInt = 48
    """Lanczos steps of each probe of the density."""
    probes: PositiveInt = 6
    """Random vectors behind the density, the trace and the layers' traces."""
    exact_below: NonNegativeInt = 1500
    """Up to this many parameters all eigenvalues are computed."""
    tolerance: PositiveFloat = 1e-3
    """Residual at which an eigenvalue has converged, as a share of the largest."""
    double: bool = False
    """Compute in float64."""
    checkpoint: str | None = None
    """Folder that all workers see, where each Lanczos step is kept: a run that was interrupted goes on from there."""


def analyse_artifact(
    name: str, settings: Analysis, *, seed: int, workers: int, cpus: float, gpu: bool, retries: int
) -> HessianReport:
    """The report of an artifact (a folder or models:/NAME/VERSION), without eigenvectors.

    Every worker holds the model and its share of the samples; products are summed over them, so that the number of
    workers changes the time and not the result. Raises ArtifactError and InputError that say what does not fit.
    """
    check_additive(recipe_of(open_artifact(registry.resolve(name))), workers)
    check_enough(settings.samples, workers)
    scaling = Scaling(workers=workers, cpus_per_worker=cpus, gpu=gpu)
    check_fits(scaling)
    from rich.console import Console

    with tempfile.TemporaryDirectory(prefix="prism-hessian-") as folder:
        task = {"name": name, "settings": settings, "seed": seed}
        running = Workers(_analyse, task, scaling=scaling, folder=folder, max_failures=retries)
        for events in running:
            for event in events:
                if "line" in event:
                    Console(stderr=True).print(f"hessian: {event['line']}", highlight=False)
    if isinstance(running.outcome, PrismError):
        raise running.outcome
    return running.outcome


def analyse_here(
    name: str, settings: Analysis, *, seed: int, device: Any = "cpu", notify: Callable[[str], None] | None = None
) -> HessianReport:
    """This worker's part of the analysis; the same report on every worker."""
    model, recipe = trained_model(open_artifact(registry.resolve(name)))
    splits = recipe.datasets()
    part = getattr(splits, settings.part)
    check_enough(min(settings.samples, len(part)), collective.world_size())
    model = model.to(device).double() if settings.double else model.to(device)
    batches = curvature_batches(splits, part, settings.samples, settings.batch_size)
    options = settings.model_dump(include={"top", "steps", "probes", "exact_below", "tolerance", "checkpoint"})
    return analyze_recipe(recipe, model, batches, seed=seed, notify=notify, **options)


def check_enough(samples: int, workers: int) -> None:
    """Raise InputError where a worker would have no sample."""
    if workers > samples:
        raise InputError(f"{samples} samples cannot be shared by {workers} workers; use fewer workers")


def _analyse(task: dict[str, Any], poster: Poster) -> None:
    """One worker's part; a refusal is the outcome."""
    from ray.train.torch import get_device

    try:
        report = analyse_here(
            task["name"],
            task["settings"],
            seed=task["seed"],
            device=get_device(),
            notify=lambda line: poster.post(line=line),
        )
        poster.post(outcome=_without_vectors(report))
    except PrismError as error:
        poster.post(outcome=error)


def _without_vectors(report: HessianReport) -> HessianReport:
    """Eigenvectors are as long as the model; what is shown needs none."""
    pairs = {
        name: replace(found, vectors=found.vectors[:0].cpu())
        for name in ("top", "bottom")
        if (found := getattr(report, name)) is not None
    }
    return replace(report, **pairs)
