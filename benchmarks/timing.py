"""How the benchmarks take time."""

import statistics
import time
from collections.abc import Callable


def median_seconds(
    call: Callable[[], object], repeat: int, *, warm: bool = True, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The median time of `repeat` calls; with `warm` after one that is not counted.

    `time.process_time` as `clock` counts processor time, which other programs of the machine disturb less.
    """
    if warm:
        call()
    times = []
    for _ in range(repeat):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times)
