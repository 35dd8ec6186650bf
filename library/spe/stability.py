"""How much encodings change when a graph changes a little: measured, and the bound of the paper's theorem."""

import math

import torch
from torch import Tensor, nn

from library.spe.encode import encode
from library.spe.settings import Encoding
from library.spectral.graph_laplacians import dense_laplacians
from library.spectral.graphs import Graphs


def stability_bound(distance: float, gap: float, eigenpairs: int, *, lipschitz: float, largest: float) -> float:
    """The theorem's bound on |SPE(L) - P SPE(L')|_F, for a rho of Lipschitz constant 1.

        (a_1 + a_2) d^(5/4) sqrt(D) + (a_2 d / gap + a_3) D,   a_1 = 2 K,  a_2 = 4 sqrt(2) M,  a_3 = K

    with D = |L - P L' P^T|_F the `distance`, d the `eigenpairs`, `gap` the distance to eigenvalue d + 1 (infinite where
    there is none), K = `lipschitz` and M = `largest` the sums over the functions phi_l of their Lipschitz constants and
    of the largest norms of their values. Only the gap at the cut enters. Source: Huang et al., ICLR 2024, theorem 1.
    """
    first, second, third = 2 * lipschitz, 4 * math.sqrt(2) * largest, lipschitz
    smooth = (first + second) * eigenpairs**1.25 * math.sqrt(distance)
    return smooth + (second * eigenpairs / gap + third) * distance


def laplacian_distance(before: Graphs, after: Graphs) -> Tensor:
    """|L - L'|_F of the normalised Laplacians of graphs with the same nodes: float64 (graphs,)."""
    difference = dense_laplacians(before) - dense_laplacians(after)
    return difference.square().sum((1, 2)).sqrt()


def relative_changes(encoder: nn.Module, before: Graphs, after: Graphs, encoding: Encoding) -> Tensor:
    """|PE - PE'|_F / |PE|_F of every graph: float64 (graphs,), nodes matched by their numbers."""
    sizes = before.sizes.tolist()
    found = [encode(encoder, graphs, encoding).double().split(sizes) for graphs in (before, after)]
    return torch.stack([(old - new).norm() / old.norm() for old, new in zip(*found, strict=True)])


def cycle(nodes: int, weights: Tensor | None = None) -> Graphs:
    """A cycle; all of its eigenvalues but 0 and, for even sizes, 2 are double."""
    place = torch.arange(nodes)
    return Graphs.from_edges([nodes], torch.stack([place, (place + 1) % nodes]), weights)


def noisy_cycles(nodes: int, noises: Tensor, generator: torch.Generator) -> tuple[Graphs, Graphs]:
    """Two cycles for each noise e: one with weights 1, one with weights 1 + e N(0, 1), the same draw for all noises.

    Weights stay above a tenth.
    """
    draw = torch.randn(nodes, generator=generator, dtype=torch.float64)
    noisy = [cycle(nodes, (1 + noise * draw).clamp(min=0.1)) for noise in noises.double()]
    return Graphs.concatenate([cycle(nodes)] * len(noisy)), Graphs.concatenate(noisy)


def without_one_edge(graphs: Graphs, generator: torch.Generator) -> Graphs:
    """Each graph without one of its edges, chosen at random; a graph without edges stays as it is."""
    ends = graphs.edge_counts.cumsum(0)
    chosen = (torch.rand(len(graphs), generator=generator) * graphs.edge_counts).long()
    keep = torch.ones(graphs.num_edges, dtype=torch.bool)
    some = graphs.edge_counts > 0
    keep[(ends - graphs.edge_counts + chosen)[some]] = False
    weights = None if graphs.weights is None else graphs.weights[keep]
    return Graphs(graphs.sizes, graphs.edges[:, keep], weights)


def log_slope(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and R^2 of the least-squares line through (log x, log y).

    >>> x = torch.tensor([1.0, 10.0, 100.0])
    >>> tuple(round(value, 6) for value in log_slope(x, 3 * x**2))
    (2.0, 1.0)
    """
    a, b = x.double().log(), y.double().log()
    a, b = a - a.mean(), b - b.mean()
    slope = (a @ b) / (a @ a)
    rest = (b - slope * a).square().sum()
    return float(slope), float(1 - rest / (b @ b)) if float(b @ b) > 0 else 1.0
