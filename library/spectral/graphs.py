"""Graphs: a batch of undirected graphs, the nodes of one after those of another, and how batches are cut by size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError


@dataclass(frozen=True, eq=False)
class Graphs:
    """A batch of undirected graphs; make one with `from_edges`, which checks it.

    `sizes` int64 (graphs,) is the number of nodes of each. `edges` int64 (2, edges) holds every edge once, its smaller
    node first, graph after graph; nodes are numbered through the whole batch. `weights` (edges,) are positive;
    None means 1 each. Node signals are (nodes, channels) in the same order.

    >>> pair = Graphs.from_edges([3, 2], [[0, 1, 0], [1, 2, 1]], edge_counts=[2, 1])  # a path and an edge
    >>> pair.edges.tolist(), pair.degrees.tolist()
    ([[0, 1, 3], [1, 2, 4]], [1.0, 2.0, 1.0, 1.0, 1.0])
    """

    sizes: Tensor
    edges: Tensor
    weights: Tensor | None = None

    @classmethod
    def from_edges(
        cls,
        sizes: Any,
        edges: Any,
        weights: Any = None,
        *,
        edge_counts: Any = None,
        directed: bool = False,
        merge: bool = False,
    ) -> "Graphs":
        """A checked batch from node counts (graphs,) and node pairs (2, edges), listed graph after graph.

        Nodes are numbered through the batch or, with `edge_counts` (graphs,), from 0 in each graph. With `directed`
        every edge must be there in both directions (with one weight), and is kept at the place of the pair whose
        smaller node comes first: attributes of edges follow by the mask `edges[0] < edges[1]`. `merge` adds the
        weights of edges that are listed more than once (without weights they count once) and drops self-loops; both
        are refused otherwise.

        Raises InputError for an empty graph, a node that is not there, an edge between two graphs, an edge out of the
        graphs' order, a direction without its reverse, a self-loop or duplicate, and a weight that is not positive.
        """
        sizes = _integers(sizes, "sizes").flatten()
        pairs = _integers(edges, "edges")
        pairs = pairs.reshape(2, 0) if pairs.numel() == 0 else pairs
        if pairs.ndim != 2 or pairs.shape[0] != 2:
            raise InputError(f"edges must be pairs of shape (2, edges), got {tuple(pairs.shape)}")
        if len(sizes) == 0:
            raise InputError("there are no graphs")
        if bool((sizes < 1).any()):
            raise InputError(f"graph {int((sizes < 1).nonzero()[0])} is empty; a graph needs at least one node")
        values = None if weights is None else _weights(weights, pairs.shape[1])
        if edge_counts is not None:
            pairs = _numbered_through(sizes, pairs, _integers(edge_counts, "edge_counts").flatten())
        owner = _checked_owner(sizes, pairs)
        if bool((owner.diff() < 0).any()):
            raise InputError("edges must be listed graph after graph, in the order of the graphs")
        loops = pairs[0] == pairs[1]
        if bool(loops.any()):
            if not merge:
                place = int(loops.nonzero()[0])
                graph = int(owner[place])
                node = int(pairs[0, place] - _starts(sizes)[graph])
                raise InputError(f"edge {place} is a self-loop of node {node} of graph {graph}")
            pairs, values = pairs[:, ~loops], None if values is None else values[~loops]
        if merge:
            pairs, values = _merged(pairs, values, directed)
        if directed:
            return cls(sizes, *_one_direction(sizes, pairs, values))
        pairs = torch.stack([pairs.amin(0), pairs.amax(0)])
        if not merge:
            _refuse_duplicates(sizes, pairs)
        return cls(sizes, pairs, values)

    @classmethod
    def concatenate(cls, batches: Sequence["Graphs"]) -> "Graphs":
        """Several batches as one, in their order. Weights are filled with 1 where only some batches have them."""
        if not batches:
            raise InputError("there are no graphs")
        shifts = torch.tensor([0] + [batch.num_nodes for batch in batches[:-1]]).cumsum(0).tolist()
        edges = torch.cat([batch.edges + shift for batch, shift in zip(batches, shifts, strict=True)], 1)
        weights = None
        if any(batch.weights is not None for batch in batches):
            weights = torch.cat([batch.edge_weights for batch in batches])
        return cls(torch.cat([batch.sizes for batch in batches]), edges, weights)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs together."""
        return int(self.offsets[-1])

    @property
    def num_edges(self) -> int:
        """Edges of all graphs together, each counted once."""
        return self.edges.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.sizes.device

    @cached_property
    def offsets(self) -> Tensor:
        """The first node of each graph and, last, the number of nodes: int64 (graphs + 1,)."""
        return _starts(self.sizes)

    @cached_property
    def graph_of_node(self) -> Tensor:
        """The graph that each node is in: int64 (nodes,)."""
        return torch.arange(len(self), device=self.device).repeat_interleave(self.sizes)

    @cached_property
    def edge_counts(self) -> Tensor:
        """The number of edges of each graph: int64 (graphs,)."""
        return torch.bincount(self.graph_of_node[self.edges[0]], minlength=len(self))

    @cached_property
    def edge_weights(self) -> Tensor:
        """The weights as float64 (edges,), 1 where none were given."""
        if self.weights is None:
            return torch.ones(self.num_edges, dtype=torch.float64, device=self.device)
        return self.weights.double()

    @cached_property
    def degrees(self) -> Tensor:
        """Sums of the weights at each node: float64 (nodes,)."""
        found = torch.zeros(self.num_nodes, dtype=torch.float64, device=self.device)
        return found.index_add_(0, self.edges[0], self.edge_weights).index_add_(0, self.edges[1], self.edge_weights)

    @cached_property
    def components(self) -> Tensor:
        """The number of the connected component that each node is in: int64 (nodes,), counted through the batch."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        rows, columns = self.edges.cpu().numpy()
        links = coo_array((self.edge_weights.cpu().numpy(), (rows, columns)), shape=(self.num_nodes,) * 2)
        return torch.from_numpy(connected_components(links, directed=False)[1]).long().to(self.device)

    def nodes_of(self, chosen: Tensor) -> Tensor:
        """The nodes of the chosen graphs, graph after graph, to pick their signals with; see `select`."""
        chosen = self._numbers(chosen)
        return ragged_ranges(self.offsets[chosen], self.sizes[chosen])

    def edges_of(self, chosen: Tensor) -> Tensor:
        """The edges of the chosen graphs, graph after graph, to pick their attributes with; see `select`."""
        chosen = self._numbers(chosen)
        return ragged_ranges(self._edge_offsets[chosen], self.edge_counts[chosen])

    def select(self, chosen: Any) -> "Graphs":
        """The chosen graphs, in that order, as a batch of their own.

        `chosen` are numbers, counted from the end where negative, or a bool mask (graphs,). Raises InputError for
        others.
        """
        chosen = self._numbers(chosen)
        places = self.edges_of(chosen)
        sizes = self.sizes[chosen]
        shift = (_starts(sizes)[:-1] - self.offsets[chosen]).repeat_interleave(self.edge_counts[chosen])
        return Graphs(sizes, self.edges[:, places] + shift, None if self.weights is None else self.weights[places])

    def _numbers(self, chosen: Any) -> Tensor:
        """A choice of graphs as numbers from 0."""
        chosen = torch.as_tensor(chosen, device=self.device)
        if chosen.dtype == torch.bool and chosen.shape == self.sizes.shape:
            return chosen.nonzero().flatten()
        whole = not (chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex())
        if not whole and chosen.numel():
            raise InputError(f"graphs are chosen by integers or a mask of {len(self)}, got {chosen.dtype}")
        chosen = chosen.long()
        outside = (chosen < -len(self)) | (chosen >= len(self))
        if bool(outside.any()):
            raise InputError(f"there is no graph {int(chosen[outside][0])}; graphs are 0 to {len(self) - 1}")
        return torch.where(chosen < 0, chosen + len(self), chosen)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Graphs":
        """The batch on `device`."""
        weights = None if self.weights is None else self.weights.to(device, non_blocking=non_blocking)
        moved = (part.to(device, non_blocking=non_blocking) for part in (self.sizes, self.edges))
        return Graphs(*moved, weights)

    def pad(self, values: Tensor) -> Tensor:
        """Node values (nodes, ...) as (graphs, largest size, ...), with zeros behind each graph's own nodes."""
        width = int(self.sizes.max())
        padded = values.new_zeros(len(self) * width, *values.shape[1:]).index_copy(0, self._padded_places, values)
        return padded.unflatten(0, (len(self), width))

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`: (graphs, largest size, ...) to (nodes, ...)."""
        return padded.flatten(0, 1)[self._padded_places]

    @cached_property
    def _padded_places(self) -> Tensor:
        first = torch.arange(len(self), device=self.device) * int(self.sizes.max())
        return ragged_ranges(first, self.sizes)

    @cached_property
    def _edge_offsets(self) -> Tensor:
        return _starts(self.edge_counts)


def ragged_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The ranges [start, start + length) one after another: int64 (sum of lengths,).

    >>> ragged_ranges(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = (starts - _starts(lengths)[:-1]).repeat_interleave(lengths)
    return torch.arange(len(shift), device=shift.device) + shift


def size_buckets(sizes: Tensor, *, budget: int, power: int = 1) -> list[Tensor]:
    """Graphs sorted by size and cut into batches whose padded cost count * largest**power is at most `budget`.

    `sizes` is (graphs,); power 1 bounds the nodes of a batch, power 2 the entries of its dense matrices. A graph that
    exceeds the budget alone is a batch alone. Returns the graphs' numbers, int64, smallest graphs first.

    >>> [bucket.tolist() for bucket in size_buckets(torch.tensor([3, 9, 2, 3]), budget=9)]
    [[2, 0, 3], [1]]
    """
    if budget < 1 or power < 1:
        raise InputError(f"budget and power must be at least 1, got {budget} and {power}")
    order = sizes.argsort(stable=True)
    costs = [size**power for size in sizes[order].tolist()]
    cuts, first = [], 0
    for place, cost in enumerate(costs):
        if place > first and (place - first + 1) * cost > budget:
            cuts.append(place)
            first = place
    return list(torch.tensor_split(order, cuts))


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _integers(values: Any, name: str) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, None, text, and what exceeds 64 bits
        raise InputError(f"{name} must be integers: {str(error).splitlines()[0]}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise InputError(f"{name} must be integers, got {found.dtype}")
    return found.long()


def _weights(values: Any, count: int) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"weights must be numbers: {str(error).splitlines()[0]}") from error
    found = found if found.is_floating_point() else found.double()
    if found.shape != (count,):
        raise InputError(f"weights must be one number for each of the {count} edges, got {tuple(found.shape)}")
    bad = ~(torch.isfinite(found) & (found > 0))
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise InputError(f"the weight of edge {place} is {float(found[place])}; weights must be positive and finite")
    return found


def _numbered_through(sizes: Tensor, pairs: Tensor, counts: Tensor) -> Tensor:
    if counts.shape != sizes.shape or bool((counts < 0).any()) or int(counts.sum()) != pairs.shape[1]:
        raise InputError(
            f"edge_counts must be a number for each of the {len(sizes)} graphs that add up to {pairs.shape[1]} edges"
        )
    limit = sizes.repeat_interleave(counts)
    outside = ((pairs < 0) | (pairs >= limit)).any(0)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        graph = int(torch.arange(len(sizes)).repeat_interleave(counts.cpu())[place])
        raise InputError(
            f"edge {place} joins nodes {pairs[:, place].tolist()} of graph {graph}, whose nodes are 0 to "
            f"{int(limit[place]) - 1}"
        )
    return pairs + _starts(sizes)[:-1].repeat_interleave(counts)


def _checked_owner(sizes: Tensor, pairs: Tensor) -> Tensor:
    """The graph of each pair, once both of its nodes are known to be in that graph."""
    total = int(sizes.sum())
    outside = ((pairs < 0) | (pairs >= total)).any(0)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise InputError(f"edge {place} joins nodes {pairs[:, place].tolist()}; nodes are 0 to {total - 1}")
    graph = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    owners = graph[pairs]
    crossing = owners[0] != owners[1]
    if bool(crossing.any()):
        place = int(crossing.nonzero()[0])
        first, second = owners[:, place].tolist()
        raise InputError(f"edge {place} joins graph {first} to graph {second}; an edge must stay in its graph")
    return owners[0]


def _keys(pairs: Tensor) -> Tensor:
    """One int64 per pair; nodes are far fewer than 2^31 in any batch that fits a memory."""
    return pairs[0] * (int(pairs.max()) + 1) + pairs[1] if pairs.numel() else pairs[0]


def _merged(pairs: Tensor, values: Tensor | None, directed: bool) -> tuple[Tensor, Tensor | None]:
    """Each pair once, where it was first; for undirected pairs both directions are one."""
    pairs = pairs if directed else torch.stack([pairs.amin(0), pairs.amax(0)])
    _, inverse = _keys(pairs).unique(return_inverse=True)
    groups = int(inverse.max()) + 1 if len(inverse) else 0
    places = torch.arange(len(inverse), device=pairs.device)
    first = torch.full((groups,), len(inverse), device=pairs.device).scatter_reduce(0, inverse, places, "amin")
    first, order = first.sort()
    if values is not None:
        values = values.new_zeros(groups).index_add_(0, inverse, values)[order]
    return pairs[:, first], values


def _refuse_duplicates(sizes: Tensor, pairs: Tensor) -> None:
    keys, order = _keys(pairs).sort(stable=True)
    same = keys.diff() == 0
    if bool(same.any()):
        place = int(order[1:][same][0])
        graph = int((_starts(sizes)[1:] <= pairs[0, place]).sum())
        nodes = (pairs[:, place] - _starts(sizes)[graph]).tolist()
        raise InputError(f"edge {place}, between nodes {nodes} of graph {graph}, is listed twice")


def _one_direction(sizes: Tensor, pairs: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The pairs that begin at their smaller node, once each is known to have its reverse with the same weight."""
    if pairs.shape[1] == 0:
        return pairs, values
    _refuse_duplicates(sizes, pairs)
    forward, order = _keys(pairs).sort()
    span = int(pairs.max()) + 1
    backward, reverse = (pairs[1] * span + pairs[0]).sort()
    alone = ~torch.isin(forward, backward)
    if bool(alone.any()):
        place = int(order[alone].min())
        raise InputError(
            f"edge {place} goes from node {int(pairs[0, place])} to {int(pairs[1, place])}, but none comes back; "
            "an undirected graph lists both directions, or each edge once with directed=False"
        )
    if values is not None and not bool((values[order] == values[reverse]).all()):
        raise InputError("the two directions of an edge have different weights; an undirected graph is needed")
    kept = pairs[0] < pairs[1]
    return pairs[:, kept], None if values is None else values[kept]
