"""Laplacians of batches of graphs, products with them, and Rayleigh quotients of node signals.

The normalised Laplacian is L = I - S with S = D^{-1/2} A D^{-1/2}. One convention holds for isolated nodes: their row
of L is zero, so that each connected component has one eigenvalue 0 and a signal there has no energy. (Others write 1
there; ask for `isolated=1` to compare with them.) S is zero in an isolated node's row under either.
"""

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.graphs import Graphs

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Laplacian = Literal["normalised", "combinatorial"]


def couplings(graphs: Graphs) -> Tensor:
    """The entries w_ij / sqrt(d_i d_j) of S at the edges: float64 (edges,)."""
    scale = graphs.degrees.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    return graphs.edge_weights * scale[graphs.edges[0]] * scale[graphs.edges[1]]


def adjacency_matrix(graphs: Graphs, dtype: torch.dtype = torch.float32) -> Tensor:
    """A of the whole batch, block diagonal: a CSR matrix (nodes, nodes)."""
    return _csr(graphs, graphs.edge_weights, None, dtype)


def propagation_matrix(graphs: Graphs, dtype: torch.dtype = torch.float32) -> Tensor:
    """S = D^{-1/2} A D^{-1/2} of the whole batch, block diagonal: a CSR matrix (nodes, nodes)."""
    return _csr(graphs, couplings(graphs), None, dtype)


def laplacian_matrix(
    graphs: Graphs,
    laplacian: Laplacian = "normalised",
    *,
    isolated: Literal[0, 1] = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Laplacian of the whole batch, block diagonal: a CSR matrix (nodes, nodes), float64 by default.

    `normalised` is I - D^{-1/2} A D^{-1/2}, `combinatorial` is D - A; `isolated` is the normalised one's diagonal
    entry at nodes without edges.
    """
    diagonal, entries = _parts(graphs, laplacian, isolated)
    return _csr(graphs, entries, diagonal, dtype or torch.float64)


def dense_laplacians(graphs: Graphs, laplacian: Laplacian = "normalised", *, isolated: Literal[0, 1] = 0) -> Tensor:
    """The Laplacian of each graph, float64 (graphs, largest size, largest size), zero behind a graph's own nodes."""
    diagonal, entries = _parts(graphs, laplacian, isolated)
    width = int(graphs.sizes.max())
    owner = graphs.graph_of_node
    local = torch.arange(graphs.num_nodes, device=graphs.device) - graphs.offsets[owner]
    found = torch.zeros(len(graphs), width, width, dtype=torch.float64, device=graphs.device)
    i, j = graphs.edges
    found[owner[i], local[i], local[j]] = entries
    found[owner[i], local[j], local[i]] = entries
    found[owner, local, local] = diagonal
    return found


class _FixedProduct(torch.autograd.Function):
    """A fixed CSR matrix, whose transpose is known, times a block."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, matrix: Tensor, transposed: Tensor, block: Tensor) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix @ block

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _FixedProduct.apply(ctx.transposed, ctx.matrix, gradient.contiguous())


def symmetric_product(matrix: Tensor, block: Tensor) -> Tensor:
    """`matrix @ block` for a symmetric CSR matrix (n, n) and a block (n, channels) that may be differentiated.

    The derivative multiplies by the matrix itself, so no transpose is formed. In the matrix's dtype, autocast or not.
    """
    return fixed_product(matrix, matrix, block)


def fixed_product(matrix: Tensor, transposed: Tensor, block: Tensor) -> Tensor:
    """`matrix @ block` for a CSR matrix (n, m) with its transpose in CSR too, and a block (m, channels).

    Only the block is differentiated, by a product with the transpose. In the matrix's dtype, autocast or not.
    """
    with torch.autocast(block.device.type, enabled=False):  # sparse products have no half precision on a CPU
        return _FixedProduct.apply(matrix, transposed, block.to(matrix.dtype))


def sparse_rows(matrix: "csr_array") -> Tensor:
    """SciPy's CSR matrix as torch's, with 32-bit places; the numbers are not copied."""
    places = (torch.from_numpy(part.astype(np.int32, copy=False)) for part in (matrix.indptr, matrix.indices))
    return _csr_tensor(*places, torch.from_numpy(matrix.data), matrix.shape)


def graph_sums(graphs: Graphs, values: Tensor) -> Tensor:
    """Sums of node values (nodes, ...) over each graph: (graphs, ...)."""
    found = values.new_zeros(len(graphs), *values.shape[1:])
    return found.index_add(0, graphs.graph_of_node, values)


def rayleigh_terms(graphs: Graphs, signals: Tensor) -> tuple[Tensor, Tensor]:
    """x^T L x and x^T x of every graph and channel, each (graphs, channels), for node signals (nodes, channels).

    x^T L x = sum over edges w_ij (x_i / sqrt(d_i) - x_j / sqrt(d_j))^2, with L normalised: never negative, and
    O(edges) work per channel. In the dtype of `signals`. Raises InputError for a wrong shape, NaN and infinity.
    """
    check_signals(graphs, signals)
    scale = torch.where(graphs.degrees > 0, graphs.degrees, 1.0).rsqrt().to(signals.dtype)
    scaled = signals * scale[:, None]
    i, j = graphs.edges
    differences = (scaled[i] - scaled[j]).square()
    if graphs.weights is not None:
        differences = differences * graphs.weights.to(signals.dtype)[:, None]
    energies = signals.new_zeros(len(graphs), signals.shape[1])
    energies = energies.index_add(0, graphs.graph_of_node[i], differences)
    return energies, graph_sums(graphs, signals.square())


def one_hot_rayleigh_terms(graphs: Graphs, kinds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x^T L x and x^T x as `rayleigh_terms`, of the `count` indicator signals of the nodes' kinds; no signal is made.

    For kind c: x^T L x = (its nodes that are not isolated) - 2 sum over edges inside c of w_ij / sqrt(d_i d_j), and
    x^T x = its nodes. `kinds` int64 (nodes,). Float64 (graphs, count). Raises InputError for a kind outside 0..count-1.
    """
    if kinds.dtype != torch.int64 or kinds.shape != (graphs.num_nodes,) or bool(((kinds < 0) | (kinds >= count)).any()):
        raise InputError(
            f"kinds must be an int64 from 0 to {count - 1} for each of the {graphs.num_nodes} nodes, got {kinds.dtype} "
            f"{tuple(kinds.shape)}"
        )
    cell = graphs.graph_of_node * count + kinds
    i, j = graphs.edges
    same = kinds[i] == kinds[j]
    energies = torch.zeros(len(graphs) * count, dtype=torch.float64, device=graphs.device)
    energies.index_add_(0, cell, (graphs.degrees > 0).double())
    energies.index_add_(0, cell[i[same]], couplings(graphs)[same], alpha=-2.0)
    squares = torch.bincount(cell, minlength=len(graphs) * count).double()
    return energies.clamp(min=0).unflatten(0, (len(graphs), count)), squares.unflatten(0, (len(graphs), count))


def rayleigh_quotients(graphs: Graphs, signals: Tensor) -> Tensor:
    """x^T L x / x^T x of every graph and channel: (graphs, channels), within [0, 2]; 0 where a signal vanishes.

    Computed in float64 from `unit_signals`, so that a signal's size does not matter. Raises InputError as
    `rayleigh_terms`.

    >>> cycle = Graphs.from_edges([4], [[0, 1, 2, 3], [1, 2, 3, 0]])
    >>> rayleigh_quotients(cycle, torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]))
    tensor([[0., 2.]])
    """
    check_signals(graphs, signals)
    return quotients(*rayleigh_terms(graphs, unit_signals(graphs, signals.double()))).to(signals.dtype)


def quotients(energies: Tensor, squares: Tensor) -> Tensor:
    """energies / squares, 0 where a square is 0; differentiable there too. NaN stays NaN."""
    absent = squares == 0
    return torch.where(absent, 0, energies / torch.where(absent, 1, squares))


def check_signals(graphs: Graphs, signals: Tensor) -> None:
    """Raise InputError for signals that are not real and finite numbers (nodes, channels)."""
    if signals.ndim != 2 or len(signals) != graphs.num_nodes or not signals.is_floating_point():
        raise InputError(
            f"signals must be real (nodes, channels) with {graphs.num_nodes} nodes, got {signals.dtype} "
            f"{tuple(signals.shape)}"
        )
    bad = ~torch.isfinite(signals)
    if bool(bad.any()):
        node, channel = bad.nonzero()[0].tolist()
        raise InputError(f"the signal of node {node}, channel {channel}, is NaN or infinite")


def unit_signals(graphs: Graphs, signals: Tensor) -> Tensor:
    """Signals (nodes, channels) over their largest size in each graph; one that vanishes stays zero.

    The divisor counts as a constant in derivatives: those of a quotient that no scale changes are right.
    """
    places = graphs.graph_of_node[:, None].expand_as(signals)
    largest = signals.new_zeros(len(graphs), signals.shape[1])
    largest = largest.scatter_reduce(0, places, signals.detach().abs(), "amax")
    return signals / torch.where(largest > 0, largest, 1)[graphs.graph_of_node]


def _parts(graphs: Graphs, laplacian: Laplacian, isolated: Literal[0, 1]) -> tuple[Tensor, Tensor]:
    """The diagonal (nodes,) and the entries at the edges (edges,) of a Laplacian."""
    if laplacian == "combinatorial":
        return graphs.degrees, -graphs.edge_weights
    if laplacian != "normalised":
        raise InputError(f"there is no Laplacian {laplacian!r}; there are normalised, combinatorial")
    return torch.where(graphs.degrees > 0, 1.0, float(isolated)).double(), -couplings(graphs)


def _csr(graphs: Graphs, entries: Tensor, diagonal: Tensor | None, dtype: torch.dtype) -> Tensor:
    i, j = graphs.edges
    rows, columns, values = [i, j], [j, i], [entries, entries]
    if diagonal is not None:
        nodes = torch.arange(graphs.num_nodes, device=graphs.device)
        rows, columns, values = [*rows, nodes], [*columns, nodes], [*values, diagonal]
    row, column = torch.cat(rows), torch.cat(columns)
    order = (row * graphs.num_nodes + column).argsort()
    starts = torch.zeros(graphs.num_nodes + 1, dtype=torch.int32, device=graphs.device)
    starts[1:] = torch.bincount(row, minlength=graphs.num_nodes).cumsum(0)
    return _csr_tensor(starts, column[order].int(), torch.cat(values)[order].to(dtype), (graphs.num_nodes,) * 2)


def _csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch calls its CSR tensors a beta
        return torch.sparse_csr_tensor(starts, columns, values, shape)
