"""What a person sees while a run goes on: a live line with bars on a terminal, plain lines elsewhere. On stderr."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINES = 20  # plain lines over a whole run

PEAK_FLOPS = {  # dense bfloat16 of one device, from the vendors' data sheets, for the model's utilisation (MFU)
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA B200": 2250e12,
}


class Display:
    """Shows the events that rank 0 posts. A context manager."""

    def __init__(self, name: str, steps: int, unit: str, *, device: str | None = None) -> None:
        self._name, self._steps, self._unit = name, steps, unit
        self._peak = next((peak for key, peak in PEAK_FLOPS.items() if device and device.startswith(key)), None)
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._shown = 0
        self._speed: float | None = None
        self._began = time.monotonic()
        self._first: int | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[state]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self._console,
            expand=True,  # a narrow terminal cuts the state, from its end
        )
        self._task = self._progress.add_task(name, total=steps, state="starting workers")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def note(self, text: str) -> None:
        """Print one line above the progress."""
        console = self._progress.console if self._live else self._console
        console.print(f"{self._name}: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def show(self, event: dict[str, Any]) -> None:
        """Show a step's event, or a note."""
        if "note" in event:
            self.note(event["note"])
        if "step" not in event:
            return
        step = event["step"]
        speed = event["units_per_second"]
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        state = self._describe(event)
        if self._live:
            self._progress.update(self._task, completed=step, state=state)
            return
        if self._first is None:
            self._first, self._began = step, time.monotonic()
        if step == self._steps or step - self._shown >= max(1, self._steps // LINES):
            self._shown = step
            left = ""
            if self._first < step < self._steps:
                each = (time.monotonic() - self._began) / (step - self._first)
                left = f"  {each * (self._steps - step):.0f} s left"
            print(f"{self._name}  step {step}/{self._steps}  {state}{left}", file=sys.stderr, flush=True)  # noqa: T201

    def _describe(self, event: dict[str, Any]) -> str:
        metrics = event["metrics"]
        parts = [f"loss {metrics['loss']:.4f}", f"{self._speed:,.0f} {self._unit}/s"]
        parts += [f"{name} {metrics[name]:.4f}" for name in ("validation_loss", "eigenscore", "ees") if name in metrics]
        parts.append("1 worker" if event["workers"] == 1 else f"{event['workers']} workers")
        if event["memory_gib"] is not None:
            parts.append(f"{event['memory_gib']:.1f} GiB")
        if event["flops_per_second"] and self._peak:
            parts.append(f"MFU {event['flops_per_second'] / (event['workers'] * self._peak):.0%}")
        return "  ".join(parts)
