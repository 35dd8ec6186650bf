"""Hyper-parameter search: any space over any training job, with Ray Tune.

A search has a folder: `search.json` is the job, `reference.json` what the space's limit compares with, and
`trials/00003` one trial, which is a run's folder (checkpoints, curves) with a record beside it. A search that is
killed goes on from there: finished trials stay, those that were running resume from their checkpoints.
"""

import json
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, SerializeAsAny, create_model, model_validator

from cluster import connect, storage
from jobs import job_class
from jobs.folders import SEARCH, new_folder, resumed_folder, root_of
from jobs.job import Job
from jobs.pareto import kept_of_front
from jobs.report import Report
from jobs.spaces import SPACES
from jobs.training import TrainingJob
from jobs.workers import check_room, room_for
from library.errors import InputError, PrismError
from tune_spaces.space import Searcher, Space

if TYPE_CHECKING:
    from jobs.search import Journal, TrialRecord

REFERENCE = "reference.json"
PREPARED = "prepared.json"
BEST = "best.json"


class TuneJob(Job, frozen=True, extra="forbid"):
    """Search for the best settings of a training job, many trials at a time on the cluster."""

    job: ClassVar[str] = "tune"

    space: str
    """What is searched: a name of `SPACES`."""
    base: SerializeAsAny[TrainingJob]
    """The job that is varied, with its scaling, engine and storage. Default: that of the space."""
    samples: PositiveInt | None = None
    """Trials in all; None is the space's number, or that of the search which is resumed."""
    concurrent: PositiveInt | None = None
    """Most trials at a time; None is as many as the cluster has room for."""
    searcher: Searcher | None = None
    """tpe (learns from finished trials), nsga2 (evolves generations of 16) or random; None is the space's."""
    seed: NonNegativeInt = 0
    """Seed of what is tried. Trials themselves have the seed of the recipe."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name of the search, and of its folder; None makes one from the space and the time."""
    resume: str | None = None
    """Go on with the search of that name; what it searches is as it was started."""
    storage: str | None = None
    """Where searches are kept: a folder that all nodes see, or a URI. None: PRISM_HOME/searches."""

    @model_validator(mode="before")
    @classmethod
    def _with_base(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("space"), str):
            return data
        if data["space"] not in SPACES:
            raise InputError(f"unknown space {data['space']!r}; there are {', '.join(SPACES)}")
        if SPACES[data["space"]].own is not None:
            raise InputError(f"the search over {data['space']!r} is a job of its own: `tune_job` gives its class")
        base = {} if data.get("base") is None else data["base"]
        if not isinstance(base, Mapping):
            return data
        content = {key: value for key, value in base.items() if key != "job"}
        return {**data, "base": job_class(SPACES[data["space"]].job).model_validate(content)}

    def leaves_artifact(self) -> bool:
        return True

    def run(self) -> Report:
        """Run the trials, write down the best and register its artifact.

        Raises InputError for a base job or space that does not fit, an unknown search to resume or a name that is
        taken, and PrismError when no trial reached its end.
        """
        began = time.monotonic()
        asked, folder = self._open()
        report = asked._search(folder)
        report.seconds = time.monotonic() - began
        if storage.is_local(folder):
            report.folder = str(report.save(storage.local_path(folder) / "report"))
        return report

    def _open(self) -> tuple["TuneJob", str]:
        """The search that is meant, and its folder: made for a new one, read for one that goes on."""
        root = root_of(SEARCH, self.storage)
        if self.resume is None:
            SPACES[self.space].of(self.base)
            return self, new_folder(SEARCH, root, self.record(), prefix=self.space, name=self.name)
        folder, content = resumed_folder(SEARCH, root, self.resume)
        if content.get("space") != self.space:
            raise InputError(f"search {self.resume!r} is over space {content.get('space')!r}, not {self.space!r}")
        before = TuneJob.model_validate({key: value for key, value in content.items() if key != "job"})
        if self.base not in (before.base, type(self.base)()):
            raise InputError(
                f"search {self.resume!r} was started with another base job; a resumed search keeps it: leave these "
                "options out, or start a new search"
            )
        given = {name: getattr(self, name) for name in ("samples", "concurrent") if getattr(self, name) is not None}
        return before.model_copy(update=given | {"name": self.resume, "storage": self.storage}), folder

    def _search(self, folder: str) -> Report:
        from jobs.search import Journal

        connect()
        check_room(self.base)
        space = SPACES[self.space].of(self.base)
        base = self._prepared(folder)
        ready = self.model_copy(update={"base": base})
        reference = _reference(space, base, folder)
        journal = Journal(folder)
        interrupted = ready._tune(space, journal, reference, self.samples or space.samples)
        return ready._report(space, journal, folder, interrupted)

    def _prepared(self, folder: str) -> TrainingJob:
        """The base job once what it rests on is there; made once in a search."""
        file = storage.join(folder, PREPARED)
        if storage.exists(file):
            content = json.loads(storage.read_bytes(file))
            return type(self.base).model_validate({key: value for key, value in content.items() if key != "job"})
        made = self.base.prepared()
        if made is None:
            raise PrismError(f"stopped before any trial; go on with: {self._resume(folder)}")
        storage.write_bytes(file, json.dumps(made.record(), indent=1).encode())
        return made

    def _resume(self, folder: str) -> str:
        place = f" --storage {self.storage}" if self.storage else ""
        return f"prism tune {self.space} --resume {os.path.basename(folder.split('?')[0])}{place}"

    def _tune(self, space: Space, journal: "Journal", reference: Mapping[int, float], samples: int) -> bool:
        """Run what is missing of the trials; whether it was interrupted."""
        import optuna

        from jobs.search import JournalSearcher, run_trials, scheduler, trial_folder

        drawn = sum(record.group is None for record in journal.records)
        baselines = sum(map(len, space.baselines.values())) - (len(journal.records) - drawn)
        missing = sum(record.state == "running" for record in journal.records)
        missing += baselines + max(0, samples - drawn)
        if not missing:
            return False
        base, steps = self.base, self.base.recipe.steps
        root = journal.root

        def trial(config: dict[str, Any]) -> None:
            _run_trial(space, base, trial_folder(root, config["number"]), config["values"], reference)

        alone = base.scaling.workers == 1
        needs = {"CPU": base.scaling.cpus_per_worker} | ({"GPU": 1} if base.scaling.gpu else {})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        run_trials(
            trial,
            needs if alone else {"CPU": 0, "memory": 1 << 20},
            JournalSearcher(
                space, journal, samples=samples, kind=self.searcher or space.searcher, seed=self.seed, steps=steps
            ),
            scheduler(space, journal.records, steps),
            samples=missing,
            concurrent=self.concurrent or _room(base),
            max_failures=base.max_failures,
        )
        return any(record.state == "running" for record in journal.records)

    def _report(self, space: Space, journal: "Journal", folder: str, interrupted: bool) -> Report:
        from jobs import search_report
        from jobs.search import trial_folder

        report = Report(
            job=self.job,
            config=self.record(),
            tables={"trials": search_report.table(space, journal.records)},
            figures={"trials": search_report.figure(space, journal.records)},
            folder=folder,
        )
        if space.others:
            report.figures["front"] = search_report.front_figure(space, journal.records)
        importance = search_report.importance(space, journal.records)
        if importance is not None:
            report.tables["importance"] = importance
        states = [record.state for record in journal.records]
        report.metrics = {"trials": float(len(states))} | {
            state: float(states.count(state)) for state in ("finished", "stopped", "failed")
        }
        if interrupted:
            report.notes.append(f"interrupted; go on with: {self._resume(folder)}")
            return report
        best = best_trial(space, journal.records)
        if best is None:
            fault = next((record.fault for record in journal.records if record.fault), "all were stopped")
            raise PrismError(f"no trial of {folder} reached its end: {fault}")
        if space.others:
            report.metrics |= search_report.front_metrics(space, journal.records)
            for other in kept_of_front(space, journal.records)[1:]:
                self._keep(space, other, trial_folder(journal.root, other.number), folder, report, first=False)
        self._keep(space, best, trial_folder(journal.root, best.number), folder, report)
        return report

    def _keep(
        self, space: Space, best: "TrialRecord", place: str, folder: str, report: Report, *, first: bool = True
    ) -> None:
        """Write down a trial's job, and register its artifact; `first` is that of the best one."""
        from jobs.launch import Tracking, keep_result
        from jobs.trial import changed

        job = changed(self.base, best.values)
        file = storage.join(folder, BEST if first else f"front-{best.number:05d}.json")
        storage.write_bytes(file, json.dumps(job.record(), indent=1).encode())
        report.notes.append(f"settings of trial {best.number}: prism run {job.job} --config {file}")
        if first:
            report.metrics |= {"best_trial": float(best.number)} | {f"best_{k}": v for k, v in best.last.items()}
        if best.last["excess"] > 0 and space.limit is not None:
            report.notes.append(
                f"no trial kept {space.limit.metric} within {space.limit.slack:.0%} of the reference; "
                f"the best exceeds that by {best.last['excess']:.1%}"
            )
        tracking = Tracking(job)
        tracking.log(max(best.curve), best.last)
        keep_result(job, place, report, tracking, advice=f"go on with: {self._resume(folder)}")
        tracking.finish("FINISHED")
        report.notes += tracking.notes


def tune_job(name: str) -> type[Job]:
    """The job of a named space: what typed flags are made from. Its `base` has that space's own type and default.

    Raises InputError that lists the spaces.
    """
    if name not in SPACES:
        raise InputError(f"unknown space {name!r}; there are {', '.join(SPACES)}")
    own = SPACES[name].own
    if own is not None:
        module, _, attribute = own.partition(":")
        return getattr(import_module(module), attribute)
    base = job_class(SPACES[name].job)
    made = create_model(f"Tune{base.__name__}", __base__=TuneJob, space=(Literal[name], name), base=(base, base()))
    made.__doc__ = import_module(SPACES[name].module).__doc__
    return made


def best_trial(space: Space, records: list["TrialRecord"]) -> "TrialRecord | None":
    """The finished trial with the best metric among the feasible ones; where none is, that with the best objective.

    With several objectives it is the first of `kept_of_front`.
    """
    if space.others:
        return next(iter(kept_of_front(space, records)), None)
    finished = [record for record in records if record.state == "finished" and record.curve and record.group is None]
    sign = 1 if space.mode == "min" else -1
    return min(
        finished,
        key=lambda record: (record.last["excess"] > 0, sign * record.last["objective"], record.number),
        default=None,
    )


def _reference(space: Space, base: TrainingJob, folder: str) -> dict[int, float]:
    """The limited metric of the reference run by step, from its file or from running it now; empty without a limit."""
    import ray

    from jobs.trial import changed

    if space.limit is None:
        return {}
    file = storage.join(folder, REFERENCE)
    if not storage.exists(file):
        alone = base.scaling.workers == 1
        task = ray.remote(
            num_cpus=base.scaling.cpus_per_worker if alone else 0,
            num_gpus=1 if base.scaling.gpu and alone else 0,
            max_retries=base.max_failures,
            max_calls=1,
        )(_run_reference)
        job = changed(base, space.limit.reference)
        found = ray.get(task.remote(job, storage.join(folder, "reference"), space.limit.metric))
        if isinstance(found, str):
            raise InputError(found)
        storage.write_bytes(file, json.dumps(found).encode())
    return {int(step): value for step, value in json.loads(storage.read_bytes(file)).items()}


def _run_reference(job: TrainingJob, folder: str, metric: str) -> dict[int, float] | str:
    """The reference's metric by step, or why there is none."""
    from jobs.history import read_history
    from jobs.trial import follow

    try:
        outcome = follow(job, folder, lambda evaluation: None)
    except PrismError as error:
        return str(error)
    if outcome.reason not in ("finished", "early"):
        return outcome.message
    points = read_history(folder).get(metric)
    return dict(points) if points else f"the reference run has no {metric!r} to compare with"


def _run_trial(
    space: Space, base: TrainingJob, folder: str, values: Mapping[str, Any], reference: Mapping[int, float]
) -> None:
    """One trial, inside Ray Tune. What it reports last says how it ended."""
    from ray import tune

    from jobs.trial import Evaluation, changed, follow, scored

    last: dict[str, Any] = {"step": 0}

    def watch(evaluation: Evaluation) -> None:
        report = scored(space, evaluation, reference)
        if report is not None:
            last.update(report)
            if evaluation.step < base.recipe.steps:
                tune.report(dict(report))

    try:
        outcome = follow(changed(base, values), folder, watch)
        reason, fault = outcome.reason, outcome.message
    except PrismError as error:
        reason, fault = "refused", str(error)
    if reason in ("finished", "early") and last["step"] != outcome.step:
        reason, fault = "unmeasured", f"the training ended without a finite {space.metric!r}"
    tune.report({**last, "reason": reason, "fault": fault})


def _room(base: TrainingJob) -> int:
    """How many trials fit into the cluster at a time."""
    workers = base.scaling.workers if isinstance(base.scaling.workers, int) else base.scaling.workers[0]
    return max(1, room_for(base.scaling) // workers)
