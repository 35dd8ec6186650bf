"""Environments of a surface: hourly temperature, humidity, rain and wind, and the shipped weather of three airports."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.samples import sample_file

STATIONS = ("EWR", "LGA", "JFK")
CHANNELS = ("temperature", "humidity", "rain", "wind")
GUST = 60.0  # m/s; a faster hourly wind is an error of the instrument
SAMPLE = "nyc_airports_2013_hourly.npz"
FIELDS = {"temperature": "temp_C", "humidity": "rel_humidity_pct", "rain": "precip_mm_h", "wind": "wind_speed_m_s"}


@dataclass(frozen=True)
class Environment:
    """Hourly weather, float64, each (hours,) or (series, hours).

    temperature degrees Celsius, humidity percent, rain mm/h, wind m/s; `start` is the time of the first hour.
    """

    temperature: Tensor
    humidity: Tensor
    rain: Tensor
    wind: Tensor
    start: datetime

    @property
    def hours(self) -> int:
        """How many."""
        return self.temperature.shape[-1]

    def inputs(self) -> Tensor:
        """What a reservoir is driven with, (..., hours, 4): temperature, humidity, log(1 + rain), wind."""
        return torch.stack([self.temperature, self.humidity, torch.log1p(self.rain), self.wind], -1)

    def part(self, begin: int, end: int) -> Self:
        """The hours from `begin` to before `end`."""
        return self._each(lambda values: values[..., begin:end])

    def rolled(self, hours: Tensor) -> Self:
        """One series for each of `hours` (series,): the year begins that many hours later and goes around."""
        places = (torch.arange(self.hours) + hours[:, None]) % self.hours
        return self._each(lambda values: values[places])

    def _each(self, change: Any) -> Self:
        return type(self)(**{name: change(getattr(self, name)) for name in CHANNELS}, start=self.start)


@lru_cache(maxsize=8)
def load_weather(station: str) -> Environment:
    """The year 2013 at one of `STATIONS`, 8730 hours, without gaps.

    Winds above 60 m/s count as missing. Missing values are interpolated linearly; missing rain is none.

    >>> load_weather("JFK").hours
    8730
    """
    if station not in STATIONS:
        raise InputError(f"station {station!r}; there are {', '.join(STATIONS)}")
    with sample_file("qrc", SAMPLE).open("rb") as stream, np.load(stream, allow_pickle=False) as content:
        table, names = content[station].astype(np.float64), list(content["fields"])
        start = datetime.fromisoformat(str(content["start_utc"])).astimezone(UTC)
    columns = {name: table[:, names.index(field)] for name, field in FIELDS.items()}
    columns["wind"] = np.where(columns["wind"] > GUST, np.nan, columns["wind"])
    columns["rain"] = np.nan_to_num(columns["rain"], nan=0.0)
    return Environment(
        **{name: torch.from_numpy(_interpolated(values)) for name, values in columns.items()}, start=start
    )


def _interpolated(values: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(np.isfinite(values))
    return np.interp(np.arange(len(values)), known, values[known])
