"""Recipe: the complete configuration of one trainable method and the few functions that a training loop calls.

The same recipe runs in a notebook through `fit` and on a cluster through `jobs.training`; both give the same
loss curve, because batches are a function of (seed, step) alone and losses are normalised by global counts.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library import order
from library.artifact import Artifact, write_artifact
from library.errors import InputError, NonFiniteError
from library.weights import load_tensors, state_tensors

Batch = Any


class Samples(Protocol):
    """A map-style data set: a length, and samples by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Splits:
    """The data of a recipe.

    `collate(samples, keys)` makes one batch: `keys` is int64 of shape (len(samples),), a function of
    (seed, step, place) alone, from which augmentations and noise must be drawn so that they are the same on any
    number of workers. `fingerprint` identifies the content of the data.
    """

    train: Samples
    validation: Samples
    test: Samples
    collate: Callable[[list[Any], Tensor], Batch]
    fingerprint: str


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Base of every trainable method's configuration. A subclass sets `kind` and implements the functions.

    The model handed to the functions is callable and may be a wrapper of an engine; `unwrap` gives the module
    that `model()` made.
    """

    kind: ClassVar[str]
    metric: ClassVar[str] = "loss"  # the entry of `evaluate` that decides which checkpoint is best
    mode: ClassVar[Literal["min", "max"]] = "min"
    unit: ClassVar[str] = "samples"  # what `count` counts
    contrastive: ClassVar[bool] = False  # whether the loss compares samples, also those of other workers

    seed: NonNegativeInt = 0
    """Seed of the weights, of the order of samples, and of all noise."""
    steps: PositiveInt
    """Optimiser steps."""
    batch_size: PositiveInt
    """Samples per optimiser step over all workers; the result does not depend on how many there are."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; a larger one is scaled down to it."""

    def datasets(self) -> Splits:
        """The data. Called once per worker; must give the same data everywhere."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """A new model. Called with torch's generator seeded by `seed`."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimiser over the model's parameters."""
        raise NotImplementedError

    def schedule(self, optimizer: Optimizer) -> LRScheduler | None:
        """The learning-rate schedule, stepped once per optimiser step; None keeps the rate."""
        return None

    def largest_norm(self, optimizer: Optimizer) -> float | None:
        """The norm down to which the gradient of the coming step is scaled where it is larger; None keeps any."""
        return self.clip_norm

    def note_norm(self, optimizer: Optimizer, norm: float) -> None:
        """Called after every optimiser step, on all workers alike, with the gradient's norm before it was scaled.

        What a limit that adapts must remember lives in the optimiser's first parameter group, as a number or a tuple
        of numbers: checkpoints keep it.
        """

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars, each the mean over the `count(batch)` units of the batch; `loss` is what is minimised."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """How many units (samples, tokens, nodes) the means of `losses` are over."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (N, classes) whose mean cross-entropy against `targets(batch)` is the loss, in the model's dtype.

        Together they let the curvature of the loss be taken apart (Gauss-Newton part, classes). Only asked for where
        `targets` gives labels.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor | None:
        """Labels (N,) of the batch's units; None where the loss is no cross-entropy of one tensor of logits."""
        return None

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over this worker's batches, as means over their units; the loop averages over workers by units.

        A metric that is no mean (an area under a curve) gathers its inputs with `library.collective` and returns
        the same value on every worker. Default: the means of `losses`.
        """
        sums: dict[str, float] = {}
        total = 0
        for batch in batches:
            units = self.count(batch)
            for name, value in self.losses(model, batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * units
            total += units
        return {name: value / total for name, value in sums.items()}

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Called on every worker after optimiser step `step` (from 1); may change the model alike on all of them.

        State that must survive a restart lives in the model's persistent buffers. Returns metrics to log, if any.
        """
        return None

    def finished(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether to stop early, asked after each evaluation with its metrics and the last ones of `after_step`."""
        return False

    def costs(self, samples: Samples, indices: Sequence[int]) -> Sequence[float] | None:
        """What each of these training samples costs to compute, in any unit: workers get shares of like sums.

        None means that all cost the same. Nothing but the time depends on it.
        """
        return None

    def flops_per_unit(self, model: nn.Module) -> float | None:
        """Floating-point operations of forward and backward per unit of `count`, for the model's utilisation."""
        return None

    def stored(self, model: nn.Module, state: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """What an artifact holds of the trained `model`, whose whole `state` is given; by default all as it is."""
        return state

    def restored(self, weights: Mapping[str, Tensor], *, source: str) -> nn.Module:
        """The model with the weights of an artifact, as `stored` gave them. Raises ArtifactError where they do not fit.

        `source` says in errors where the weights are from.
        """
        model = seeded_model(self)
        load_tensors(model, weights, source=source)
        return model

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Named tensors and named texts that the artifact holds beside the weights (a tokeniser, a calibration)."""
        return {}, {}


def unwrap(model: nn.Module) -> nn.Module:
    """The module that `Recipe.model` made, out of whatever an engine or compiler wrapped around it."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if _is_wrapper(model) else None)
        if inner is None:
            return model
        model = inner


def seeded_model(recipe: Recipe) -> nn.Module:
    """`recipe.model()` with weights that depend on the recipe's seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return recipe.model()


def seed_step(recipe: Recipe, step: int, rank: int = 0) -> None:
    """Seed torch for what is random inside step `step` (dropout), so that a resumed run repeats it."""
    torch.manual_seed(((recipe.seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def make_batch(splits: Splits, samples: Samples, indices: Sequence[int], keys: Sequence[int]) -> Batch:
    """One collated batch of `samples[indices]`."""
    return splits.collate([samples[int(i)] for i in indices], torch.as_tensor(keys, dtype=torch.int64))


def evaluation_batches(splits: Splits, samples: Samples, size: int, parts: int = 1, part: int = 0) -> Iterator[Batch]:
    """Part `part` of `parts` of a data set in nearly equal batches of at most `size`, equally many for each part."""
    if len(samples) < parts:
        raise InputError(f"{len(samples)} evaluation samples cannot be shared by {parts} workers; use fewer workers")
    per_part = -(-len(samples) // (parts * size))
    for indices in order.split(len(samples), parts * per_part)[part * per_part : (part + 1) * per_part]:
        yield make_batch(splits, samples, indices, list(indices))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor inside tuples, lists and dicts (or with a `.to`) on `device`."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def fit(
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callable[[int, dict[str, float]], None]] = (),
    path: str | Path | None = None,
) -> Artifact:
    """Train a recipe in this process and return its artifact: the plain loop for notebooks and tests.

    Each callback is called with (step from 1, metrics of the step). The artifact is written to `path`, or to a new
    temporary folder. Raises NonFiniteError before the optimiser step when the loss or gradient is not finite.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    splits = recipe.datasets()
    model = seeded_model(recipe).to(device)
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer)
    for step in range(recipe.steps):
        seed_step(recipe, step)
        indices = order.global_batch(recipe.seed, step, recipe.batch_size, len(splits.train))
        keys = order.sample_keys(recipe.seed, step, recipe.batch_size)
        model.train()
        losses = recipe.losses(model, to_device(make_batch(splits, splits.train, indices, keys), device))
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_norm(optimizer) or float("inf"))
        if not torch.isfinite(norm):
            raise NonFiniteError(f"gradient norm {float(norm)} at step {step + 1}, samples {indices[:8].tolist()} ...")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recipe.note_norm(optimizer, float(norm))
        if schedule is not None:
            schedule.step()
        model.eval()
        extra = recipe.after_step(model, step + 1) or {}
        metrics = {name: float(value.detach()) for name, value in losses.items()} | extra
        for callback in callbacks:
            callback(step + 1, metrics)
    model.eval()
    with torch.no_grad():
        batches = evaluation_batches(splits, splits.validation, recipe.batch_size)
        metrics = recipe.evaluate(model, (to_device(batch, device) for batch in batches))
    arrays, texts = recipe.attachments(model)
    return write_artifact(
        path or Path(tempfile.mkdtemp(prefix=f"prism-{recipe.kind}-")),
        kind=recipe.kind,
        recipe=recipe.model_dump(mode="json"),
        weights=recipe.stored(model, state_tensors(model).items()),
        metrics=metrics,
        data=splits.fingerprint,
        arrays=arrays,
        texts=texts,
    )


def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine")
