"""Batches of graphs with everything that does not depend on weights computed before: quotients and Chebyshev terms.

With kinds at the nodes the features X are one-hot, and the first layers map each kind c to a row h_c of a table H.
Then T_k(L~) H0 = (T_k(L~) X) H: the terms of X, a few numbers per node, are data. They are made once for all graphs, as
one sparse matrix [T_0 X, ..., T_{K-1} X], and a batch takes its rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.graph_laplacians import couplings, one_hot_rayleigh_terms, rayleigh_terms, sparse_rows
from library.spectral.graphs import Graphs


class GraphBatch(NamedTuple):
    """What the network takes.

    graphs              the batch's nodes and edges
    kinds               int64 (nodes,), or None for features
    features            float32 (nodes, features), or None for kinds
    spread              S = D^{-1/2} A D^{-1/2}, CSR (nodes, nodes)
    terms               [T_0 X, ..., T_{K-1} X] of one-hot X, CSR (nodes, terms * kinds), or None for features
    terms_transposed    its transpose, CSR
    energies, squares   x^T L x and x^T x per graph and feature, float32 (graphs, features)
    labels              int64 (graphs,); 0 where unknown
    """

    graphs: Graphs
    kinds: Tensor | None
    features: Tensor | None
    spread: Tensor
    terms: Tensor | None
    terms_transposed: Tensor | None
    energies: Tensor
    squares: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class PreparedGraphs:
    """Graphs with their quotients' parts and Chebyshev terms; `batch` takes some of them. Make one with `prepare`."""

    graphs: Graphs
    kinds: Tensor | None
    features: Tensor | None
    labels: Tensor
    spread: scipy.sparse.csr_array
    terms: scipy.sparse.csr_array | None
    energies: Tensor
    squares: Tensor

    @property
    def width(self) -> int:
        """The number of features: kinds, or columns."""
        return self.energies.shape[1]

    def batch(self, chosen: Tensor) -> GraphBatch:
        """The chosen graphs (int64) as a batch, in that order."""
        nodes = self.graphs.nodes_of(chosen)
        rows = nodes.numpy()
        spread = self.spread[rows]
        graphs = self.graphs.select(chosen)
        shift = (self.graphs.offsets[chosen] - graphs.offsets[:-1]).repeat_interleave(graphs.sizes).numpy()
        columns = spread.indices - np.repeat(shift, np.diff(spread.indptr)).astype(spread.indices.dtype)
        spread = scipy.sparse.csr_array((spread.data, columns, spread.indptr), shape=(len(rows), len(rows)))
        terms = None if self.terms is None else self.terms[rows]
        return GraphBatch(
            graphs,
            None if self.kinds is None else self.kinds[nodes],
            None if self.features is None else self.features[nodes],
            sparse_rows(spread),
            None if terms is None else sparse_rows(terms),
            None if terms is None else sparse_rows(terms.T.tocsr()),
            self.energies[chosen],
            self.squares[chosen],
            self.labels[chosen],
        )

    def whole(self) -> GraphBatch:
        """All graphs as one batch."""
        return self.batch(torch.arange(len(self.graphs)))


def prepare(
    graphs: Graphs,
    *,
    kinds: Tensor | None = None,
    count: int | None = None,
    features: Tensor | None = None,
    labels: Tensor | None = None,
    depth: int,
) -> PreparedGraphs:
    """Compute once what the network needs of each graph, in float64, and keep it in float32.

    Either `kinds` int64 (nodes,) of `count`, or `features` (nodes, features). `depth` is the number of Chebyshev terms.
    O(depth * edges) work; no dense matrix of nodes by kinds is made. Raises InputError for kinds or features that do
    not fit the graphs, NaN, infinity, and features whose squares exceed float32.
    """
    if (kinds is None) == (features is None):
        raise InputError("graphs need either kinds or features at their nodes")
    weights = couplings(graphs).numpy()
    i, j = graphs.edges.numpy()
    nodes = graphs.num_nodes
    ends = (np.concatenate([i, j]).astype(np.int32), np.concatenate([j, i]).astype(np.int32))
    spread = scipy.sparse.coo_array((np.concatenate([weights, weights]), ends), shape=(nodes, nodes)).tocsr()
    terms = None
    if kinds is not None:
        energies, squares = one_hot_rayleigh_terms(graphs, kinds, int(count))
        terms = _kind_terms(spread, kinds.numpy(), int(count), depth)
    else:
        energies, squares = rayleigh_terms(graphs, features.double())
        _refuse_overflow(torch.maximum(energies, squares))
        features = features.float()
    labels = torch.zeros(len(graphs), dtype=torch.int64) if labels is None else labels
    return PreparedGraphs(
        graphs, kinds, features, labels, spread.astype(np.float32), terms, energies.float(), squares.float()
    )


def _refuse_overflow(terms: Tensor) -> None:
    large = ~torch.isfinite(terms.float())
    if bool(large.any()):
        graph, feature = large.nonzero()[0].tolist()
        raise InputError(f"feature {feature} of graph {graph} is too large: its sum of squares must fit float32")


def _kind_terms(spread: scipy.sparse.csr_array, kinds: np.ndarray, count: int, depth: int) -> scipy.sparse.csr_array:
    """[T_0(-S) X, ..., T_{depth-1}(-S) X] of the indicator signals X, sparse float32 (nodes, depth * count)."""
    nodes = len(kinds)
    starts = np.arange(nodes + 1, dtype=np.int32)
    indicators = scipy.sparse.csr_array((np.ones(nodes), kinds.astype(np.int32), starts), shape=(nodes, count))
    found = [indicators]
    if depth > 1:
        found.append(-(spread @ indicators))
    while len(found) < depth:
        found.append(-2 * (spread @ found[-1]) - found[-2])
    return scipy.sparse.hstack(found, format="csr").astype(np.float32)
