"""Laplacian eigenpairs of any number of graphs or molecules, streamed through Ray Data from Parquet into Parquet."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

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

    from library.spe.data import GraphData

SMILES = "smiles"
GRAPH = ("num_nodes", "edges")
Split = Literal["shrink", "extend", "keep", "error"]


class SpeEigenpairsJob(GraphTableJob, frozen=True, extra="forbid"):
    """Compute what positional encodings are made from, the smallest eigenpairs of every graph, into Parquet files.

    Each input row is a graph, `num_nodes` and `edges` (a list of pairs of node numbers from 0, each edge once), or a
    molecule, `smiles`, whose nodes are its heavy atoms in the SMILES's order. Other columns are kept. New are
    `eigenvalues` (k,) of the normalised Laplacian, ascending; `eigenvectors`, the matrix (nodes, k) row by row; `gap`,
    the distance to the next eigenvalue, null where all are there; and `multiplicities`, the dimensions of the
    eigenspaces. All are float64. A row whose graph is malformed, or cannot be cut as asked, keeps its place, with the
    reason in the column `fault`.
    """

    job: ClassVar[str] = "spe-eigenpairs"

    source: tuple[str, ...] = Field(("zinc12k",), min_length=1)
    """Parquet files or folders, local or URIs; or one set that spe trains on: zinc12k, hiv-scaffold, counting ..."""
    eigenpairs: PositiveInt = 37
    """Smallest eigenpairs of each graph, zero included; a graph of fewer nodes has them all."""
    split: Split = "shrink"
    """When the cut falls into an eigenspace: take fewer pairs, more (extend), cut all the same (keep), or refuse."""

    def named(self, source: str) -> "list[pa.Table]":
        from library.spe.data import load_graphs

        return rows_of(load_graphs(source))

    def work(self, graphs: "Dataset") -> Work:
        names = graphs.schema().names
        inputs = (SMILES,) if SMILES in names and not set(GRAPH) <= set(names) else GRAPH
        check_columns(graphs, inputs)
        return Work(partial(graph_eigenpairs, inputs=inputs, count=self.eigenpairs, split=self.split))


def rows_of(data: "GraphData") -> "list[pa.Table]":
    """A set of graphs as tables, with a column for each target."""
    import pyarrow as pa
    import torch

    tables = []
    for chosen in torch.arange(len(data.graphs)).split(NAMED_BLOCK):
        targets = data.targets[chosen].T
        columns = {name: pa.array(own.numpy()) for name, own in zip(data.schema.targets, targets, strict=True)}
        tables.append(pa.table(graph_columns(data.graphs.select(chosen)) | columns))
    return tables


def graph_eigenpairs(batch: "pa.Table", *, inputs: tuple[str, ...], count: int, split: Split) -> "pa.Table":
    """A batch of graphs with the columns num_edges, eigenvalues, eigenvectors, gap, multiplicities and fault.

    Molecules get num_nodes too.
    """
    import pyarrow as pa

    types = {"num_nodes": pa.int64()} if inputs == (SMILES,) else {}
    types |= {
        "num_edges": pa.int64(),
        "eigenvalues": pa.list_(pa.float64()),
        "eigenvectors": pa.list_(pa.float64()),
        "gap": pa.float64(),
        "multiplicities": pa.list_(pa.int64()),
    }
    return with_results(batch, inputs, partial(_eigenpairs, count=count, split=split), types)


def _eigenpairs(rows: list[Row], *, count: int, split: Split) -> list[dict[str, Any]]:
    """The eigenpairs of each row's graph. Raises InputError for one that is not in order."""
    from library.spectral import eigenpairs

    graphs = graphs_of([_bonds(*row) if len(row) == 1 else row for row in rows])
    spectra = eigenpairs(graphs, count=count, split=split)
    found = []
    for place, (nodes, edges, gap) in enumerate(
        zip(graphs.sizes.tolist(), graphs.edge_counts.tolist(), spectra.gaps.tolist(), strict=True)
    ):
        values, vectors = spectra.graph(place)
        found.append(
            {
                "num_nodes": nodes,
                "num_edges": edges,
                "eigenvalues": values.numpy(),
                "eigenvectors": vectors.flatten().numpy(),
                "gap": gap if math.isfinite(gap) else None,
                "multiplicities": spectra.multiplicities(place),
            }
        )
    return found


def _bonds(smiles: str | None) -> tuple[int, list[list[int]]]:
    """Heavy atoms and bonds of a molecule."""
    from library.molecules import Molecule

    if smiles is None:
        raise InputError("smiles must not be null")
    molecule = Molecule.from_smiles(smiles)
    return len(molecule), molecule.edges.T.tolist()
