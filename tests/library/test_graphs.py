"""Batches of graphs: what they refuse, how they are picked, padded, and cut by size."""

from itertools import pairwise

import pytest
import torch

from library.errors import InputError
from library.spectral import Graphs, ragged_ranges, size_buckets
from tests.library.graph_cases import cycle, path, random_graphs


@pytest.mark.parametrize(
    ("sizes", "edges", "options", "message"),
    [
        ([2, 0], [[0], [1]], {}, "graph 1 is empty"),
        ([], [], {}, "no graphs"),
        ([2, 2], [[0, 1], [1, 2]], {}, "edge 1 joins graph 0 to graph 1"),
        ([2], [[0], [2]], {}, "nodes are 0 to 1"),
        ([2], [[-1], [1]], {}, "nodes are 0 to 1"),
        ([3, 2], [[0, 2], [1, 1]], {"edge_counts": [1, 1]}, "nodes .2, 1. of graph 1, whose nodes are 0 to 1"),
        ([3], [[0], [1]], {"edge_counts": [2]}, "edge_counts"),
        ([3], [[0, 1], [1, 1]], {}, "edge 1 is a self-loop of node 1 of graph 0"),
        ([3, 2], [[0, 3, 4], [1, 4, 3]], {}, "edge 2, between nodes .0, 1. of graph 1, is listed twice"),
        ([2, 2], [[2, 0], [3, 1]], {}, "graph after graph"),
        ([3], [[0, 1, 1], [1, 0, 2]], {"directed": True}, "edge 2 goes from node 1 to 2, but none comes back"),
        ([2], [[0, 1], [1, 0]], {"directed": True, "weights": [1.0, 2.0]}, "different weights"),
        ([2], [[0.0], [1.0]], {}, "integers"),
        ([3], [[0, 1], [1]], {}, "edges must be integers: expected sequence of length 2"),
        ([3], None, {}, "edges must be integers"),
        ([3], "ab", {}, "edges must be integers"),
        ([3], [[0], [10**30]], {}, "edges must be integers"),
        ([2], [[0], [1]], {"weights": ["a"]}, "weights must be numbers"),
        ([2], [0, 1], {}, "pairs of shape"),
        ([2], [[0], [1]], {"weights": [0.0]}, "positive"),
        ([2], [[0], [1]], {"weights": [float("nan")]}, "positive"),
        ([2], [[0], [1]], {"weights": [1.0, 1.0]}, "one number for each of the 1 edges"),
    ],
)
def test_what_is_no_batch_of_undirected_graphs_is_refused(sizes, edges, options, message) -> None:
    with pytest.raises(InputError, match=message):
        Graphs.from_edges(sizes, edges, **options)


def test_merging_adds_weights_and_drops_loops() -> None:
    merged = Graphs.from_edges([3, 2], [[1, 0, 2, 1, 4], [0, 1, 2, 2, 3]], [1.0, 2.0, 9.0, 4.0, 5.0], merge=True)
    assert merged.edges.tolist() == [[0, 1, 3], [1, 2, 4]]
    assert merged.weights.tolist() == [3.0, 4.0, 5.0]
    plain = Graphs.from_edges([2], [[0, 1, 0], [1, 0, 1]], merge=True)
    assert plain.edges.tolist() == [[0], [1]]
    assert plain.weights is None
    both = Graphs.from_edges([2], [[0, 1, 0, 1], [1, 0, 1, 0]], [1.0, 2.0, 2.0, 1.0], directed=True, merge=True)
    assert both.edges.tolist() == [[0], [1]]
    assert both.weights.tolist() == [3.0]


def test_both_directions_give_the_undirected_graph_with_attributes_by_the_mask() -> None:
    graphs = random_graphs([6, 1, 9], weighted=True)
    generator = torch.Generator().manual_seed(1)
    both = torch.cat([graphs.edges, graphs.edges.flip(0)], 1)
    order = torch.randperm(both.shape[1], generator=generator)
    order = order[graphs.graph_of_node[both[0, order]].argsort(stable=True)]
    pairs, weights = both[:, order], graphs.weights.repeat(2)[order]
    found = Graphs.from_edges(graphs.sizes, pairs, weights, directed=True)
    kept = pairs[0] < pairs[1]
    assert torch.equal(found.edges, pairs[:, kept])
    assert torch.equal(found.weights, weights[kept])
    assert torch.allclose(found.degrees, graphs.degrees)


def test_selecting_and_concatenating_are_inverse() -> None:
    graphs = random_graphs([4, 7, 1, 5], weighted=True)
    signals = torch.arange(graphs.num_nodes)
    chosen = torch.tensor([3, 0, 2, 1])
    shuffled = graphs.select(chosen)
    assert shuffled.sizes.tolist() == [5, 4, 1, 7]
    assert signals[graphs.nodes_of(chosen)].tolist() == [*range(12, 17), *range(4), 11, *range(4, 11)]
    assert torch.equal(shuffled.weights, graphs.weights[graphs.edges_of(chosen)])
    again = Graphs.concatenate([shuffled.select([i]) for i in (1, 3, 2, 0)])
    for name in ("sizes", "edges", "weights", "edge_counts"):
        assert torch.equal(getattr(again, name), getattr(graphs, name))
    mixed = Graphs.concatenate([cycle(3), graphs])
    assert mixed.weights[:3].tolist() == [1, 1, 1]


def test_graphs_are_chosen_from_the_end_and_by_a_mask() -> None:
    graphs = random_graphs([4, 7, 1, 5], weighted=True)
    chosen = torch.tensor([3, 0])
    for same in (torch.tensor([-1, 0]), torch.tensor([-1, -4])):
        for name in ("sizes", "edges", "weights"):
            assert torch.equal(getattr(graphs.select(same), name), getattr(graphs.select(chosen), name))
        assert torch.equal(graphs.nodes_of(same), graphs.nodes_of(chosen))
        assert torch.equal(graphs.edges_of(same), graphs.edges_of(chosen))
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(graphs.select(mask).edges, graphs.select([0, 3]).edges)
    assert graphs.nodes_of(mask).tolist() == [*range(4), *range(12, 17)]
    for bad, message in (([4], "no graph 4; graphs are 0 to 3"), ([-5], "no graph -5"), ([0.0], "or a mask of 4")):
        with pytest.raises(InputError, match=message):
            graphs.select(bad)


def test_padding_puts_zeros_behind_each_graph() -> None:
    graphs = Graphs.concatenate([path(2), cycle(3), path(1 + 1)])
    values = torch.arange(1.0, 15.0).reshape(7, 2)
    padded = graphs.pad(values)
    assert padded.shape == (3, 3, 2)
    assert padded[0, 2].tolist() == padded[2, 2].tolist() == [0, 0]
    assert torch.equal(graphs.unpad(padded), values)


def test_components_are_counted_through_the_batch() -> None:
    graphs = Graphs.from_edges([4, 2], [[0, 2], [1, 3]])
    assert graphs.components.tolist() == [0, 0, 1, 1, 2, 3]


def test_buckets_cover_all_graphs_within_their_budget() -> None:
    sizes = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0))
    for power, budget in ((1, 300), (2, 5000)):
        buckets = size_buckets(sizes, budget=budget, power=power)
        assert torch.cat(buckets).sort().values.tolist() == list(range(200))
        costs = [len(bucket) * int(sizes[bucket].max()) ** power for bucket in buckets]
        assert max(costs) <= budget
        heavier = pairwise(buckets)  # the next graph would not have fitted
        assert all((len(a) + 1) * int(sizes[b[0]]) ** power > budget for a, b in heavier)
    alone = size_buckets(torch.tensor([5, 100, 5]), budget=10)
    assert [bucket.tolist() for bucket in alone] == [[0, 2], [1]]
    with pytest.raises(InputError, match="budget"):
        size_buckets(sizes, budget=0)


def test_ragged_ranges_may_be_empty() -> None:
    assert ragged_ranges(torch.tensor([3, 9, 0]), torch.tensor([1, 0, 2])).tolist() == [3, 0, 1]
