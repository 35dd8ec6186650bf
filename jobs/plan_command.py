"""The verb `prism plan`, and its tables of the Pythia suite and of the papers' settings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs import JOBS, job_class
from jobs.commands import SUCCESS, Output, rows, tell
from library.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.plan import Plan
    from jobs.training import TrainingJob

GIB = 2**30
SUITE = "pythia"
PAPERS = "papers"


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Output):
    """Flags of `prism plan` beside those of the job."""

    config: str | None = None
    """A job's record to start from (job.json or report.json of a run, config.json in the registry); flags change it."""
    efficiency: float = 0.4
    """Share of the device's peak that is reached; large language models on GPUs reach 0.3 to 0.5."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(Output):
    """Flags of the tables."""

    workers: int = 8
    """Training processes."""
    efficiency: float = 0.4
    """Share of the device's peak that is reached."""


def plan(args: Sequence[str]) -> int:
    """Say what a training takes without running it: prism plan JOB [--gpu h100] [flags], prism plan pythia|papers."""
    import sys

    from jobs import commands, flags
    from jobs.plan_devices import device

    if list(args) in (["-h"], ["--help"]):
        offers = {SUITE: "table: pre-training every size of the suite", PAPERS: "table: the papers' settings"}
        lines = [plan.__doc__ or "", "", *(f"  {name:<16} {what}" for name, what in (offers | trainings()).items()), ""]
        sys.stdout.write("\n".join(lines))
        return SUCCESS
    gpu, rest = _gpu(args)
    given = commands.understood(rest)
    name = given.name or given.record.get("job")
    if name is None:
        raise InputError(f"name a job, as in `prism plan send`; there are {', '.join([SUITE, PAPERS, *trainings()])}")
    if name in (SUITE, PAPERS):
        options = flags.parse(TableOptions, given.flags, prog=f"prism plan {name}")
        return _tables(name, options, gpu)
    job = job_class(name)
    if name not in trainings():
        raise InputError(f"{name} has no training to plan; there are {', '.join(trainings())}")
    switched = [*given.flags, *(["--gpu"] if gpu else [])]
    default = flags.from_record(job, given.record, source=given.source) if given.source else None
    made, options = flags.parse_job(job, PlanOptions, switched, prog=f"prism plan {name}", default=default)
    from jobs.plan import plan as planned

    if made.scaling.gpu and gpu is None:
        raise InputError("--gpu: name the GPU, as in --gpu h100")
    result = planned(made, device(gpu, cpus=made.scaling.cpus_per_worker), efficiency=options.efficiency)
    show(result, options.console())
    options.finish(result.record())
    return SUCCESS


def trainings() -> dict[str, str]:
    """The jobs that can be planned: those that train a model that is known beforehand."""
    made_later = {"hawq", "hawq-lm"}  # whose model is chosen from a trained network's curvature
    from_recipes = {"send", "hawq-classifier", "farms-balance", "spe", "rqgnn", "diffspectra", "diffspectra-pretrain"}
    return {name: entry.summary for name, entry in JOBS.items() if name in from_recipes - made_later}


def show(result: "Plan", console: "Console") -> None:
    """Print a plan: a table of engines, what is recommended, and the assumptions."""
    found, best = result.found, result.best
    where = f"{result.workers} x {result.device.name}, {result.job.precision}"
    table = rows("GiB for each worker", *(one.engine for one in result.engines), title=f"{result.job.job} on {where}")
    for part in ("weights", "gradients", "optimizer", "buffers", "activations"):
        table.add_row(part, *(_gib(getattr(one.memory, part)) for one in result.engines))
    table.add_row("copy for a checkpoint", *(_gib(one.memory.snapshot) for one in result.engines))
    table.add_row("at the peak", *(_gib(one.bytes) for one in result.engines))
    table.add_row("sent in a step", *(_gib(one.sent) for one in result.engines), end_section=True)
    table.add_row("micro-batch x passes", *(f"{one.micro_batch} x {one.passes}" for one in result.engines))
    table.add_row("seconds a step", *(_seconds(one.seconds) for one in result.engines))
    table.add_row("fits", *("refused" if one.why else "yes" if one.fits else "no" for one in result.engines))
    console.print(table)
    learning = "" if found.learning == found.parameters else f", {found.learning:,} of them learn"
    lines = [f"{found.parameters:,} parameters{learning}; {result.flops:.3g} operations a step"]
    lines += [f"{one.engine} is refused by the job: {one.why}" for one in result.engines if one.why]
    if best is not None:
        flags = f"--engine {best.engine}" + (f" --micro-batch {best.micro_batch}" if best.passes > 1 else "")
        steps = f"{_hours(result.hours)} for {result.job.recipe.steps} steps"
        lines.append(f"take {flags}: {_seconds(best.seconds)} s a step, {steps}")
    else:
        enough = result.enough()
        more = f"{enough[0]} fits on {enough[1]} workers" if enough else "no number of workers is enough"
        also = "" if result.job.activation_checkpointing else "; --activation-checkpointing keeps less"
        lines.append(f"nothing fits: {more}{also}")
    lines += ["assumed:", *(f"  {line}" for line in result.assumptions())]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def suite() -> "Iterator[tuple[str, TrainingJob]]":
    """Pre-training of every size of the Pythia suite, as published, in bf16."""
    from jobs.send import SendJob
    from library.language.pythia import SIZES
    from library.send.recipe import SendRecipe

    for size in SIZES:
        if size != "pythia-tiny":
            yield size, SendJob(recipe=SendRecipe.pretraining(size), precision="bf16")


def papers() -> "Iterator[tuple[str, TrainingJob]]":
    """The papers' settings of every method that trains, on shipped samples where a data set is not here."""
    from jobs.diffspectra import DiffSpectraJob
    from jobs.diffspectra_pretrain import DiffSpectraPretrainJob
    from jobs.farms_balance import FarmsBalanceJob
    from jobs.hawq import ClassifierJob
    from jobs.rqgnn import RqgnnJob
    from jobs.send import SendJob
    from jobs.spe import SpeJob
    from library.diffspectra.pretraining_recipe import PretrainingRecipe
    from library.diffspectra.recipe import DiffSpectraRecipe
    from library.farms.recipe import BalancedClassifierRecipe
    from library.images.recipe import ClassifierRecipe
    from library.rqgnn.recipe import RqgnnRecipe
    from library.send.recipe import SendRecipe
    from library.spe.presets import PRESETS
    from library.spe.recipe import SpeRecipe

    for size in ("pythia-1b", "pythia-2.8b"):
        yield f"send {size}", SendJob(recipe=SendRecipe.adaptation(f"EleutherAI/{size}", steps=10_000))
    yield "hawq ResNet20", ClassifierJob(recipe=ClassifierRecipe(network="resnet20"))
    yield "farms ResNet56", FarmsBalanceJob(recipe=BalancedClassifierRecipe(network="resnet56"))
    for preset in PRESETS:
        yield f"spe {preset}", SpeJob(recipe=SpeRecipe(preset=preset))
    for preset in ("official", "paper"):
        yield f"rqgnn {preset}", RqgnnJob(recipe=RqgnnRecipe(preset=preset))
    yield "diffspectra encoder", DiffSpectraPretrainJob(recipe=PretrainingRecipe(preset="paper"))
    yield "diffspectra", DiffSpectraJob(recipe=DiffSpectraRecipe(preset="paper"))


def _tables(name: str, options: TableOptions, gpu: str | None) -> int:
    from jobs.plan import plan as planned
    from jobs.plan_devices import device

    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: at least 1")
    chosen = device(gpu or "h100", cpus=1)
    table = rows("training", "weights", "FLOP/step", "take", "GiB", "s/step", "in all")
    records: dict[str, Any] = {}
    for label, job in suite() if name == SUITE else papers():
        tell(f"measuring {label}")
        workers = min(options.workers, job.recipe.batch_size)
        changed = job.model_copy(update={"scaling": job.scaling.model_copy(update={"workers": workers, "gpu": True})})
        result = planned(changed, chosen, efficiency=options.efficiency)
        best = result.best
        numbers = ("nothing", "", "", "")
        if best is not None:
            size = f"{best.engine} {best.micro_batch}x{best.passes}"
            numbers = (size, _gib(best.bytes), _seconds(best.seconds), _hours(result.hours))
        table.add_row(label, _millions(result.found.parameters), f"{result.flops:.2e}", *numbers)
        records[label] = result.record()
    console = options.console()
    console.print(table)
    lines = [
        f"at most {options.workers} x {chosen.name}; take ENGINE MICRO-BATCHxPASSES; GiB for each worker at its peak",
        "assumed, beside what `prism plan JOB` says:",
        f"  {options.efficiency:.0%} of the device's peak: small networks reach far less",
        "  images, graphs and molecules are those of the shipped samples; a data set of larger ones takes more",
        "  hessian and qrc train no network by gradients, and are not here",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    options.finish(records)
    return SUCCESS


def _gpu(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name that follows --gpu, and the other arguments."""
    rest = list(args)
    for i, argument in enumerate(rest):
        if argument == "--gpu" and i + 1 < len(rest) and not rest[i + 1].startswith("-"):
            return rest[i + 1], rest[:i] + rest[i + 2 :]
        if argument.startswith("--gpu="):
            return argument.partition("=")[2], rest[:i] + rest[i + 1 :]
    return None, rest


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.01 else f"{gib:.1g}"


def _millions(count: int) -> str:
    return (
        f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.2g}" if seconds < 1 else f"{seconds:.3g}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    for unit, length in (("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * length:
            return f"{hours / length:,.3g} {unit}" if hours < 1000 * length else f"{hours / length:,.0f} {unit}"
    return f"{hours * 3600:.3g} s"
