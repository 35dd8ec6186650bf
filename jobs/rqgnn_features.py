"""Rayleigh features of any number of graphs, streamed through Ray Data from Parquet into Parquet."""

import json
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from jobs.graph_tables import (
    NAMED_BLOCK,
    GraphTableJob,
    Row,
    Work,
    check_columns,
    graph_columns,
    graphs_of,
    with_results,
)
from library.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from library.rqgnn.data import GraphData

KINDS = "_kinds.json"  # readers of Parquet folders pass over names that begin so
COLUMNS = ("num_nodes", "edges", "kinds")


class RqgnnFeaturesJob(GraphTableJob, frozen=True, extra="forbid"):
    """Compute x^T L x, x^T x and their quotient for every kind of node of every graph, into Parquet files.

    The columns energies, squares and quotients are lists with an entry per kind, in the order of `_kinds.json`.

    Each input row is a graph: `num_nodes`, `edges` (a list of pairs of node numbers from 0, each edge once), and
    `kinds` (a list of texts, one per node). Other columns are kept. A row whose graph is malformed keeps its place,
    with the reason in the column `fault`. What is in memory is a batch of graphs per task.
    """

    job: ClassVar[str] = "rqgnn-features"

    source: tuple[str, ...] = Field(("tox21:SR-p53",), min_length=1)
    """Parquet files or folders, local or URIs; or one set that rqgnn trains on: tox21:ASSAY, hiv, a TU folder, NPZ."""
    kinds: tuple[str, ...] = ()
    """Kinds of nodes that get features, in this order; none: all that occur, found by a first pass over the files."""
    eigenvalues: bool = False
    """Write the eigenvalues of each graph's normalised Laplacian too."""

    def named(self, source: str) -> "list[pa.Table]":
        from library.rqgnn.data import load_graphs

        return rows_of(load_graphs(source))

    def work(self, graphs: "Dataset") -> Work:
        check_columns(graphs, COLUMNS)
        kinds = self.kinds or tuple(_kinds(graphs, self.batch_graphs, self.concurrency))
        if not kinds:
            raise InputError(f"source: no graph of {', '.join(self.source)} has a node")
        compute = partial(graph_features, kinds=kinds, eigenvalues=self.eigenvalues)
        return Work(compute, {KINDS: json.dumps(list(kinds)).encode()}, {"kinds": float(len(kinds))})


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
        starts = pa.array(part.graphs.offsets.numpy().astype(np.int32))
        kinds = pa.ListArray.from_arrays(starts, pa.array(symbols[part.kinds.numpy()], pa.string()))
        tables.append(pa.table(graph_columns(part.graphs) | {"kinds": kinds, "label": pa.array(part.labels.numpy())}))
    return tables


def graph_features(batch: "pa.Table", *, kinds: tuple[str, ...], eigenvalues: bool) -> "pa.Table":
    """A batch of graphs with the columns num_edges, energies, squares, quotients (lists over `kinds`), and fault.

    Nodes of other kinds have no feature. Malformed graphs have null features.
    """
    import pyarrow as pa

    names = ("energies", "squares", "quotients", *(["eigenvalues"] if eigenvalues else []))
    types = {"num_edges": pa.int64()} | {name: pa.list_(pa.float64()) for name in names}
    return with_results(batch, COLUMNS, partial(_features, kinds=kinds, eigenvalues=eigenvalues), types)


def _features(rows: list[Row], *, kinds: tuple[str, ...], eigenvalues: bool) -> list[dict[str, Any]]:
    """The features of each row's graph. Raises InputError for the first that is not in order."""
    import torch

    from library.spectral import eigenpairs, one_hot_rayleigh_terms
    from library.spectral.graph_laplacians import quotients

    graphs = graphs_of([row[:2] for row in rows])
    for size, _, own in rows:
        if own is None:
            raise InputError("kinds must not be null")
        if len(own) != size:
            raise InputError(f"{size} nodes have {len(own)} kinds")
    known = {kind: place for place, kind in enumerate(kinds)}
    numbers = torch.tensor([known.get(kind, len(kinds)) for _, _, own in rows for kind in own])
    energies, squares = (part[:, :-1] for part in one_hot_rayleigh_terms(graphs, numbers, len(kinds) + 1))
    found = {
        "num_edges": graphs.edge_counts.tolist(),
        "energies": energies.tolist(),
        "squares": squares.tolist(),
        "quotients": quotients(energies, squares).tolist(),
    }
    if eigenvalues:
        found["eigenvalues"] = [part.tolist() for part in eigenpairs(graphs).values.split(graphs.sizes.tolist())]
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


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
