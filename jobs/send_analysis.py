"""Sensitivity and self-consistency over a training's checkpoints: which coordinates move, and how the scores swing."""

import math
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from cluster import connect, storage
from jobs.job import Job
from jobs.report import Report
from jobs.send_checkpoints import Source, find_checkpoints
from jobs.send_measurement import Fault, Measured, measure_checkpoint, read_kept
from library import files
from library.drawing import blank, open_frame
from library.errors import ArtifactError, InputError, PrismError
from library.send.detection import DetectionSettings
from library.send.dropout import Form, Layer
from library.send.sensitivity import (
    Record,
    Selection,
    drop_count,
    empty_record,
    mean_sensitivity,
    normalised,
    partial_sums,
    scale_over_texts,
    scale_sums,
    top_indices,
    update,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class SendAnalysis(Job, frozen=True, extra="forbid"):
    """Sensitivity of embedding coordinates, EigenScore and EES over checkpoints in order, one Ray task for each."""

    job: ClassVar[str] = "send-analysis"

    checkpoints: tuple[str, ...] = Field(min_length=1)
    """In order: a run's checkpoints, artifacts (folders or models:/NAME/VERSION), folders of models, globs of these,
    or a hub name OWNER/NAME."""
    revisions: tuple[str, ...] = ()
    """Revisions of the hub name, in order, such as step133000 step134000."""
    tokenizer: str | None = None
    """bytes, a folder or a hub name; None is each checkpoint's own."""

    corpus: str = "wikipedia"
    """Where texts and prompts are from: as for training, a shipped sample, a file, token stores or a hub data set."""
    text_column: str = "text"
    """The column of a file or hub data set that holds the documents."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the documents to train, validate and test on, where the corpus has no splits of its own."""
    texts: PositiveInt = 64
    """Validation documents whose embeddings are compared."""
    context: int = Field(128, ge=2)
    """Longest text in tokens, and the length of a held-out block."""
    blocks: PositiveInt = 64
    """Held-out blocks over which loss and entropy are taken; fewer when the validation documents hold fewer."""
    prompts: PositiveInt = 16
    """Test documents whose openings are continued."""
    prompt_tokens: PositiveInt = 16
    """Tokens of each opening."""
    answers: DetectionSettings = DetectionSettings()
    """How the continuations are drawn and scored."""
    seed: NonNegativeInt = 0
    """Seed of the sampled answers."""
    layer: Layer = "penultimate"
    """Block whose output embeds a text."""
    form: Form = "slt"
    """Embedding of a text: its second-to-last token (slt), its last, or the mean over its tokens (pooled)."""
    batch_size: PositiveInt = 8
    """Texts, blocks or prompts in one forward pass."""

    selection: Selection = "product"
    """Which sensitivity orders the coordinates: change x variance (product), or either."""
    normalise: bool = False
    """Divide each coordinate by its deviation over the texts, so that a large scale alone is not sensitive."""
    drop_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the coordinates that counts as the sensitive set."""
    top: PositiveInt = 20
    """Coordinates in the table."""

    out: str | None = None
    """Folder or URI where each checkpoint's results are kept, and found again by a later run; None keeps nothing."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each checkpoint."""
    gpu: bool = False
    """One GPU for each checkpoint."""
    max_retries: NonNegativeInt = 2
    """How often a checkpoint is tried again whose worker died."""

    def run(self) -> Report:
        """Measure every checkpoint and reduce in order.

        Raises InputError for fewer than two checkpoints, one that cannot be found or read, checkpoints of different
        width or tokeniser (naming both), and ArtifactError for a damaged one.
        """
        began = time.monotonic()
        sources = find_checkpoints(self.checkpoints, self.revisions)
        if len(sources) < 2:
            raise InputError(f"sensitivity needs at least 2 checkpoints in order, got {len(sources)}: {sources[0]}")
        connect()
        record: Record | None = None
        rows: list[dict[str, Any]] = []
        first: Measured | None = None
        for source, measured in zip(sources, self._measure(sources), strict=True):
            if first is None or record is None:
                first, record = measured, empty_record(*measured.embeddings.shape)
            _check_alike(sources[0], first, source, measured)
            try:
                record = update(record, measured.embeddings)
            except InputError as error:
                raise InputError(f"checkpoint {source}: {error}") from error
            rows.append({"checkpoint": source.label, **measured.metrics})
        return self._report(record, rows, time.monotonic() - began)

    def _measure(self, sources: list[Source]) -> Iterator[Measured]:
        """The results in order; what is kept already is read, the rest are tasks that run at once."""
        import ray

        task = ray.remote(num_cpus=self.cpus_per_task, num_gpus=1 if self.gpu else 0, max_retries=self.max_retries)(
            measure_checkpoint
        )
        keys = [self._key(source) for source in sources]
        kept = {key: read_kept(self.out, key) for key in keys} if self.out else {}
        pending = {}
        for source, key in zip(sources, keys, strict=True):
            if kept.get(key) is None and key not in pending:
                pending[key] = task.remote(self, source, key)
        # none is cancelled when one is at fault: Ray 2.60 may abort the driver when a cancelled task just ends
        for source, key in zip(sources, keys, strict=True):
            found = kept.get(key) or _got(pending[key], source)
            if isinstance(found, Fault):
                raise (ArtifactError if found.artifact else InputError)(found.message)
            yield found

    def _key(self, source: Source) -> str:
        """Identifies what a task finds: the checkpoint's content, the texts, and the settings that enter it."""
        apart = {"checkpoints", "revisions", "selection", "normalise", "drop_fraction", "top"}
        apart |= {"out", "cpus_per_task", "gpu", "max_retries", "batch_size"}
        settings = self.model_dump_json(exclude=apart)
        corpus = Path(self.corpus)
        content = files.sha256(corpus) if corpus.is_file() else ""
        if corpus.is_dir():
            content = " ".join(files.sha256(file) for file in sorted(corpus.glob("*/index.json")))
        return sha256("\n".join([source.key, settings, content]).encode()).hexdigest()[:32]

    def _report(self, record: Record, rows: list[dict[str, Any]], seconds: float) -> Report:
        import pandas as pd

        scores = {name: mean_sensitivity(partial_sums(record, name)) for name in ("product", "change", "variance")}
        scale = scale_over_texts(scale_sums(record)) if len(record.mean) > 1 else None
        ordering = scores[self.selection]
        if self.normalise:
            if scale is None:
                raise InputError("normalise needs at least 2 texts, got 1")
            ordering = normalised(ordering, scale, self.selection)
        width = len(ordering)
        count = drop_count(self.drop_fraction, width)
        sensitive = top_indices(ordering, count)
        shown = top_indices(ordering, min(self.top, width - 1))
        coordinates = pd.DataFrame(
            {
                "coordinate": shown.tolist(),
                "sensitivity": ordering[shown].tolist(),
                "net_change": scores["change"][shown].tolist(),
                "variance": scores["variance"][shown].tolist(),
                "deviation_over_texts": scale[shown].tolist() if scale is not None else math.nan,
            }
        )
        checkpoints = pd.DataFrame(rows)
        total = float(ordering.sum())
        metrics = {
            "checkpoints": float(len(rows)),
            "texts": float(len(record.mean)),
            "width": float(width),
            "sensitive_coordinates": float(count),
            "sensitive_share": float(ordering[sensitive].sum()) / total if total else math.nan,
        }
        for name in ("eigenscore", "ees", "loss"):
            metrics |= {f"{name}_last": rows[-1][name], f"{name}_deviation": float(checkpoints[name].std(ddof=0))}
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=metrics,
            tables={"coordinates": coordinates, "checkpoints": checkpoints},
            figures={"sensitivity": _spectrum(ordering, count), "oscillation": _oscillation(checkpoints)},
            seconds=seconds,
        )
        if self.out is not None and storage.is_local(self.out):
            report.folder = str(report.save(storage.local_path(self.out) / "report"))
        return report


def _check_alike(first: Source, expected: Measured, source: Source, measured: Measured) -> None:
    widths = expected.embeddings.shape[1], measured.embeddings.shape[1]
    if widths[0] != widths[1]:
        raise InputError(
            f"checkpoints have different widths: {first} has {widths[0]} coordinates, {source} has {widths[1]}"
        )
    if expected.tokenizer != measured.tokenizer:
        raise InputError(
            f"vocabulary mismatch: {first} and {source} have different tokenisers; name one with --tokenizer "
            "if they share a vocabulary"
        )


def _got(reference: Any, source: Source) -> Measured | Fault:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PrismError(f"checkpoint {source} could not be measured: {lines[-1] if lines else type(error)}") from error


def _spectrum(scores: Tensor, count: int) -> "Figure":
    """The sensitivities in falling order, and the share of their sum that the largest ones hold."""

    ordered = scores.sort(descending=True).values
    rank = range(1, len(ordered) + 1)
    drawn = blank(8.4, 3.0)
    left, right = drawn.subplots(1, 2)
    left.semilogy(rank, ordered.clamp(min=torch.finfo(torch.float64).tiny).tolist(), lw=1.2)
    left.set_ylabel("sensitivity", fontsize=8)
    right.plot(rank, (ordered.cumsum(0) / ordered.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist(), lw=1.2)
    right.set_ylabel("share of the sum", fontsize=8)
    for axis in (left, right):
        axis.axvline(count, color="0.6", lw=0.8, ls="--")
        axis.set_xlabel("coordinates in falling order", fontsize=8)
        axis.tick_params(labelsize=8)
        open_frame(axis)
    return drawn


def _oscillation(rows: "pd.DataFrame") -> "Figure":
    """EigenScore and EES with their standard errors, and the held-out loss, over the checkpoints."""

    drawn = blank(max(6.0, 0.45 * len(rows)), 6.0)
    places = range(len(rows))
    panels: tuple[Literal["eigenscore", "ees", "loss"], ...] = ("eigenscore", "ees", "loss")
    for axis, name in zip(drawn.subplots(3, 1, sharex=True), panels, strict=True):
        errors = rows.get(f"{name}_standard_error")
        axis.errorbar(places, rows[name], yerr=errors, marker="o", ms=3, lw=1.2, capsize=2)
        axis.set_ylabel({"eigenscore": "EigenScore", "ees": "EES", "loss": "held-out loss"}[name], fontsize=8)
        axis.tick_params(labelsize=8)
        open_frame(axis)
    axis.set_xticks(list(places), rows["checkpoint"], rotation=60, ha="right")
    return drawn
