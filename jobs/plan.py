"""What a training would take, without running it: bytes per worker, operations, time, network, and what to choose."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from jobs import plan_memory
from jobs.engines import EngineName
from jobs.plan_devices import USABLE, Device
from jobs.plan_measure import Measured, measure
from jobs.plan_memory import ENGINES, Memory
from jobs.training import TrainingJob
from library.errors import InputError

MOST_WORKERS = 4096  # that are tried when a plan says how many would be enough
CLOSE = 1.02  # steps this near the fastest count as equal, and the simpler engine is taken


@dataclass(frozen=True)
class EnginePlan:
    """One engine: the largest micro-batch that fits (or one sample), what a worker holds and sends, and the time.

    seconds is the longer of computing and sending, which overlap; why says why the job does not take this engine.
    """

    engine: EngineName
    micro_batch: int
    passes: int
    memory: Memory
    bytes: float
    fits: bool
    sent: float
    computing: float
    sending: float
    why: str | None = None

    @property
    def seconds(self) -> float:
        """Estimated seconds of a step."""
        return max(self.computing, self.sending)


@dataclass(frozen=True)
class Plan:
    """The plan of a job on a number of workers of a device. `flops` is of a whole step."""

    job: TrainingJob
    device: Device
    workers: int
    efficiency: float
    found: Measured
    flops: float
    engines: tuple[EnginePlan, ...]

    @property
    def best(self) -> EnginePlan | None:
        """The fastest engine that fits, the simplest of those that are as fast; None when none fits."""
        fitting = [plan for plan in self.engines if plan.fits and plan.why is None]
        fastest = min((plan.seconds for plan in fitting), default=0.0)
        return next((plan for plan in fitting if plan.seconds <= CLOSE * fastest), None)

    @property
    def hours(self) -> float | None:
        """Estimated hours of the whole training with the best engine."""
        return None if self.best is None else self.job.recipe.steps * self.best.seconds / 3600

    def enough(self) -> tuple[EngineName, int] | None:
        """The engine that fits on the fewest workers, and how many: a power of two of at most MOST_WORKERS."""
        workers = self.workers
        while workers < min(MOST_WORKERS, self.job.recipe.batch_size):
            workers = min(2 * workers, self.job.recipe.batch_size)
            for engine in ENGINES:
                one = _engine(self.job, self.found, engine, workers, self.device, self.efficiency)
                if one.fits and one.why is None:
                    return engine, workers
        return None

    def assumptions(self) -> list[str]:
        """What the numbers rest on, one sentence each."""
        recipe, device = self.job.recipe, self.device
        peak = device.peak(self.job.precision)
        where = (
            "activations and operations were measured by passing a few real samples through the network on this CPU, "
            "whose shapes depend on them"
            if self.found.on_data
            else "activations and operations were measured on tensors that have shapes and no values"
        )
        device_line = (
            f"{device.name}: {_rate(peak)} at its peak in {self.job.precision}, of which {self.efficiency:.0%} is "
            f"reached (--efficiency); {device.memory / 2**30:.0f} GiB for each worker, {USABLE:.0%} of it usable"
        )
        ring = (
            f"a ring over {self.workers} workers, {device.node} to a machine, sends "
            f"{device.link(self.workers) / 1e9:g} GB/s each, while they compute"
        )
        snapshot = "a checkpoint is written from a copy of the state in the host's memory, a CPU's own"
        uncounted = (
            f"{recipe.steps} steps of {recipe.batch_size} samples; evaluations, checkpoints and what a method does "
            "after a step take no time"
        )
        samples = f"{where}, with fused attention; they grow in a straight line with the samples"
        lines = [samples, device_line, ring, snapshot, uncounted]
        return [line for line in lines if line is not ring or self.workers > 1]

    def record(self) -> dict[str, Any]:
        """The plan as JSON values."""
        best = self.best
        return {
            "job": self.job.job,
            "device": asdict(self.device),
            "workers": self.workers,
            "precision": self.job.precision,
            "efficiency": self.efficiency,
            "parameters": self.found.parameters,
            "learning": self.found.learning,
            "flops_per_step": self.flops,
            "checkpoint_bytes": plan_memory.checkpoint(self.found),
            "measured_on": "data" if self.found.on_data else "shapes",
            "engines": [asdict(plan) | {"seconds": plan.seconds} for plan in self.engines],
            "recommended": None if best is None else {"engine": best.engine, "micro_batch": best.micro_batch},
            "step_seconds": None if best is None else best.seconds,
            "hours": self.hours,
            "assumptions": self.assumptions(),
        }


def plan(job: TrainingJob, device: Device, *, efficiency: float = 0.4, found: Measured | None = None) -> Plan:
    """The plan of a job for as many workers as it asks for (the most of an elastic one).

    Raises InputError for more workers than samples in a batch, and for a model that cannot be made.

    >>> from jobs.plan_devices import device
    >>> from jobs.send import SendJob
    >>> print(plan(SendJob(), device("t4", cpus=1)).best.engine)
    ddp
    """
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency {efficiency:g}: a share of the peak, above 0 and at most 1")
    asked = job.scaling.workers
    workers = asked if isinstance(asked, int) else asked[1]
    if workers > job.recipe.batch_size:
        raise InputError(f"batch_size {job.recipe.batch_size} is less than the {workers} workers; each needs a sample")
    found = found or measure(job)
    engines = tuple(_engine(job, found, engine, workers, device, efficiency) for engine in ENGINES)
    whole = found.flops(job.recipe.batch_size)
    return Plan(job, device, workers, efficiency, found, whole, engines)


def _engine(
    job: TrainingJob, found: Measured, engine: EngineName, workers: int, device: Device, efficiency: float
) -> EnginePlan:
    share = math.ceil(job.recipe.batch_size / workers)
    refusal = _refusal(job, {"engine": engine})
    cuttable = _refusal(job, {"micro_batch": 1}) is None
    for size in _sizes(share, job.micro_batch) if cuttable else [share]:
        passes = math.ceil(share / size)
        held = plan_memory.memory(job, found, engine, workers, size, passes)
        peak = held.device(gpu=job.scaling.gpu)
        if peak <= USABLE * device.memory:
            break
    sent = plan_memory.sent(job, found, engine, workers, passes)
    operations = passes * found.flops.fixed + share * found.flops.each
    return EnginePlan(
        engine=engine,
        micro_batch=size,
        passes=passes,
        memory=held,
        bytes=peak,
        fits=peak <= USABLE * device.memory,
        sent=sent,
        computing=operations / (efficiency * device.peak(job.precision)),
        sending=sent / device.link(workers),
        why=refusal,
    )


def _sizes(share: int, asked: int | None) -> list[int]:
    """Micro-batches to try, the largest first: those of one pass, two passes, ... that are not equal."""
    sizes = dict.fromkeys(math.ceil(share / passes) for passes in range(1, share + 1))
    return [size for size in sizes if asked is None or size <= asked]


def _refusal(job: TrainingJob, change: dict[str, Any]) -> str | None:
    """Why the job itself does not take a change of its settings; None when it does."""
    try:
        type(job).model_validate(job.model_dump() | change)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


def _rate(per_second: float) -> str:
    return f"{per_second / 1e12:g} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:g} GFLOP/s"
