"""Prune a causal language model on Ray Train: calibration shared by the workers, epsilon chosen on validation text."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cluster import connect, storage
from jobs.board import Poster
from jobs.farms import DEFAULT_MODEL, place_of_model
from jobs.folders import RUN, new_folder, root_of
from jobs.job import Job
from jobs.report import Report
from jobs.training import Scaling
from jobs.workers import Workers, check_fits
from library import collective, files, order
from library.artifact import write_artifact
from library.drawing import blank, open_frame
from library.errors import InputError, PrismError
from library.farms.prune import Pruned, Pruning, Texts, prune_causal_lm
from library.language import material, pythia
from library.language.hub import is_loadable
from library.language.token_store import TokenBlocks, TokenStream
from library.language.tokens import Tokenizer, check_vocabulary
from library.weights import state_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

KIND = "farms"


class FarmsPruneJob(Job, frozen=True, extra="forbid"):
    """Prune a language model and register the sparse one, with its perplexity before and after."""

    job: ClassVar[str] = "farms-prune"

    model: str = DEFAULT_MODEL
    """A folder of a Hugging Face causal LM, a SeND artifact, models:/NAME@ALIAS, or a hub name OWNER/NAME."""
    revision: str | None = None
    """Revision of a hub name; None is the newest."""
    pruning: Pruning = Pruning()
    """How much is pruned, of which layers, and how."""

    corpus: str = "wikipedia"
    """Texts: a shipped sample, a CSV, Parquet or JSONL file, token stores, or a hub data set."""
    text_column: str = "text"
    """The column of a file or hub data set that holds the documents."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the documents to calibrate, validate and test on, where the corpus has no splits of its own."""
    tokenizer: str | None = None
    """bytes, a folder or a hub name; None is the model's own."""
    context: int = Field(128, ge=2)
    """Tokens per sequence (2048 in the papers)."""
    calibration: PositiveInt = 128
    """Sequences of the train split to calibrate on, drawn by `seed`."""
    evaluation: PositiveInt = 256
    """Sequences of the validation and of the test split, spread evenly over them; fewer where there are fewer."""
    batch_size: PositiveInt = 16
    """Sequences that pass a block at once on one worker."""
    seed: NonNegativeInt = 0
    """Seed of the calibration sequences."""

    scaling: Scaling = Scaling()
    """What the job takes of the cluster; changes nothing in the result beyond rounding."""
    max_failures: NonNegativeInt = 1
    """How often the work starts again whose worker died."""
    storage: str | None = None
    """Where the artifact is kept: a folder that all nodes see, or a URI. None: PRISM_HOME/runs."""
    register_as: str | None = None
    """Name in the model registry; None is farms."""
    champion: bool = False
    """Let @champion mean the new version; the first version of a model gets it anyway."""

    def run(self) -> Report:
        """Prune, write the artifact, register it. Raises InputError for what cannot be pruned, in one line."""
        began = time.monotonic()
        if not isinstance(self.scaling.workers, int):
            raise InputError("scaling.workers: pruning is not elastic; give one number of workers")
        source = place_of_model(self.model)
        connect()
        check_fits(self.scaling)
        folder = new_folder(RUN, root_of(RUN, self.storage), self.record(), prefix=self.job, resumable=False)
        pruned, target = self._pruned(str(source), folder)
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=pruned.metrics,
            tables={"layers": pruned.layers},
            figures={"layers": ratios_figure(pruned)},
            artifact=target,
            folder=folder,
        )
        if pruned.choices:
            report.tables["epsilon"] = _choices(pruned)
        report.register(self.register_as or KIND, champion=self.champion)
        report.seconds = time.monotonic() - began
        if storage.is_local(folder):
            report.folder = str(report.save(storage.local_path(folder) / "report"))
        return report

    def texts(self, tokenizer: str) -> tuple[Texts, Tokenizer, str]:
        """The sequences, the tokeniser that made them, and the fingerprint of the texts."""
        made = material.prepare(
            self.corpus,
            column=self.text_column,
            fractions=self.fractions,
            spaces=True,
            tokenizer=tokenizer,
            revision=self.revision if self.tokenizer is None and tokenizer != "bytes" else None,
            vocab_size=257,
        )
        train = self._blocks(made.train, "train")
        if len(train) < self.calibration:
            raise InputError(f"calibration: {self.calibration} sequences asked, the train split has {len(train)}")
        drawn = order.permutation(self.seed, 0, len(train))[: self.calibration].tolist()
        held_out = [_spread(self._blocks(made[i], material.SPLITS[i - 1]), self.evaluation) for i in (2, 3)]
        return Texts(torch.stack([train[i] for i in drawn]), *held_out), made.tokenizer, made.test.fingerprint

    def _blocks(self, stream: TokenStream, split: str) -> TokenBlocks:
        return TokenBlocks(stream, self.context, f"corpus {self.corpus!r}, {split}")

    def _pruned(self, source: str, folder: str) -> tuple[Pruned, str]:
        """Run the workers, and show what they post."""
        from rich.console import Console

        settings = {"job": self, "source": source, "folder": folder}
        workers = Workers(_prune, settings, scaling=self.scaling, folder=folder, max_failures=self.max_failures)
        console = Console(stderr=True)
        try:
            for events in workers:
                for event in events:
                    if "line" in event:
                        console.print(f"{self.job}: {event['line']}", highlight=False)
        except PrismError:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise PrismError(f"the workers failed: {lines[0] if lines else type(error).__name__}") from error
        if isinstance(workers.outcome, PrismError):
            raise workers.outcome
        return workers.outcome


class Prepared(NamedTuple):
    """What is pruned, and on what."""

    lm: "PreTrainedModel"
    texts: Texts
    tokenizer: Tokenizer
    fingerprint: str


def _prune(settings: dict[str, Any], poster: Poster) -> None:
    """One worker: load, prune with the others; the first one writes the artifact. A refusal is the outcome."""
    from ray.train.torch import get_device

    job: FarmsPruneJob = settings["job"]
    prepared, fault = None, None
    try:
        prepared = prepare(job, settings["source"])
    except PrismError as error:
        fault = error
    faults = [fault for fault in collective.all_gather(fault) if fault is not None]
    if faults or prepared is None:
        poster.post(outcome=faults[0])
        return
    try:
        pruned = prune_causal_lm(
            prepared.lm,
            prepared.texts,
            job.pruning,
            batch_size=job.batch_size,
            device=get_device(),
            tell=lambda line: poster.post(line=line),
        )
    except PrismError as error:  # the same on every worker
        poster.post(outcome=error)
        return
    if collective.rank() == 0:
        poster.post(outcome=(pruned, _write(job, prepared, pruned, settings["folder"])))
    collective.barrier()


def prepare(job: FarmsPruneJob, source: str) -> Prepared:
    """Model, sequences and tokeniser of a job. Raises InputError for what does not fit together."""
    if not is_loadable(source):
        raise InputError(f"model {source!r} is neither a folder nor a hub name OWNER/NAME")
    lm = pythia.load(source, revision=job.revision)
    texts, tokenizer, fingerprint = job.texts(job.tokenizer or source)
    check_vocabulary(tokenizer, lm.config.vocab_size, source)
    positions = lm.config.max_position_embeddings
    if job.context > positions:
        raise InputError(f"context: {job.context} tokens, the model has {positions} positions")
    return Prepared(lm, texts, tokenizer, fingerprint)


def _write(job: FarmsPruneJob, prepared: Prepared, pruned: Pruned, folder: str) -> str:
    target = storage.join(folder, "artifact")
    with files.scratch_folder() as scratch:
        local = storage.local_path(target) if storage.is_local(target) else scratch / "artifact"
        write_artifact(
            local,
            kind=KIND,
            recipe=job.record(),
            weights=state_tensors(prepared.lm),
            metrics=pruned.metrics,
            data=prepared.fingerprint,
            texts={
                material.TOKENIZER: prepared.tokenizer.to_json(),
                "config.json": prepared.lm.config.to_json_string(use_diff=False),
                "layers.json": json.dumps(pruned.layers.to_dict("records"), indent=1),
            },
        )
        if not storage.is_local(target):
            storage.upload_folder(Path(local), target, last="artifact.json")
    return target


def _spread(blocks: TokenBlocks, most: int) -> Tensor:
    """At most so many blocks, at equal distances over all."""
    count = min(len(blocks), most)
    return torch.stack([blocks[i * len(blocks) // count] for i in range(count)])


def _choices(pruned: Pruned) -> Any:
    import pandas as pd

    return pd.DataFrame({"epsilon": list(pruned.choices), "validation_perplexity": list(pruned.choices.values())})


def ratios_figure(pruned: Pruned) -> "Figure":
    """The exponent of each layer, and the share of it that was pruned."""

    drawn = blank(9.6, 4.2)
    above, below = drawn.subplots(2, 1, sharex=True)
    places = range(len(pruned.layers))
    above.plot(places, pruned.layers["alpha"], "o", ms=3, color="#0072B2")
    above.set_ylabel("alpha")
    below.bar(places, pruned.layers["sparsity"], color="#D55E00")
    below.axhline(pruned.metrics["sparsity"], color="0.4", lw=0.8, ls=":")
    below.set_ylabel("share pruned")
    below.set_xlabel("layer, in the model's order (dotted: all layers)")
    for axis in (above, below):
        open_frame(axis)
    return drawn
