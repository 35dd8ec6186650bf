"""The simulator against its golden runs and its own laws; the shipped weather; the dose-response function."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import InputError
from library.qrc.corrosion import COLUMNS, Condition, dose_response, iso9223, simulate
from library.qrc.weather import CHANNELS, STATIONS, Environment, load_weather

GOLDEN = Path(__file__).parents[1] / "golden" / "qrc" / "corrosion_sim.npz"
START = datetime(2013, 1, 1, tzinfo=UTC)


def weather(hours: int, **values: float) -> Environment:
    chosen = {"temperature": 20.0, "humidity": 80.0, "rain": 0.0, "wind": 3.0} | values
    return Environment(**{k: torch.full((hours,), v, dtype=torch.float64) for k, v in chosen.items()}, start=START)


def test_simulated_courses_are_the_golden_ones():
    golden = np.load(GOLDEN)
    environment = Environment(*(torch.from_numpy(golden[name]) for name in ("T", "RH", "P", "W")), start=START)
    conditions = [Condition("AA2024", 60, False), Condition("AA6061", 300, True)]
    assert list(golden["columns"]) == list(COLUMNS)
    found = simulate(environment, conditions).table()
    for course, name in zip(found, ("out_AA2024_60_open", "out_AA6061_300_sheltered"), strict=True):
        np.testing.assert_allclose(course.numpy(), golden[name], rtol=1e-9)


def test_dose_response_is_the_golden_one_and_continuous_at_ten_degrees():
    for temperature, humidity, sulphur, chloride, value in np.load(GOLDEN)["iso9223"]:
        assert iso9223(temperature, humidity, sulphur, chloride) == pytest.approx(value, rel=1e-9)
    assert iso9223(10, 75, 5, 60) == pytest.approx(iso9223(10 + 1e-9, 75, 5, 60), rel=1e-8)
    grown = dose_response(12, 75, 5, 60, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert float(grown[1] / grown[0]) == pytest.approx(2**0.728)


def test_conditions_of_a_batch_are_those_alone():
    environment = load_weather("LGA").part(0, 300)
    conditions = [Condition("AA7075", 10), Condition("AA1050", 200, True)]
    together = simulate(environment, conditions).table()
    for condition, course in zip(conditions, together, strict=True):
        assert torch.allclose(simulate(environment, [condition]).table()[0], course, rtol=1e-13)
    shifted = environment.rolled(torch.tensor([0, 24]))
    assert torch.allclose(simulate(shifted, conditions).table()[0], together[0], rtol=1e-12)


def test_laws_of_the_simulator():
    year = load_weather("JFK").part(0, 2000)
    course = simulate(year, [Condition(salt=salt) for salt in (5, 60, 300)])
    assert (course.loss.diff(dim=1) >= 0).all()
    assert (course.loss[:, -1].diff() > 0).all()  # more salt, more loss
    assert ((course.active >= 0) & (course.active <= 1)).all()
    washed = simulate(weather(400, rain=5.0), [Condition(salt=0)])
    assert float(washed.molarity[0, -1]) == 1e-4  # no salt left: the floor
    humidity = torch.tensor([80.0] * 100 + [30.0] * 100, dtype=torch.float64)
    drying = Environment(*(getattr(weather(200), name) for name in CHANNELS), start=START)
    dried = simulate(dataclasses.replace(drying, humidity=humidity), [Condition()]).current[0]
    assert (dried[110:] < 0.1 * dried[99]).all()
    cold = simulate(weather(50, temperature=-20.0), [Condition()])
    assert float(cold.current.max()) < 1e-9 * float(simulate(weather(50), [Condition()]).current.max()) + 1e-12


def test_a_calm_has_the_salt_of_any_steady_wind():
    calm, steady = (simulate(weather(100, wind=wind), [Condition()]).table() for wind in (0.0, 3.0))
    assert torch.equal(calm, steady)


def test_brine_is_wet_between_deliquescence_and_efflorescence_only_after_it_was_wet():
    humidity = torch.tensor([60.0] * 5 + [80.0] * 5 + [60.0] * 5 + [40.0] * 5 + [60.0] * 5, dtype=torch.float64)
    environment = weather(25)
    environment = Environment(environment.temperature, humidity, environment.rain, environment.wind, START)
    film = simulate(environment, [Condition(salt=1000)]).film[0]
    assert (film[10:15] > 3 * film[4]).all()
    assert film[24] < film[12] / 3


def test_the_shipped_weather_is_whole_and_plausible():
    for station in STATIONS:
        year = load_weather(station)
        assert year.hours == 8730
        assert year.inputs().shape == (8730, 4)
        for name in CHANNELS:
            assert torch.isfinite(getattr(year, name)).all()
        assert -20 < float(year.temperature.min()) < float(year.temperature.max()) < 45
        assert 0 < float(year.humidity.min()) <= float(year.humidity.max()) <= 100
        assert float(year.rain.min()) == 0
        assert float(year.wind.max()) < 60
        wet = float(((year.humidity > 80) & (year.temperature > 0)).double().mean())
        assert wet == pytest.approx({"EWR": 0.22, "JFK": 0.28, "LGA": 0.16}[station], abs=0.006)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_weather("LAX"), "'LAX'; there are EWR, LGA, JFK"),
        (lambda: Condition("steel"), "'steel'; there are AA2024"),
        (lambda: Condition(salt=-1), "0 to 10000"),
        (lambda: simulate(weather(5), []), "none given"),
        (lambda: simulate(weather(5, temperature=np.nan), [Condition()]), "temperature: nan C; possible are -90 to 80"),
        (lambda: simulate(weather(5, rain=-1.0), [Condition()]), "rain: -1 mm/h; possible are 0 to 500"),
        (lambda: simulate(weather(5, humidity=101.0), [Condition()]), "humidity: 101 percent"),
        (lambda: simulate(weather(0), [Condition()]), r"environment: temperature \(0,\)"),
        (
            lambda: simulate(dataclasses.replace(weather(5), wind=torch.ones(4)), [Condition()]),
            r"wind \(4,\); all need",
        ),
        (lambda: simulate(weather(5).rolled(torch.arange(3)), [Condition()] * 2), r"or \(2, hours\)"),
        (lambda: iso9223(10, 120, 1, 1), "0 to 100 %"),
        (lambda: iso9223(np.nan, 50, 1, 1), "temperature nan"),
        (lambda: iso9223(10, 50, np.nan, 1), "SO2 nan"),
        (lambda: iso9223(10, 50, 1, np.inf), "chloride inf"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
