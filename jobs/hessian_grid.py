"""The grid of the Hessian experiments: which tiny networks are measured, as Ray tasks, and what they showed."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, PositiveInt

from jobs.reproduce import gather
from library.errors import InputError
from library.hessian.basins import LINES, Basin, Basins, measure_basins
from library.hessian.study import Cell, Measured, Tried, measure_cell, measure_estimates

if TYPE_CHECKING:
    import pandas as pd

EXPERIMENTS = ("spectrum", "growth", "classes", "separability", "gauss-newton", "batches", "estimates")
OF_BLOBS = ("classes", "separability")


class Grid(BaseModel, frozen=True, extra="forbid"):
    """What the experiments vary around one centre."""

    base: Cell = Cell()
    """The centre: data, network and training."""
    classes: tuple[PositiveInt, ...] = Field((2, 5, 10), min_length=1)
    """Numbers of blobs (experiment classes)."""
    batch: PositiveInt = 10
    """Points per step where gradient descent is compared with stochastic gradient descent (experiment classes)."""
    hidden: tuple[PositiveInt, ...] = Field((10, 20, 40, 80), min_length=2)
    """Sizes of the hidden layer on the same data (experiment growth)."""
    spreads: tuple[float, ...] = Field((0.5, 1.0, 2.0, 3.0, 4.0), min_length=2)
    """Standard deviations of the blobs (experiment separability)."""
    image_hidden: tuple[PositiveInt, ...] = (10, 20)
    """Sizes of the hidden layer on real images (experiment gauss-newton)."""
    image_loss: float = Field(0.05, gt=0)
    """Training loss at which networks on images stop."""
    image_steps: PositiveInt = 3000
    """Most steps on images."""
    probes: tuple[PositiveInt, ...] = Field((1, 4, 16), min_length=1)
    """Numbers of random vectors behind an estimated density (experiment estimates)."""
    lanczos_steps: tuple[PositiveInt, ...] = Field((8, 16, 32, 64), min_length=1)
    """Lanczos steps of an estimated density (experiment estimates)."""
    basins: Basins = Basins()
    """Size of the experiment on large and small batches."""

    def cells(self, experiment: str) -> list[Cell]:
        """The settings of an experiment; none for batches and estimates, which are of another kind.

        Raises InputError for an experiment that varies what only blobs have, with other data.
        """
        if experiment in OF_BLOBS and self.base.data != "blobs":
            raise InputError(
                f"experiment {experiment}: it varies blobs, and grid.base.data is {self.base.data}; leave it out"
            )
        if experiment == "growth":
            return [self._cell(hidden=(size, *self.base.hidden[1:])) for size in self.hidden]
        if experiment == "classes":
            return [self._cell(classes=k, batch=batch) for k in self.classes for batch in (None, self.batch)]
        if experiment == "separability":
            return [self._cell(spread=spread) for spread in self.spreads]
        if experiment == "gauss-newton":
            images = {"data": "images", "loss": self.image_loss, "steps": self.image_steps}
            return [self.base, *(self._cell(hidden=(size,), **images) for size in self.image_hidden)]
        return [self.base] if experiment == "spectrum" else []

    def _cell(self, **changes: Any) -> Cell:
        return Cell.model_validate(self.base.model_dump() | changes)


@dataclass(frozen=True)
class Findings:
    """What the tasks found: networks by cell, runs with large and small batches by seed, and estimated densities."""

    networks: Mapping[Cell, list[Measured]]
    basins: list[Basin]
    estimates: list[Tried]

    def of(self, cells: Iterable[Cell], moment: str = "end") -> list[Measured]:
        """The networks of these cells at a moment, in the order of cells and seeds."""
        return [found for cell in cells for found in self.networks[cell] if found.moment == moment]


def run_grid(
    grid: Grid,
    experiments: Iterable[str],
    seeds: tuple[int, ...],
    *,
    name: str,
    seeds_per_task: int = 3,
    cpus: float = 1.0,
    retries: int = 2,
) -> Findings:
    """Measure every cell that the experiments need once, as Ray tasks on the connected cluster, largest first.

    A task trains the networks of `seeds_per_task` seeds as one; a task whose worker dies is tried again.
    """
    import ray

    wanted = list(dict.fromkeys(cell for experiment in experiments for cell in grid.cells(experiment)))
    task = ray.remote(num_cpus=cpus, max_retries=retries)(_measure)
    parts = [seeds[i : i + seeds_per_task] for i in range(0, len(seeds), seeds_per_task)]
    both = {grid.base} if "spectrum" in experiments else set()
    tasks: dict[str, Any] = {}
    labels: dict[str, Cell] = {}
    titles = _titles(wanted)
    basins: dict[int, str] = {}
    estimates: dict[int, str] = {}
    if "batches" in experiments:
        for seed in seeds:
            basins[seed] = f"large and small batches, seed {seed}"
            tasks[basins[seed]] = ray.remote(num_cpus=cpus, max_retries=retries)(measure_basins).remote(
                grid.basins, seed
            )
    if "estimates" in experiments:
        for seed in seeds:
            estimates[seed] = f"estimated densities, seed {seed}"
            tasks[estimates[seed]] = ray.remote(num_cpus=cpus, max_retries=retries)(measure_estimates).remote(
                grid.base, seed, grid.probes, grid.lanczos_steps
            )
    for cell in sorted(wanted, key=lambda cell: -max(cell.hidden)):
        for part in parts:
            label = f"{titles[cell]}, seeds {' '.join(map(str, part))}"
            labels[label] = cell
            tasks[label] = task.remote(cell, part, ("start", "end") if cell in both else ("end",))
    found = gather(tasks, name=name)
    networks: dict[Cell, list[Measured]] = {cell: [] for cell in wanted}
    for label, cell in labels.items():
        networks[cell] += found[label]
    return Findings(
        networks,
        [found[basins[seed]] for seed in basins],
        [one for seed in estimates for one in found[estimates[seed]]],
    )


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    data = f"{cell.classes} blobs of spread {cell.spread:g}" if cell.data == "blobs" else cell.data
    batch = f", batches of {cell.batch}" if cell.batch else ""
    return f"{data}, hidden {' '.join(map(str, cell.hidden))}{batch}"


def _titles(cells: Iterable[Cell]) -> dict[Cell, str]:
    """Each cell in a few words of its own: what two of them would share is numbered."""
    titles: dict[str, Cell] = {}
    for cell in cells:
        title, number = describe(cell), 1
        while title in titles:
            number += 1
            title = f"{describe(cell)} ({number})"
        titles[title] = cell
    return {cell: title for title, cell in titles.items()}


def network_table(found: Iterable[Measured]) -> "pd.DataFrame":
    """A row per network: its setting and numbers, H's k-th and next eigenvalue, how far G's first k exceed H's."""
    import pandas as pd

    rows = []
    for one in found:
        k = one.gauss_newton.shape[0] // 2 - 1
        top = one.eigenvalues[::-1][:k]
        rows.append(
            {
                "data": one.cell.data,
                "classes": k,
                "hidden": " ".join(map(str, one.cell.hidden)),
                "spread": one.cell.spread,
                "batch": one.cell.batch or 0,
                "seed": one.seed,
                "moment": one.moment,
                **one.metrics,
                "kth": float(top[-1]),
                "next": float(one.eigenvalues[-k - 1]),
                "gauss_newton_excess": float((one.gauss_newton[:k] / top - 1).mean()),
            }
        )
    return pd.DataFrame(rows)


def basin_table(basins: Iterable[Basin]) -> "pd.DataFrame":
    """A row per seed and line: losses at its ends, the barrier, and whether the loss is monotone on the way."""
    import pandas as pd

    rows = [
        {
            "seed": basin.seed,
            "line": name,
            "train_first": basin.train[first],
            "train_last": basin.train[last],
            "test_first": basin.test[first],
            "test_last": basin.test[last],
            "barrier": basin.lines[name].barrier,
            "monotone": basin.lines[name].monotone,
        }
        for basin in basins
        for name, (first, last) in LINES.items()
    ]
    return pd.DataFrame(rows)


def estimate_table(tried: Iterable[Tried]) -> "pd.DataFrame":
    """A row per estimated density: seed, probes, steps, and the distances of both kinds."""
    import pandas as pd

    return pd.DataFrame([dataclasses.asdict(one) for one in tried])


def _measure(cell: Cell, seeds: tuple[int, ...], moments: tuple[Any, ...]) -> list[Measured]:
    import torch

    torch.set_num_threads(1)  # many tiny networks: the tasks are the parallelism
    return measure_cell(cell, seeds, moments)
