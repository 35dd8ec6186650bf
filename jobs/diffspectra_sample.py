"""Candidates for any number of spectra on Ray Data, block by block: what is written is not computed again."""

import json
import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from cluster import connect, registry, storage
from jobs.job import Job
from jobs.report import Report
from library.artifact import open_artifact
from library.diffspectra.answers import (
    COLUMNS,
    answer_entries,
    answer_molecules,
    candidate_rows,
    evaluated,
    sdf_blocks,
)
from library.diffspectra.data import load_molecules
from library.diffspectra.entries import KINDS, read_entries
from library.diffspectra.generation import Elucidator
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    import pandas as pd

RECORD = "job.json"
FREE = ("out", "concurrency", "cpus_per_worker", "gpus_per_worker")  # fields that change nothing in the result


class DiffSpectraSampleJob(Job, frozen=True, extra="forbid"):
    """Find ranked candidate molecules for spectra: of a data set, whose truth is known, or of your own files.

    In the folder `out`: `blocks/`, a JSON file per block of spectra, each written whole; then `candidates.parquet`, a
    row for each candidate, and `candidates.sdf` with their geometries. A run that was stopped goes on when it is asked
    again: blocks that are there are not computed again. Spectra that cannot be read, and samples that are no molecules,
    are counted with their reasons.
    """

    job: ClassVar[str] = "diffspectra-sample"

    model: str = "models:/diffspectra@champion"
    """Artifact of the job diffspectra: a registered model, or a folder."""
    source: str = "simulated"
    """simulated, an NPZ file of line lists or a folder of QM9S; or measured spectra: .json, .jsonl, .csv, .parquet."""
    part: str = "test"
    """Of a data set: train, validation or test."""
    limit: PositiveInt | None = None
    """Only the first so many spectra; None takes all."""
    most_atoms: PositiveInt | None = None
    """Of a data set: leave out molecules of more atoms; None keeps what the model was trained on."""
    told: Literal["nothing", "atoms", "formula"] = "atoms"
    """What the network is told of a data set's molecules beside spectra; the paper tells the number of atoms."""
    out: str
    """Folder or URI of what is written; one that a run of the same job has left is gone on with."""
    sampling: Sampling = Sampling()
    """How candidates are drawn and ranked."""
    keep: PositiveInt = 10
    """Most candidates that are written for each spectrum."""
    at: tuple[PositiveInt, ...] = (1, 5, 10)
    """Numbers of samples and candidates among which a right one is looked for."""
    mces: bool = False
    """Measure the distance of every sample to the truth too, which takes up to a second each."""
    block: PositiveInt = 8
    """Spectra that one task answers, and writes, at a time."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved for each copy of the network."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs, or a share of one, for each copy."""
    concurrency: PositiveInt | None = None
    """Copies of the network; None is as many as the cluster has room for."""

    def run(self) -> Report:
        """Answer what is not answered yet, and put everything together.

        Raises InputError for a model or source that is not there, and for an `out` that another job has left, or this
        one of a source that has changed since.
        """
        import pandas as pd

        began = time.monotonic()
        artifact = open_artifact(registry.resolve(self.model, kind=DiffSpectraRecipe.kind))
        blocks, content = self._blocks(DiffSpectraRecipe.model_validate(artifact.recipe))
        self._claim(artifact.version, content)
        connect()
        there = set(storage.list(storage.join(self.out, "blocks")))
        missing = [block for block in blocks if block["name"] not in there]
        if missing:
            self._answer(missing, artifact.version)
        answers = [
            answer
            for block in blocks
            for answer in json.loads(storage.read_bytes(storage.join(self.out, "blocks", block["name"])))
        ]
        rows = pd.DataFrame(candidate_rows(answers), columns=list(COLUMNS))
        with storage.open_output(storage.join(self.out, "candidates.parquet")) as stream:
            rows.to_parquet(stream)
        storage.write_bytes(storage.join(self.out, "candidates.sdf"), "".join(sdf_blocks(answers)).encode())
        report = self._report(answers, rows, time.monotonic() - began)
        report.notes.insert(0, f"{len(blocks) - len(missing)} of {len(blocks)} blocks were there already")
        return report

    def _blocks(self, recipe: DiffSpectraRecipe) -> tuple[list[dict[str, Any]], str]:
        """What each task is given, the name of its file and numbers of molecules or entries; SHA-256 of all spectra."""
        items: Sequence[Any]
        content = ""
        if self.source.endswith(KINDS):
            with storage.open_input(self.source) as stream:
                items = read_entries(stream, self.source)
        else:
            data = load_molecules(self.source).limited(
                most_atoms=self.most_atoms or recipe.most_atoms, modalities=recipe.encoder.modalities
            )
            items, content = data.part(self.part).numbers.tolist(), data.fingerprint
        items = items[: self.limit]
        parts = [items[start : start + self.block] for start in range(0, len(items), self.block)]
        blocks = [
            {"name": f"block-{i:06d}.json", "first": i * self.block, "items": json.dumps(part)}
            for i, part in enumerate(parts)
        ]
        return blocks, sha256("\n".join([content, *(block["items"] for block in blocks)]).encode()).hexdigest()

    def _claim(self, version: str, content: str) -> None:
        """Write the record, or see that it is this job's, of this artifact. Raises InputError for another's."""
        place = storage.join(self.out, RECORD)
        own = {name: value for name, value in self.record().items() if name not in FREE}
        own |= {"version": version, "content": content}
        if storage.exists(place):
            found = json.loads(storage.read_bytes(place))
            differing = [name for name, value in own.items() if found.get(name) != value]
            if differing:
                raise InputError(f"out: {self.out} holds answers with another {differing[0]}; choose a new folder")
        else:
            storage.write_bytes(place, json.dumps(own, indent=1).encode())

    def _answer(self, blocks: list[dict[str, Any]], version: str) -> None:
        import ray
        from ray.data import DataContext
        from ray.exceptions import RayTaskError

        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        room = ray.cluster_resources().get("CPU", 1) // self.cpus_per_worker
        if self.gpus_per_worker:
            room = min(room, ray.cluster_resources().get("GPU", 0) // self.gpus_per_worker)
        if room < 1:
            raise InputError("the cluster has no room for one copy of the network; ask for fewer CPUs or GPUs each")
        dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(
            Answerer,
            fn_constructor_args=(self, version),
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker or None,
            concurrency=min(len(blocks), self.concurrency or int(room)),
        )
        try:
            dataset.take_all()
        except Exception as error:  # Ray wraps what killed a task
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise PrismError(f"the sampling failed: {_first_line(cause)}; ask again to go on with it") from error

    def _report(self, answers: list[dict[str, Any]], rows: "pd.DataFrame", seconds: float) -> Report:
        import pandas as pd

        good = [answer for answer in answers if not answer["error"]]
        failures: dict[str, int] = {}
        for answer in good:
            for reason, count in answer["failures"].items():
                failures[reason] = failures.get(reason, 0) + count
        metrics = {
            "spectra": float(len(answers)),
            "unreadable": float(len(answers) - len(good)),
            "samples": float(len(good) * self.sampling.samples),
            "failed_samples": float(sum(failures.values())),
            "without_candidates": float(sum(not answer["candidates"] for answer in good)),
        }
        tables = {"candidates": rows[rows["rank"] == 1][["molecule", "smiles", "count", "score", "truth"]]}
        if failures:
            tables["failures"] = pd.DataFrame(sorted(failures.items()), columns=["reason", "samples"])
        report = Report(self.job, self.record(), metrics, tables, folder=self.out, seconds=seconds)
        judged = {i: answer for i, answer in enumerate(good) if answer["judged"] is not None}
        if judged:
            found = evaluated(judged, self.at)
            metrics |= {name: value for name, value in found.metrics.items() if name not in metrics}
            honest = pd.DataFrame({"metric": found.errors.keys(), "error": found.errors.values()})
            honest.insert(1, "mean", [found.metrics[name] for name in found.errors])
            tables["evaluation"] = honest
        if len(good) < len(answers):
            first = next(answer for answer in answers if answer["error"])
            unread = len(answers) - len(good)
            report.notes.append(f"{unread} spectra were not read, such as {first['name']}: {first['error']}")
        return report


class Answerer:
    """A copy of the network that answers blocks and writes each; what it returns is the block's name."""

    def __init__(self, job: DiffSpectraSampleJob, version: str) -> None:
        self.job = job
        self.data = None if job.source.endswith(KINDS) else load_molecules(job.source)
        device = "cuda" if job.gpus_per_worker and torch.cuda.is_available() else "cpu"
        artifact = open_artifact(registry.resolve(job.model))
        self.moved = artifact.version != version
        self.elucidator = Elucidator.from_artifact(artifact, device)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        items, job = json.loads(block["items"]), self.job
        if self.moved:
            raise PrismError(f"model: {job.model} has become another artifact since the run began")
        told = {"sampling": job.sampling, "keep": job.keep}
        if self.data is None:
            answers = answer_entries(self.elucidator, items, first=block["first"], **told)
        else:
            answers = answer_molecules(self.elucidator, self.data, items, told=job.told, mces=job.mces, **told)
        storage.write_bytes(storage.join(job.out, "blocks", block["name"]), json.dumps(answers).encode())
        return {"name": block["name"]}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
