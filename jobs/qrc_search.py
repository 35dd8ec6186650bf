"""The search for onions of quantum reservoirs: a pool of single ones, a greedy choice among the best, joint refinement.

A search has a folder: `search.json` is the job, `pool/00003.json` a batch of single reservoirs (its features beside
it), `onion/00001.json` a batch of variants of the chosen onion, `winner` the run that fitted the best. A search that
is killed goes on from there.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster import connect, storage
from jobs.folders import SEARCH, new_folder, resumed_folder, root_of
from jobs.job import Job
from jobs.qrc import QrcJob
from jobs.qrc_trials import Batch, Evaluated, Ledger, draw, evaluate_onions, evaluate_pool, hybrid
from jobs.report import Report
from library.errors import InputError, PrismError
from library.qrc.nowcast import Nowcast
from library.qrc.recipe import QrcRecipe
from tune_spaces.qrc import first_guesses, onion, pool, reservoir, unrefined

if TYPE_CHECKING:
    from library.qrc.reservoir import QuantumReservoir
    from library.qrc.selection import Step

BEST = "best.json"
SHARED = ("mode", "size", "encoding")  # what the reservoirs of a batch have in common, so that they evolve as one
STARTUP = 8  # batches that are drawn at random, before the searcher knows anything of these


class QrcSearch(Job, frozen=True, extra="forbid"):
    """Search for the onion of quantum reservoirs with the least validation error.

    Stage 1 draws batches of single reservoirs and evaluates each as one batch in one Ray task, stopping most of them
    after a part of the series. Stage 2 chooses an onion among the best greedily, and refines its members' angles and a
    classical layer jointly. The result is fitted with fresh seeds too, registered, and only then measured on the test.
    """

    job: ClassVar[str] = "tune-qrc"

    space: Literal["qrc"] = "qrc"
    """What is searched."""
    samples: PositiveInt | None = None
    """Batches of stage 1; None is 32, or that of the search which is resumed."""
    concurrent: PositiveInt | None = None
    """Most batches at a time; None is as many as the cluster has room for."""
    batch: int = Field(64, ge=2, le=1024)
    """Configurations of a batch of stage 1."""
    searcher: Literal["tpe", "random"] = "tpe"
    """Whether it learns from the batches that have ended, or draws all."""
    rungs: tuple[PositiveInt, ...] = (1000, 3000)
    """Hours of the series after which poor configurations are stopped."""
    reduction: int = Field(3, ge=2)
    """At each of them the best of so many goes on."""
    candidates: int = Field(64, ge=1)
    """The best single reservoirs among which an onion is chosen."""
    members: int = Field(3, ge=1, le=8)
    """Most members of the onion."""
    refinements: PositiveInt = 96
    """Variants of the onion that stage 2 tries."""
    refine_batch: PositiveInt = 16
    """Variants of a batch of stage 2."""
    most_qubits: PositiveInt | None = None
    """Most qubits of all members together; None is no limit."""
    most_cx: PositiveInt | None = None
    """Most CX gates of all members together in a step; None is no limit."""
    nowcast: Nowcast = Nowcast()
    """Places of training and validation; the test is measured once, at the end."""
    washout: NonNegativeInt = 300
    """Hours from which nothing is learned, or half of a rung where that is less."""
    fresh_seeds: NonNegativeInt = 5
    """Seeds that the winner is fitted with beside its own."""
    seed: NonNegativeInt = 0
    """Seed of what is tried."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name of the search, and of its folder; None makes one from the time."""
    resume: str | None = None
    """Go on with the search of that name; what it searches is as it was started."""
    storage: str | None = None
    """Where searches are kept: a folder that all nodes see, or a URI. None: PRISM_HOME/searches."""
    register_as: str | None = None
    """Name in the model registry; None is qrc."""
    champion: bool = False
    """Let the endpoint serve the result from now on."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each batch."""
    gpu: bool = False
    """One GPU for each batch."""

    @model_validator(mode="after")
    def _rungs_fit(self) -> "QrcSearch":
        if list(self.rungs) != sorted(set(self.rungs)) or (self.rungs and self.rungs[-1] >= self.nowcast.hours):
            raise InputError(f"rungs {self.rungs}: rising, and below the {self.nowcast.hours} hours of the series")
        if self.washout >= self.nowcast.hours // 2:
            raise InputError(f"washout {self.washout}: below half of the {self.nowcast.hours} hours")
        pool(self.most_qubits)
        return self

    def leaves_artifact(self) -> bool:
        return True

    def run(self) -> Report:
        """Run both stages, fit the winner, and register it.

        Raises InputError for an unknown search to resume or a name that is taken, PrismError when nothing fits.
        """
        began = time.monotonic()
        asked, folder = self._open()
        connect()
        report = Report(job=self.job, config=asked.record(), folder=folder)
        try:
            asked._stages(folder, report)
        except KeyboardInterrupt:
            place = f" --storage {self.storage}" if self.storage else ""
            report.notes.append(f"interrupted; go on with: prism tune qrc --resume {_named(folder)}{place}")
        report.seconds = time.monotonic() - began
        if storage.is_local(folder):
            report.folder = str(report.save(storage.local_path(folder) / "report"))
        return report

    def _open(self) -> tuple["QrcSearch", str]:
        """The search that is meant, and its folder: made for a new one, read for one that goes on."""
        root = root_of(SEARCH, self.storage)
        if self.resume is None:
            return self, new_folder(SEARCH, root, self.record(), prefix=self.space, name=self.name)
        folder, content = resumed_folder(SEARCH, root, self.resume)
        if content.get("job") != self.job:
            raise InputError(f"search {self.resume!r} is of {content.get('space', 'another kind')}, not of qrc")
        before = QrcSearch.model_validate({key: value for key, value in content.items() if key != "job"})
        free = {"samples", "concurrent", "resume", "storage", "name"}
        now, default = self.model_dump(exclude=free), QrcSearch().model_dump(exclude=free)
        if now not in (default, before.model_dump(exclude=free)):
            raise InputError(
                f"search {self.resume!r} was started with other settings; a resumed search keeps them: leave these "
                "options out, or start a new search"
            )
        given = {name: getattr(self, name) for name in ("samples", "concurrent") if getattr(self, name) is not None}
        return before.model_copy(update=given | {"name": self.resume, "storage": self.storage}), folder

    def _stages(self, folder: str, report: Report) -> None:
        from jobs.qrc_pool_report import pool_figure, pool_table

        singles = Ledger(storage.join(folder, "pool"))
        self._pool(singles)
        trials = singles.trials
        seconds = sum(batch.seconds for batch in singles.batches)
        report.tables["pool"] = pool_table(trials, self.nowcast.hours)
        report.figures["pool"] = pool_figure(trials, self.nowcast.hours)
        report.metrics = {
            "configurations": float(len(trials)),
            "configurations_per_cpu_minute": 60 * len(trials) / seconds,
            "best_single_validation_nrmse": min(trial.errors.get(self.nowcast.hours, float("inf")) for trial in trials),
        }
        members, steps = self._choose(singles)
        report.metrics |= {"members": float(len(members)), "greedy_validation_nrmse": steps[-1].error}
        variants = Ledger(storage.join(folder, "onion"))
        self._refine(variants, members)
        best = min(variants.trials, key=lambda trial: trial.errors[self.nowcast.hours])
        report.metrics |= {
            "onions": float(len(variants.trials)),
            "refined_validation_nrmse": best.errors[self.nowcast.hours],
        }
        self._win(folder, members, best, report)

    def _pool(self, ledger: Ledger) -> None:
        """Stage 1: the batches that are missing."""
        varies, hours = pool(self.most_qubits), self.nowcast.hours

        def drawn(number: int) -> list[Any]:
            return draw(
                varies,
                ledger,
                number,
                self.batch,
                searcher=self.searcher,
                seed=self.seed,
                first=[guess for guess in first_guesses(self.most_qubits) if self._fits(reservoir(guess))],
                whole=hours,
                shared=SHARED,
                startup=STARTUP,
                fits=lambda values: self._fits(reservoir(values)),
            )

        def arguments(batch: Batch) -> tuple[Any, ...]:
            seen = {rung: [t.errors[rung] for t in ledger.trials if rung in t.errors] for rung in self.rungs}
            place = ledger.place(batch.number, "safetensors")
            return batch, self.nowcast, self.rungs, seen, self.reduction, self.washout, place

        self._run_batches(ledger, self.samples or 32, drawn, evaluate_pool, arguments, "single reservoirs")

    def _fits(self, member: "QuantumReservoir") -> bool:
        return (self.most_qubits or member.qubits) >= member.qubits and (self.most_cx or 10**9) >= member.cx_per_step

    def _choose(self, ledger: Ledger) -> "tuple[list[QuantumReservoir], list[Step]]":
        """The greedy onion among the best of the pool, from the moments of their features."""
        import torch
        from safetensors.torch import load

        from library.qrc.pool import joint_moments, parts_of
        from library.qrc.selection import forward_selection

        hours = self.nowcast.hours
        ranked = sorted(
            (trial.errors[hours], batch.number, place)
            for batch in ledger.batches
            for place, trial in enumerate(batch.trials)
            if hours in trial.errors
        )[: self.candidates]
        shards = {
            n: load(storage.read_bytes(ledger.place(n, "safetensors"))) for n in {number for _, number, _ in ranked}
        }
        trials = {batch.number: batch.trials for batch in ledger.batches}
        singles = [reservoir(trials[number][place].values) for _, number, place in ranked]
        parts = parts_of(self.nowcast, ("train", "validation"))
        moments = {}
        for name, part in parts.items():
            features = [shards[number][f"{place}.{name}"] for _, number, place in ranked]
            moments[name] = joint_moments(features, part.targets, self.washout)
        costs = torch.tensor([[member.qubits, member.cx_per_step] for member in singles], dtype=torch.float64)
        limits = [float(self.most_qubits or 10**9), float(self.most_cx or 10**9)]
        whole, _, columns = moments["train"]
        steps = forward_selection(
            whole, moments["validation"][1], columns, most=self.members, costs=costs.tolist(), limits=limits
        )
        return [singles[step.candidate] for step in steps], steps

    def _refine(self, ledger: Ledger, members: "list[QuantumReservoir]") -> None:
        """Stage 2: the batches of variants that are missing."""
        count = -(-self.refinements // self.refine_batch)

        def drawn(number: int) -> list[Any]:
            size = min(self.refine_batch, self.refinements - number * self.refine_batch)
            return draw(
                onion(len(members)),
                ledger,
                number,
                size,
                searcher=self.searcher,
                seed=self.seed + 1,
                first=unrefined(len(members)),
                whole=self.nowcast.hours,
            )

        def arguments(batch: Batch) -> tuple[Any, ...]:
            return batch, members, self.nowcast, self.washout

        self._run_batches(ledger, count, drawn, evaluate_onions, arguments, "onions")

    def _run_batches(
        self,
        ledger: Ledger,
        count: int,
        drawn: Callable[[int], list[Any]],
        evaluate: Callable[..., Batch],
        arguments: Callable[[Batch], tuple[Any, ...]],
        what: str,
    ) -> None:
        """Those of `count` batches that have not ended: first the ones that were cut off, then new ones."""
        import ray

        task = ray.remote(num_cpus=self.cpus_per_task, num_gpus=1 if self.gpu else 0, max_retries=2)(evaluate)
        room = self.concurrent or max(1, int(ray.cluster_resources().get("CPU", 1) // self.cpus_per_task))
        waiting = self._waiting(ledger, count, drawn)
        flying: dict[Any, int] = {}
        more = True
        try:
            while more or flying:
                while more and len(flying) < room:
                    batch = next(waiting, None)
                    more = batch is not None
                    if batch is not None:
                        flying[task.remote(*arguments(batch))] = batch.number
                if flying:
                    [done], _ = ray.wait(list(flying))
                    number = flying.pop(done)
                    ledger.write(_got(done, f"batch {number} of {what}"))
                    self._tell(ledger, count, what)
        finally:
            for left in flying:
                ray.cancel(left, force=True)

    def _waiting(self, ledger: Ledger, count: int, drawn: Callable[[int], list[Any]]) -> Iterator[Batch]:
        yield from [batch for batch in ledger.batches if batch.state == "running"]
        for number in range(len(ledger.batches), count):
            batch = Batch(number=number, trials=[Evaluated(values=values) for values in drawn(number)])
            ledger.write(batch)
            yield batch

    def _tell(self, ledger: Ledger, count: int, what: str) -> None:
        ended = sum(batch.state == "finished" for batch in ledger.batches)
        hours = self.nowcast.hours
        best = min((trial.errors[hours] for trial in ledger.trials if hours in trial.errors), default=float("nan"))
        line = f"qrc  {ended}/{count} batches, {len(ledger.trials)} {what}  best validation NRMSE {best:.4f}"
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def _win(self, folder: str, members: "list[QuantumReservoir]", best: Evaluated, report: Report) -> None:
        """Fit the best onion with its own and fresh seeds, measure it on the test, and register it."""
        from library.qrc.figures import onion_figure
        from library.qrc.pool import parts_of

        found = hybrid(members, best.values)
        layer = found.layer
        changes: dict[str, Any] = {"units": 0, "washout": self.washout}
        if layer is not None:
            names = ("units", "spectral_radius", "leak", "input_scale")
            changes |= {name: getattr(layer, name) for name in names} | {"wiring": found.wiring}
        job = QrcJob(
            recipe=QrcRecipe.of(found.members, **changes),
            nowcast=self.nowcast,
            seeds=tuple(range(1 + self.fresh_seeds)),
            storage=folder,
            name="winner",
            register_as=self.register_as,
            champion=self.champion,
            cpus_per_task=self.cpus_per_task,
            gpu=self.gpu,
        )
        storage.write_bytes(storage.join(folder, BEST), json.dumps(job.record(), indent=1).encode())
        storage.remove(storage.join(folder, "winner"))
        fitted = job.run()
        seeds = fitted.tables["seeds"].set_index("seed")
        report.artifact, report.registered = fitted.artifact, fitted.registered
        report.tables |= {"seeds": fitted.tables["seeds"], "reservoirs": fitted.tables["reservoirs"]}
        report.figures["test"] = fitted.figures["test"]
        mean = parts_of(self.nowcast, ("train",))["train"].inputs.flatten(0, 1).mean(0, keepdim=True)
        report.figures["spectrum"] = onion_figure(found.members, mean)
        report.metrics |= {"test_nrmse": float(seeds["test_nrmse"][0])}
        if self.fresh_seeds:
            fresh = seeds.drop(index=0)["test_nrmse"]
            report.metrics |= {"fresh_seeds_test_nrmse": float(fresh.mean())}
            report.metrics |= {"fresh_seeds_test_nrmse_sd": float(fresh.std())} if len(fresh) > 1 else {}
        report.notes += fitted.notes
        report.notes.append(
            f"chosen among {report.metrics['configurations']:.0f} single reservoirs and {report.metrics['onions']:.0f} "
            f"onions by validation at {', '.join(self.nowcast.validation)}; tests are at {', '.join(self.nowcast.test)}"
        )
        report.notes.append(f"repeat it: prism run qrc --config {storage.join(folder, BEST)}")


def _got(done: Any, what: str) -> Batch:
    """A task's batch. Raises its own PrismError, or one that names the batch."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(done)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, PrismError):
            raise cause from None
        first = (str(cause).splitlines() or [""])[0]
        raise PrismError(f"{what} failed ({type(cause).__name__}: {first}); resume to try it again") from error


def _named(folder: str) -> str:
    return os.path.basename(folder.split("?")[0])
