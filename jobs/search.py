"""The memory of a search: one JSON file per trial, from which the searcher decides and a killed search goes on.

What the next trial tries is a function of the seed, its number, and the trials so far; nothing else is kept, so
nothing is lost when the driver dies, and no pickle is read. Ray's own searcher over Optuna counts a trial that the
scheduler stopped as a complete one with the value it had then, and starts its random numbers anew when it is
restored; here Optuna is told that the trial was pruned, and the draws go on.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster import storage
from jobs.pareto import costs, crowding, front_ranks
from library import files
from library.errors import PrismError
from tune_spaces.space import Space

if TYPE_CHECKING:
    from optuna import Study

State = Literal["running", "finished", "stopped", "failed"]
RECORD = "trial.json"
POPULATION = 16  # trials in a generation of NSGA-II


class TrialRecord(BaseModel):
    """A trial: the values it tries, how it stands, and what it reported at each step.

    `group` names the baselines that it belongs to; None is a trial that the search drew.
    """

    number: int
    values: dict[str, Any]
    group: str | None = None
    state: State = "running"
    curve: dict[int, dict[str, float]] = {}
    fault: str | None = None

    @property
    def last(self) -> dict[str, float]:
        """The newest report; empty when there is none."""
        return self.curve[max(self.curve)] if self.curve else {}


class Journal:
    """The records of all trials of a search, in memory and in its folder."""

    def __init__(self, folder: str) -> None:
        self.root = storage.join(folder, "trials")
        self.records: list[TrialRecord] = []
        for name in storage.list(self.root):
            file = storage.join(self.root, name, RECORD)
            if storage.exists(file):
                try:
                    self.records.append(TrialRecord.model_validate_json(storage.read_bytes(file)))
                except ValidationError as error:
                    raise PrismError(f"{file} is corrupt or foreign; remove it to run this trial again") from error

    def write(self, record: TrialRecord) -> None:
        """Keep a record that is new or has changed."""
        if record not in self.records:
            self.records.append(record)
        content = record.model_dump_json(indent=1).encode()
        storage.write_bytes(storage.join(trial_folder(self.root, record.number), RECORD), content)


def trial_folder(root: str, number: int) -> str:
    """Where a trial keeps its checkpoints, its curves and its record."""
    return storage.join(root, f"{number:05d}")


class JournalSearcher(Searcher):
    """Gives Ray Tune the trials that were cut off, then new ones, and writes down what becomes of them."""

    def __init__(self, space: Space, journal: Journal, *, samples: int, kind: str, seed: int, steps: int) -> None:
        super().__init__(metric="objective", mode=space.mode)
        self._space, self._journal, self._samples = space, journal, samples
        self._kind, self._seed, self._steps = kind, seed, steps
        self._pending = [record for record in journal.records if record.state == "running"]
        self._live: dict[str, TrialRecord] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        records = self._journal.records
        if self._pending:
            record = self._pending.pop(0)
        elif (record := self._new(records)) is not None:
            self._journal.write(record)
        else:
            return Searcher.FINISHED
        self._live[trial_id] = record
        return {"number": record.number, "values": record.values, "group": record.group}

    def _new(self, records: list[TrialRecord]) -> TrialRecord | None:
        """The next baseline, then the next trial that is drawn; None when there are enough."""
        number = max((known.number for known in records), default=-1) + 1
        for group, settings in self._space.baselines.items():
            begun = sum(known.group == group for known in records)
            if begun < len(settings):
                return TrialRecord(number=number, values=dict(settings[begun]), group=group)
        if sum(known.group is None for known in records) >= self._samples:
            return None
        return TrialRecord(number=number, values=draw(self._space, records, number, self._kind, self._seed))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        self._add(self._live[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        record = self._live.pop(trial_id, None)
        if record is None:
            return
        result = result or {}
        self._add(record, result)
        reason = result.get("reason")
        if error or reason in ("refused", "unsaved", "non-finite", "unmeasured"):
            record.state = "failed"
            record.fault = result.get("fault") or "its worker died; see Ray's logs"
        elif reason in ("finished", "early"):
            record.state = "finished"
        elif result:
            record.state = "stopped"
        else:
            return  # the search itself was interrupted: the trial goes on when it is resumed
        self._journal.write(record)
        self._tell(record)

    def save(self, checkpoint_path: str) -> None:
        """The journal is the state; Ray asks for a file of its own."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""

    def _add(self, record: TrialRecord, result: Mapping[str, Any]) -> None:
        names = [self._space.metric, *self._space.others, "excess", "objective"]
        names += [self._space.limit.metric] if self._space.limit else []
        if "objective" in result:
            record.curve[int(result["step"])] = {name: float(result[name]) for name in names}
            self._journal.write(record)

    def _tell(self, record: TrialRecord) -> None:
        done = sum(known.state != "running" for known in self._journal.records)
        last = record.last
        shown = f"{self._space.metric} {last[self._space.metric]:.4f}" if last else record.fault
        settings = ", ".join(
            f"{path.rpartition('.')[2]} {value:.3g}"
            if isinstance(value, float)
            else f"{path.rpartition('.')[2]} {value}"
            for path, value in record.values.items()
        )
        step = f"step {max(record.curve)}/{self._steps}" if record.curve else "no evaluation"
        what = record.group or "trial"
        line = f"{self._space.name}  {what} {record.number} {record.state}, {step}  {shown}  ({settings})"
        total = self._samples + sum(map(len, self._space.baselines.values()))
        print(f"{line}  {done}/{total}", file=sys.stderr, flush=True)  # noqa: T201


def draw(space: Space, records: list[TrialRecord], number: int, kind: str, seed: int) -> dict[str, Any]:
    """What trial `number` tries: a function of the seed, the number, and the records so far.

    "tpe" is Optuna's tree-structured Parzen estimator, which draws the first ten trials at random; "nsga2" recombines
    the best of the generation before, 16 trials each; "random" draws all.
    """
    from optuna import create_study
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    own = (seed * 1_000_003 + number) % 2**32
    if kind == "nsga2":
        sampler = NSGAIISampler(population_size=POPULATION, seed=own)
    else:
        sampler = RandomSampler(seed=own) if kind == "random" else TPESampler(seed=own, constant_liar=True)
    study = told(space, records, create_study(sampler=sampler, directions=directions(space)))
    return study.ask({path: domain.distribution() for path, domain in space.varies.items()}).params


def directions(space: Space) -> list[str]:
    """Each objective's direction, as Optuna names them."""
    return [f"{mode}imize" for mode in (space.mode, *space.others.values())]


def told(space: Space, records: list[TrialRecord], study: "Study") -> "Study":
    """The study with all records of the search in it: finished, pruned by the scheduler, failed, and running ones.

    Optuna knows no pruned trials where there are several objectives: there a stopped one counts with what it showed
    last, which the scheduler found beaten.
    """
    from optuna.trial import TrialState, create_trial

    states = {
        "running": TrialState.RUNNING,
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    distributions = {path: domain.distribution() for path, domain in space.varies.items()}
    drawn = sorted((record for record in records if record.group is None), key=lambda record: record.number)
    for place, record in enumerate(drawn):
        state = states[record.state]
        if space.others and state == TrialState.PRUNED:
            state = TrialState.COMPLETE
        last = record.last
        values = [last["objective"], *(last[name] for name in space.others)] if state == TrialState.COMPLETE else None
        study.add_trial(
            create_trial(
                state=state,
                params=record.values,
                distributions=distributions,
                values=values,
                intermediate_values={}
                if space.others
                else {step: report["objective"] for step, report in record.curve.items()},
                system_attrs={"NSGAIISampler:generation": place // POPULATION},
            )
        )
    return study


def scheduler(space: Space, records: list[TrialRecord], steps: int) -> TrialScheduler:
    """Asynchronous successive halving over steps, which knows what closed trials reported at its rungs.

    With several objectives it goes by non-dominated sorting. Baselines are not stopped.
    """
    if space.reduction is None or steps < space.reduction**2:
        return FIFOScheduler()
    grace = steps // space.reduction**2
    if space.others or space.baselines:
        halving = ParetoHalving(space, grace=grace, steps=steps)
    else:
        halving = AsyncHyperBandScheduler(
            time_attr="step",
            metric="objective",
            mode=space.mode,
            max_t=steps + 1,  # a trial ends by itself, with its last checkpoint written
            grace_period=grace,
            reduction_factor=space.reduction,
        )
    for record in records:
        if record.state in ("finished", "stopped"):
            replayed = _Replayed(trial_id=f"replayed-{record.number}", config={"group": record.group})
            halving.on_trial_add(None, replayed)
            for step, report in sorted(record.curve.items()):
                halving.on_trial_result(None, replayed, {"step": step} | report)
    return halving


def run_trials(
    trial: Callable[[dict[str, Any]], None],
    resources: Mapping[str, float],
    searcher: Searcher,
    halving: TrialScheduler,
    *,
    samples: int,
    concurrent: int,
    max_failures: int,
) -> None:
    """Run trials with Ray Tune, silently: whoever gave the searcher keeps the records, and Ray's own are dropped."""
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that diverges reports no objective
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a corpus may be named by a relative path
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints tables even when it is told to be silent
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with files.scratch_folder() as scratch:
        tune.Tuner(
            tune.with_resources(trial, dict(resources)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=halving,
                num_samples=samples,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=max_failures),
            ),
        ).fit()


class ParetoHalving(FIFOScheduler):
    """Asynchronous successive halving by non-dominated sorting.

    At each rung, the first report at or after its step counts; a trial that is not among the best 1 / `reduction` of
    those that came to the rung so far, by front rank and then by crowding, stops. The first few go on.
    Source: Schmucker, Donini, Zafar, Salinas, Archambeau, "Multi-objective asynchronous successive halving", 2021.
    """

    def __init__(self, space: Space, *, grace: int, steps: int) -> None:
        super().__init__()
        assert space.reduction is not None
        self._space, self._reduction = space, space.reduction
        self._rungs: dict[int, dict[str, tuple[float, ...]]] = {}
        rung = grace
        while rung < steps:
            self._rungs[rung] = {}
            rung *= space.reduction

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "objective" not in result or not _searched(trial):
            return TrialScheduler.CONTINUE
        decision = TrialScheduler.CONTINUE
        for rung, seen in self._rungs.items():
            if result["step"] >= rung and trial.trial_id not in seen:
                seen[trial.trial_id] = costs(self._space, result)
                decision = TrialScheduler.CONTINUE if self._is_good(seen, trial.trial_id) else TrialScheduler.STOP
        return decision

    def _is_good(self, seen: Mapping[str, tuple[float, ...]], own: str) -> bool:
        names, points = list(seen), list(seen.values())
        order = np.lexsort((-crowding(points), front_ranks(points)))
        place = [names[i] for i in order].index(own)
        return place < max(1, len(names) / self._reduction) or len(names) < self._reduction


def _searched(trial: Any) -> bool:
    """Whether a trial of Ray Tune was drawn by the search, and is none of the space's baselines."""
    return not getattr(trial, "config", {}).get("group")


class _Replayed(BaseModel):
    """As much of a Ray Tune trial as the scheduler looks at."""

    trial_id: str
    config: dict[str, Any] = {}
