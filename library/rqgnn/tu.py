"""The TU format of graph data sets: four or five text files with a line per edge, node or graph."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError, PrismError
from library.rqgnn.data import GraphData, checked_features, checked_labels
from library.spectral.graphs import Graphs


def read_folder(folder: Path) -> GraphData:
    """The graphs of a TU data set NAME in a folder, or in its subfolder `raw`.

    NAME_A.txt                  pairs of node numbers from 1, one per line, every edge in both directions
    NAME_graph_indicator.txt    the graph of each node, from 1, rising
    NAME_graph_labels.txt       0 (or -1) normal, 1 anomalous
    NAME_node_labels.txt        a kind for each node (of several columns, the row as a whole, such as "0,5"), or else
    NAME_node_attributes.txt    its features

    Raises InputError that names file and line for what is missing or does not fit: indicators that fall or leave a
    graph out, an edge between two graphs or without its reverse, a self-loop, a duplicate, counts that disagree.
    """
    place = next((p for p in (folder, folder / "raw") if any(p.glob("*_A.txt"))), None)
    if place is None:
        raise InputError(f"{folder} holds no TU data set: there is no NAME_A.txt in it or in its folder raw")
    found = sorted(place.glob("*_A.txt"))
    if len(found) > 1:
        raise InputError(f"{place} holds several data sets: {', '.join(file.name for file in found)}")
    name = found[0].name.removesuffix("_A.txt")

    def file(part: str) -> Path:
        return place / f"{name}_{part}.txt"

    indicator = _integers(file("graph_indicator"), 1)[:, 0]
    steps = indicator.diff(prepend=indicator.new_zeros(1))
    if bool((steps < 0).any()):
        raise InputError(f"{file('graph_indicator')} line {int((steps < 0).nonzero()[0]) + 1}: graphs must not fall")
    if bool((steps > 1).any()) or int(indicator[0]) != 1:
        line = int(((steps > 1) | (steps.cumsum(0) < 1)).nonzero()[0]) + 1
        raise InputError(
            f"{file('graph_indicator')} line {line}: a graph before {int(indicator[line - 1])} has no nodes"
        )
    sizes = torch.bincount(indicator)[1:]
    nodes = len(indicator)
    pairs = _integers(file("A"), 2).mT - 1 if file("A").stat().st_size else torch.zeros(2, 0, dtype=torch.int64)
    outside = ((pairs < 0) | (pairs >= nodes)).any(0)
    if bool(outside.any()):
        line = int(outside.nonzero()[0]) + 1
        raise InputError(f"{file('A')} line {line}: nodes {(pairs[:, line - 1] + 1).tolist()}; there are 1 to {nodes}")
    order = indicator[pairs[0]].argsort(stable=True)
    try:
        graphs = Graphs.from_edges(sizes, pairs[:, order], directed=True)
    except InputError as error:
        raise InputError(f"{file('A')}: {error} (edges sorted by graph; nodes and edges counted from 0)") from error
    labels = checked_labels(_integers(file("graph_labels"), 1)[:, 0], len(graphs), str(file("graph_labels")))
    if file("node_labels").is_file():
        rows = _integers(file("node_labels"), None)
        if len(rows) != nodes:
            raise InputError(f"{file('node_labels')} has {len(rows)} lines for {nodes} nodes")
        values, kinds = rows.unique(dim=0, return_inverse=True)
        symbols = tuple(",".join(map(str, row)) for row in values.tolist())
        return GraphData(graphs, labels, kinds, None, symbols, name)
    if file("node_attributes").is_file():
        table = torch.from_numpy(_table(file("node_attributes"), np.float32, None))
        return GraphData(graphs, labels, None, checked_features(table, nodes, str(file("node_attributes"))), (), name)
    raise InputError(f"{place} has neither {name}_node_labels.txt nor {name}_node_attributes.txt")


def by_name(name: str, root: str | None) -> GraphData:
    """A TU data set by its name, such as MCF-7; PyTorch Geometric downloads it into `root`/NAME when it is not there.

    Raises InputError for a name that has no such form or a missing root, PrismError when it cannot be had.
    """
    if not name or not name[0].isalnum() or any(letter in name for letter in "/\\ "):
        raise InputError(
            f"no graphs at {name!r}; give tox21:TASK, hiv, simulated, a folder of TU files, an NPZ file, or the name "
            "of a TU data set such as MCF-7"
        )
    if root is None:
        raise InputError(f"{name!r} is no file or folder here; to download a TU data set of that name, give tu_root")
    folder = Path(root) / name / "raw"
    if not any(folder.glob("*_A.txt")):
        from torch_geometric.datasets import TUDataset

        try:
            TUDataset(root, name)
        except Exception as error:  # whatever the network and the archive's reader raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PrismError(f"the TU data set {name!r} could not be downloaded: {reason}") from error
    return read_folder(folder)


def _integers(file: Path, columns: int | None) -> Tensor:
    """A table of integers (rows, columns)."""
    return torch.from_numpy(_table(file, np.int64, columns))


def _table(file: Path, kind: type, columns: int | None) -> np.ndarray:
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        found = np.loadtxt(file, dtype=kind, delimiter=",", ndmin=2)
    except ValueError as error:
        raise InputError(f"{file}: {str(error).splitlines()[0]}") from error
    if not len(found) or (columns is not None and found.shape[1] != columns):
        wanted = f"lines of {columns}" if columns else "lines of"
        raise InputError(f"{file}: {wanted} numbers are needed, it has {found.shape[0]} lines of {found.shape[1]}")
    return found
