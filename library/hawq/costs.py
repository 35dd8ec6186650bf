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


def checked_table(
    omega: ArrayLike, cost: ArrayLike, allowed: ArrayLike | None, name: str = "cost"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sensitivities, costs and permissions as arrays (layers, choices). Raises InputError that says what is wrong."""
    omega, cost = np.asarray(omega, np.float64), np.asarray(cost)
    if omega.ndim != 2 or omega.size == 0 or cost.shape != omega.shape:
        raise InputError(f"omega and {name} must be (layers, choices), got {omega.shape} and {cost.shape}")
    if not np.isfinite(omega).all() or not np.isfinite(cost).all() or (cost < 0).any():
        raise InputError(f"omega and {name} must be finite, and {name} not negative")
    allowed = np.ones(omega.shape, bool) if allowed is None else np.asarray(allowed, bool)
    if allowed.shape != omega.shape or not allowed.any(1).all():
        raise InputError(f"allowed must be {omega.shape} with at least one choice for each layer")
    return omega, cost, allowed
