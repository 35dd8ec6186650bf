"""The order of samples: a function of (seed, step) alone, so neither workers nor restarts can change it.

Epoch e visits the samples in the order of one seeded permutation P_e; the permutations are laid end to end, and
the global batch of step t (from 0) is the stretch [t B, (t + 1) B) of that endless sequence.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=3)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `length` samples: int64, shape (length,)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)


def global_batch(seed: int, step: int, batch_size: int, length: int) -> np.ndarray:
    """Sample numbers of the whole batch of step `step` (from 0): int64, shape (batch_size,)."""
    position = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(position, length)
    return np.concatenate([permutation(seed, int(e), length)[offsets[epochs == e]] for e in np.unique(epochs)])


def sample_keys(seed: int, step: int, batch_size: int) -> np.ndarray:
    """One 63-bit key per place of the batch, for augmentations and noise: int64, shape (batch_size,).

    A function of (seed, step, place) alone: a sample draws the same noise on any number of workers.
    """
    return np.random.Generator(np.random.PCG64([seed, step, 1])).integers(0, 2**63 - 1, batch_size)


def split(length: int, parts: int) -> list[range]:
    """`range(length)` cut into `parts` contiguous ranges whose sizes differ by at most one."""
    edges = [length * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The places of `costs` in `parts` lists of like sums, whose lengths differ by at most one; each list rises.

    The costliest are dealt out first, forth and back over the parts. One part has all places.

    >>> balanced([9, 1, 4, 6], 2)
    [[0, 1], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for turn, place in enumerate(sorted(range(len(costs)), key=lambda place: -costs[place])):
        around, part = divmod(turn, parts)
        dealt[parts - 1 - part if around % 2 else part].append(place)
    return [sorted(part) for part in dealt]
