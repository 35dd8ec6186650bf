"""Graphs with known spectra, random ones, and the golden files' layout."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.spectral import Graphs

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def cycle(n: int) -> Graphs:
    return Graphs.from_edges([n], [list(range(n)), [*range(1, n), 0]])


def path(n: int) -> Graphs:
    return Graphs.from_edges([n], [list(range(n - 1)), list(range(1, n))])


def star(n: int) -> Graphs:
    return Graphs.from_edges([n], [[0] * (n - 1), list(range(1, n))])


def complete(n: int) -> Graphs:
    return Graphs.from_edges([n], torch.triu_indices(n, n, 1))


def hypercube(q: int) -> Graphs:
    nodes = torch.arange(2**q)
    pairs = torch.cat([torch.stack([nodes, nodes ^ (1 << bit)]) for bit in range(q)], 1)
    return Graphs.from_edges([2**q], pairs[:, pairs[0] < pairs[1]])


def petersen() -> Graphs:
    outer = [(i, (i + 1) % 5) for i in range(5)]
    inner = [(5 + i, 5 + (i + 2) % 5) for i in range(5)]
    return Graphs.from_edges([10], torch.tensor(outer + inner + [(i, i + 5) for i in range(5)]).mT)


CLOSED = {  # name: the graph, and its normalised Laplacian's eigenvalues
    "cycle": (cycle(7), [1 - math.cos(2 * math.pi * k / 7) for k in range(7)]),
    "path": (path(6), [1 - math.cos(math.pi * k / 5) for k in range(6)]),
    "star": (star(5), [0, 1, 1, 1, 2]),
    "complete": (complete(5), [0] + [5 / 4] * 4),
    "hypercube": (hypercube(3), [0] + [2 / 3] * 3 + [4 / 3] * 3 + [2]),
    "petersen": (petersen(), [0] + [2 / 3] * 5 + [5 / 3] * 4),
    "single node": (Graphs.from_edges([1], []), [0]),
    "no edges": (Graphs.from_edges([3], []), [0, 0, 0]),
}


def random_graphs(sizes: list[int], *, seed: int = 0, chance: float = 0.3, weighted: bool = False) -> Graphs:
    """Random graphs in which any two nodes are joined by chance: some have isolated nodes or several components."""
    generator = torch.Generator().manual_seed(seed)
    pairs, counts = [], []
    for n in sizes:
        every = torch.triu_indices(n, n, 1)
        kept = torch.rand(every.shape[1], generator=generator) < chance
        pairs.append(every[:, kept])
        counts.append(int(kept.sum()))
    weights = 0.5 + torch.rand(sum(counts), generator=generator, dtype=torch.float64) if weighted else None
    return Graphs.from_edges(sizes, torch.cat(pairs, 1), weights, edge_counts=counts)


def permuted(graphs: Graphs, order: Tensor) -> Graphs:
    """One graph with node `order[i]` in place i."""
    places = order.argsort()
    return Graphs.from_edges(graphs.sizes, places[graphs.edges], graphs.weights)


def golden(method: str, name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / method / f"{name}.npz") as stored:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in stored.items()}


def golden_graphs(stored: dict[str, Tensor]) -> Graphs:
    return Graphs.from_edges(stored["num_nodes"], stored["edge"].mT, edge_counts=stored["num_edges"])
