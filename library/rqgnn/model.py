"""The Rayleigh quotient graph neural network: a bank of Chebyshev wavelets, pooled by Rayleigh quotients.

With N nodes, F features, h hidden channels, q filters of K terms, and s the graph's Rayleigh vector (F,):

    H0 = act(W2 act(W1 X))                                    node features, F -> F -> F
    P_i = sum_k T_k(L~) H0 Theta_ik + b_i, i = 1..q           the bank; L~ = L - I = -D^{-1/2} A D^{-1/2}
    H = act(W4 act(W3 [P_1 | ... | P_q]))                     q F -> h -> h
    t = act(W9 act(W8 s)),  a_v = H_v . t,  g = sum_v a_v H_v     pooling by Rayleigh quotients
    z = act(W6 W5 s)                                          Rayleigh branch, F -> h -> h
    logits = W7 dropout(batch_norm([g | z]))                  (graphs, 2)

There is nothing non-linear between the bank and W3, so their product Theta_k W3 (F, h) is formed first: K F h instead
of K q F^2 + q F h multiplications per node, and the T_k H0 are shared by all filters. Source: Dong, Zhang, Wang,
"Rayleigh Quotient Graph Neural Networks for Graph-level Anomaly Detection", ICLR 2024, arXiv 2310.02861.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.batch_norm import GlobalBatchNorm
from library.rqgnn.batches import GraphBatch
from library.spectral.chebyshev import chebyshev_terms
from library.spectral.graph_laplacians import fixed_product, graph_sums, quotients, symmetric_product

RayleighOn = Literal["raw", "latent", "counts"]
Pooling = Literal["rq", "rq-mean", "attention", "mean", "sum", "max"]
Filters = Literal["learned", "frozen"]


class Scored(NamedTuple):
    """Logits (graphs, 2) and each node's share in the pooling (nodes,): a_v, its softmax, or 1."""

    logits: Tensor
    node_scores: Tensor


class RQGNN(nn.Module):
    """The network over `GraphBatch`es; `features` is F.

    rq_on           s is of the raw features, of H0 (latent), or, as a control without smoothness, their counts x^T x
    normalise_rq    divide x^T L x by x^T x
    filters         learned, or frozen at their random start as in the released code
    pooling         rq: as above. rq-mean: a_v / (sqrt(h) n), which does not grow with the graph. attention: softmax of
                    a_v / sqrt(h) over the nodes. mean, sum, max: without quotients
    shared_query    t is the Rayleigh branch's z, as the paper has it
    branch          whether there is a Rayleigh branch

    Linear layers start as torch's do, filters by Glorot's uniform rule with zero bias.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 64,
        width: int = 4,
        depth: int = 6,
        dropout: float = 0.4,
        rq_on: RayleighOn = "raw",
        normalise_rq: bool = False,
        filters: Filters = "learned",
        pooling: Pooling = "rq",
        shared_query: bool = False,
        branch: bool = True,
    ) -> None:
        super().__init__()
        self.depth, self.rq_on, self.normalise_rq, self.pooling = depth, rq_on, normalise_rq, pooling
        self.node_first = nn.Linear(features, features)
        self.node_second = nn.Linear(features, features)
        theta = torch.empty(depth, features, width * features).uniform_(-1, 1) * (3 / features) ** 0.5
        bias = torch.zeros(width * features)
        if filters == "learned":
            self.theta, self.theta_bias = nn.Parameter(theta), nn.Parameter(bias)
        else:
            self.register_buffer("theta", theta)
            self.register_buffer("theta_bias", bias)
        self.mix_first = nn.Linear(width * features, hidden)
        self.mix_second = nn.Linear(hidden, hidden)
        self.branch_first = nn.Linear(features, hidden) if branch else None
        self.branch_second = nn.Linear(hidden, hidden) if branch else None
        queried = pooling in ("rq", "rq-mean", "attention")
        own = queried and not (shared_query and branch)
        self.query_first = nn.Linear(features, hidden) if own else None
        self.query_second = nn.Linear(hidden, hidden) if own else None
        joined = 2 * hidden if branch else hidden
        self.norm = GlobalBatchNorm(joined)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(joined, 2)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Logits (graphs, 2) of normal and anomalous."""
        return self.scored(batch).logits

    def scored(self, batch: GraphBatch) -> Scored:
        """The logits, and what the pooling made of each node."""
        table = self._node_layers(None) if batch.kinds is not None else None
        start = None
        if table is None:
            start = self._node_layers(batch.features)
        elif self.rq_on == "latent":
            start = table[batch.kinds]
        wide = batch.energies.dtype  # under autocast, sums over nodes and what follows them stay exact
        rayleigh = self.rayleigh(batch, None if start is None else start.to(wide))
        nodes = self.node_channels(batch, table, start).to(wide)
        branch = None
        if self.branch_first is not None:
            branch = F.leaky_relu(self.branch_second(self.branch_first(rayleigh))).to(wide)
        query = branch
        if self.query_first is not None:
            query = F.leaky_relu(self.query_second(F.leaky_relu(self.query_first(rayleigh)))).to(wide)
        pooled, scores = self._pooled(batch, nodes, query)
        joined = pooled if branch is None else torch.cat([pooled, branch], 1)
        return Scored(self.head(self.dropout(self.norm(joined))), scores)

    def rayleigh(self, batch: GraphBatch, start: Tensor | None) -> Tensor:
        """The vector s of each graph (graphs, F); `start` is H0, needed for latent quotients."""
        if self.rq_on == "counts":
            return batch.squares
        energies, squares = batch.energies, batch.squares
        if self.rq_on == "latent":
            joined = (batch.graphs.degrees > 0).to(start.dtype)[:, None]
            changes = start * joined - symmetric_product(batch.spread, start)
            energies = graph_sums(batch.graphs, start * changes)
            squares = graph_sums(batch.graphs, start.square())
        return quotients(energies, squares) if self.normalise_rq else energies

    def node_channels(self, batch: GraphBatch, table: Tensor | None, start: Tensor | None) -> Tensor:
        """H (nodes, h): from the precomputed terms and the `table` of kinds, or by the recurrence from `start`."""
        mixing = self.theta @ self.mix_first.weight.mT  # (K, F, h)
        bias = self.theta_bias @ self.mix_first.weight.mT + self.mix_first.bias
        if table is not None:
            mixed = fixed_product(batch.terms, batch.terms_transposed, (table @ mixing).flatten(0, 1))
        else:
            terms = torch.cat(chebyshev_terms(batch.spread, start, self.depth, sign=-1), 1)
            mixed = terms @ mixing.flatten(0, 1)
        return F.leaky_relu(self.mix_second(F.leaky_relu(mixed + bias)))

    def _node_layers(self, features: Tensor | None) -> Tensor:
        """H0 of features, or of every kind: then the first layer's product is its weight itself."""
        first = self.node_first.weight.mT + self.node_first.bias if features is None else self.node_first(features)
        return F.leaky_relu(self.node_second(F.leaky_relu(first)))

    def _pooled(self, batch: GraphBatch, nodes: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor]:
        graphs = batch.graphs
        if query is None or self.pooling in ("mean", "sum", "max"):
            ones = torch.ones_like(nodes[:, 0])
            if self.pooling == "max":
                return graphs.pad(nodes).masked_fill(_absent(batch), -torch.inf).amax(1), ones
            pooled = graph_sums(graphs, nodes)
            return (pooled / graphs.sizes[:, None] if self.pooling == "mean" else pooled), ones
        scores = (nodes * query.repeat_interleave(graphs.sizes, 0)).sum(1)
        if self.pooling == "rq-mean":
            scores = scores / (nodes.shape[1] ** 0.5 * graphs.sizes.repeat_interleave(graphs.sizes))
        if self.pooling == "attention":
            padded = graphs.pad((scores / nodes.shape[1] ** 0.5)[:, None]).masked_fill(_absent(batch), -torch.inf)
            scores = graphs.unpad(padded.softmax(1))[:, 0]
        return graph_sums(graphs, scores[:, None] * nodes), scores


def _absent(batch: GraphBatch) -> Tensor:
    """Where a padded batch has no node: bool (graphs, largest size, 1)."""
    sizes = batch.graphs.sizes
    return (torch.arange(int(sizes.max()), device=sizes.device) >= sizes[:, None])[..., None]
