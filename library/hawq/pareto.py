"""The exact Pareto frontier of sensitivity against one cost, by dynamic programming; selection; certificates.

Sensitivity Omega and cost are both sums over layers, so choosing one option per layer is a multiple-choice knapsack.
Layer after layer, the list of (cost, Omega) that no other setting beats is merged with each of the layer's options.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from library.errors import InputError
from library.hawq.costs import attainable, checked_table, joined, rounded_limit

AT_ONCE = 1 << 12  # sums omega + mu cost that are made in one go
CELLS = 1 << 18  # integer costs up to this many multiples of their divisor are tabulated, larger lists are thinned


@dataclass(frozen=True)
class Selection:
    """One choice per layer, `choice` (layers,), the least `omega` within the limits.

    `cost` is what it costs and `slack` what it leaves of the limit. `lower_bound` is a proven bound of every setting
    within the limit, by the Lagrangian relaxation; the selection is within `omega - lower_bound` of the best one,
    and is the best when `exact`.
    """

    choice: np.ndarray
    omega: float
    cost: float
    limit: float
    lower_bound: float
    exact: bool

    @property
    def slack(self) -> float:
        """What the limit leaves over."""
        return self.limit - self.cost


@dataclass(frozen=True)
class Frontier:
    """All settings that no other one beats: `cost` rises strictly and `omega` falls strictly, both (points,).

    `exact` is false when the lists had to be thinned: every point is then a true setting, but better ones may exist.
    """

    cost: np.ndarray
    omega: np.ndarray
    exact: bool
    _table: tuple[np.ndarray, np.ndarray, np.ndarray]  # omega, cost, allowed per group
    _group: np.ndarray
    _steps: "tuple[_Step, ...]"
    _states: np.ndarray

    def __len__(self) -> int:
        return len(self.cost)

    @cached_property
    def choices(self) -> np.ndarray:
        """The option of each layer at every point: (points, layers)."""
        return self._traced(self._states)

    def choose(self, limit: float) -> Selection:
        """The point of least Omega whose cost is at most `limit`, with its certificate.

        Raises InputError for NaN, and when none of the settings is that cheap: it says which limits can be met.
        """
        place = int(np.searchsorted(self.cost, rounded_limit(limit), "right")) - 1
        if place < 0:
            _, cost, allowed = self._table
            low, high = attainable(cost, allowed)
            raise InputError(f"limit {limit:.6g} cannot be met: settings cost from {low:.6g} to {high:.6g}")
        return Selection(
            choice=self._traced(self._states[place : place + 1])[0],
            omega=float(self.omega[place]),
            cost=float(self.cost[place]),
            limit=float(limit),
            lower_bound=lagrangian_bound(*self._table, limit),
            exact=self.exact,
        )

    def _traced(self, states: np.ndarray) -> np.ndarray:
        found = np.empty((len(states), len(self._steps)), np.intp)
        for group in range(len(self._steps) - 1, -1, -1):
            found[:, group], states = self._steps[group].back(states)
        return found[:, self._group]


def frontier(
    omega: ArrayLike, cost: ArrayLike, *, ties: Sequence[Sequence[int]] = (), allowed: ArrayLike | None = None
) -> Frontier:
    """The Pareto frontier of sum_i omega[i, c_i] against sum_i cost[i, c_i] over all choices c.

    `omega` and `cost` are (layers, choices), `allowed` likewise where a layer may not take every choice; layers in a
    set of `ties` take the same one. Exact for integer costs that span at most 2^18 multiples of their greatest common
    divisor, in time (layers x choices x multiples); and for any costs while the list stays as short. A longer list
    keeps the best setting of each of 2^18 intervals of cost.

    Raises InputError for tables that do not fit, are not finite, or ties that leave no common choice.

    >>> found = frontier([[4.0, 1.0], [8.0, 2.0]], [[2, 4], [3, 6]])
    >>> found.cost.tolist(), found.omega.tolist(), found.choose(8).choice.tolist()
    ([5, 7, 8, 10], [12.0, 9.0, 6.0, 3.0], [0, 1])
    """
    omega, cost, allowed = checked_table(omega, cost, allowed)
    omega, group = joined(omega, ties)
    cost, _ = joined(cost, ties)
    allowed = np.logical_not(joined(~allowed, ties)[0])
    if not allowed.any(1).all():
        layers = np.flatnonzero(np.isin(group, np.flatnonzero(~allowed.any(1)))).tolist()
        raise InputError(f"ties: layers {layers} must share bits but have no choice in common")
    table = omega, cost, allowed
    unit = int(np.gcd.reduce(cost - cost.min(1, keepdims=True), axis=None)) if cost.dtype.kind in "iu" else 0
    low, high = attainable(cost, allowed)
    if unit and (high - low) / unit < CELLS:
        totals, steps, states = _tabulated(*table, unit)
        values, exact = int(low) + unit * states, True
    else:
        totals, steps, states, values, exact = _listed(*table)
    return Frontier(values, totals, exact, table, group, tuple(steps), states)


def lagrangian_bound(omega: np.ndarray, cost: np.ndarray, allowed: np.ndarray, limit: float) -> float:
    """A lower bound of the least Omega within `limit`: the maximum over mu >= 0 of

        sum_i min_c (omega[i, c] + mu cost[i, c]) - mu limit.

    The maximum is over the slopes between two options of a layer, among which the concave dual function has its
    kinks, so it is that of the linear relaxation. Tables are (layers, choices).
    """
    cost = cost.astype(np.float64)
    rise, run = omega[:, :, None] - omega[:, None, :], cost[:, None, :] - cost[:, :, None]
    both = allowed[:, :, None] & allowed[:, None, :] & (run > 0) & (rise > 0)
    slopes = np.sort(np.append(rise[both] / run[both], 0.0))
    masked = np.where(allowed, omega, np.inf)
    if limit == np.inf:
        return float(masked.min(1).sum())
    together = max(4, AT_ONCE // cost.size)  # with four places the next step has fewer slopes
    while True:
        places = np.linspace(0, len(slopes) - 1, min(together, len(slopes))).astype(np.intp)
        mu = slopes[places]
        dual = (masked + mu[:, None, None] * cost).min(2).sum(1) - mu * limit
        if len(places) == len(slopes):
            return float(dual.max())
        best = int(dual.argmax())  # it is concave in mu, so its maximum is beside the best of these places
        slopes = slopes[places[max(best - 1, 0)] : places[min(best + 1, len(places) - 1)] + 1]


@dataclass(frozen=True)
class _Step:
    """What one layer did to the states: the option of each, and where it came from."""

    option: np.ndarray
    parent: np.ndarray | None  # of each state; None when the parent is the state less the option's shift
    shift: np.ndarray

    def back(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        option = self.option[states].astype(np.intp)
        return option, self.parent[states] if self.parent is not None else states - self.shift[option]


def _tabulated(
    omega: np.ndarray, cost: np.ndarray, allowed: np.ndarray, unit: int
) -> tuple[np.ndarray, list[_Step], np.ndarray]:
    """Least Omega at every multiple of the unit above the least cost; a state is that multiple."""
    least = np.where(allowed, cost, np.iinfo(np.int64).max).min(1, keepdims=True)
    shifts = np.where(allowed, (cost - least) // unit, 0)
    best, steps = np.zeros(1), []
    for values, shift, may in zip(omega, shifts, allowed, strict=True):
        count, starts = len(best), shift.tolist()
        first, *others = np.flatnonzero(may).tolist()
        found = np.full(count + max(starts), np.inf)
        option = np.full(len(found), first, np.int8 if len(may) < 128 else np.int32)
        np.add(best, values[first], out=found[starts[first] : starts[first] + count])
        for choice in others:
            place = slice(starts[choice], starts[choice] + count)
            candidate = best + values[choice]
            better = candidate < found[place]
            np.copyto(found[place], candidate, where=better)
            np.copyto(option[place], choice, where=better, casting="unsafe")
        best = found
        steps.append(_Step(option, None, shift))
    states = _undominated(best)
    return best[states], steps, states


def _listed(
    omega: np.ndarray, cost: np.ndarray, allowed: np.ndarray
) -> tuple[np.ndarray, list[_Step], np.ndarray, np.ndarray, bool]:
    """The list of undominated settings; a state is a place in the list."""
    costs, best, steps, exact = np.zeros(1, cost.dtype), np.zeros(1), [], True
    for values, prices, may in zip(omega, cost, allowed, strict=True):
        options = np.flatnonzero(may)
        all_costs = (costs + prices[options, None]).ravel()
        all_best = (best + values[options, None]).ravel()
        order = np.lexsort((all_best, all_costs))
        kept = order[_undominated(all_best[order])]
        if len(kept) > CELLS:
            exact = False
            edges = np.linspace(all_costs[kept[0]], all_costs[kept[-1]], CELLS + 1)
            interval = np.searchsorted(edges, all_costs[kept], "left")
            kept = kept[np.append(np.diff(interval) > 0, True)]  # the last of an interval has its least Omega
        steps.append(_Step(options[kept // len(best)], kept % len(best), prices))
        costs, best = all_costs[kept], all_best[kept]
    return best, steps, np.arange(len(best)), costs, exact


def _undominated(omega: np.ndarray) -> np.ndarray:
    """The places where Omega falls below all values before it."""
    before = np.minimum.accumulate(np.append(np.inf, omega[:-1]))
    return np.flatnonzero(omega < before)
