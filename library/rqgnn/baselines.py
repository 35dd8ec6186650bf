"""Two plain graph networks with mean pooling, to compare with: GIN and GCN, four layers each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.rqgnn.batches import GraphBatch
from library.spectral.graph_laplacians import adjacency_matrix, graph_sums, symmetric_product


class _MeanPooled(nn.Module):
    """Layers over the nodes, the mean over each graph, and a linear layer to 2 logits."""

    layers = 4

    def __init__(self, features: int, *, hidden: int = 64) -> None:
        super().__init__()
        sizes = [features] + [hidden] * (self.layers - 1)
        self.first = nn.ModuleList(nn.Linear(size, hidden) for size in sizes)
        self.head = nn.Linear(hidden, 2)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Logits (graphs, 2)."""
        nodes = batch.features
        if nodes is None:
            nodes = F.one_hot(batch.kinds, batch.energies.shape[1]).to(batch.energies.dtype)
        nodes = self.nodes(batch, nodes)
        return self.head(graph_sums(batch.graphs, nodes.to(batch.energies.dtype)) / batch.graphs.sizes[:, None])

    def nodes(self, batch: GraphBatch, nodes: Tensor) -> Tensor:
        """The last layer's channels (nodes, hidden)."""
        raise NotImplementedError


class GIN(_MeanPooled):
    """x <- MLP(x + sum of the neighbours' x), two linear layers each. Source: Xu et al., ICLR 2019 (epsilon 0)."""

    def __init__(self, features: int, *, hidden: int = 64) -> None:
        super().__init__(features, hidden=hidden)
        self.second = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(self.layers))

    def nodes(self, batch: GraphBatch, nodes: Tensor) -> Tensor:
        adjacency = adjacency_matrix(batch.graphs, nodes.dtype)
        for first, second in zip(self.first, self.second, strict=True):
            nodes = F.relu(second(F.relu(first(nodes + symmetric_product(adjacency, nodes)))))
        return nodes


class GCN(_MeanPooled):
    """x <- relu((D + I)^{-1/2} (A + I) (D + I)^{-1/2} x W). Source: Kipf, Welling, ICLR 2017."""

    def nodes(self, batch: GraphBatch, nodes: Tensor) -> Tensor:
        adjacency = adjacency_matrix(batch.graphs, nodes.dtype)
        scale = torch.rsqrt(batch.graphs.degrees + 1).to(nodes.dtype)[:, None]
        for layer in self.first:
            scaled = scale * layer(nodes)
            nodes = F.relu(scale * (scaled + symmetric_product(adjacency, scaled)))
        return nodes
