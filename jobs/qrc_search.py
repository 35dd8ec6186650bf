"""The search for onions of quantum reservoirs: a pool of single ones, a greedy choice among the best, joint refinement.

A search has a folder: `search.json` is the job, `pool/00003.json` a batch of single reservoirs (its features beside
it), `onion/00001.json` a batch of variants of the chosen onion, `winner` the run that fitted the best. A search that
is killed goes on from there. A trial of Ray Tune is a whole batch: its configurations evolve as one.
"""

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster import connect, storage
from jobs.folders import SEARCH, new_folder, resumed_folder, root_of
from jobs.job import Job
from jobs.qrc import QrcJob
from jobs.qrc_evaluation import Plan, hybrid
from jobs.qrc_trials import Evaluated, Ledger, batch_place, draw
from jobs.report import Report
from library.errors import InputError
from library.qrc.nowcast import Nowcast
from library.qrc.recipe import QrcRecipe
from tune_spaces.qrc import PoolRanges, Values, onion, reservoir, unrefined

if TYPE_CHECKING:
    from library.qrc.reservoir import QuantumReservoir
    from library.qrc.selection import Step

BEST = "best.json"
BATCHES = 32
SHARED = ("mode", "size", "encoding")  # what the reservoirs of a batch have in common, so that they evolve as one
STARTUP = 8  # batches that are drawn at random, before the searcher knows anything of these


class QrcSearch(Job, frozen=True, extra="forbid"):
    """Search for the onion of quantum reservoirs with the least validation error.

    Stage 1 draws batches of single reservoirs, each a trial of Ray Tune, and stops most of them after a part of the
    series. Stage 2 chooses an onion among the best greedily, and refines its members' angles and a classical layer
    jointly. The result is fitted with fresh seeds too, registered, and only then measured on the test.
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
    pool: PoolRanges = PoolRanges()
    """Ranges of the single reservoirs."""
    searcher: Literal["tpe", "random"] = "tpe"
    """Whether it learns from the batches that have ended, or draws all."""
    halving: Literal["hours", "seeds"] = "hours"
    """What a configuration gets more of when it goes on: hours of the series, or seeds whose errors are averaged."""
    rungs: tuple[PositiveInt, ...] | None = None
    """Hours, or seeds, after which poor configurations are stopped; None is 1000 and 3000 hours, or 1 and 2 seeds."""
    most_seeds: PositiveInt = 5
    """Seeds of the last rung of halving over seeds."""
    reduction: int = Field(3, ge=2)
    """At each of them the best of so many go on."""
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
    shots: PositiveInt | None = None
    """Shots behind each feature, in the search and in its result; None gives exact expectation values."""
    most_shots: PositiveInt | None = None
    """Most shots of all members together in a step; None is no limit."""
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
    def _fits_together(self) -> "QrcSearch":
        rungs, whole = self._plan().rungs, self._plan().whole
        if list(rungs) != sorted(set(rungs)) or (rungs and rungs[-1] >= whole):
            raise InputError(f"rungs {rungs}: rising, and below the {whole} {self.halving} of the last")
        if self.washout >= self.nowcast.hours // 2:
            raise InputError(f"washout {self.washout}: below half of the {self.nowcast.hours} hours")
        if self.most_shots and (self.shots or 0) > self.most_shots:
            raise InputError(f"most_shots {self.most_shots}: one member alone takes {self.shots} shots a step")
        if self.most_shots and not self.shots:
            raise InputError("most_shots: exact expectation values take no shots; give shots too")
        self.pool.domains(self.most_qubits)
        return self

    def _plan(self, members: "tuple[QuantumReservoir, ...]" = ()) -> Plan:
        by_hours = self.halving == "hours"
        return Plan(
            nowcast=self.nowcast,
            halving=self.halving,
            rungs=self.rungs or ((1000, 3000) if by_hours else (1, 2)),
            whole=self.nowcast.hours if by_hours else self.most_seeds,
            reduction=self.reduction,
            washout=self.washout,
            members=members,
            spared=len(unrefined(len(members))) if members else 0,
            shots=self.shots,
            gpu=self.gpu,
        )

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
            ended = Ledger(storage.join(folder, "pool")).trials
            report.metrics = report.metrics or {"configurations": float(len(ended))}
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
        from jobs.qrc_pool_report import pool_figure, pool_metrics, pool_table

        plan = self._plan()
        singles = Ledger(storage.join(folder, "pool"))
        self._pool(singles, plan)
        varies = self.pool.domains(self.most_qubits)
        report.tables["pool"] = pool_table(singles.trials)
        report.figures["pool"] = pool_figure(singles.trials, plan.whole, varies)
        report.metrics = pool_metrics(singles.batches, plan.whole)
        members, steps = self._choose(singles, plan)
        report.metrics |= {"members": float(len(members)), "greedy_validation_nrmse": steps[-1].error}
        variants = Ledger(storage.join(folder, "onion"))
        self._refine(variants, members)
        best = min(variants.trials, key=lambda trial: trial.errors.get(plan.whole, float("inf")))
        report.metrics |= {
            "onions": float(len(variants.trials)),
            "refined_validation_nrmse": best.errors[plan.whole],
        }
        self._win(folder, members, best, report)

    def _pool(self, ledger: Ledger, plan: Plan) -> None:
        """Stage 1: the batches that are missing."""
        varies = self.pool.domains(self.most_qubits)
        first = [guess for guess in self.pool.first_guesses(self.most_qubits) if self._fits(guess)]

        def drawn(number: int) -> list[Values]:
            return draw(
                varies,
                ledger,
                number,
                self.batch,
                searcher=self.searcher,
                seed=self.seed,
                first=first,
                whole=plan.whole,
                shared=SHARED,
                startup=STARTUP,
                fits=self._fits,
            )

        self._run(ledger, plan, self.samples or BATCHES, drawn, "single reservoirs", features=True)

    def _fits(self, values: Values) -> bool:
        member = reservoir(values)
        return (self.most_qubits or member.qubits) >= member.qubits and (self.most_cx or 10**9) >= member.cx_per_step

    def _choose(self, ledger: Ledger, plan: Plan) -> "tuple[list[QuantumReservoir], list[Step]]":
        """The greedy onion among the best of the pool, from the moments of their features.

        Of equal errors the one of fewer qubits counts, then that of fewer CX gates.
        """
        from safetensors.torch import load

        from library.qrc.pool import joint_moments, parts_of
        from library.qrc.selection import forward_selection

        known = []
        for batch in ledger.batches:
            for place, trial in enumerate(batch.trials):
                if plan.whole in trial.errors:
                    member = reservoir(trial.values)
                    costs = (member.qubits, member.cx_per_step)
                    known.append((trial.errors[plan.whole], *costs, batch.number, place, member))
        ranked = sorted(known, key=lambda entry: entry[:-1])[: self.candidates]
        numbers = {entry[3] for entry in ranked}
        shards = {n: load(storage.read_bytes(batch_place(ledger.folder, n, "safetensors"))) for n in numbers}
        moments = {}
        for name, part in parts_of(self.nowcast, ("train", "validation")).items():
            features = [shards[number][f"{place}.{name}"] for *_, number, place, _ in ranked]
            moments[name] = joint_moments(features, part.targets, self.washout)
        unlimited = float(10**9)
        limits = [float(limit or unlimited) for limit in (self.most_qubits, self.most_cx, self.most_shots)]
        whole, _, columns = moments["train"]
        steps = forward_selection(
            whole,
            moments["validation"][1],
            columns,
            most=self.members,
            costs=[[float(entry[1]), float(entry[2]), float(self.shots or 0)] for entry in ranked],
            limits=limits,
        )
        return [ranked[step.candidate][-1] for step in steps], steps

    def _refine(self, ledger: Ledger, members: "list[QuantumReservoir]") -> None:
        """Stage 2: the batches of variants that are missing."""
        plan = self._plan(tuple(members))

        def drawn(number: int) -> list[Values]:
            size = min(self.refine_batch, self.refinements - number * self.refine_batch)
            return draw(
                onion(len(members)),
                ledger,
                number,
                size,
                searcher=self.searcher,
                seed=self.seed + 1,
                first=unrefined(len(members)),
                whole=plan.whole,
            )

        count = -(-self.refinements // self.refine_batch)
        self._run(ledger, plan, count, drawn, "onions", features=False)

    def _run(
        self,
        ledger: Ledger,
        plan: Plan,
        count: int,
        drawn: Callable[[int], list[Values]],
        what: str,
        *,
        features: bool,
    ) -> None:
        from jobs.qrc_batches import run_batches

        options = {"cpus": self.cpus_per_task, "concurrent": self.concurrent, "features": features}
        if not run_batches(ledger, plan, count, drawn, what, **options):
            raise KeyboardInterrupt

    def _win(self, folder: str, members: "list[QuantumReservoir]", best: Evaluated, report: Report) -> None:
        """Fit the best onion with its own and fresh seeds, measure it on the test, and register it."""
        from library.qrc.figures import onion_figure
        from library.qrc.pool import parts_of

        found = hybrid(members, best.values)
        layer = found.layer
        changes: dict[str, Any] = {"units": 0, "washout": self.washout, "shots": self.shots}
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


def _named(folder: str) -> str:
    return os.path.basename(folder.split("?")[0])
