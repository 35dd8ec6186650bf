"""Time RQGNN's training step against the published formulation on PyTorch Geometric's ChebConv, in one run.

The peer does what the released code does for each batch, in our own words: the batch's Laplacian as a sparse matrix of
which each graph's block is taken out, x^T L x as the diagonal of X^T L X, one ChebConv per filter with its own
recurrence, and pooling graph by graph. `vectorised` is the same network with no loop over graphs or filters but with
nothing precomputed or folded: what a careful user would write. All three hold the same weights; logits must agree.

    python -m benchmarks.rqgnn [--graphs N] [--repeat N] [--threads N] [--out FILE.json]
"""

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch_geometric.nn import ChebConv

from benchmarks.timing import median_seconds
from library.rqgnn.batches import GraphBatch
from library.rqgnn.data import GraphData
from library.rqgnn.loss import focal_loss
from library.rqgnn.model import RQGNN
from library.rqgnn.recipe import Material, RqgnnRecipe
from library.spectral.graph_laplacians import graph_sums, propagation_matrix, rayleigh_terms, symmetric_product

GOAL = 7.0
CLASS_WEIGHTS = torch.tensor([0.3, 1.7])


def published_batch(data: GraphData, count: int) -> dict[str, object]:
    """What the published formulation makes of a batch before its network runs."""
    graphs = data.graphs
    features = F.one_hot(data.kinds, count).float()
    i, j = graphs.edges.numpy()
    ends = (np.concatenate([i, j]), np.concatenate([j, i]))
    adjacency = scipy.sparse.coo_array((np.ones(2 * len(i)), ends), shape=(graphs.num_nodes,) * 2).tolil()
    offsets = graphs.offsets.tolist()
    vectors, pool = [], torch.zeros(len(graphs), graphs.num_nodes)
    for place, (first, last) in enumerate(itertools.pairwise(offsets)):
        laplacian = scipy.sparse.csgraph.laplacian(adjacency[first:last, first:last].tocsr(), normed=True)
        own = features[first:last].numpy()
        vectors.append(np.diagonal(own.T @ (laplacian @ own)))
        pool[place, first:last] = 1
    edges = torch.cat([graphs.edges, graphs.edges.flip(0)], 1)
    s = torch.from_numpy(np.stack(vectors)).float()
    return {"features": features, "edges": edges, "s": s, "pool": pool, "offsets": offsets, "labels": data.labels}


class Published(nn.Module):
    """The published network with the weights of ours."""

    def __init__(self, net: RQGNN) -> None:
        super().__init__()
        self.net = net
        depth, features, columns = net.theta.shape
        self.filters = nn.ModuleList(ChebConv(features, features, depth) for _ in range(columns // features))
        with torch.no_grad():
            for place, one in enumerate(self.filters):
                own = slice(place * features, (place + 1) * features)
                one.bias.copy_(net.theta_bias[own])
                for k, linear in enumerate(one.lins):
                    linear.weight.copy_(net.theta[k, :, own].mT)

    def forward(self, batch: dict[str, object]) -> Tensor:
        net, s = self.net, batch["s"]
        branch = F.leaky_relu(net.branch_second(net.branch_first(s)))
        nodes = F.leaky_relu(net.node_second(F.leaky_relu(net.node_first(batch["features"]))))
        nodes = torch.cat([one(nodes, batch["edges"]) for one in self.filters], 1)
        nodes = F.leaky_relu(net.mix_second(F.leaky_relu(net.mix_first(nodes))))
        query = F.leaky_relu(net.query_second(F.leaky_relu(net.query_first(s))))
        scores = torch.zeros(len(s), len(nodes))
        offsets = batch["offsets"]
        rows = []
        for place, (first, last) in enumerate(itertools.pairwise(offsets)):
            weights = torch.zeros_like(scores[place])
            weights[first:last] = nodes[first:last] @ query[place]
            rows.append(weights)
        pooled = (torch.stack(rows) * batch["pool"]) @ nodes
        return net.head(net.dropout(net.norm(torch.cat([pooled, branch], 1))))


def vectorised(net: RQGNN, data: GraphData, count: int) -> Tensor:
    """Logits with no loop over graphs or filters, nothing precomputed, and the filters mixed one after the other."""
    graphs = data.graphs
    features = F.one_hot(data.kinds, count).float()
    s = rayleigh_terms(graphs, features)[0]
    spread = propagation_matrix(graphs)
    nodes = F.leaky_relu(net.node_second(F.leaky_relu(net.node_first(features))))
    terms = [nodes, -symmetric_product(spread, nodes)]
    while len(terms) < net.depth:
        terms.append(-2 * symmetric_product(spread, terms[-1]) - terms[-2])
    nodes = torch.cat(terms, 1) @ net.theta.flatten(0, 1) + net.theta_bias
    nodes = F.leaky_relu(net.mix_second(F.leaky_relu(net.mix_first(nodes))))
    query = F.leaky_relu(net.query_second(F.leaky_relu(net.query_first(s))))
    scores = (nodes * query[graphs.graph_of_node]).sum(1)
    branch = F.leaky_relu(net.branch_second(net.branch_first(s)))
    joined = torch.cat([graph_sums(graphs, scores[:, None] * nodes), branch], 1)
    return net.head(net.dropout(net.norm(joined)))


def step(logits: Callable[[], Tensor], labels: Tensor) -> None:
    """Forward, loss, backward."""
    focal_loss(logits(), labels, CLASS_WEIGHTS, 1.5).backward()


def measure(graphs: int, repeat: int) -> dict[str, Any]:
    """Seconds of batch, step and inference of each way, and how far their logits are apart."""
    material: Material = RqgnnRecipe(data="hiv", node_kinds=None).material()
    chosen = material.train[:graphs]
    data, count = material.data.select(chosen), material.prepared.width
    torch.manual_seed(0)
    ours = RQGNN(count, dropout=0.0)
    theirs = Published(ours)
    batch: GraphBatch = material.prepared.batch(chosen)
    plain = published_batch(data, count)
    ours.eval()
    with torch.no_grad():
        logits = ours(batch)
        scale = float(logits.abs().max())
        apart = {
            "published": float((theirs(plain) - logits).abs().max()) / scale,
            "vectorised": float((vectorised(ours, data, count) - logits).abs().max()) / scale,
            "ours": 0.0,
        }
        inference = {
            "published": median_seconds(lambda: theirs(plain), repeat),
            "vectorised": median_seconds(lambda: vectorised(ours, data, count), repeat),
            "ours": median_seconds(lambda: ours(batch), repeat),
        }
    ours.train()
    theirs.train()
    steps = {
        "published": median_seconds(lambda: step(lambda: theirs(plain), data.labels), repeat),
        "vectorised": median_seconds(lambda: step(lambda: vectorised(ours, data, count), data.labels), repeat),
        "ours": median_seconds(lambda: step(lambda: ours(batch), data.labels), repeat),
    }
    batches = {
        "published": median_seconds(lambda: published_batch(data, count), 1),
        "vectorised": median_seconds(lambda: material.data.select(chosen), repeat),
        "ours": median_seconds(lambda: material.prepared.batch(chosen), repeat),
    }
    return {"batch": batches, "step": steps, "inference": inference, "apart": apart, "nodes": data.graphs.num_nodes}


def report(found: dict[str, Any], console: Console) -> float:
    """Print milliseconds and ratios, a step being forward and backward; the ratio of batch and step together."""
    table = Table(title=f"Milliseconds, {found['nodes']:,} nodes (times faster than published)")
    for name in ("way", "batch", "step", "both", "inference", "apart"):
        table.add_column(name, justify="left" if name == "way" else "right")
    both = {way: found["batch"][way] + found["step"][way] for way in found["step"]}
    for way in found["step"]:
        cells = [
            f"{1e3 * times[way]:.1f} ({times['published'] / times[way]:.1f})"
            for times in (found["batch"], found["step"], both, found["inference"])
        ]
        table.add_row(way, *cells, f"{found['apart'][way]:.0e}")
    console.print(table)
    ratio = both["published"] / both["ours"]
    step_ratio = found["step"]["published"] / found["step"]["ours"]
    console.print(f"batch and step: {ratio:.0f} times faster, the step alone {step_ratio:.0f} (goal {GOAL:g})")
    return ratio


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=512, help="graphs in the batch")
    parser.add_argument("--repeat", type=int, default=5, help="timings of each, whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.graphs, options.repeat)
    ratio = report(found, Console())
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({"machine": machine, **found, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
