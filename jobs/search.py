"""The memory of a search: one JSON file per trial, from which the searcher decides and a killed search goes on.

What the next trial tries is a function of the seed, its number, and the trials so far; nothing else is kept, so
nothing is lost when the driver dies, and no pickle is read. Ray's own searcher over Optuna counts a trial that the
scheduler stopped as a complete one with the value it had then, and starts its random numbers anew when it is
restored; here Optuna is told that the trial was pruned, and the draws go on.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster import storage
from library.errors import PrismError
from tune_spaces.space import Space

if TYPE_CHECKING:
    from optuna import Study

State = Literal["running", "finished", "stopped", "failed"]
RECORD = "trial.json"


class TrialRecord(BaseModel):
    """A trial: the values it tries, how it stands, and what it reported at each step."""

    number: int
    values: dict[str, Any]
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
        elif len(records) < self._samples:
            number = max((known.number for known in records), default=-1) + 1
            record = TrialRecord(number=number, values=draw(self._space, records, number, self._kind, self._seed))
            self._journal.write(record)
        else:
            return Searcher.FINISHED
        self._live[trial_id] = record
        return {"number": record.number, "values": record.values}

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
        names = [self._space.metric, "excess", "objective"]
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
        line = f"{self._space.name}  trial {record.number} {record.state}, {step}  {shown}  ({settings})"
        print(f"{line}  {done}/{self._samples}", file=sys.stderr, flush=True)  # noqa: T201


def draw(space: Space, records: list[TrialRecord], number: int, kind: str, seed: int) -> dict[str, Any]:
    """What trial `number` tries: a function of the seed, the number, and the records so far.

    "tpe" is Optuna's tree-structured Parzen estimator, which draws the first ten trials at random; "random" draws all.
    """
    from optuna import create_study
    from optuna.samplers import RandomSampler, TPESampler

    own = (seed * 1_000_003 + number) % 2**32
    sampler = RandomSampler(seed=own) if kind == "random" else TPESampler(seed=own, constant_liar=True)
    study = told(space, records, create_study(sampler=sampler, direction=f"{space.mode}imize"))
    return study.ask({path: domain.distribution() for path, domain in space.varies.items()}).params


def told(space: Space, records: list[TrialRecord], study: "Study") -> "Study":
    """The study with all records in it: finished, pruned by the scheduler, failed, and running ones."""
    from optuna.trial import TrialState, create_trial

    states = {
        "running": TrialState.RUNNING,
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    distributions = {path: domain.distribution() for path, domain in space.varies.items()}
    for record in sorted(records, key=lambda record: record.number):
        study.add_trial(
            create_trial(
                state=states[record.state],
                params=record.values,
                distributions=distributions,
                value=record.last["objective"] if record.state == "finished" else None,
                intermediate_values={step: report["objective"] for step, report in record.curve.items()},
            )
        )
    return study


def scheduler(space: Space, records: list[TrialRecord], steps: int) -> TrialScheduler:
    """Asynchronous successive halving over steps, which knows what closed trials reported at its rungs."""
    if space.reduction is None or steps < space.reduction**2:
        return FIFOScheduler()
    halving = AsyncHyperBandScheduler(
        time_attr="step",
        metric="objective",
        mode=space.mode,
        max_t=steps + 1,  # a trial ends by itself, with its last checkpoint written
        grace_period=steps // space.reduction**2,
        reduction_factor=space.reduction,
    )
    for record in records:
        if record.state in ("finished", "stopped"):
            replayed = _Replayed(trial_id=f"replayed-{record.number}")
            halving.on_trial_add(None, replayed)
            for step, report in sorted(record.curve.items()):
                halving.on_trial_result(None, replayed, {"step": step, "objective": report["objective"]})
    return halving


class _Replayed(BaseModel):
    """As much of a Ray Tune trial as the scheduler looks at."""

    trial_id: str
