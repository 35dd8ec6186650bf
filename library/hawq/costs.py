"""What a choice of bits costs: model size, bit operations, or a measured latency; and layers that must share bits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from library.errors import InputError


class BitChoice(NamedTuple):
    """One choice for a layer: bits of its weights, and of its input."""

    weight: int
    activation: int = 8


def numbers(values: ArrayLike, name: str) -> np.ndarray:
    """Values as an array: whole ones stay whole, all others are float64. Raises InputError when some are no numbers."""
    try:
        found = np.asarray(values)
        if found.dtype.kind in "US":
            raise ValueError("got text")
        return found if found.dtype.kind in "iu" else found.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: a table of numbers in rows of equal length is needed: {error}") from error


def size_costs(n_params: ArrayLike, choices: Sequence[BitChoice]) -> np.ndarray:
    """Bits of the weights, n_i b: int64 (layers, choices)."""
    return np.asarray(n_params, np.int64)[:, None] * np.array([choice.weight for choice in choices], np.int64)


def bops_costs(macs: ArrayLike, choices: Sequence[BitChoice]) -> np.ndarray:
    """Bit operations of one sample, MACs_i b_w b_a: int64 (layers, choices). Source: HAWQ-V3, Yao et al., 2021."""
    products = np.array([choice.weight * choice.activation for choice in choices], np.int64)
    return np.asarray(macs, np.int64)[:, None] * products


def joined(costs: np.ndarray, ties: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Costs (groups, choices) summed over tied layers, and the group of each layer (layers,).

    `ties` are sets of layers that must have the same bits; sets that share a layer become one. Raises InputError for
    a layer that does not exist.
    """
    costs = np.asarray(costs)
    group = np.arange(len(costs))
    if not ties:
        return costs.copy(), group
    for tie in ties:
        wrong = [layer for layer in tie if not 0 <= layer < len(costs)]
        if wrong:
            raise InputError(f"ties: there is no layer {wrong[0]}; layers are 0 to {len(costs) - 1}")
        for other in tie[1:]:
            group[group == group[other]] = group[tie[0]]
    _, group = np.unique(group, return_inverse=True)
    total = np.zeros((group.max() + 1, costs.shape[1]), costs.dtype)
    np.add.at(total, group, costs)
    return total, group


def attainable(costs: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
    """Least and greatest total cost over the allowed choices of each layer."""
    least = np.where(allowed, costs, np.inf).min(1).sum()
    return float(least), float(np.where(allowed, costs, -np.inf).max(1).sum())


def rounded_limit(limit: float, name: str = "limit") -> float:
    """A limit with room for the rounding of a sum, yet less than one unit. Raises InputError for NaN."""
    if np.isnan(limit):
        raise InputError(f"{name} must be a number, got {limit}")
    return limit + min(1e-12 * abs(limit), 0.25) if np.isfinite(limit) else limit


def checked_table(
    omega: ArrayLike, cost: ArrayLike, allowed: ArrayLike | None, name: str = "cost"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sensitivities, costs and permissions as arrays (layers, choices). Raises InputError that says what is wrong.

    Whole costs become int64, which their total must fit.
    """
    omega, cost = numbers(omega, "omega").astype(np.float64), numbers(cost, name)
    if omega.ndim != 2 or omega.size == 0 or cost.shape != omega.shape:
        raise InputError(f"omega and {name} must be (layers, choices), got {omega.shape} and {cost.shape}")
    if not np.isfinite(omega).all() or not np.isfinite(cost).all() or (cost < 0).any():
        raise InputError(f"omega and {name} must be finite, and {name} not negative")
    if cost.dtype.kind in "iu" and int(cost.max()) * len(cost) >= 2**62:
        raise InputError(f"{name}: whole costs up to {cost.max()} are too large to add up; give them in a larger unit")
    cost = cost.astype(np.int64 if cost.dtype.kind in "iu" else np.float64)
    allowed = np.ones(omega.shape, bool) if allowed is None else np.asarray(allowed, bool)
    if allowed.shape != omega.shape or not allowed.any(1).all():
        raise InputError(f"allowed must be {omega.shape} with at least one choice for each layer")
    return omega, cost, allowed
