"""Bits for a network that is given by numbers alone: its traces, sizes and perturbations. No model is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from library.errors import InputError
from library.hawq.analysis import CONFIDENCE, RESAMPLES, Sensitivity, positive_curvature
from library.hawq.costs import BitChoice, numbers
from library.hawq.layers import LayerTable
from library.hawq.plan import Budget, frontier
from library.hawq.quantizers import bit_numbers

SHOWN = 200  # points of a frontier that are handed over


@dataclass(frozen=True)
class Advice:
    """The best bits within a limit, `lower_bound` <= `omega`, the `frontier` as (cost, omega), and what to beware of.

    `stability` is the share of traces, drawn within their standard errors, that would choose the same bits.
    """

    bits: tuple[int, ...]
    omega: float
    cost: float
    limit: float
    lower_bound: float
    frontier: tuple[tuple[float, float], ...]
    stability: float | None
    warnings: tuple[str, ...]

    @property
    def slack(self) -> float:
        """What the limit leaves over."""
        return self.limit - self.cost


def described(
    traces: Sequence[float],
    n_params: Sequence[int],
    perturbation: Sequence[Sequence[float]],
    bits: Sequence[int],
    *,
    macs: Sequence[int] | None = None,
    errors: Sequence[float] | None = None,
) -> Sensitivity:
    """A sensitivity from numbers: mean traces Tr(H_i)/n_i, weights n_i, ||Q_b(W_i) - W_i||^2 (layers, bits).

    Layers are named by their number. Raises InputError for lengths that differ, values that are no numbers or not
    finite, sizes that are not whole, and bits outside 2 to 16.
    """
    count = len(traces)
    lengths = {"n_params": n_params, "perturbation": perturbation, "macs": macs, "errors": errors}
    for name, values in lengths.items():
        if values is not None and len(values) != count:
            raise InputError(f"{name}: {len(values)} entries for {count} traces")
    bits = bit_numbers(list(bits))
    if count == 0 or any(len(row) != len(bits) for row in perturbation):
        raise InputError(f"perturbation: {count} rows of {len(bits)} entries are needed, one per bit number")
    squares, trace = _tensor(perturbation, "perturbation"), _tensor(traces, "traces")
    if not bool(torch.isfinite(trace).all() and torch.isfinite(squares).all() and (squares >= 0).all()):
        raise InputError("traces and perturbation must be finite, and perturbation not negative")
    layers = LayerTable(
        tuple(map(str, range(count))), _whole(n_params, "n_params", 1), _whole(macs or [0] * count, "macs", 0)
    )
    error = torch.full_like(trace, float("nan")) if errors is None else _tensor(errors, "errors")
    negative = [str(i) for i, value in enumerate(trace.tolist()) if value <= 0]
    notes = (f"layers {', '.join(negative)}: a trace that is not positive counts as 0",) if negative else ()
    omega = positive_curvature(trace)[:, None] * squares
    return Sensitivity("hessian", layers, tuple(bits), trace, error, error * float("nan"), squares, omega, notes=notes)


def _tensor(values: Sequence[Any], name: str) -> torch.Tensor:
    return torch.from_numpy(numbers(values, name).astype(np.float64))


def _whole(values: Sequence[int], name: str, least: int) -> tuple[int, ...]:
    found = _tensor(values, name)
    wrong = found[~((found >= least) & (found < 2**53) & (found == found.floor()))].tolist()
    if wrong:
        raise InputError(f"{name} must be whole numbers of at least {least}, got {wrong[0]:g}")
    return tuple(map(int, found.tolist()))


def advise(
    found: Sensitivity, budget: Budget, *, ties: Sequence[Sequence[int]] = (), activation: int = 8, seed: int = 0
) -> Advice:
    """The best bits of a network within a budget, the frontier around them, and how stable the choice is.

    Raises InputError for a budget that cannot be met (with what can), ties that do not fit, or bit operations without
    multiply-accumulates.
    """
    if budget.kind == "bops" and not any(found.layers.macs):
        raise InputError("macs: bit operations need the multiply-accumulates of each layer")
    names = found.layers.names
    wrong = [layer for tie in ties for layer in tie if not 0 <= layer < len(names)]
    if wrong:
        raise InputError(f"ties: there is no layer {wrong[0]}; layers are 0 to {len(names) - 1}")
    options = {"choices": [BitChoice(b, activation) for b in found.bits]}
    options["ties"] = [[names[layer] for layer in tie] for tie in ties]
    front = frontier(found, budget, **options)
    plan = front.plan()
    stability, warnings = None, list(found.notes)
    if bool(torch.isfinite(found.probe_error).all()):
        generator = torch.Generator().manual_seed(seed)
        same = 0
        for _ in range(RESAMPLES):
            noise = torch.randn(len(names), generator=generator, dtype=torch.float64)
            curvature = positive_curvature(found.curvature + found.probe_error * noise)
            drawn = replace(found, omega=curvature[:, None] * found.perturbation)
            same += frontier(drawn, budget, **options).plan().bits == plan.bits
        stability = same / RESAMPLES
        if stability < CONFIDENCE:
            warnings.append(f"only {stability:.0%} of traces within their errors choose these bits; take more probes")
    heavy = max(found.layers.n_params) / sum(found.layers.n_params)
    if heavy > 0.5 and min(plan.bits.values()) == 2:
        warnings.append(
            f"one layer holds {heavy:.0%} of the weights, and 2 bits were chosen: check the loss before use"
        )
    count = len(front.frontier)
    shown = range(count) if count <= SHOWN else np.linspace(0, count - 1, SHOWN).round().astype(int)
    return Advice(
        bits=tuple(plan.bits.values()),
        omega=plan.omega,
        cost=plan.selection.cost,
        limit=plan.selection.limit,
        lower_bound=plan.selection.lower_bound,
        frontier=tuple((float(front.frontier.cost[i]), float(front.frontier.omega[i])) for i in shown),
        stability=stability,
        warnings=tuple(warnings),
    )
