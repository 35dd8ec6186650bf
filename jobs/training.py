"""The one distributed training loop.

Read `train` from top to bottom: everything that happens in a run happens there. What it relies on:

* The batch of a step is a function of (seed, step) alone (`library.order`); each worker takes its share of it and
  cuts the share into equally many micro-batches.
* Every loss is weighted by its micro-batch's units (samples, tokens) over the units of the whole batch, so the
  gradient is that of the whole batch on any number of workers, at any accumulation, with any engine.
* Anything random inside a step is seeded by (seed, step, worker), so a resumed run repeats it.
* A checkpoint holds the state by name (`jobs.checkpoint`), so any engine on any number of workers resumes it.
"""

import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from torch import Tensor

from cluster import storage
from jobs import engines
from jobs.board import Poster
from jobs.checkpoint import Checkpoint, CheckpointWriter, latest, model_weights
from jobs.engines import Engine, EngineName, Precision
from jobs.folders import refusal_to_share
from jobs.history import History
from jobs.job import Job
from jobs.report import Report
from library import collective, order
from library.errors import InputError, NonFiniteError, PrismError
from library.recipe import Batch, Recipe, Splits, evaluation_batches, make_batch, seed_step, seeded_model, to_device
from library.weights import load_tensors


class Scaling(BaseModel, frozen=True, extra="forbid"):
    """What a training job takes of the cluster."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training processes; a pair MIN MAX makes the job elastic: it grows and shrinks with the cluster."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved for each worker."""
    gpu: bool = False
    """One GPU for each worker."""
    autoscale: bool = False
    """Wait for an autoscaler to add nodes, instead of refusing more workers than the cluster has."""

    @field_validator("workers")
    @classmethod
    def _ordered(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"the least number of workers, {workers[0]}, is above the greatest, {workers[1]}")
        return workers


class TrainingJob(Job, frozen=True, extra="forbid"):
    """Trains a recipe with data-parallel workers on Ray Train."""

    recipe: Recipe
    """What is trained."""
    scaling: Scaling = Scaling()
    """What it takes of the cluster; changes nothing in the result."""
    engine: EngineName = "ddp"
    """How the work is divided; changes nothing in the result. zero1, zero2 and zero3 are DeepSpeed's."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward; weights and moments stay in fp32."""
    micro_batch: PositiveInt | None = None
    """Most samples in one forward pass of a worker; gradients accumulate up to the batch. None: the whole share."""
    compile: bool = False
    """Compile the model with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    checkpoint_every: PositiveInt = 100
    """Steps between two checkpoints; the last step always has one."""
    evaluate_every: PositiveInt | None = None
    """Steps between two evaluations on the validation data; None evaluates at every checkpoint."""
    curvature_every: PositiveInt | None = None
    """Steps between two looks at the largest eigenvalues of the loss's Hessian, for engine ddp; None never looks."""
    max_failures: NonNegativeInt = 3
    """How often a run whose worker or node died starts again from its last checkpoint."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name of the run, and of its folder; None makes one from the method and the time."""
    resume: bool = False
    """Go on with the run of that name from its newest checkpoint."""
    storage: str | None = None
    """Where runs are kept: a folder that all nodes see, or a URI such as s3://bucket/runs. None: PRISM_HOME/runs."""
    artifact_from: Literal["last", "best"] = "last"
    """Which weights become the artifact: those of the last step, or of the best evaluation."""
    register_as: str | None = None
    """Name in the model registry; None is the method's name."""
    champion: bool = False
    """Let @champion mean the new version; the first version of a model gets it anyway."""

    @field_validator("curvature_every")
    @classmethod
    def _whole_weights(cls, every: int | None, info: ValidationInfo) -> int | None:
        if every is not None and info.data.get("engine", "ddp") != "ddp":
            raise ValueError(f"needs whole weights on each worker: engine ddp, not {info.data['engine']}")
        return every

    def leaves_artifact(self) -> bool:
        return True

    def prepared(self) -> "TrainingJob | None":
        """The job once what it rests on is there, such as weights to start from; None when making that was stopped."""
        return self

    def run(self) -> Report:
        """Train, write the artifact, register it. Raises PrismError; the last checkpoint stays in every case."""
        from jobs.launch import launch

        return launch(self)


class WholeBatchJob(TrainingJob, frozen=True, extra="forbid"):
    """Trains a recipe in which samples see each other: batch normalisation, or a loss that compares them."""

    @field_validator("micro_batch")
    @classmethod
    def _whole_batches(cls, size: int | None) -> int | None:
        if size is not None:
            raise ValueError("samples see all others of a step's batch, which cannot be cut; leave it out")
        return size


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended: all steps, the recipe's own criterion, the driver's wish, a non-finite number, a
    recipe that was refused, or a storage that refused to be written."""

    step: int
    reason: Literal["finished", "early", "stopped", "non-finite", "refused", "unsaved"]
    message: str = ""


def train(job: TrainingJob, folder: str, device: torch.device, poster: Poster) -> Outcome:
    """Run one worker's part of a job in an initialised torch.distributed; `folder` is the run's, `poster` rank 0's."""
    recipe, rank = job.recipe, collective.rank()
    checkpoints = storage.join(folder, "checkpoints")
    try:
        splits = recipe.datasets()
        model = seeded_model(recipe)
        refusal = None
    except PrismError as error:
        refusal = str(error)
    refusals = [refusal for refusal in collective.all_gather(refusal) if refusal]
    if refusals:
        return Outcome(0, "refused", refusals[0])
    if refusal := refusal_to_share(folder):
        return Outcome(0, "refused", refusal)

    checkpoint, faults = latest(checkpoints)
    for fault in faults:
        poster.post(note=fault)
    if checkpoint is not None:
        load_tensors(model, dict(model_weights(checkpoint)), source=f"checkpoint {checkpoint.place}")
    flops = recipe.flops_per_unit(model)
    engine = engines.prepare(
        job.engine,
        recipe,
        model,
        device=device,
        precision=job.precision,
        compile=job.compile,
        activation_checkpointing=job.activation_checkpointing,
    )
    schedule = recipe.schedule(engine.optimizer)
    if checkpoint is not None:
        restore(checkpoint, engine, schedule)
    writer = CheckpointWriter(
        checkpoints,
        kind=recipe.kind,
        recipe=recipe.model_dump(mode="json"),
        metric=recipe.metric,
        mode=recipe.mode,
    )
    step = checkpoint.step if checkpoint else 0
    history = History(folder, start=step, enabled=rank == 0)
    noticed: dict[str, float] = {}
    outcome = Outcome(step, "finished")

    follower = None
    if job.curvature_every is not None:
        from library.hessian.recipes import CurvatureFollower

        follower = CurvatureFollower(recipe, splits, every=job.curvature_every, device=device)

    with Feed(job, splits, start=step, device=device) as feed:
        while step < recipe.steps and outcome.reason == "finished":
            began = time.perf_counter()
            seed_step(recipe, step, rank)
            try:
                done = training_step(recipe, engine, feed.take(), stop=poster.stop_requested)
            except NonFiniteError as error:
                writer.wait()
                return Outcome(step, "non-finite", _named(error, recipe, step, feed.indices))
            if schedule is not None:
                schedule.step()
            step += 1
            engine.model.eval()
            noticed |= recipe.after_step(engine.model, step) or {}
            seconds = time.perf_counter() - began
            metrics = {**done.losses, "gradient_norm": done.norm, "lr": engine.optimizer.param_groups[0]["lr"]}
            if follower is not None:
                metrics |= follower(engine.model, step)

            last = done.stop or step == recipe.steps
            saved = last or step % job.checkpoint_every == 0
            if saved:
                if refusal := writer.refusal():
                    return Outcome(step, "unsaved", refusal)
                writer.save(step, engine.pieces(), run_state(engine, schedule))
            if step == recipe.steps or step % (job.evaluate_every or job.checkpoint_every) == 0:
                found = evaluate(recipe, engine, splits, device, poster)
                metrics |= {f"validation_{name}": value for name, value in found.items()}
                if found and saved:
                    writer.annotate(step, found)
                if found and not last and recipe.finished(step, noticed | found):
                    outcome = Outcome(step, "early")
                    if not saved:
                        writer.save(step, engine.pieces(), run_state(engine, schedule))
                        writer.annotate(step, found)
            if done.stop and step < recipe.steps:
                outcome = Outcome(step, "stopped")
            history.add(step, metrics | noticed)
            if saved:
                with writer.keeping_errors():
                    history.write()
            poster.post(
                step=step,
                metrics=metrics | noticed,
                units_per_second=done.units / seconds,
                workers=collective.world_size(),
                memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
                flops_per_second=flops * done.units / seconds if flops else None,
            )
    with writer.keeping_errors():
        history.write()
    if refusal := writer.refusal():
        return Outcome(step, "unsaved", refusal)
    return replace(outcome, step=step)


class StepResult(NamedTuple):
    """One optimiser step over the whole batch: its losses, the gradient's norm before clipping, its units."""

    losses: dict[str, float]
    norm: float
    units: float
    stop: bool


def training_step(recipe: Recipe, engine: Engine, share: "Share", *, stop: bool = False) -> StepResult:
    """One optimiser step over the whole batch; `stop` is true in the result when it was on any worker.

    Raises NonFiniteError on every worker alike, before any weight changes.
    """
    engine.model.train()
    total, stops = collective.all_sum(torch.tensor([sum(share.units), stop], dtype=torch.float64)).tolist()
    if total == 0:
        raise InputError("a batch has no units to average its loss over (no target tokens, no labelled samples)")
    sums: dict[str, Tensor] = {}
    for i, (batch, units) in enumerate(zip(share.batches, share.units, strict=True)):
        engine.begin(last=i == len(share.batches) - 1)
        losses = recipe.losses(engine.model, batch)
        weight = units / total
        engine.backward(losses["loss"] * (weight * collective.world_size()))  # engines average, this makes it a sum
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * weight
    summed = collective.all_sum(torch.stack(list(sums.values())))
    values = dict(zip(sums, summed.tolist(), strict=True))
    if not torch.isfinite(summed).all():
        raise NonFiniteError(", ".join(f"{name} is {value}" for name, value in values.items()))
    return StepResult(values, engine.step(), total, stops > 0)


def evaluate(recipe: Recipe, engine: Engine, splits: Splits, device: torch.device, poster: Poster) -> dict[str, float]:
    """Metrics on the validation data, averaged over workers by units; none when the evaluation failed anywhere."""
    seen = 0

    def counted() -> Iterator[Batch]:
        nonlocal seen
        ranks, me = collective.world_size(), collective.rank()
        for batch in evaluation_batches(splits, splits.validation, -(-recipe.batch_size // ranks), ranks, me):
            seen += recipe.count(batch)
            yield to_device(batch, device)

    engine.model.eval()
    found, fault = {}, None
    try:
        with torch.no_grad():
            found = recipe.evaluate(engine.model, counted())
    except Exception as error:  # a failed evaluation does not end the training
        fault = f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
    parts = collective.all_gather((found, seen, fault))
    faults = [fault for _, _, fault in parts if fault]
    if faults:
        poster.post(note=f"evaluation failed, the training goes on: {faults[0]}")
        return {}
    total = sum(units for _, units, _ in parts)
    return {name: sum(part[name] * units for part, units, _ in parts) / total for name in found}


def restore(checkpoint: Checkpoint, engine: Engine, schedule: Any) -> None:
    """Set optimiser and schedule from a checkpoint; the weights were loaded before the engine wrapped the model."""
    engine.restore(checkpoint)
    engines.restore_optimizer_record(engine.optimizer, checkpoint.index.state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(dict(checkpoint.index.state["schedule"]))


def run_state(engine: Engine, schedule: Any) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors. The sampler and all random states are functions of (seed, step)."""
    return {
        "optimizer": engines.optimizer_record(engine.optimizer),
        "schedule": schedule.state_dict() if schedule is not None else None,
    }


class Share(NamedTuple):
    """One worker's micro-batches of a step, and how many units each has (0 for a repeated sample that fills up)."""

    batches: list[Batch]
    units: list[int]


class Feed:
    """The shares of one worker, step after step; the next one is made in a thread while this one computes."""

    def __init__(self, job: TrainingJob, splits: Splits, *, start: int, device: torch.device) -> None:
        self._recipe, self._splits, self._device = job.recipe, splits, device
        if len(splits.train) == 0:
            raise InputError("the training data is empty")
        shares = order.split(job.recipe.batch_size, collective.world_size())
        longest = max(map(len, shares))
        if min(map(len, shares)) == 0:
            raise InputError(
                f"batch_size {job.recipe.batch_size} is less than the {collective.world_size()} workers; "
                "use fewer workers or a larger batch"
            )
        self._shares = shares
        self._parts = -(-longest // (job.micro_batch or longest))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._step = start
        self._next: Future[tuple[Share, list[int]]] = self._pool.submit(self._make, start)
        self.indices: list[int] = []

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self) -> Share:
        """This worker's share of the next step, on its device."""
        share, self.indices = self._next.result()
        self._step += 1
        if self._step < self._recipe.steps:
            self._next = self._pool.submit(self._make, self._step)
        return Share([to_device(batch, self._device) for batch in share.batches], share.units)

    def _make(self, step: int) -> tuple[Share, list[int]]:
        recipe, splits = self._recipe, self._splits
        batch = order.global_batch(recipe.seed, step, recipe.batch_size, len(splits.train))
        costs = recipe.costs(splits.train, batch.tolist())
        shares = self._shares if costs is None else order.balanced(costs, len(self._shares))
        places = list(shares[collective.rank()])
        indices, keys = batch[places].tolist(), order.sample_keys(recipe.seed, step, recipe.batch_size)[places]
        batches, units = [], []
        for part in order.split(len(indices), self._parts):
            chosen = list(part) or [0]  # a worker that has a sample less repeats one, with no weight
            batch = make_batch(splits, splits.train, [indices[i] for i in chosen], [keys[i] for i in chosen])
            batches.append(batch)
            units.append(recipe.count(batch) if part else 0)
        return Share(batches, units), indices


def _named(error: NonFiniteError, recipe: Recipe, step: int, indices: list[int]) -> str:
    samples = [index for part in collective.all_gather(indices) for index in part]
    shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
    return f"{error} at step {step + 1} of {recipe.steps} (training samples {shown}); nothing was changed by that step"
