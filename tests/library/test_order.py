"""Shares of a batch: every place once, sizes that differ by at most one, and like sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library import order
from library.diffspectra.recipe import DiffSpectraRecipe


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_balanced_shares_hold_every_place_once_and_are_alike(costs, parts):
    shares = order.balanced(costs, parts)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    sums = [sum(costs[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs)
    assert all(share == sorted(share) for share in shares)


def test_molecules_are_shared_by_their_pairs_of_atoms():
    recipe = DiffSpectraRecipe()
    train = recipe.datasets().train
    batch = order.global_batch(0, 0, 64, len(train)).tolist()
    costs = recipe.costs(train, batch)
    assert costs[:3] == [len(train[i].structure) ** 2 for i in batch[:3]]
    shares = order.balanced(costs, 8)
    sums = np.array([sum(costs[place] for place in share) for share in shares])
    plain = np.array([sum(costs[place] for place in share) for share in order.split(64, 8)])
    assert sums.max() / sums.mean() == pytest.approx(1, abs=0.05)
    assert plain.max() / plain.mean() > 1.1
