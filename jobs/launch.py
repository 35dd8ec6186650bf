"""The driver's side of a training job: check, start Ray Train, show progress, stop on demand, keep the result."""

import contextlib
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import connect, registry, storage
from jobs import curves
from jobs.checkpoint import Checkpoint, best_checkpoint, complete, model_weights
from jobs.display import Display
from jobs.folders import RUN, new_folder, resumed_folder, root_of
from jobs.history import read_history
from jobs.interrupts import counted_interrupts
from jobs.report import Report
from jobs.workers import Workers, check_room, stand_in
from library import files
from library.artifact import write_artifact
from library.errors import InputError, NonFiniteError, PrismError
from library.recipe import seeded_model
from library.weights import load_tensors

if TYPE_CHECKING:
    from jobs.training import Outcome, TrainingJob

LOG_S = 5.0  # between two writes to the registry


def launch(job: "TrainingJob") -> Report:
    """Run a training job to its end on the connected cluster (connecting locally when there is none)."""
    began = time.monotonic()
    connect()
    check_room(job)
    folder = _open_folder(job)
    name = os.path.basename(folder.split("?")[0])
    resume = f"prism run {job.job} --name {name} --resume" + (f" --storage {job.storage}" if job.storage else "")
    tracking = Tracking(job)
    try:
        outcome, notes = _follow(job, folder, name, tracking)
    except BaseException as error:
        done = complete(storage.join(folder, "checkpoints"))
        tracking.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        if isinstance(error, KeyboardInterrupt):
            raise PrismError(f"aborted; {_saved(done)}: {resume}") from None
        if isinstance(error, PrismError) or not isinstance(error, Exception):
            raise
        raise _explained(error, f"{_saved(done)}: {resume}" if done else None) from error
    done = complete(storage.join(folder, "checkpoints"))
    if outcome.reason == "refused" and not job.resume and not done:
        tracking.finish("FAILED")
        storage.remove(folder)
        raise InputError(outcome.message)
    if outcome.reason in ("refused", "unsaved"):
        tracking.finish("FAILED")
        raise InputError(f"{outcome.message}; {_saved(done)}: {resume}")
    if outcome.reason == "non-finite":
        tracking.finish("FAILED")
        raise NonFiniteError(outcome.message)
    report = _report(job, folder, name, notes + tracking.notes)
    if outcome.reason == "stopped":
        tracking.finish("KILLED")
        report.notes.append(f"stopped at step {outcome.step} of {job.recipe.steps}; go on with: {resume}")
    else:
        keep_result(job, folder, report, tracking, advice=f"{_saved(done)}: {resume}")
        tracking.finish("FINISHED")
    report.seconds = time.monotonic() - began
    if storage.is_local(folder):
        report.folder = str(report.save(storage.local_path(folder) / "report"))
    return report


class Tracking:
    """The run in the registry. A registry that fails costs a note, never the training."""

    def __init__(self, job: "TrainingJob") -> None:
        self.run: registry.Run | None = None
        self.notes: list[str] = []
        self._pending: dict[int, dict[str, float]] = {}
        self._written = time.monotonic()
        with self._tolerant():
            self.run = registry.start_run(job.job, job.record())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics, in batches."""
        self._pending[step] = metrics
        if time.monotonic() - self._written > LOG_S:
            self.flush()

    def flush(self) -> None:
        """Write the newest of what was recorded: the curves themselves are in the run's folder."""
        pending, self._pending = self._pending, {}
        self._written = time.monotonic()
        if self.run is not None and pending:
            step = max(pending)
            with self._tolerant():
                registry.log_metrics(self.run, {k: v for k, v in pending[step].items() if v == v}, step)

    def finish(self, status: registry.Status) -> None:
        """Record how the run ended."""
        self.flush()
        if self.run is not None:
            with self._tolerant():
                registry.finish_run(self.run, status)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except PrismError as error:
            self.run = None
            self.notes.append(f"the registry does not record this run: {error}")


def _follow(job: "TrainingJob", folder: str, name: str, tracking: Tracking) -> "tuple[Outcome, list[str]]":
    """Run the workers, and show what they post until they end; their outcome and notes."""
    workers, notes, asked = Workers.of(job, folder), [], False
    with (
        Display(name, job.recipe.steps, job.recipe.unit, device=_accelerator(job)) as display,
        counted_interrupts() as interrupts,
    ):
        for events in workers:
            for event in events:
                display.show(event)
                if "note" in event:
                    notes.append(event["note"])
                if "step" in event:
                    tracking.log(event["step"], event["metrics"])
            if interrupts and not asked:
                asked = True
                display.note("stopping after this step and saving; press Ctrl-C again to abort")
                workers.stop()
            if len(interrupts) > 1:
                raise KeyboardInterrupt
    assert workers.outcome is not None
    return workers.outcome, notes


def _accelerator(job: "TrainingJob") -> str | None:
    import torch

    return torch.cuda.get_device_name() if job.scaling.gpu and torch.cuda.is_available() else None


def _open_folder(job: "TrainingJob") -> str:
    """The run's folder, made for a new run and checked for a resumed one."""
    root = root_of(RUN, job.storage)
    if not job.resume:
        return new_folder(RUN, root, job.record(), prefix=job.job, name=job.name)
    if job.name is None:
        raise InputError("resume needs the name of the run to go on with")
    folder, record = resumed_folder(RUN, root, job.name)
    before = record["recipe"]
    now = job.recipe.model_dump(mode="json")
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    if changed:
        raise InputError(
            f"run {job.name!r} was started with another recipe ({', '.join(changed)} differ); "
            "a resumed run keeps its recipe: leave these options as they were, or start a new run"
        )
    return folder


def _report(job: "TrainingJob", folder: str, name: str, notes: list[str]) -> Report:
    history = read_history(folder)
    final = {key: points[-1][1] for key, points in history.items() if key != "lr"}
    return Report(
        job=job.job,
        config=job.record(),
        metrics=final | {"steps": float(max((points[-1][0] for points in history.values()), default=0))},
        tables={"curves": curves.table(history)},
        figures={"curves": curves.figure(history, title=name)},
        folder=folder,
        notes=notes,
    )


def keep_result(job: "TrainingJob", folder: str, report: Report, tracking: Tracking, *, advice: str) -> None:
    """Write the artifact from a checkpoint on a worker, and register it from here.

    Raises a PrismError that ends with `advice`, the way on, when it cannot be written or that is interrupted.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    gpus = 1 if job.scaling.gpu else 0
    write = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_write_result)
    try:
        report.artifact = ray.get(write.remote(job, folder, os.getcwd()))
    except KeyboardInterrupt:
        tracking.finish("KILLED")
        raise PrismError(f"aborted while the artifact was written; {advice}") from None
    except RayError as error:
        tracking.finish("FAILED")
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, PrismError):
            raise type(cause)(f"{cause}; {advice}") from None
        raise PrismError(f"the artifact was not written ({_first_line(cause)}); {advice}") from error
    report.register(job.register_as or job.recipe.kind, run=tracking.run, champion=job.champion)


def _write_result(job: "TrainingJob", folder: str, cwd: str) -> str:
    """The artifact of a finished run, streamed from its last or best checkpoint."""
    stand_in(cwd)
    recipe = job.recipe
    root = storage.join(folder, "checkpoints")
    best = best_checkpoint(root, recipe.metric, recipe.mode) if job.artifact_from == "best" else None
    checkpoint = Checkpoint(best or complete(root)[0])
    model = seeded_model(recipe)
    load_tensors(model, dict(model_weights(checkpoint)), source=checkpoint.place)
    arrays, texts = recipe.attachments(model.eval())
    target = storage.join(folder, "artifact")
    with files.scratch_folder() as scratch:
        local = storage.local_path(target) if storage.is_local(target) else scratch / "artifact"
        write_artifact(
            local,
            kind=recipe.kind,
            recipe=recipe.model_dump(mode="json"),
            weights=recipe.stored(model, model_weights(checkpoint)),
            metrics=checkpoint.metrics,
            data=recipe.datasets().fingerprint,
            arrays=arrays,
            texts=texts,
        )
        if not storage.is_local(target):
            storage.upload_folder(local, target, last="artifact.json")
    return target


def _saved(checkpoints: list[str]) -> str:
    if not checkpoints:
        return "no checkpoint had been written; start again with"
    step = int(Path(checkpoints[0].split("?")[0]).name.split("-")[1])
    return f"the checkpoint of step {step} is safe; go on with"


def _explained(error: Exception, advice: str | None) -> PrismError:
    """One line out of what Ray Train raises: the first worker's own error, or Ray's."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    ours = next((cause for cause in causes if isinstance(cause, PrismError)), None)
    if ours is not None:
        return type(ours)(f"{ours}" + (f"; {advice}" if advice else ""))
    cause: BaseException = causes[0] if causes else error
    return PrismError(f"the training failed ({_first_line(cause)})" + (f"; {advice}" if advice else ""))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or traceback.format_exception_only(error)
    return f"{type(error).__name__}: {lines[0].strip()}"
