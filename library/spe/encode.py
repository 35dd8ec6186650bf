"""Encodings of graphs without a task: from graphs to eigenpairs to (N, p)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from library.recipe import to_device
from library.spe.batch import GraphSample, SpeBatch, collate_graphs
from library.spe.data import GraphData, GraphSamples, spectra_of
from library.spe.settings import Encoding, Schema
from library.spectral.graph_spectra import GraphSpectra
from library.spectral.graphs import Graphs, size_buckets

ROWS = 1 << 17  # node pairs of a batch


def bare_samples(
    graphs: Graphs, encoding: Encoding, spectra: GraphSpectra | None = None, dtype: torch.dtype = torch.float32
) -> list[GraphSample]:
    """Graphs whose nodes are all of type 0, and edges too, with the eigenpairs that an encoding uses."""
    nodes, edges = (torch.zeros(count, dtype=torch.int64) for count in (graphs.num_nodes, graphs.num_edges))
    targets = torch.zeros(len(graphs), 1)
    data = GraphData(graphs, nodes, edges, targets, {}, Schema(node_types=1), standardized=False, name="graphs")
    found = spectra_of(graphs, encoding) if spectra is None else spectra
    samples = GraphSamples(data, found, torch.arange(len(graphs)), dtype)
    return [samples[place] for place in range(len(samples))]


@torch.no_grad()
def encode(encoder: nn.Module, graphs: Graphs, encoding: Encoding, spectra: GraphSpectra | None = None) -> Tensor:
    """Encodings (nodes, p) of graphs, in the order of their nodes, by an encoder such as `Spe` in evaluation.

    `spectra` are the graphs' eigenpairs where they are known; otherwise `spectra_of` computes them, which may refuse.
    The arithmetic is that of the encoder's weights.
    """
    like = next(encoder.parameters(), torch.empty(0))
    samples = bare_samples(graphs, encoding, spectra, like.dtype)
    found: list[Tensor | None] = [None] * len(samples)
    for chosen, batch in batches_by_size(samples, encoding):
        encodings = encoder(to_device(batch, like.device)).cpu().split(batch.counts.tolist())
        for place, own in zip(chosen, encodings, strict=True):
            found[place] = own
    return torch.cat(found)


def batches_by_size(samples: list[GraphSample], encoding: Encoding) -> Iterator[tuple[list[int], SpeBatch]]:
    """The samples in batches of like sizes and bounded memory: the places of each batch's graphs, and the batch."""
    sizes = torch.tensor([len(sample.nodes) for sample in samples])
    for bucket in size_buckets(sizes, budget=ROWS, power=2):
        chosen = bucket.tolist()
        yield chosen, collate_graphs([samples[place] for place in chosen], eigenpairs=encoding.eigenpairs)
