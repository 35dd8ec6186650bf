"""The selection under several budgets at once, as an integer linear programme."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from library.errors import InputError, PrismError
from library.hawq.costs import attainable, checked_table, joined
from library.hawq.pareto import Selection, lagrangian_bound


def select(
    omega: ArrayLike,
    costs: Mapping[str, ArrayLike],
    limits: Mapping[str, float],
    *,
    ties: Sequence[Sequence[int]] = (),
    allowed: ArrayLike | None = None,
) -> Selection:
    """The choice of least sum_i omega[i, c_i] with sum_i costs[k][i, c_i] <= limits[k] for every budget k.

    Exact, by branch and bound (HiGHS, through `scipy.optimize.milp`). `cost`, `limit` and `lower_bound` of the
    result are those of the first budget. Raises InputError for budgets that cannot be met, naming the attainable
    interval of each. Source: HAWQ-V3, Yao et al., 2021, section 3.4.
    """
    if not limits or limits.keys() != costs.keys():
        raise InputError(f"limits are for {', '.join(limits) or 'nothing'}, costs for {', '.join(costs) or 'nothing'}")
    tables = {name: checked_table(omega, cost, allowed, name) for name, cost in costs.items()}
    values, _, permitted = next(iter(tables.values()))
    values, group = joined(values, ties)
    may = np.logical_not(joined(~permitted, ties)[0])
    prices = {name: joined(table[1], ties)[0].astype(np.float64) for name, table in tables.items()}
    if not may.any(1).all():
        raise InputError("ties: layers that must share bits have no choice in common")
    rows = np.arange(len(values))
    choice = _least(values, prices, limits, may)
    while True:  # the solver's gap is absolute: leave out what costs more alone than all layers of the incumbent
        total = values[rows, choice].sum()
        left = may & (values <= total)
        if not total > 0 or values[left].max() >= values[may].max() / 2:
            break
        may, choice = left, _least(values, prices, limits, left)
    first = next(iter(limits))
    return Selection(
        choice=choice[group],
        omega=float(values[rows, choice].sum()),
        cost=float(prices[first][rows, choice].sum()),
        limit=float(limits[first]),
        lower_bound=lagrangian_bound(values, prices[first], may, limits[first]),
        exact=True,
    )


def _least(
    values: np.ndarray, prices: Mapping[str, np.ndarray], limits: Mapping[str, float], may: np.ndarray
) -> np.ndarray:
    """The solver's choice for each group."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups, choices = values.shape
    constraints = [LinearConstraint(csr_array(np.kron(np.eye(groups), np.ones((1, choices)))), 1, 1)]
    for name, limit in limits.items():
        unit = max(abs(limit), np.finfo(np.float64).tiny)
        constraints.append(LinearConstraint(prices[name].reshape(1, -1) / unit, -np.inf, limit / unit * (1 + 1e-12)))
    found = milp(
        np.where(may, values, 0).ravel() / (values[may].max() or 1.0),
        constraints=constraints,
        bounds=Bounds(0, may.ravel().astype(float)),
        integrality=np.ones(values.size),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:
        ranges = [
            f"{name} {limits[name]:.6g} of {low:.6g} to {high:.6g}"
            for name, (low, high) in ((name, attainable(cost, may)) for name, cost in prices.items())
        ]
        raise InputError(f"no setting meets the limits together: {'; '.join(ranges)}")
    if not found.success:
        raise PrismError(f"the integer programme was not solved: {found.message}")
    return found.x.reshape(groups, choices).argmax(1)
