"""The selection under several budgets at once, as an integer linear programme."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from library.errors import InputError, PrismError
from library.hawq.costs import attainable, checked_table, joined, rounded_limit
from library.hawq.pareto import Selection, lagrangian_bound

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CELLS = 1 << 16  # partial settings that are held at a time
TOLERANCE = 2e-6  # by which the solver may exceed a limit, relative


def select(
    omega: ArrayLike,
    costs: Mapping[str, ArrayLike],
    limits: Mapping[str, float],
    *,
    ties: Sequence[Sequence[int]] = (),
    allowed: ArrayLike | None = None,
) -> Selection:
    """The choice of least sum_i omega[i, c_i] with sum_i costs[k][i, c_i] <= limits[k] for every budget k.

    Branch and bound (HiGHS, through `scipy.optimize.milp`) meets the limits and ends only within tolerances. So its
    setting is checked against the limits, and every setting that could still beat it is gone through, layer by layer;
    `exact` is false when those are more than 2^16 at a time. `cost`, `limit` and `lower_bound` of the result are those
    of the first budget. Raises InputError for budgets that cannot be met, naming the attainable interval of each.
    Source: HAWQ-V3, Yao et al., 2021, section 3.4.
    """
    if not limits or limits.keys() != costs.keys():
        raise InputError(f"limits are for {', '.join(limits) or 'nothing'}, costs for {', '.join(costs) or 'nothing'}")
    tables = {name: checked_table(omega, cost, allowed, name) for name, cost in costs.items()}
    values, _, permitted = next(iter(tables.values()))
    values, group = joined(values, ties)
    may = np.logical_not(joined(~permitted, ties)[0])
    if not may.any(1).all():
        raise InputError("ties: layers that must share bits have no choice in common")
    prices = np.stack([joined(tables[name][1], ties)[0] for name in limits]).astype(np.float64)
    bounds = np.array([rounded_limit(limits[name], f"limit of {name}") for name in limits])
    bounds = np.clip(bounds, -1, 2 * prices.max(2).sum(1))  # beyond these a limit is as good as infinite
    problem = _Problem(values - np.where(may, values, np.inf).min(1, keepdims=True), prices, bounds, may)
    near = _near(problem)
    choice, exact = (None, True) if near is None and _solved(problem, 0.0) is None else _best(problem, near)
    if choice is None and exact:
        ranges = [
            f"{name} {limits[name]:.6g} of {low:.6g} to {high:.6g}"
            for name, (low, high) in ((name, attainable(cost, may)) for name, cost in zip(limits, prices, strict=True))
        ]
        raise InputError(f"no setting meets the limits together: {'; '.join(ranges)}")
    if choice is None:
        raise PrismError("the integer programme was not solved: no setting was found within the solver's tolerance")
    rows, first = np.arange(len(values)), next(iter(limits))
    return Selection(
        choice=choice[group],
        omega=float(values[rows, choice].sum()),
        cost=float(prices[0][rows, choice].sum()),
        limit=float(limits[first]),
        lower_bound=lagrangian_bound(values, prices[0], may, limits[first]),
        exact=exact,
    )


class _Problem(NamedTuple):
    """Omega above each group's least (groups, choices), costs (budgets, groups, choices), limits, allowed choices."""

    values: np.ndarray
    prices: np.ndarray
    limits: np.ndarray
    may: np.ndarray

    def total(self, choice: np.ndarray) -> float:
        return float(self.values[np.arange(len(choice)), choice].sum())

    def holds(self, choice: np.ndarray) -> bool:
        return bool((self.prices[:, np.arange(len(choice)), choice].sum(1) <= self.limits).all())


def _near(problem: _Problem) -> np.ndarray | None:
    """A setting within the limits, the best but for the solver's tolerances; None where they hide all of them."""
    choice = next(
        (
            found
            for slack in (0.0, TOLERANCE)
            if (found := _solved(problem, slack)) is not None and problem.holds(found)
        ),
        None,
    )
    while choice is not None:  # the gap is absolute: leave out what costs more alone than all layers of this setting
        left = problem.may & (problem.values <= problem.total(choice))
        if not problem.values[left].max() < problem.values[problem.may].max() / 2:
            break
        problem = problem._replace(may=left)
        better = _solved(problem, 0.0)
        if better is None or not problem.holds(better) or problem.total(better) > problem.total(choice):
            break
        choice = better
    return choice


def _solved(problem: _Problem, slack: float) -> np.ndarray | None:
    """The solver's choice for each group, with limits lowered by a share `slack`; None when it finds none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    weights, matrix, limits = _scaled(problem)
    one_each = LinearConstraint(_memberships(problem.may.shape), 1, 1)
    found = milp(
        weights,
        constraints=[one_each, LinearConstraint(matrix, -np.inf, limits - slack * np.abs(limits))],
        bounds=Bounds(0, problem.may.ravel().astype(float)),
        integrality=np.ones(problem.may.size),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:
        return None
    if not found.success:
        raise PrismError(f"the integer programme was not solved: {found.message}")
    return found.x.reshape(problem.may.shape).argmax(1)


def _best(problem: _Problem, known: np.ndarray | None) -> tuple[np.ndarray | None, bool]:
    """The best setting, and whether that is proven. Budgets that do not bind are left out where that suffices."""
    if known is not None:
        problem = problem._replace(may=problem.may & (problem.values <= problem.total(known)))
    mu = _multipliers(problem)
    binding = mu > 0
    if binding.any() and not binding.all():
        fewer = problem._replace(prices=problem.prices[binding], limits=problem.limits[binding])
        choice, exact = _swept(fewer, mu[binding], known)
        if exact and choice is not None and problem.holds(choice):
            return choice, True
    return _swept(problem, mu, known)


def _swept(problem: _Problem, mu: np.ndarray, known: np.ndarray | None) -> tuple[np.ndarray | None, bool]:
    """The best setting, going through all that may beat a `known` one, and whether none had to be left out.

    With prices mu of the budgets a choice costs r = Omega + mu cost - (the group's least of it) >= 0, and a setting
    has Omega >= dual bound + sum of r: partial settings that exceed the known total are left out, and so are those
    that cannot meet a limit any more, and those that another one beats in Omega and all costs.
    """
    reduced = np.where(problem.may, problem.values + np.tensordot(mu, problem.prices, 1), np.inf)
    least = reduced.min(1)
    room = np.inf if known is None else problem.total(known) - (least.sum() - mu @ problem.limits)
    room += 1e-12 * (least.sum() + mu @ problem.limits)
    ahead = np.where(problem.may, problem.prices, np.inf).min(2)
    ahead = ahead.sum(1, keepdims=True) - ahead.cumsum(1)  # the least that the later groups cost
    limits = problem.limits[:, None] + 1e-9 * np.abs(problem.limits[:, None])  # of parts, whose sums are rounded
    omega, excess, cost, trail, exact = np.zeros(1), np.zeros(1), np.zeros((len(mu), 1)), [], True
    for group, may in enumerate(problem.may):
        options, count = np.flatnonzero(may), len(omega)
        omega = (omega + problem.values[group, options, None]).ravel()
        excess = (excess + (reduced[group, options, None] - least[group])).ravel()
        cost = (cost[:, None] + problem.prices[:, group, options, None]).reshape(len(mu), -1)
        within = (cost + ahead[:, group, None] <= limits).all(0)
        kept = np.flatnonzero(within & (excess <= room))
        kept = kept[_undominated(omega[kept], cost[:, kept])]
        if len(kept) > CELLS and known is not None:
            return known, False
        if len(kept) > CELLS:
            exact, kept = False, kept[np.argpartition(excess[kept], CELLS)[:CELLS]]
        trail.append((options[kept // count], kept % count))
        omega, excess, cost = omega[kept], excess[kept], cost[:, kept]
    good = np.flatnonzero((cost <= problem.limits[:, None]).all(0))
    if not len(good) or (known is not None and omega[good].min() >= problem.total(known)):
        return known, exact
    state, choice = good[omega[good].argmin()], []
    for options, parents in reversed(trail):
        choice.append(options[state])
        state = parents[state]
    return np.array(choice[::-1]), exact


def _undominated(omega: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Places of the settings without those that others beat: most of these for two budgets, equal costs for more.

    In the order of Omega one is beaten when the staircase of earlier costs (first falls into a step, least second of
    it) lies below. Those within a block are not compared with each other.
    """
    order = np.lexsort((*cost, omega))
    if len(cost) > 2:
        order = np.lexsort((omega, *cost))
        return order[np.append(True, (np.diff(cost[:, order]) != 0).any(0))[: len(order)]]
    first, second, kept, start, size = np.array([-np.inf]), np.array([np.inf]), [order[:0]], 0, 16
    while start < len(order):
        block = order[start : start + size]
        one, two = cost[0, block], cost[-1, block]
        free = second[np.searchsorted(first, one, "right") - 1] > two
        kept.append(block[free])
        first, second = np.append(first, one[free]), np.append(second, two[free])
        steps = np.lexsort((second, first))
        first, second = first[steps], np.minimum.accumulate(second[steps])
        lower = np.append(True, np.diff(second) < 0)
        first, second = first[lower], second[lower]
        start, size = start + size, min(2 * size, 4096)
    return np.concatenate(kept)


def _multipliers(problem: _Problem) -> np.ndarray:
    """The prices mu >= 0 of the budgets in the linear relaxation; any are valid, these prove most."""
    from scipy.optimize import linprog

    weights, matrix, limits = _scaled(problem)
    found = linprog(
        weights,
        A_ub=matrix,
        b_ub=limits,
        A_eq=_memberships(problem.may.shape),
        b_eq=np.ones(len(problem.may)),
        bounds=np.stack([np.zeros(problem.may.size), problem.may.ravel()], 1),
    )
    if not found.success:
        return np.zeros(len(problem.limits))
    return np.maximum(0, -found.ineqlin.marginals) * _largest(problem) / _units(problem)


def _scaled(problem: _Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objective, rows and limits of the programme, of about unit size."""
    units = _units(problem)
    weights = np.where(problem.may, problem.values, 0).ravel() / _largest(problem)
    return weights, problem.prices.reshape(len(units), -1) / units[:, None], problem.limits / units


def _largest(problem: _Problem) -> float:
    return float(problem.values[problem.may].max()) or 1.0


def _units(problem: _Problem) -> np.ndarray:
    units = np.maximum(np.abs(problem.limits), 1e-9 * problem.prices.max((1, 2)))
    return np.where(units > 0, units, 1.0)


def _memberships(shape: tuple[int, int]) -> "csr_array":
    from scipy.sparse import csr_array

    return csr_array(np.kron(np.eye(shape[0]), np.ones((1, shape[1]))))
