"""From sensitivities to bits: the frontier of a network's settings, and the plan that a budget picks from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat

from library.errors import InputError
from library.hawq.costs import BitChoice, bops_costs, numbers, size_costs
from library.hawq.layers import LayerTable
from library.hawq.pareto import Frontier, Selection
from library.hawq.pareto import frontier as exact_frontier
from library.hawq.programme import select

if TYPE_CHECKING:
    from library.hawq.analysis import Sensitivity

BudgetKind = Literal["size", "bops", "latency"]


class Budget(BaseModel, frozen=True, extra="forbid"):
    """A limit as a share of what the most bits would cost: 0.375 of 8 bits is 3 bits per weight on average."""

    kind: BudgetKind = "size"
    """Model size in bits, bit operations (multiply-accumulates x weight bits x input bits), or measured latency."""
    fraction: float = Field(0.375, gt=0, le=1)
    """Share of the cost of the setting with the most bits everywhere."""
    latency: tuple[tuple[FiniteFloat, ...], ...] = ()
    """For kind=latency: seconds of each layer (rows) at each choice of bits (columns)."""

    def costs(self, layers: LayerTable, choices: Sequence[BitChoice]) -> np.ndarray:
        """What each choice costs in each layer: (layers, choices). InputError for a latency table of another size."""
        if self.kind == "size":
            return size_costs(layers.n_params, choices)
        if self.kind == "bops":
            return bops_costs(layers.macs, choices)
        table = numbers(self.latency, "latency")
        if table.shape != (len(layers.names), len(choices)):
            raise InputError(
                f"latency: a table of {len(layers.names)} layers x {len(choices)} choices is needed, got {table.shape}"
            )
        return table

    def limit(self, layers: LayerTable, choices: Sequence[BitChoice]) -> float:
        """The limit in the kind's own unit."""
        return self.fraction * float(self.costs(layers, choices).max(1).sum())


@dataclass(frozen=True)
class BitPlan:
    """The bits of every layer, in the network's order, and what they cost.

    `omega` is the predicted sensitivity and `selection` says under which limit it is the least. `size` is in bits of
    the weights, `bops` in bit operations per sample; `mean_bits` is per weight.
    """

    layers: LayerTable
    choices: tuple[BitChoice, ...]
    omega: float
    selection: Selection | None = None

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the weights by layer."""
        return {name: choice.weight for name, choice in zip(self.layers.names, self.choices, strict=True)}

    @property
    def size(self) -> int:
        """Bits of all weights."""
        return int(sum(n * c.weight for n, c in zip(self.layers.n_params, self.choices, strict=True)))

    @property
    def bops(self) -> int:
        """Bit operations of one sample."""
        return int(sum(m * c.weight * c.activation for m, c in zip(self.layers.macs, self.choices, strict=True)))

    @property
    def mean_bits(self) -> float:
        """Bits per weight."""
        return self.size / sum(self.layers.n_params)


@dataclass(frozen=True)
class BitFrontier:
    """The settings of a network that no other one beats in both sensitivity and cost."""

    layers: LayerTable
    choices: tuple[BitChoice, ...]
    budget: Budget
    frontier: Frontier
    most: float

    def plan(self, fraction: float | None = None) -> BitPlan:
        """The least sensitive setting within a share of the cost of the most bits; the budget's when it is None.

        Raises InputError with the shares that can be met, and for NaN.
        """
        share = self.budget.fraction if fraction is None else fraction
        if math.isnan(share):
            raise InputError(f"budget fraction must be a number, got {share}")
        try:
            chosen = self.frontier.choose(share * self.most)
        except InputError as error:
            low = self.frontier.cost[0] / self.most
            raise InputError(f"budget fraction {share:g} cannot be met; the least is {low:.4g}, the most 1") from error
        return BitPlan(self.layers, tuple(self.choices[i] for i in chosen.choice), chosen.omega, chosen)


def frontier(
    sensitivity: "Sensitivity",
    budget: Budget | None = None,
    *,
    choices: Sequence[BitChoice] | None = None,
    ties: Sequence[Sequence[str]] = (),
    fixed: Mapping[str, int] | None = None,
) -> BitFrontier:
    """The exact Pareto frontier of a network: least Omega for every model size, bit operations or latency.

    `choices` are the bits that a layer may have (all that were measured, with 8-bit inputs, by default); layers in a
    set of `ties` share them; `fixed` gives the weight bits of layers that have no choice, such as the first and last.
    Raises InputError for names and bits that do not exist.

    >>> import torch
    >>> from library import hawq
    >>> from library.images import image_network
    >>> batch = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))
    >>> found = hawq.sensitivity(image_network("cnn8"), torch.nn.functional.cross_entropy, [batch], probes=10)
    >>> hawq.frontier(found).plan(0.5).mean_bits <= 4
    True
    """
    budget, choices, omega, cost, allowed, tied = _tables(sensitivity, budget, choices, ties, fixed)
    found = exact_frontier(omega, cost, ties=tied, allowed=allowed)
    return BitFrontier(sensitivity.layers, choices, budget, found, float(cost.max(1).sum()))


def plan_within(
    sensitivity: "Sensitivity",
    budgets: Sequence[Budget],
    *,
    choices: Sequence[BitChoice] | None = None,
    ties: Sequence[Sequence[str]] = (),
    fixed: Mapping[str, int] | None = None,
) -> BitPlan:
    """The least sensitive bits within several budgets of different kinds at once, by an integer programme."""
    kinds = [budget.kind for budget in budgets]
    if not kinds or len(set(kinds)) < len(kinds):
        raise InputError(f"budgets must be of different kinds, at least one; got {', '.join(kinds) or 'none'}")
    tables = {budget.kind: _tables(sensitivity, budget, choices, ties, fixed) for budget in budgets}
    _, options, omega, _, allowed, tied = next(iter(tables.values()))
    costs = {kind: table[3] for kind, table in tables.items()}
    limits = {budget.kind: budget.limit(sensitivity.layers, options) for budget in budgets}
    chosen = select(omega, costs, limits, ties=tied, allowed=allowed)
    return BitPlan(sensitivity.layers, tuple(options[i] for i in chosen.choice), chosen.omega, chosen)


def explicit_plan(
    sensitivity: "Sensitivity", bits: Sequence[int] | Sequence[BitChoice], *, activation: int = 8
) -> BitPlan:
    """The plan of given bits, one entry per layer. Raises InputError for another number of them, or for fractions."""
    layers = sensitivity.layers
    if len(bits) != len(layers.names):
        raise InputError(f"{len(bits)} bit numbers for {len(layers.names)} layers: {', '.join(layers.names)}")
    broken = [entry for entry in bits if not isinstance(entry, BitChoice) and entry != int(entry)]
    if broken:
        raise InputError(f"bits must be whole numbers, got {broken[0]}")
    given = tuple(entry if isinstance(entry, BitChoice) else BitChoice(int(entry), activation) for entry in bits)
    kinds = list(dict.fromkeys(given))
    table = sensitivity.table(kinds)
    return BitPlan(layers, given, float(sum(table[i, kinds.index(choice)] for i, choice in enumerate(given))))


def _tables(
    sensitivity: "Sensitivity",
    budget: Budget | None,
    choices: Sequence[BitChoice] | None,
    ties: Sequence[Sequence[str]],
    fixed: Mapping[str, int] | None,
) -> tuple[Budget, tuple[BitChoice, ...], np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    budget, layers = budget or Budget(), sensitivity.layers
    options = tuple(choices or (BitChoice(b) for b in sensitivity.bits))
    allowed = np.ones((len(layers.names), len(options)), bool)
    for name, bits in (fixed or {}).items():
        allowed[layers.index([name])[0]] = [option.weight == bits for option in options]
        if not allowed[layers.index([name])[0]].any():
            raise InputError(f"fixed: layer {name!r} cannot have {bits} bits; choices are {options}")
    tied = [layers.index(tie) for tie in ties]
    return budget, options, sensitivity.table(options), budget.costs(layers, options), allowed, tied
