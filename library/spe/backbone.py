"""The backbone: a graph isomorphism network with edge features (GINE), pooling and a head.

Source: Hu, Liu et al., "Strategies for pre-training graph neural networks", 2020, with the residuals and perceptrons
of the released SPE.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.spe.batch import SpeBatch
from library.spe.perceptron import Perceptron

Pooling = Literal["mean", "add"]


class GineLayer(nn.Module):
    """x <- MLP((1 + eps) x + sum_u ReLU(x_u + e_uv)), eps from N(0, 1).

    `edges` embeds edge types or features, and is None where edges have none. `position` is a perceptron of the nodes'
    encodings, which are added to x, or of the edges' distances, which multiply e, and are e where edges have nothing.
    """

    def __init__(self, edges: nn.Module | None, position: Perceptron | None, mlp: Perceptron) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.randn(1))
        self.edges, self.position, self.mlp = edges, position, mlp

    def forward(self, x: Tensor, batch: SpeBatch, encodings: Tensor | None, distances: Tensor | None) -> Tensor:
        if self.position is not None and encodings is not None:
            x = x + self.position(encodings)
        messages = x[batch.sources]
        edge = None if self.edges is None else self.edges(batch.attributes)
        if self.position is not None and distances is not None:
            near = self.position(distances)
            edge = near if edge is None else edge * near
        if edge is not None:
            messages = messages + edge
        collected = torch.zeros_like(x).index_add(0, batch.destinations, F.relu(messages))
        return self.mlp((1 + self.eps) * x + collected)


def pooled(x: Tensor, batch: SpeBatch, pooling: Pooling) -> Tensor:
    """The sum or mean over each graph's nodes: (N, h) to (B, h)."""
    total = x.new_zeros(len(batch.counts), x.shape[1]).index_add(0, batch.graph_of_node, x)
    return total if pooling == "add" else total / batch.counts[:, None]
