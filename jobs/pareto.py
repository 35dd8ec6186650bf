"""Several objectives at once: which trials no other one beats, and by how much.

A trial's objectives are turned into costs, all to be small. One set of costs dominates another when none is larger
and one is smaller; the rank of a set is 0 on the front, 1 on the front of the rest, and so on.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tune_spaces.space import Space

if TYPE_CHECKING:
    from jobs.search import TrialRecord

KEPT = 3  # trials of a front whose artifacts are kept


def costs(space: Space, report: Mapping[str, float]) -> tuple[float, ...]:
    """The objectives of a report as costs: the space's own first, then the further ones in their order."""
    signs = {"min": 1.0, "max": -1.0}
    own = signs[space.mode] * report["objective"]
    return (own, *(signs[mode] * report[name] for name, mode in space.others.items()))


def front_ranks(points: Sequence[Sequence[float]]) -> np.ndarray:
    """Rank of each row of costs (n, objectives) by non-dominated sorting: int64 (n,)."""
    if not len(points):
        return np.zeros(0, np.int64)
    rows = np.asarray(points, np.float64).reshape(len(points), -1)
    less = (rows[:, None] <= rows[None]).all(-1) & (rows[:, None] < rows[None]).any(-1)  # [i, j]: i dominates j
    ranks = np.full(len(rows), -1)
    rank = 0
    while (ranks < 0).any():
        left = ranks < 0
        ranks[left & ~less[left].any(0)] = rank
        rank += 1
    return ranks


def crowding(points: Sequence[Sequence[float]]) -> np.ndarray:
    """How far apart each row's neighbours are, summed over objectives scaled to [0, 1]; infinite at the ends.

    Source: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002.
    """
    rows = np.asarray(points, np.float64).reshape(len(points), -1)
    distance = np.zeros(len(rows))
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if width > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The area that rows of two costs (n, 2) dominate below a reference point; rows beyond it count nothing."""
    rows = np.asarray(points, np.float64).reshape(-1, 2)
    rows = rows[(rows < np.asarray(reference)).all(1)]
    area, edge = 0.0, float(reference[1])
    for first, second in rows[np.lexsort((rows[:, 1], rows[:, 0]))]:
        if second < edge:
            area += (reference[0] - first) * (edge - second)
            edge = second
    return float(area)


def front(space: Space, records: list["TrialRecord"]) -> list["TrialRecord"]:
    """The finished trials of the search that no other of them beats in all objectives, the best metric first."""
    finished = [r for r in records if r.state == "finished" and r.curve and r.group is None]
    if not finished:
        return []
    points = [costs(space, record.last) for record in finished]
    kept = [i for i, rank in enumerate(front_ranks(points)) if rank == 0]
    return [finished[i] for i in sorted(kept, key=lambda i: (points[i], finished[i].number))]


def kept_of_front(space: Space, records: list["TrialRecord"]) -> list["TrialRecord"]:
    """At most three trials of the front: the one that the front would miss most, then both ends of its metric.

    What is missed is the area that a trial alone dominates, in the metric and the first further objective, each scaled
    to the front's own range; the reference lies a tenth beyond its worst.
    """
    found = front(space, records)
    if len(found) < KEPT:
        return found
    points = np.array([costs(space, record.last)[:2] for record in found])
    width = np.ptp(points, axis=0)
    scaled = (points - points.min(0)) / np.where(width > 0, width, 1.0)
    whole = hypervolume(scaled, (1.1, 1.1))
    missed = [whole - hypervolume(np.delete(scaled, i, 0), (1.1, 1.1)) for i in range(len(found))]
    chosen = dict.fromkeys([int(np.argmax(missed)), 0, len(found) - 1])
    return [found[i] for i in chosen]
