"""What a fitted forecaster's numbers mean: its inputs with their order, the spacing of rows, and its target."""

from typing import Self

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat
from torch import Tensor

from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.qrc.corrosion import GRAMS_PER_AMPERE_HOUR
from library.qrc.nowcast import FLOOR
from library.qrc.series import LOGARITHMIC, QUANTITIES, Series, driven


class Target(BaseModel, frozen=True, extra="forbid"):
    """A rate of corrosion as it is learned and as it is shown.

    >>> Target(name="current", unit="A/m2", logarithmic=True, floor=1e-6, grams=0.33552).natural(np.array(-6.0)).item()
    0.0
    """

    name: str
    """What it is called in answers."""
    unit: str
    """Unit of the rate."""
    logarithmic: bool = False
    """Whether log10(rate + floor) is learned."""
    floor: float = Field(0.0, ge=0)
    """What is added before the logarithm."""
    grams: PositiveFloat
    """Loss in g/m2 per hour at a rate of one unit."""
    simulated: bool = False
    """Whether the rates that were learned are simulated ones."""

    def natural(self, learned: np.ndarray) -> np.ndarray:
        """Rates in their unit, not below 0, from what is learned."""
        return np.maximum(10.0**learned - self.floor if self.logarithmic else learned, 0.0)


SIMULATED = Target(
    name="current", unit="A/m2", logarithmic=True, floor=FLOOR, grams=GRAMS_PER_AMPERE_HOUR, simulated=True
)
MEASURED = Target(name="rate", unit="g/m2/h", grams=1.0)


class Schema(BaseModel, frozen=True, extra="forbid"):
    """The columns of a series. Quantities that `library.qrc.series` knows have its units; others none."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Names of what drives the reservoir, in their order."""
    step: PositiveFloat
    """Hours between rows."""
    target: Target | None = None
    """What is predicted; None where a series is forecast from itself."""

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The schema that an artifact holds. Raises ArtifactError when it has none."""
        try:
            return cls.model_validate(artifact.recipe["series"])
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{artifact.path} does not say what its series are: {error}") from error

    def rows(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """What drives the reservoir, (rows, channels), from inputs by name in any order.

        Raises InputError for inputs that are missing or unknown.
        """
        if missing := [name for name in self.inputs if name not in inputs]:
            raise InputError(f"{missing[0]}: missing; this model needs {', '.join(self.inputs)}")
        if unknown := sorted(inputs.keys() - set(self.inputs)):
            raise InputError(f"{unknown[0]}: this model knows no such input; it takes {', '.join(self.inputs)}")
        return driven({name: inputs[name] for name in self.inputs})

    def natural(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs by name, in their own units, from what drives the reservoir (..., channels)."""
        return {
            name: np.expm1(rows[..., place]) if name in LOGARITHMIC else rows[..., place]
            for place, name in enumerate(self.inputs)
        }

    def unit(self, name: str) -> str:
        """The unit of an input; empty for a column of any other kind."""
        return QUANTITIES[name].unit if name in QUANTITIES else ""

    @classmethod
    def of_table(cls, series: Series, target: Target | None) -> Self:
        """The schema of a table."""
        return cls(inputs=tuple(series.inputs), step=series.step, target=target)


def loss_of(target: Target, learned: Tensor, step: float) -> np.ndarray:
    """Loss in g/m2 that has gathered along the last axis, from what is learned in rows `step` hours apart."""
    return np.cumsum(target.natural(learned.cpu().numpy()) * target.grams * step, -1)
