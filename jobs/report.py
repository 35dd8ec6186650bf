"""Report: what a finished job shows and keeps: metrics, tables, figures, and where its artifact is."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import files
from library.errors import PrismError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from cluster.registry import Run


@dataclass
class Report:
    """The outcome of one job. `tables` are pandas frames, `figures` matplotlib figures, both by name."""

    job: str
    config: Mapping[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    tables: "dict[str, pd.DataFrame]" = field(default_factory=dict)
    figures: "dict[str, Figure]" = field(default_factory=dict)
    artifact: str | None = None
    registered: str | None = None
    folder: str | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """One JSON object: job, metrics, artifact, registered version, folder, seconds, notes."""
        return {
            "job": self.job,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "artifact": self.artifact,
            "registered": self.registered,
            "folder": self.folder,
            "seconds": round(self.seconds, 2),
            "notes": self.notes,
        }

    def save(self, folder: Path) -> Path:
        """Write report.json, one Parquet file per table and one PNG per figure into `folder`, whole or not at all."""
        with files.atomic_folder(folder) as target:
            for name, table in self.tables.items():
                table.to_parquet(target / f"{name}.parquet")
            for name, figure in self.figures.items():
                figure.savefig(target / f"{name}.png", dpi=150, bbox_inches="tight")
            content = self.summary() | {"config": dict(self.config)}
            (target / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        return folder

    def register(self, model: str, *, run: "Run | None" = None, champion: bool = False) -> None:
        """Register the artifact as a version of `model`; a registry that fails costs a note, never the artifact.

        With `champion`, or as the first version of its model, it becomes what endpoints serve.
        """
        from cluster import registry

        if self.artifact is None:
            raise ValueError("a report without an artifact has nothing to register")
        try:
            version = registry.register(registry.resolve(self.artifact), model, run=run)
            if champion:
                registry.set_alias(model, registry.CHAMPION, version)
            else:
                registry.crown_first(model, version)
            self.registered = f"models:/{model}/{version}"
        except PrismError as error:
            self.notes.append(str(error))

    def show(self, console: "Console") -> None:
        """Print the metrics, the small tables, and where things are."""
        from rich.table import Table
        from rich.text import Text

        metrics = Table("metric", "value", title=f"{self.job}, {self.seconds:.0f} s", title_justify="left")
        for name, value in self.metrics.items():
            metrics.add_row(Text(name), f"{value:.6g}")
        console.print(metrics)
        for name, frame in self.tables.items():
            if len(frame) <= 40 and name != "curves":
                console.print(_fitting(name, frame, console.width))
        for note in self.notes:
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
        places = {"registered": self.registered, "artifact": self.artifact, "folder": self.folder}
        for name, place in places.items():
            if place:
                console.print(f"{name:<10} {place}", highlight=False, markup=False, soft_wrap=True)


def _fitting(name: str, frame: "pd.DataFrame", width: int) -> "Table":
    """The leading columns that a terminal of this width has room for; the caption names the others."""
    from rich.markup import escape
    from rich.table import Column, Table
    from rich.text import Text

    texts = [
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in frame.iloc[:, i]]
        for i in range(frame.shape[1])
    ]
    columns = [str(column) for column in frame.columns]
    room, kept = width - 1, 0
    for column, cells in zip(columns, texts, strict=True):
        room -= min(max(map(len, (column, *cells))), width // 2) + 3
        if room < 0 and kept:
            break
        kept += 1
    rest = escape(f"in the report: {', '.join(columns[kept:])}") if columns[kept:] else None
    shown = [Column(Text(column), overflow="fold") for column in columns[:kept]]
    table = Table(*shown, title=name, title_justify="left", caption=rest, caption_justify="left")
    for row in zip(*texts[:kept], strict=True):
        table.add_row(*map(Text, row))
    return table
