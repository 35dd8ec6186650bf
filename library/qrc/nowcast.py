"""The two forecasting tasks on simulated corrosion: its rate from the weather so far, its course from its beginning."""

from typing import Literal

import torch
from pydantic import BaseModel, Field, PositiveInt, model_validator
from torch import Tensor

from library.errors import InputError
from library.qrc.corrosion import CATHODE, GRAMS_PER_AMPERE_HOUR, Condition, simulate
from library.qrc.weather import STATIONS, load_weather

Station = Literal["EWR", "LGA", "JFK"]
FLOOR = 1e-6  # A/m2 added before the logarithm is taken


class Nowcast(BaseModel, frozen=True, extra="forbid"):
    """Rate of corrosion from the weather so far; other places, not later seasons, for validation and test."""

    train: tuple[Station, ...] = Field(("EWR",), min_length=1)
    """Stations that the read-out learns from."""
    validation: tuple[Station, ...] = Field(("LGA",), min_length=1)
    """Stations by which regularisation, and in a search the configuration, is chosen."""
    test: tuple[Station, ...] = Field(("JFK",), min_length=1)
    """Stations that only the result is measured on."""
    alloy: Literal["AA2024", "AA7075", "AA6061", "AA1050"] = "AA2024"
    """The simulated alloy."""
    salt: float = Field(60.0, ge=0, le=10_000)
    """Chloride that settles, mg/(m2 day)."""
    sheltered: bool = False
    """Whether rain is kept away."""
    hours: int = Field(6000, ge=50, le=8730)
    """How much of the year is used, from its beginning."""

    @model_validator(mode="after")
    def _disjoint(self) -> "Nowcast":
        named = [*self.train, *self.validation, *self.test]
        if len(set(named)) < len(named):
            raise InputError(f"{', '.join(named)}: a station is for training, validation or test, not for two of them")
        return self

    def series(self, stations: tuple[Station, ...]) -> tuple[Tensor, Tensor]:
        """Inputs (stations, hours, 4) and targets (stations, hours, 1), log10 of the simulated current + 1e-6 A/m2."""
        condition = Condition(self.alloy, self.salt, self.sheltered)
        years = [load_weather(station).part(0, self.hours) for station in stations]
        rates = [simulate(year, [condition]).current.T for year in years]
        return torch.stack([year.inputs() for year in years]), torch.log10(torch.stack(rates) + FLOOR)


class Curves(BaseModel, frozen=True, extra="forbid"):
    """Courses of simulated loss under conditions drawn at random, of which a forecaster sees the beginning alone."""

    curves: int = Field(60, ge=3)
    """How many, two thirds of them for training."""
    points: int = Field(180, ge=20)
    """Points of each."""
    every: PositiveInt = 48
    """Hours between points."""
    primed: int = Field(60, ge=2)
    """Points that are shown before a forecast."""
    horizon: int = Field(60, ge=1)
    """Points that are forecast."""

    @model_validator(mode="after")
    def _fits(self) -> "Curves":
        if self.primed + self.horizon > self.points:
            raise InputError(f"primed {self.primed} and horizon {self.horizon} exceed the {self.points} points")
        if self.points * self.every > 8730:
            raise InputError(f"{self.points} points every {self.every} h are longer than the year of 8730 h")
        return self

    def series(self, seed: int) -> tuple[Tensor, Tensor]:
        """Training and test courses (curves, points, 1) in units of the greatest loss in training.

        Curve k is of station k mod 3, its year rolled by up to 8000 hours; chloride is log-uniform in 3 to 300
        mg/(m2 day), alloy and shelter are drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        rolls = torch.randint(8000, (self.curves,), generator=generator)
        salts = 3 * 100 ** torch.rand(self.curves, generator=generator, dtype=torch.float64)
        alloys = torch.randint(len(CATHODE), (self.curves,), generator=generator).tolist()
        shelters = torch.rand(self.curves, generator=generator) < 0.5
        loss = torch.empty(self.curves, self.points, dtype=torch.float64)
        for number, station in enumerate(STATIONS):
            places = range(number, self.curves, len(STATIONS))
            year = load_weather(station).rolled(rolls[number :: len(STATIONS)]).part(0, self.points * self.every)
            chosen = [Condition(list(CATHODE)[alloys[k]], float(salts[k]), bool(shelters[k])) for k in places]
            loss[number :: len(STATIONS)] = simulate(year, chosen).loss[:, self.every - 1 :: self.every]
        cut = self.curves * 2 // 3
        return tuple((loss / loss[:cut].max())[..., None].split([cut, self.curves - cut]))


def loss_from_rates(rates: Tensor, hours: float = 1.0) -> Tensor:
    """Loss in g/m2 that has gathered along the second-last axis, from log10 (current + 1e-6 A/m2) every `hours`."""
    current = (10**rates - FLOOR).clamp(min=0)
    return (GRAMS_PER_AMPERE_HOUR * hours * current).cumsum(-2)
