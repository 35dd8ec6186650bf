"""The curves of a run: every step's metrics, kept in the run's folder across restarts."""

import json
import math
import uuid

from cluster import storage


class History:
    """Rank 0's record since this start; written as one file beside those of earlier starts."""

    def __init__(self, folder: str, *, start: int, enabled: bool) -> None:
        self._file = storage.join(folder, "history", f"from-{start:08d}-{uuid.uuid4().hex[:8]}.json")
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._enabled = enabled

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Add one step's metrics."""
        if self._enabled:
            self._rows.append((step, metrics))

    def write(self) -> None:
        """Write all rows so far, whole or not at all."""
        if self._enabled and self._rows:
            rows = [[step, {k: v if math.isfinite(v) else None for k, v in row.items()}] for step, row in self._rows]
            storage.write_bytes(self._file, json.dumps(rows).encode())


def read_history(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Each metric's (step, value) over the whole run, rising; a step that was repeated counts as it went last."""
    place = storage.join(folder, "history")
    steps: dict[int, dict[str, float]] = {}
    names = [name for name in storage.list(place) if name.endswith(".json")]  # a killed writer leaves others
    files = [json.loads(storage.read_bytes(storage.join(place, name))) for name in names]
    for rows in sorted(files, key=lambda rows: (rows[-1][0], rows[0][0])):
        steps |= dict(rows)
    curves: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(steps):
        for name, value in steps[step].items():
            if value is not None:
                curves.setdefault(name, []).append((step, value))
    return curves
