"""Gradient clipping by the norms that were seen last.

limit = min(most, 1.5 mean + 2 std of the last 50 norms), where a norm that was clipped counts as clipped; before the
first step the queue holds 3000. Source: Hoogeboom et al., "Equivariant Diffusion", 2022; the released DiffSpectra code.
"""

from collections.abc import Sequence

import numpy as np

QUEUE = 50
FIRST = 3000.0
MEAN_FACTOR, SPREAD_FACTOR = 1.5, 2.0


def adaptive_limit(norms: Sequence[float], most: float) -> float:
    """The limit of the coming step; `norms` are the last ones, none before the first step.

    >>> adaptive_limit((), 10.0), adaptive_limit((1.0, 3.0), 10.0)
    (10.0, 5.0)
    """
    seen = np.asarray(norms or (FIRST,), dtype=np.float64)
    return float(min(most, MEAN_FACTOR * seen.mean() + SPREAD_FACTOR * seen.std()))


def remembered(norms: Sequence[float], norm: float, most: float) -> tuple[float, ...]:
    """The last norms once the coming one is known."""
    limit = adaptive_limit(norms, most)
    return (*(norms or (FIRST,)), min(norm, limit))[-QUEUE:]
