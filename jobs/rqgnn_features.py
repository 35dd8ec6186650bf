"""Rayleigh features of any number of graphs, streamed through Ray Data from Parquet into Parquet."""

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

    from library.rqgnn.data import GraphData
    from library.spectral import Graphs

KINDS = "_kinds.json"  # readers of Parquet folders pass over names that begin so
NAMED_BLOCK = 2048  # graphs of a named set in a block


class RqgnnFeaturesJob(Job, frozen=True, extra="forbid"):
    """Compute x^T L x, x^T x and their quotient for every kind of node of every graph, into Parquet files.

    The columns energies, squares and quotients are lists with an entry per kind, in the order of `_kinds.json`.

    Each input row is a graph: `num_nodes`, `edges` (a list of pairs of node numbers from 0, each edge once), and
    `kinds` (a list of texts, one per node). Other columns are kept. A row whose graph is malformed keeps its place,
    with the reason in the column `fault`. What is in memory is a batch of graphs per task.
    """

    job: ClassVar[str] = "rqgnn-features"

    source: tuple[str, ...] = Field(("tox21:SR-p53",), min_length=1)
    """Parquet files or folders, local or URIs; or one set that rqgnn trains on: tox21:ASSAY, hiv, a TU folder, NPZ."""
    out: str
    """New folder, or URI, of the Parquet files that are written."""
    kinds: tuple[str, ...] = ()
    """Kinds of nodes that get features, in this order; none: all that occur, found by a first pass over the files."""
    eigenvalues: bool = False
    """Write the eigenvalues of each graph's normalised Laplacian too."""
    batch_graphs: PositiveInt = 1024
    """Graphs in memory per task."""
    concurrency: PositiveInt | None = None
    """Most tasks at a time; None leaves it to Ray. Changes nothing in the result."""

    def run(self) -> Report:
        """Write the files, whole or not at all where `out` is local.

        Raises InputError for a source that is not there or lacks a column, and an `out` that is not empty.
        """
        began = time.monotonic()
        local = storage.local_path(self.out) if storage.is_local(self.out) else None
        if local is not None and local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise InputError(f"out: {local} exists and is not empty; choose a new folder")
        connect()
        _hush()
        graphs = self._graphs()
        kinds = self.kinds or _kinds(graphs, self.batch_graphs, self.concurrency)
        if not kinds:
            raise InputError(f"source: no graph of {', '.join(self.source)} has a node")
        compute = partial(graph_features, kinds=tuple(kinds), eigenvalues=self.eigenvalues)
        found = graphs.map_batches(
            compute, batch_size=self.batch_graphs, batch_format="pyarrow", concurrency=self.concurrency
        )
        names = json.dumps(list(kinds)).encode()
        if local is None:
            _write(found, self.out)
            storage.write_bytes(storage.join(self.out, KINDS), names)
        else:
            with files.atomic_folder(local) as folder:
                _write(found, str(folder))
                (folder / KINDS).write_bytes(names)
        rows, faults = _counts(self.out)
        report = Report(
            job=self.job,
            config=self.record(),
            metrics={
                "graphs": float(rows),
                "faults": float(faults),
                "kinds": float(len(kinds)),
                "graphs_per_second": rows / (time.monotonic() - began),
            },
            folder=self.out,
            seconds=time.monotonic() - began,
        )
        if faults:
            report.notes.append(f"{faults} of {rows} graphs are malformed; the column fault says why")
        return report

    def _graphs(self) -> "Dataset":
        import ray

        if len(self.source) == 1 and not _is_parquet(self.source[0]):
            from library.rqgnn.data import load_graphs

            return ray.data.from_arrow(rows_of(load_graphs(self.source[0])))
        try:
            dataset = ray.data.read_parquet([_expanded(place) for place in self.source])
            names = dataset.schema().names
        except Exception as error:  # pyarrow and Ray raise many kinds for what cannot be read
            raise InputError(f"source: {', '.join(self.source)} cannot be read: {_first_line(error)}") from error
        missing = [name for name in ("num_nodes", "edges", "kinds") if name not in names]
        if missing:
            raise InputError(f"source: there is no column {missing[0]!r}; there are {', '.join(names)}")
        return dataset


def rows_of(data: "GraphData") -> "list[pa.Table]":
    """A labelled set as tables of graphs. Raises InputError for a set with features instead of kinds."""
    import pyarrow as pa
    import torch

    if data.kinds is None:
        raise InputError(f"source: the nodes of {data.name} have features, not kinds")
    symbols = np.asarray(data.vocabulary, dtype=object)
    tables = []
    for chosen in torch.arange(len(data)).split(NAMED_BLOCK):
        part = data.select(chosen)
        graphs = part.graphs
        local = (graphs.edges - graphs.offsets[graphs.graph_of_node[graphs.edges[0]]]).mT.contiguous().numpy()
        starts = np.concatenate([[0], graphs.edge_counts.cumsum(0).numpy()]).astype(np.int32)
        pairs = pa.FixedSizeListArray.from_arrays(pa.array(local.reshape(-1)), 2)
        columns = {
            "num_nodes": pa.array(graphs.sizes.numpy()),
            "edges": pa.ListArray.from_arrays(pa.array(starts), pairs),
            "kinds": pa.ListArray.from_arrays(
                pa.array(graphs.offsets.numpy().astype(np.int32)), pa.array(symbols[part.kinds.numpy()], pa.string())
            ),
            "label": pa.array(part.labels.numpy()),
        }
        tables.append(pa.table(columns))
    return tables


def graph_features(batch: "pa.Table", *, kinds: tuple[str, ...], eigenvalues: bool) -> "pa.Table":
    """A batch of graphs with the columns num_edges, energies, squares, quotients (lists over `kinds`), and fault.

    Nodes of other kinds have no feature. Malformed graphs have null features.
    """
    import pyarrow as pa
    import torch

    from library.spectral import eigenpairs, one_hot_rayleigh_terms
    from library.spectral.graph_laplacians import quotients

    known = {kind: place for place, kind in enumerate(kinds)}
    rows = list(zip(*(batch[name].to_pylist() for name in ("num_nodes", "edges", "kinds")), strict=True))
    graphs, faults = _built(rows)
    good = [fault is None for fault in faults]
    columns: dict[str, list[Any]] = {name: [None] * len(faults) for name in ("num_edges", "energies", "squares")}
    columns |= {name: [None] * len(faults) for name in ("quotients", *(["eigenvalues"] if eigenvalues else []))}
    if graphs is not None:
        own = [kind for (_, _, row), fine in zip(rows, good, strict=True) if fine for kind in row]
        numbers = torch.tensor([known.get(kind, len(kinds)) for kind in own])
        energies, squares = (part[:, :-1] for part in one_hot_rayleigh_terms(graphs, numbers, len(kinds) + 1))
        found = {
            "num_edges": graphs.edge_counts.tolist(),
            "energies": energies.tolist(),
            "squares": squares.tolist(),
            "quotients": quotients(energies, squares).tolist(),
        }
        if eigenvalues:
            parts = eigenpairs(graphs).values.split(graphs.sizes.tolist())
            found["eigenvalues"] = [part.tolist() for part in parts]
        for name, values in found.items():
            given = iter(values)
            columns[name] = [next(given) if fine else None for fine in good]
    types = {name: pa.int64() if name == "num_edges" else pa.list_(pa.float64()) for name in columns}
    for name, values in columns.items():
        batch = _with_column(batch, name, pa.array(values, types[name]))
    return _with_column(batch, "fault", pa.array(faults, pa.string()))


def _built(rows: "list[tuple[int | None, list | None, list | None]]") -> "tuple[Graphs | None, list[str | None]]":
    """The graphs of the rows that are in order (None when none is), and what is wrong with each of the others."""
    from library.spectral import Graphs

    try:  # all at once, which is what usually goes well
        return _graphs_of(rows), [None] * len(rows)
    except (InputError, ValueError, RuntimeError, TypeError):
        built: list[Graphs] = []
        faults: list[str | None] = []
        for row in rows:
            try:
                built.append(_graphs_of([row]))
                faults.append(None)
            except (InputError, ValueError, RuntimeError, TypeError) as error:
                faults.append(_first_line(error))
    return (Graphs.concatenate(built) if built else None), faults


def _graphs_of(rows: "list[tuple[int | None, list | None, list | None]]") -> "Graphs":
    """The rows as graphs. Raises InputError for the first that is not in order."""
    import torch

    from library.spectral import Graphs

    for size, edges, kinds in rows:
        if size is None or edges is None or kinds is None:
            raise InputError("num_nodes, edges and kinds must not be null")
        if len(kinds) != size:
            raise InputError(f"{size} nodes have {len(kinds)} kinds")
    pairs = torch.tensor([pair for _, edges, _ in rows for pair in edges], dtype=torch.int64).reshape(-1, 2).mT
    return Graphs.from_edges([size for size, _, _ in rows], pairs, edge_counts=[len(edges) for _, edges, _ in rows])


def _with_column(table: "pa.Table", name: str, values: Any) -> "pa.Table":
    place = table.schema.get_field_index(name)
    return table.append_column(name, values) if place < 0 else table.set_column(place, name, values)


def _kinds(graphs: "Dataset", size: int, concurrency: int | None) -> list[str]:
    """All kinds that occur, the most frequent first."""
    counted = graphs.map_batches(_count_kinds, batch_size=size, batch_format="pyarrow", concurrency=concurrency)
    totals: dict[str, int] = {}
    for row in counted.take_all():
        totals[row["kind"]] = totals.get(row["kind"], 0) + row["count"]
    return sorted(totals, key=lambda kind: (-totals[kind], kind))


def _count_kinds(batch: "pa.Table") -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.list_flatten(batch["kinds"].combine_chunks())
    counts = pc.value_counts(values.drop_null())
    return pa.table({"kind": counts.field("values").cast(pa.string()), "count": counts.field("counts")})


def _write(found: "Dataset", place: str) -> None:
    try:
        found.write_parquet(place)
    except Exception as error:  # Ray wraps what a task or the storage raised
        raise PrismError(f"the features could not be written: {_first_line(error)}") from error


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


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _hush() -> None:
    """Ray Data's progress bars and its own messages stay off the terminal."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
