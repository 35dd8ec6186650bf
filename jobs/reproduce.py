"""Reproductions of papers' claims: the table of them, the shape that they share, and the document that they write.

A reproduction measures on the Ray cluster and hands back an `Outcome`; `run` writes `docs/results/<method>.md` with its
figures. Nothing in the document is typed by hand after the measurement: texts are rules, numbers are filled in.
"""

import importlib
import io
import os
import platform
import shlex
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, NonNegativeInt, field_validator

from cluster import connect
from jobs.flags import unprefixed
from jobs.job import Job
from jobs.report import Report
from library import files
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REPRODUCTIONS = {
    "send": "jobs.send_reproduction:SendReproduction",
    "hawq": "jobs.hawq_reproduction:HawqReproduction",
    "hessian": "jobs.hessian_reproduction:HessianReproduction",
    "farms": "jobs.farms_reproduction:FarmsReproduction",
    "spe": "jobs.spe_reproduction:SpeReproduction",
    "qrc": "jobs.qrc_reproduction:QrcReproduction",
    "rqgnn": "jobs.rqgnn_reproduction:RqgnnReproduction",
    "diffspectra": "jobs.diffspectra_reproduction:DiffSpectraReproduction",
}

ROOT = Path(__file__).resolve().parents[1]


def reproduction_class(method: str) -> "type[Reproduction]":
    """The reproduction of a method. Raises InputError that lists those there are.

    >>> reproduction_class("send").method
    'send'
    """
    if method not in REPRODUCTIONS:
        raise InputError(f"there is no reproduction of {method!r}; there are {', '.join(REPRODUCTIONS)}")
    module, _, attribute = REPRODUCTIONS[method].partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Claim:
    """One section of the document.

    `paper` is what was published, `measured` how it was measured here, `verdict` a few words by the rule that is in
    `findings`, whose sentences carry the numbers. `tables` are by caption, their cells ready to print; `figure` is
    the name of one among the outcome's figures.
    """

    title: str
    paper: str
    measured: str
    verdict: str
    findings: Sequence[str]
    tables: "Mapping[str, pd.DataFrame]"
    figure: str


@dataclass(frozen=True)
class Outcome:
    """What a reproduction measured: headline `metrics`, raw `tables` and `figures` by name, and the claims.

    The figure named after the method is its picture in the README.
    """

    metrics: dict[str, float]
    tables: "dict[str, pd.DataFrame]"
    figures: "dict[str, Figure]"
    claims: Sequence[Claim]
    remarks: Sequence[str] = field(default=())


class Reproduction(Job, frozen=True, extra="forbid"):
    """Base of every reproduction: the claims of one method's paper, measured at a size that the fields set."""

    method: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of the repetitions; means and deviations are over them."""
    out: Path | None = None
    """Folder of the document and its figures; None is docs/results of the checkout this runs in, else ./results."""

    @field_validator("seeds")
    @classmethod
    def _once_each(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{' '.join(map(str, seeds))} repeats a seed; give each once")
        return seeds

    @abstractmethod
    def measure(self) -> Outcome:
        """Do the work on the connected cluster."""

    def run(self) -> Report:
        """Measure, and write `<method>.md` with its figures; a place that cannot be written is refused before."""
        began = time.monotonic()
        folder = results_folder(self.out)
        connect()
        outcome = self.measure()
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=outcome.metrics,
            tables=outcome.tables,
            figures=outcome.figures,
            folder=str(folder),
            seconds=time.monotonic() - began,
            notes=[f"{claim.title}: {claim.verdict}" for claim in outcome.claims],
        )
        for name, figure in outcome.figures.items():
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
            files.write_bytes(folder / f"{name}.png", content.getvalue())
        text = document(self, outcome, machine=machine(), seconds=report.seconds)
        files.write_bytes(folder / f"{self.method}.md", text.encode())
        return report


def results_folder(out: Path | None) -> Path:
    """The folder for documents, made and found writable. Raises PrismError when it is not."""
    if out is None:
        here = Path.cwd().resolve()
        inside = (ROOT / "pyproject.toml").is_file() and here.is_relative_to(ROOT)
        out = ROOT / "docs" / "results" if inside else here / "results"
    with files.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    return out


def gather(tasks: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The results of Ray tasks by label, with a line on stderr as each ends; the rest is cancelled when one fails.

    Raises the task's own PrismError, or a PrismError that names the task.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from rich.console import Console

    console, began = Console(stderr=True), time.monotonic()
    waiting, found = {ref: label for label, ref in tasks.items()}, {}
    try:
        while waiting:
            [ref], _ = ray.wait(list(waiting))
            label = waiting.pop(ref)
            try:
                found[label] = ray.get(ref)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, PrismError):
                    raise cause from None
                first = (str(cause).splitlines() or [""])[0]
                raise PrismError(f"{name}: {label} failed ({type(cause).__name__}: {first})") from error
            done = f"{len(found)} of {len(tasks)}, {time.monotonic() - began:.0f} s"
            console.print(f"{name}: {label} ({done})", highlight=False)
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)
    return found


def document(job: Reproduction, outcome: Outcome, *, machine: str, seconds: float) -> str:
    """The Markdown of a reproduction."""
    lines = [
        f"# {job.title}: reproduction",
        "",
        f"{job.paper}. Written by the command below; no number here is typed by hand.",
        "",
        "```",
        command_line(job),
        "```",
        "",
        f"{len(job.seeds)} seeds ({', '.join(map(str, job.seeds))}); numbers are mean ± standard deviation over them "
        f"unless said otherwise. {machine}. The whole run took {seconds / 60:.1f} minutes.",
        "",
        "| claim | outcome |",
        "|---|---|",
        *[f"| {claim.title} | {claim.verdict} |" for claim in outcome.claims],
        "",
        *[line for remark in outcome.remarks for line in (remark, "")],
    ]
    for claim in outcome.claims:
        lines += [f"## {claim.title}", "", f"**Published.** {claim.paper}", "", f"**Measured.** {claim.measured}", ""]
        for caption, frame in claim.tables.items():
            lines += [f"{caption}:", "", markdown(frame), ""]
        lines += [f"**Outcome: {claim.verdict}.**", "", *[f"* {finding}" for finding in claim.findings], ""]
        lines += [f"![{claim.title}]({claim.figure}.png)", ""]
    return "\n".join(lines)


def markdown(frame: "pd.DataFrame") -> str:
    """A frame as a Markdown table, its first column on the left and the others on the right."""
    rows = [list(map(str, frame.columns)), ["---", *["---:"] * (frame.shape[1] - 1)]]
    rows += [list(map(str, row)) for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """`0.123 ± 0.004`: mean and sample standard deviation; the mean alone for one value.

    >>> mean_and_deviation([1.0, 2.0, 3.0])
    '2.000 ± 1.000'
    """
    import numpy as np

    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def verdict(outcomes: Sequence[bool], of: str) -> str:
    """What was found, counted over `of` (seeds, sizes): holds in all of them, in some, or in none.

    >>> verdict([True, True, False], "seeds")
    'holds in 2 of 3 seeds'
    """
    holding = sum(map(bool, outcomes))
    if holding == len(outcomes):
        return f"holds in all {len(outcomes)} {of}"
    return f"holds in {holding} of {len(outcomes)} {of}" if holding else f"does not hold in any of {len(outcomes)} {of}"


def command_line(job: Reproduction) -> str:
    """The `prism reproduce` command of a job: its method, and the flags of what is not the default."""
    parts = ["prism", "reproduce", job.method]
    for name, value in _changes(job, type(job)()):
        if name != "out":
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                parts.append(flag if value else f"--no-{flag[2:]}")
            else:
                parts += [
                    flag,
                    *[shlex.quote(str(entry)) for entry in (value if isinstance(value, tuple) else [value])],
                ]
    return " ".join(parts)


def machine() -> str:
    """Processor, cores, GPUs and versions of what computed, without names of hosts or users."""
    import ray
    import torch

    resources, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    gpus = {node_key.removeprefix("accelerator_type:") for node_key in resources if node_key.startswith("accelerator_")}
    found = [
        f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} with {resources.get('CPU', 0):g} CPUs in all",
        f"processor {_processor()} ({os.cpu_count()} cores)",
        *([f"{resources['GPU']:g} GPUs ({', '.join(sorted(gpus))})"] if resources.get("GPU") else []),
    ]
    return f"{', '.join(found)}; torch {torch.__version__}, Ray {ray.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _changes(model: BaseModel, default: BaseModel, depth: int = 0, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flags and values of the fields that differ; a model's own fields have no prefix at the first level."""
    for name in type(model).model_fields:
        value, usual = getattr(model, name), getattr(default, name)
        if isinstance(value, BaseModel) and type(value) is type(usual):
            bare = not depth and name in unprefixed(type(model))
            yield from _changes(value, usual, depth + 1, "" if bare else f"{prefix}{name}.")
        elif value != usual:
            yield f"{prefix}{name}", value
