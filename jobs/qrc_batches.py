"""Batches of a search for reservoirs as trials of Ray Tune: those that were cut off first, then new ones."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from jobs.qrc_evaluation import Plan, evaluate
from jobs.qrc_trials import Batch, Evaluated, Ledger, batch_place, read_batch, write_batch
from jobs.search import run_trials
from library.errors import PrismError
from tune_spaces.qrc import Values

TRIES = 2  # of a batch whose worker dies


class BatchSearcher(Searcher):
    """Gives Ray Tune the batches that were cut off, then new ones; a trial is a batch, because it evolves as one."""

    def __init__(self, ledger: Ledger, plan: Plan, count: int, drawn: Callable[[int], list[Values]], what: str) -> None:
        super().__init__(metric="objective", mode="min")
        self._ledger, self._plan, self._count, self._drawn, self._what = ledger, plan, count, drawn, what
        self._pending = [batch.number for batch in ledger.batches if batch.state == "running"]
        self._live: dict[str, int] = {}
        self.fault: str | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.fault is not None:
            return Searcher.FINISHED
        if self._pending:
            number = self._pending.pop(0)
        elif (number := len(self._ledger.batches)) < self._count:
            trials = [Evaluated(values=values) for values in self._drawn(number)]
            self._ledger.add(Batch(number=number, trials=trials))
        else:
            return Searcher.FINISHED
        self._live[trial_id] = number
        known = self._ledger.trials
        seen = {rung: [trial.errors[rung] for trial in known if rung in trial.errors] for rung in self._plan.rungs}
        return {"number": number, "seen": json.dumps(seen)}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        number = self._live.pop(trial_id, None)
        if number is None or not (error or result):
            return  # the search itself was interrupted: the batch goes on when it is resumed
        if error or (result and result["fault"]):
            why = (result or {}).get("fault") or "its worker died; see Ray's logs"
            self.fault = f"batch {number} of {self._what} failed ({why}); resume to try it again"
            return
        self._ledger.reload(number)
        self._tell()

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state; Ray asks for a file of its own."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""

    def _tell(self) -> None:
        ended = sum(batch.state == "finished" for batch in self._ledger.batches)
        trials, whole = self._ledger.trials, self._plan.whole
        best = min((trial.errors[whole] for trial in trials if whole in trial.errors), default=float("nan"))
        line = f"qrc  {ended}/{self._count} batches, {len(trials)} {self._what}  best validation NRMSE {best:.4f}"
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def run_batches(
    ledger: Ledger,
    plan: Plan,
    count: int,
    drawn: Callable[[int], list[Values]],
    what: str,
    *,
    cpus: float,
    concurrent: int | None,
    features: bool,
) -> bool:
    """Run those of `count` batches that have not ended; whether all have. `features` keeps those of the last rung.

    Raises PrismError for a batch that cannot be evaluated.
    """
    import ray

    cut_off = sum(batch.state == "running" for batch in ledger.batches)
    missing = cut_off + max(0, count - len(ledger.batches))
    if not missing:
        return True
    searcher = BatchSearcher(ledger, plan, count, drawn, what)
    folder = ledger.folder

    def trial(config: dict[str, Any]) -> None:
        _run_batch(folder, plan, config["number"], json.loads(config["seen"]), features)

    there = ray.cluster_resources()
    room = int(there.get("CPU", 1) // cpus)
    run_trials(
        trial,
        {"CPU": cpus} | ({"GPU": 1} if plan.gpu else {}),
        searcher,
        FIFOScheduler(),
        samples=missing,
        concurrent=concurrent or max(1, min(room, int(there.get("GPU", 0))) if plan.gpu else room),
        max_failures=TRIES,
    )
    if searcher.fault is not None:
        raise PrismError(searcher.fault)
    return sum(batch.state == "finished" for batch in ledger.batches) >= max(count, len(ledger.batches))


def _run_batch(folder: str, plan: Plan, number: int, seen: Mapping[str, list[float]], features: bool) -> None:
    """One batch, inside Ray Tune: written down when it has ended, and reported with its least error."""
    from ray import tune

    place = batch_place(folder, number, "safetensors") if features else None
    try:
        done = evaluate(read_batch(folder, number), plan, {int(rung): errors for rung, errors in seen.items()}, place)
    except PrismError as error:
        tune.report({"objective": float("inf"), "fault": str(error)})
        return
    write_batch(folder, done)
    least = min(trial.errors[plan.whole] for trial in done.trials if plan.whole in trial.errors)
    tune.report({"objective": least, "fault": ""})
