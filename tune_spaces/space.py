"""Space: what a search varies over a training job's fields, what is best, and what must hold meanwhile."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from library.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Searcher = Literal["tpe", "nsga2", "random"]


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, uniform, or uniform in their logarithm with `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (self.low < self.high and math.isfinite(self.high - self.low)) or (self.log and self.low <= 0):
            raise InputError(f"range {self.low} to {self.high}{' in logarithms' if self.log else ''} is empty or unfit")

    @property
    def example(self) -> float:
        """A value in the range."""
        return self.low

    def distribution(self) -> "BaseDistribution":
        """The range as Optuna knows it."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(f"range {self.low} to {self.high} is empty")

    @property
    def example(self) -> int:
        """A value in the range."""
        return self.low

    def distribution(self) -> "BaseDistribution":
        """The range as Optuna knows it."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of a few values without an order."""

    values: tuple[str | int | float | bool | None, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("a choice needs at least one value")

    @property
    def example(self) -> str | int | float | bool | None:
        """One of the values."""
        return self.values[0]

    def distribution(self) -> "BaseDistribution":
        """The choice as Optuna knows it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


Domain = Real | Whole | Choice


@dataclass(frozen=True)
class Limit:
    """A metric, smaller is better, that a trial must keep near that of a reference run.

    The reference is the searched job with the fields `reference` set; it runs once, before the trials. At a step
    where the trial's metric is v and the reference's at the same step is r, the trial's excess is

        max(0, (v - r) / |r| - slack),

    and it is feasible when that is 0. An excess costs `penalty` times itself of what is optimised.
    """

    metric: str
    slack: float
    penalty: float
    reference: Mapping[str, Any]

    def excess(self, value: float, reference: float) -> float:
        """How far `value` lies beyond the slack, relative to the reference (absolutely where that is 0)."""
        return max(0.0, (value - reference) / (abs(reference) or 1.0) - self.slack)


@dataclass(frozen=True)
class Space:
    """A search over a training job. `varies` maps dotted paths of the job's fields to what they may be.

    `metric` is one that the training shows (`loss`, `validation_...`, or what the recipe notices after a step), and
    `mode` whether less or more of it is better. `reduction` is that of asynchronous successive halving: at one
    ninth and at one third of the steps (for 3) a trial outside the best third of those that came so far stops; None
    lets every trial run to its end.

    `others` are further metrics that are traded against the first, each to be least or greatest ("min", "max"): the
    search then looks for the trials that no other one beats in all of them. `baselines` are settings, by the name of
    their group, that run to their end beside the search, to be compared with it.

    >>> space = Space("toy", {"recipe.lr": Real(1e-4, 1e-1, log=True)}, metric="validation_loss")
    >>> space.objective(2.5)
    2.5
    """

    name: str
    varies: Mapping[str, Domain]
    metric: str
    mode: Literal["min", "max"] = "min"
    limit: Limit | None = None
    samples: int = 16
    searcher: Searcher = "tpe"
    reduction: int | None = 3
    others: Mapping[str, Literal["min", "max"]] = field(default_factory=dict)
    baselines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def objective(self, value: float, excess: float = 0.0) -> float:
        """What searcher and scheduler compare, in the direction of `mode`: the metric, worsened by the penalty."""
        cost = self.limit.penalty * excess if self.limit else 0.0
        return value + cost if self.mode == "min" else value - cost
