"""What the endpoint `corrosion` takes and gives."""

import math
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.endpoint import Request, Response, optional

MOST_ROWS = 20_000  # rows and horizons of one request
MOST_HORIZON = 1000
EXAMPLE_HOURS = 48


def _weather(hours: int, begin: int = 0) -> dict[str, list[float] | list[str]]:
    start = datetime(2024, 5, 1, tzinfo=UTC) + timedelta(hours=begin)
    day = [2 * math.pi * (begin + i) / 24 for i in range(hours)]
    return {
        "time": [(start + timedelta(hours=i)).isoformat() for i in range(hours)],
        "temperature": [round(14 - 5 * math.cos(angle), 1) for angle in day],
        "humidity": [round(72 + 16 * math.cos(angle), 1) for angle in day],
        "rain": [0.8 if 20 <= begin + i < 24 else 0.0 for i in range(hours)],
        "wind": [round(4 + math.sin(angle), 1) for angle in day],
    }


def example_site(hours: int, begin: int = 0) -> dict[str, Any]:
    content = _weather(hours, begin)
    return {"time": content.pop("time"), "inputs": content}


UNITS = {"temperature": "C", "humidity": "percent", "rain": "mm/h", "wind": "m/s"}


class Environment(BaseModel):
    """Rows of one site: their times, and a list of numbers for each input, as long as the times."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    time: list[str | float] = Field(
        min_length=1,
        max_length=MOST_ROWS,
        fail_fast=True,
        description="ISO 8601, UTC where no zone is given; or hours since 1970.",
    )
    inputs: dict[str, Annotated[list[float | None], Field(fail_fast=True)]] = Field(
        min_length=1, description="By name: those of the model, in any order; see `recipe.series.inputs` in /info."
    )


class Site(Environment):
    """What was observed at one site: a new series, or the next rows of one whose state is given."""

    state: str | None = Field(
        None, max_length=1 << 20, description="What the answer to the rows before gave; then one new row is enough."
    )


class CorrosionRequest(Request):
    """Sites with what was observed there, and how far to look ahead."""

    series: list[Site] = Field(min_length=1, max_length=256, description="One or several sites.")
    units: dict[str, str] = Field(description="The unit of each input, such as temperature: C, F or K.")
    horizon: int = Field(24, ge=0, le=MOST_HORIZON, description="Rows to forecast; 0 for none.")
    future: list[Environment] = optional(
        min_length=1, max_length=256, description="A weather forecast for each site, `horizon` rows after its last."
    )
    level: float = Field(0.8, gt=0, lt=1, description="Share of outcomes that an interval should hold.")
    explain: bool = Field(False, description="Say the time scales of the reservoirs, and the nowcast of every row.")

    @model_validator(mode="after")
    def _future_fits(self) -> Self:
        if self.future is not None and len(self.future) != len(self.series):
            raise ValueError(f"future: {len(self.future)} sites, there are {len(self.series)}")
        return self


class Curve(BaseModel, frozen=True):
    """A quantity over some rows, and the ends of its interval."""

    name: str
    unit: str
    mean: list[float]
    lower: list[float]
    upper: list[float]


class SiteForecast(BaseModel, frozen=True):
    """What is said of one site."""

    nowcast: list[Curve] = Field(description="At the last row given, or with `explain` at all of them.")
    time: list[str] = Field(description="Times of the forecast.")
    forecast: list[Curve] = Field(description="The rate and the loss since the stream began, or the series themselves.")
    state: str = Field(description="Send it with the next rows; it has the same length however long the stream is.")
    warnings: list[str] = Field(description="Why not to trust this answer too far.")


class Scale(BaseModel, frozen=True):
    """A reservoir's memory."""

    reservoir: str
    kind: str
    hours: float | None = Field(description="Longest time scale at the mean input; null where none is defined.")
    annulus: tuple[float | None, float | None] = Field(description="Least and largest modulus of its eigenvalues.")


class CorrosionResponse(Response):
    """One answer for each site, in their order."""

    simulated: bool = Field(description="Whether the model learned from simulated corrosion.")
    results: list[SiteForecast]
    time_scales: list[Scale] | None = None
