"""One trial of a search: a training job with some fields changed, run by the one loop, its evaluations handed over."""

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from cluster import storage
from jobs.checkpoint import complete
from jobs.history import read_history
from jobs.workers import Workers
from library.errors import InputError
from tune_spaces.space import Space

if TYPE_CHECKING:
    from jobs.training import Outcome, TrainingJob


class Evaluation(NamedTuple):
    """The metrics of a trial at one evaluation."""

    step: int
    metrics: dict[str, float]


Watch = Callable[[Evaluation], None]


def changed(job: "TrainingJob", values: Mapping[str, Any]) -> "TrainingJob":
    """The job with the fields at dotted paths set. Raises InputError for an unknown path or a value that is refused.

    >>> from jobs.send import SendJob
    >>> changed(SendJob(), {"recipe.window": 4}).recipe.window
    4
    """
    content = job.model_dump()
    for path, value in values.items():
        *parents, name = path.split(".")
        place: Any = content
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            raise InputError(f"{path}: a {job.job} job has no such field")
        place[name] = value
    try:
        return type(job).model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def follow(job: "TrainingJob", folder: str, watch: Watch) -> "Outcome":
    """Train `job` in `folder`, from the newest checkpoint there, and call `watch` at each evaluation.

    The evaluation at the last step is handed over after its checkpoint is written; where that had happened before,
    it comes from the folder. A job of one worker trains in this process, which costs nothing to start; one of
    several starts workers of its own with Ray Train.
    """
    train = _train_here if job.scaling.workers == 1 else _train_with_workers
    collector = _Collector(job.recipe.steps, watch)
    outcome = train(job, folder, collector)
    if outcome.reason == "finished" and collector.last is None:
        collector.last = _remembered(folder, outcome.step)
        if collector.last is None:  # killed after the last checkpoint, before its evaluation
            storage.remove(complete(storage.join(folder, "checkpoints"))[0])
            outcome = train(job, folder, collector)
    if collector.last is not None:
        watch(collector.last)
    return outcome


def _remembered(folder: str, step: int) -> Evaluation | None:
    """The evaluation at a step out of the run's history."""
    metrics = {name: points[-1][1] for name, points in read_history(folder).items() if points[-1][0] == step}
    return Evaluation(step, metrics) if any(name.startswith("validation_") for name in metrics) else None


class _Collector:
    """Takes the loop's events, in place of the run's board, and keeps back the evaluation at the last step."""

    stop_requested = False

    def __init__(self, steps: int, watch: Watch) -> None:
        self._steps, self._watch = steps, watch
        self.last: Evaluation | None = None

    def post(self, **event: Any) -> None:
        metrics = event.get("metrics", {})
        if not any(name.startswith("validation_") for name in metrics):
            return
        evaluation = Evaluation(event["step"], {k: float(v) for k, v in metrics.items()})
        if evaluation.step == self._steps:
            self.last = evaluation
        else:
            self._watch(evaluation)

    def flush(self, *, wait: bool = True) -> None:
        """Nothing is kept back."""


def _train_here(job: "TrainingJob", folder: str, collector: _Collector) -> "Outcome":
    import torch
    import torch.distributed as dist

    from jobs.training import train

    if not dist.is_initialized():  # kept for the next trial in this process: DeepSpeed does not start twice
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("nccl" if job.scaling.gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return train(job, folder, torch.device("cuda", 0) if job.scaling.gpu else torch.device("cpu"), collector)


def _train_with_workers(job: "TrainingJob", folder: str, collector: _Collector) -> "Outcome":
    workers = Workers.of(job, folder)
    for events in workers:
        for event in events:
            collector.post(**event)
    assert workers.outcome is not None
    return workers.outcome


def scored(space: Space, evaluation: Evaluation, reference: Mapping[int, float]) -> dict[str, float] | None:
    """What a trial reports to the search: step, metric, others, limited metric, excess, objective.

    None when one of them lacks or is not finite.

    `reference` is the limited metric of the reference run by step; between its steps the one before counts.
    """
    value = evaluation.metrics.get(space.metric, math.nan)
    if not math.isfinite(value):
        return None
    others = {name: evaluation.metrics.get(name, math.nan) for name in space.others}
    if not all(map(math.isfinite, others.values())):
        return None
    report = {"step": evaluation.step, space.metric: value} | others
    excess = 0.0
    if space.limit is not None:
        limited = evaluation.metrics.get(space.limit.metric, math.nan)
        known = [step for step in reference if step <= evaluation.step]
        if not math.isfinite(limited) or not known:
            return None
        excess = space.limit.excess(limited, reference[max(known)])
        report[space.limit.metric] = limited
    return report | {"excess": excess, "objective": space.objective(value, excess)}
