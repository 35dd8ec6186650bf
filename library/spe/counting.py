"""Substructure counting: simulated random graphs, and how many cycles of each length they have, exactly."""

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.graphs import Graphs, ragged_ranges

SHAPES = ((10, 6), (15, 6), (20, 5), (30, 5))  # nodes and degree before edges are removed
PATHS = 1 << 22  # that are extended at a time


def simulated_graphs(count: int, seed: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Graphs:
    """Random regular graphs of which as many random edges are removed as there are nodes.

    Nodes and degree are drawn uniformly from `shapes`; the regular graph comes from a random pairing of edge ends whose
    loops and double edges are drawn again together with as many other pairs. Source: Chen, Chen, Villar, Bruna, "Can
    graph neural networks count substructures?", 2020, as used for SPE.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    sizes, edges = [], []
    for shape in generator.integers(len(shapes), size=count):
        nodes, degree = shapes[shape]
        pairs = _regular(nodes, degree, generator)
        edges.append(pairs[generator.permutation(len(pairs))[nodes:]])
        sizes.append(nodes)
    counts = [len(pairs) for pairs in edges]
    return Graphs.from_edges(sizes, np.concatenate(edges).T, edge_counts=counts)


def cycle_counts(graphs: Graphs, length: int) -> Tensor:
    """How many cycles of `length` each graph has: int64 (graphs,).

    For 3, 4 and 5 by traces, with degrees d and the number of edges m:

        c3 = tr A^3 / 6
        c4 = (tr A^4 - 2 m - 4 sum_i C(d_i, 2)) / 8
        c5 = (tr A^5 - 5 tr A^3 - 5 sum_i (d_i - 2) (A^3)_ii) / 10

    Longer ones are enumerated. Source of c5: Harary, Manvel, "On the number of cycles in a graph", 1971. Raises
    InputError for a length below 3.
    """
    if length < 3:
        raise InputError(f"a cycle has at least 3 nodes, not {length}")
    if length > 5:
        return enumerated_cycles(graphs, length)
    found = torch.empty(len(graphs), dtype=torch.int64)
    for size in graphs.sizes.unique().tolist():
        chosen = (graphs.sizes == size).nonzero().flatten()
        found[chosen] = _by_traces(_adjacencies(graphs.select(chosen), size), length).round().long()
    return found


def enumerated_cycles(graphs: Graphs, length: int) -> Tensor:
    """The same for any length, by extending all paths that start at their smallest node."""
    ends = torch.cat([graphs.edges, graphs.edges.flip(0)], 1)
    ends = ends[:, ends[0].argsort(stable=True)]
    degrees = torch.bincount(ends[0], minlength=graphs.num_nodes)
    first = degrees.cumsum(0) - degrees
    found = torch.zeros(len(graphs), dtype=torch.int64)
    waiting = [torch.arange(graphs.num_nodes)[:, None]]
    while waiting:
        paths = waiting.pop()
        if len(paths) > PATHS:
            waiting += paths.split(PATHS)
            continue
        last = paths[:, -1]
        row = torch.arange(len(paths)).repeat_interleave(degrees[last])
        new = ends[1][ragged_ranges(first[last], degrees[last])]
        if paths.shape[1] == length:
            closed = row[new == paths[row, 0]]
            found += torch.bincount(graphs.graph_of_node[paths[closed, 0]], minlength=len(graphs))
            continue
        keep = (new > paths[row, 0]) & (new[:, None] != paths[row]).all(1)
        if bool(keep.any()):
            waiting.append(torch.cat([paths[row[keep]], new[keep, None]], 1))
    return found // 2  # both directions were found


def _by_traces(a: Tensor, length: int) -> Tensor:
    degree = a.sum(2)
    square = a @ a
    cube = (square @ a).diagonal(dim1=1, dim2=2)
    if length == 3:
        return cube.sum(1) / 6
    if length == 4:
        walks = square.square().sum((1, 2))
        return (walks - degree.sum(1) - 2 * (degree * (degree - 1)).sum(1)) / 8
    walks = (square @ a * square).sum((1, 2))
    return (walks - 5 * cube.sum(1) - 5 * ((degree - 2) * cube).sum(1)) / 10


def _adjacencies(graphs: Graphs, size: int) -> Tensor:
    """Dense adjacency matrices of graphs of one size, float64 (graphs, size, size)."""
    found = torch.zeros(len(graphs), size, size, dtype=torch.float64)
    i, j = graphs.edges
    owner = graphs.graph_of_node[i]
    found[owner, i - owner * size, j - owner * size] = 1
    return found + found.mT


def _regular(nodes: int, degree: int, generator: np.random.Generator) -> np.ndarray:
    """The edges (nodes * degree / 2, 2) of a random regular graph."""
    pairs = generator.permutation(np.repeat(np.arange(nodes), degree)).reshape(-1, 2)
    while True:
        keys = pairs.min(1) * nodes + pairs.max(1)
        unique = np.zeros(len(pairs), dtype=bool)
        unique[np.unique(keys, return_index=True)[1]] = True
        bad = np.flatnonzero((pairs[:, 0] == pairs[:, 1]) | ~unique)
        if not len(bad):
            return pairs
        again = np.union1d(bad, generator.integers(len(pairs), size=len(bad) + 1))
        pairs[again] = generator.permutation(pairs[again].ravel()).reshape(-1, 2)
