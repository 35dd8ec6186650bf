"""Tables of graphs, a row each: streamed from Parquet through Ray Data into Parquet, whatever is computed of them."""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from cluster import connect, storage
from jobs.job import Job
from jobs.report import Report
from library import files
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from library.spectral import Graphs

NAMED_BLOCK = 2048  # graphs of a named set in a block
Row = tuple[Any, ...]


class Work(NamedTuple):
    """What is done to a table: batch to batch, with the column `fault`; and what else is worth telling of the run.

    beside      files by name that are written beside the Parquet files; a name with `_` in front is no data to readers
    metrics     for the report
    """

    compute: "Callable[[pa.Table], pa.Table]"
    beside: Mapping[str, bytes] = {}
    metrics: Mapping[str, float] = {}


class GraphTableJob(Job, frozen=True, extra="forbid"):
    """Base of jobs that compute columns of graphs. What is in memory is a batch of graphs per task.

    A row whose graph is malformed keeps its place, with the reason in the column `fault`.
    """

    source: tuple[str, ...] = Field(min_length=1)
    """Parquet files or folders, local or URIs; or the name of one set of graphs."""
    out: str
    """New folder, or URI, of the Parquet files that are written."""
    batch_graphs: PositiveInt = 1024
    """Graphs in memory per task."""
    concurrency: PositiveInt | None = None
    """Most tasks at a time; None leaves it to Ray. Changes nothing in the result."""

    @abstractmethod
    def named(self, source: str) -> "list[pa.Table]":
        """A set of graphs by its name. Raises InputError where there is none."""

    @abstractmethod
    def work(self, graphs: "Dataset") -> Work:
        """What is computed. Raises InputError for a column that is missing."""

    def run(self) -> Report:
        """Write the files, whole or not at all where `out` is local.

        Raises InputError for a source that is not there or lacks a column, and an `out` that is not empty.
        """
        began = time.monotonic()
        local = storage.local_path(self.out) if storage.is_local(self.out) else None
        if (local is not None and local.exists() and not local.is_dir()) or storage.list(self.out):
            raise InputError(f"out: {local or self.out} exists and is not empty; choose a new folder")
        connect()
        _hush()
        graphs = self._graphs()
        work = self.work(graphs)
        found = graphs.map_batches(
            work.compute, batch_size=self.batch_graphs, batch_format="pyarrow", concurrency=self.concurrency
        )
        if local is None:
            _write(found, self.out)
            for name, content in work.beside.items():
                storage.write_bytes(storage.join(self.out, name), content)
        else:
            with files.atomic_folder(local) as folder:
                _write(found, str(folder))
                for name, content in work.beside.items():
                    (folder / name).write_bytes(content)
        place = storage.join(self.out)
        rows, faults = _counts(place)
        seconds = time.monotonic() - began
        counts = {"graphs": float(rows), "faults": float(faults), "graphs_per_second": rows / seconds}
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=counts | dict(work.metrics),
            folder=place,
            seconds=seconds,
        )
        if faults:
            report.notes.append(f"{faults} of {rows} graphs are malformed; the column fault says why")
        return report

    def _graphs(self) -> "Dataset":
        import ray

        if len(self.source) == 1 and not _is_parquet(self.source[0]):
            return ray.data.from_arrow(self.named(self.source[0]))
        try:
            dataset = ray.data.read_parquet([_expanded(place) for place in self.source])
            dataset.schema()
        except Exception as error:  # pyarrow and Ray raise many kinds for what cannot be read
            raise InputError(f"source: {', '.join(self.source)} cannot be read: {first_line(error)}") from error
        return dataset


def check_columns(graphs: "Dataset", needed: Sequence[str]) -> None:
    """Raise InputError for the first column that is needed and not there."""
    names = graphs.schema().names
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(f"source: there is no column {missing[0]!r}; there are {', '.join(names)}")


def graph_columns(graphs: "Graphs") -> "dict[str, pa.Array]":
    """The columns `num_nodes` and `edges` (pairs of node numbers from 0 in each graph) of a batch of graphs."""
    import pyarrow as pa

    local = (graphs.edges - graphs.offsets[graphs.graph_of_node[graphs.edges[0]]]).mT.contiguous().numpy()
    starts = np.concatenate([[0], graphs.edge_counts.cumsum(0).numpy()]).astype(np.int32)
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(local.reshape(-1)), 2)
    return {"num_nodes": pa.array(graphs.sizes.numpy()), "edges": pa.ListArray.from_arrays(pa.array(starts), pairs)}


def graphs_of(rows: Sequence[tuple[int | None, Sequence | None]]) -> "Graphs":
    """Rows (num_nodes, edges) as graphs. Raises InputError for the first that is not in order."""
    import torch

    from library.spectral import Graphs

    if any(size is None or edges is None for size, edges in rows):
        raise InputError("num_nodes and edges must not be null")
    flat = [pair for _, edges in rows for pair in edges]
    if any(len(pair) != 2 for pair in flat):
        raise InputError("edges must be pairs of node numbers")
    pairs = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).mT
    return Graphs.from_edges([size for size, _ in rows], pairs, edge_counts=[len(edges) for _, edges in rows])


def with_results(
    batch: "pa.Table",
    inputs: Sequence[str],
    compute: Callable[[list[Row]], list[dict[str, Any]]],
    types: "Mapping[str, pa.DataType]",
) -> "pa.Table":
    """A batch with a column of each of `types`, and `fault`.

    `compute` takes rows of the columns `inputs` and gives the results of each. What it refuses is found by halving
    the rows: those get null results, and the reason.
    """
    import pyarrow as pa

    rows = list(zip(*(batch[name].to_pylist() for name in inputs), strict=True))
    found, faults = _computed(rows, compute)
    for name, kind in types.items():
        batch = _with_column(batch, name, pa.array([None if row is None else row[name] for row in found], kind))
    return _with_column(batch, "fault", pa.array(faults, pa.string()))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _computed(
    rows: list[Row], compute: Callable[[list[Row]], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any] | None], list[str | None]]:
    if not rows:
        return [], []
    try:
        return compute(rows), [None] * len(rows)
    except (PrismError, ValueError, RuntimeError, TypeError) as error:
        if len(rows) == 1:
            return [None], [first_line(error)]
    half = len(rows) // 2
    (found, faults), (more, others) = (_computed(part, compute) for part in (rows[:half], rows[half:]))
    return found + more, faults + others


def _with_column(table: "pa.Table", name: str, values: Any) -> "pa.Table":
    place = table.schema.get_field_index(name)
    return table.append_column(name, values) if place < 0 else table.set_column(place, name, values)


def _write(found: "Dataset", place: str) -> None:
    try:
        found.write_parquet(place)
    except Exception as error:  # Ray wraps what a task or the storage raised
        raise PrismError(f"the results could not be written: {first_line(error)}") from error


def _counts(place: str) -> tuple[int, int]:
    """Rows of what was written, and those with a fault."""
    import ray

    written = ray.data.read_parquet(place, columns=["fault"])
    faults = sum(
        int(batch["fault"].is_valid().to_numpy().sum()) for batch in written.iter_batches(batch_format="pyarrow")
    )
    return written.count(), faults


def _is_parquet(place: str) -> bool:
    if "://" in place:
        return True
    path = Path(place)
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def _expanded(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _hush() -> None:
    """Ray Data's progress bars and its own messages stay off the terminal."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
