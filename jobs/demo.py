"""The training half of `prism demo`: the same small model with and without Sensitivity Dropout, side by side."""

from typing import TYPE_CHECKING

from jobs.send import SendJob
from jobs.training import Scaling
from library.samples import json_lines
from library.send.detection import DetectionSettings
from library.send.recipe import SendRecipe

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.report import Report

SHOWN = {"validation_loss": "loss", "eigenscore": "EigenScore", "ees": "EES"}
PROMPT_WORDS = 10


def arms(steps: int, *, workers: int = 2) -> dict[str, SendJob]:
    """SeND and plain training from the same weights and batches, with DeepSpeed ZeRO-2.

    Only what is dropped differs, and that the risk is calibrated for SeND alone. Its artifact becomes the champion of
    model `send`, that of plain training the one of `send-plain`.
    """
    recipe = SendRecipe(
        steps=steps,
        batch_size=12,
        context=64,
        validation_blocks=256,
        epoch_steps=max(1, steps // 6),
        vocab_size=2048,
        tracking_texts=32,
        prompts=8,
        answers=DetectionSettings(max_new_tokens=16),
        calibration_cases=120,
    )
    shared = {"scaling": Scaling(workers=workers), "engine": "zero2", "checkpoint_every": steps, "champion": True}
    plain = recipe.model_copy(update={"selection": "none", "calibration_cases": 0})
    return {
        "SeND": SendJob(recipe=recipe, **shared),
        "plain": SendJob(recipe=plain, register_as="send-plain", **shared),
    }


def comparison(reports: "dict[str, Report]") -> "Table":
    """One row per arm: what it reached with nothing dropped, how long it took, and where it is registered."""
    from rich.table import Table

    table = Table(title="on held-out text, with nothing dropped", title_justify="left")
    table.add_column("arm")
    for heading in (*SHOWN.values(), "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("registered")
    for name, report in reports.items():
        values = [f"{report.metrics[metric]:.3f}" for metric in SHOWN]
        table.add_row(name, *values, f"{report.seconds:.0f}", report.registered or "no")
    return table


def held_out_prompt() -> str:
    """The opening of a passage that no training saw."""
    passage = next(row for row in json_lines("send", "wiki_test") if row["title"] == "Adelaide Anne Procter")
    return " ".join(passage["sentences"][1].split()[:PROMPT_WORDS])
