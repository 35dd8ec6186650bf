"""Simulated graphs with a planted anomaly of the node signal, where smoothness is all that tells."""

import torch

from library.errors import InputError
from library.rqgnn.data import GraphData
from library.spectral.graphs import Graphs


def simulated_signal_anomaly(
    count: int = 400,
    *,
    anomalous: float = 0.25,
    nodes: tuple[int, int] = (64, 128),
    mean: float = 5.0,
    sigma: float = 5.0,
    share: float = 0.5,
    seed: int = 0,
) -> GraphData:
    """Barabasi-Albert graphs (2 edges per new node) with one feature: N(mean, 1) at every node of a normal graph.

    In an anomalous graph a `share` of the nodes has N(mean, sigma^2) instead: its energy moves to larger eigenvalues,
    and its Rayleigh quotient grows with `sigma` and `share`. Structure and sizes say nothing. Simulated data; source
    of the illustration: Dong, Zhang, Wang, 2024. Raises InputError for numbers out of their range.
    """
    if count < 1 or not 0 <= anomalous <= 1 or not 3 <= nodes[0] <= nodes[1] or sigma <= 0 or not 0 <= share <= 1:
        raise InputError("simulated graphs need count >= 1, 3 <= nodes, sigma > 0, and shares within [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(nodes[0], nodes[1] + 1, (count,), generator=generator)
    edges = [preferential_attachment(int(size), generator) for size in sizes]
    graphs = Graphs.from_edges(sizes, torch.cat(edges, 1), edge_counts=[part.shape[1] for part in edges])
    labels = (torch.arange(count) < round(anomalous * count)).long()[torch.randperm(count, generator=generator)]
    disturbed = torch.rand(graphs.num_nodes, generator=generator) < share
    scale = torch.where(disturbed & (labels[graphs.graph_of_node] == 1), sigma, 1.0)
    signal = mean + scale * torch.randn(graphs.num_nodes, generator=generator)
    return GraphData(graphs, labels, None, signal[:, None], (), "simulated")


def preferential_attachment(size: int, generator: torch.Generator) -> torch.Tensor:
    """The edges (2, edges) of a Barabasi-Albert graph: each node from the third on joins two earlier ones, chosen with
    chances in proportion to their degrees."""
    ends, pairs = [0, 1], [(0, 1)]
    for node in range(2, size):
        chosen: set[int] = set()
        while len(chosen) < 2:
            chosen.add(ends[int(torch.randint(len(ends), (1,), generator=generator))])
        for other in sorted(chosen):
            pairs.append((other, node))
            ends += [other, node]
    return torch.tensor(pairs).mT
