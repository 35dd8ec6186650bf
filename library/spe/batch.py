"""A batch of graphs and eigenpairs: flat nodes and edges for the backbone, dense buckets by size for encodings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GraphSample(NamedTuple):
    """One graph. `nodes` and `attributes` are types (int64) or features (float32), `edges` have each pair once.

    nodes       (n,) or (n, features)
    edges       int64 (2, e), nodes from 0
    attributes  (e,) or (e, features) of the edges
    values      (k,) the smallest eigenvalues that are kept, ascending
    vectors     (n, k) their eigenvectors
    target      float32 (targets,); nan where it is not known
    """

    nodes: Tensor
    edges: Tensor
    attributes: Tensor
    values: Tensor
    vectors: Tensor
    target: Tensor


class SizeBucket(NamedTuple):
    """Graphs of nearly one size, padded to the largest of them.

    adjacency   (b, s, s), 1 at edges
    vectors     (b, s, k), zero behind a graph's own nodes and eigenpairs
    graphs      int64 (b,), the graphs' numbers in the batch
    mask        (b, s), 1 at a graph's own nodes; None where all are
    """

    adjacency: Tensor
    vectors: Tensor
    graphs: Tensor
    mask: Tensor | None


class SpeBatch(NamedTuple):
    """Graphs one after another, as they were given; `buckets` hold them once more by size.

    nodes                   (N,) or (N, features)
    sources, destinations   int64 (2 E,), both directions of every edge
    attributes              (2 E,) or (2 E, features)
    graph_of_node           int64 (N,)
    counts                  int64 (B,), nodes of each graph
    values                  (B, d), eigenvalues behind which there are zeros
    kept                    int64 (B,), how many of them are a graph's own
    places                  int64 (N,), where each node is among the buckets' rows, laid end to end
    targets                 float32 (B, targets)
    """

    nodes: Tensor
    sources: Tensor
    destinations: Tensor
    attributes: Tensor
    graph_of_node: Tensor
    counts: Tensor
    values: Tensor
    kept: Tensor
    places: Tensor
    buckets: list[SizeBucket]
    targets: Tensor


def collate_graphs(
    samples: Sequence[GraphSample], keys: Tensor | None = None, *, eigenpairs: int, size_step: int = 1
) -> SpeBatch:
    """One batch, eigenvalues padded to `eigenpairs`. Nothing is random, so `keys` are not used.

    Graphs whose sizes are equal after rounding up to a multiple of `size_step` share a bucket: with 1 nothing is
    padded; larger steps make fewer, larger products, for accelerators.
    """
    counts = torch.tensor([len(sample.nodes) for sample in samples])
    starts = counts.cumsum(0) - counts
    kept = torch.tensor([len(sample.values) for sample in samples])
    values = samples[0].values.new_zeros(len(samples), eigenpairs)
    for row, sample in zip(values, samples, strict=True):
        row[: len(sample.values)] = sample.values
    once = torch.cat([sample.edges + start for sample, start in zip(samples, starts, strict=True)], 1)
    attributes = torch.cat([sample.attributes for sample in samples])
    buckets, places, rows = [], torch.empty(int(counts.sum()), dtype=torch.int64), 0
    rounded = -(-counts // size_step)
    for step in rounded.unique():
        graphs = (rounded == step).nonzero().flatten()
        bucket = _bucket([samples[i] for i in graphs.tolist()], counts[graphs], graphs)
        for place, graph in enumerate(graphs.tolist()):
            first = rows + place * bucket.adjacency.shape[1]
            places[starts[graph] : starts[graph] + counts[graph]] = torch.arange(first, first + int(counts[graph]))
        rows += bucket.adjacency.shape[0] * bucket.adjacency.shape[1]
        buckets.append(bucket)
    return SpeBatch(
        nodes=torch.cat([sample.nodes for sample in samples]),
        sources=torch.cat([once[0], once[1]]),
        destinations=torch.cat([once[1], once[0]]),
        attributes=torch.cat([attributes, attributes]),
        graph_of_node=torch.arange(len(samples)).repeat_interleave(counts),
        counts=counts,
        values=values,
        kept=kept,
        places=places,
        buckets=buckets,
        targets=torch.stack([sample.target for sample in samples]),
    )


def _bucket(samples: Sequence[GraphSample], counts: Tensor, graphs: Tensor) -> SizeBucket:
    size = int(counts.max())
    width = max(len(sample.values) for sample in samples)
    vectors = samples[0].vectors.new_zeros(len(samples), size, width)
    adjacency = vectors.new_zeros(len(samples), size, size)
    for matrix, block, sample in zip(adjacency, vectors, samples, strict=True):
        matrix[sample.edges[0], sample.edges[1]] = 1
        matrix[sample.edges[1], sample.edges[0]] = 1
        block[: len(sample.nodes), : len(sample.values)] = sample.vectors
    mask = None if int(counts.min()) == size else (torch.arange(size) < counts[:, None]).to(vectors)
    return SizeBucket(adjacency, vectors, graphs, mask)
