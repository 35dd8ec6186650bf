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
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not limits or limits.keys() != costs.keys():
        raise InputError(f"limits are for {', '.join(limits) or 'nothing'}, costs for {', '.join(costs) or 'nothing'}")
    tables = {name: checked_table(omega, cost, allowed, name) for name, cost in costs.items()}
    values, _, permitted = next(iter(tables.values()))
    values, group = joined(values, ties)
    may = np.logical_not(joined(~permitted, ties)[0])
    prices = {name: joined(table[1], ties)[0].astype(np.float64) for name, table in tables.items()}
    groups, choices = values.shape
    one_each = csr_array(np.kron(np.eye(groups), np.ones((1, choices))))
    first = next(iter(limits))
    bound = lagrangian_bound(values, prices[first], may, limits[first]) if may.any(1).all() else 0.0
    scale = (bound if bound > 0 else np.abs(values).max() or 1.0) / 10  # far above the solver's absolute gap of 1e-6
    rows = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        unit = max(abs(limit), 1e-300)
        rows.append(LinearConstraint(prices[name].reshape(1, -1) / unit, -np.inf, limit / unit * (1 + 1e-12)))
    found = milp(
        values.ravel() / scale,
        constraints=rows,
        bounds=Bounds(0, may.ravel().astype(float)),
        integrality=np.ones(values.size),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2 or not may.any(1).all():
        ranges = [
            f"{name} {limits[name]:.6g} of {low:.6g} to {high:.6g}"
            for name, (low, high) in ((name, attainable(cost, may)) for name, cost in prices.items())
        ]
        raise InputError(f"no setting meets the limits together: {'; '.join(ranges)}")
    if not found.success:
        raise PrismError(f"the integer programme was not solved: {found.message}")
    choice = found.x.reshape(groups, choices).argmax(1)
    return Selection(
        choice=choice[group],
        omega=float(values[np.arange(groups), choice].sum()),
        cost=float(prices[first][np.arange(groups), choice].sum()),
        limit=float(limits[first]),
        lower_bound=bound,
        exact=True,
    )
