"""Tables from people: units, times, and the column and row of everything that is wrong."""

import numpy as np
import pandas as pd
import pytest

from library.errors import InputError
from library.qrc.series import QUANTITIES, converted, driven, hours_of, mean_rates, read_table, spacing

ROWS = 6


def table(**changes: object) -> pd.DataFrame:
    columns = {
        "time": [f"2024-03-01T{hour:02d}:00" for hour in range(ROWS)],
        "temperature_F": [50.0 + i for i in range(ROWS)],
        "humidity_percent": [60.0 + i for i in range(ROWS)],
        "rain_mm_h": [0.0, 1.0, 0.0, 0.0, 2.0, 0.0],
        "acidity": [4.0 + i for i in range(ROWS)],
        "mass_loss_mg_cm2": [0.0, None, None, 0.03, None, 0.04],
    }
    return pd.DataFrame(columns | changes)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_tables_are_read_in_the_units_of_the_house(tmp_path, name):
    file = tmp_path / name
    table().to_parquet(file) if name.endswith("parquet") else table().to_csv(file, index=False)
    series = read_table(file)
    assert list(series.inputs) == ["temperature", "humidity", "rain"]
    assert series.inputs["temperature"][0] == pytest.approx(10)
    assert series.step == 1
    assert series.hours.tolist() == list(range(ROWS))
    assert series.start.isoformat() == "2024-03-01T00:00:00+00:00"
    np.testing.assert_allclose(series.driven()[:, 2], np.log1p(table()["rain_mm_h"]))
    assert series.loss[3] == pytest.approx(0.3)
    first, last, rates = mean_rates(series)
    assert (first, last) == (0, 5)
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.05, 0.05])
    assert list(read_table(file, ("acidity", "humidity"), target=False).inputs) == ["acidity", "humidity"]


@pytest.mark.parametrize(
    ("quantity", "unit", "value", "expected"),
    [
        ("temperature", "K", 273.15, 0.0),
        ("humidity", "fraction", 0.5, 50.0),
        ("rain", "in/h", 1.0, 25.4),
        ("wind", "km/h", 36.0, 10.0),
        ("wind", "kn", 1.0, 0.5144444444444445),
        ("mass_loss", "um", 1.0, 2.7),
    ],
)
def test_units(quantity, unit, value, expected):
    assert converted([value], quantity, unit, "x")[0] == pytest.approx(expected)
    assert QUANTITIES[quantity].unit in QUANTITIES[quantity].units


def test_times_of_all_forms_are_hours():
    assert hours_of(["2024-01-01", "2024-01-02T06:00+06:00"])[1].tolist() == [0, 24]
    assert hours_of([10.0, 12.5])[1].tolist() == [0, 2.5]
    assert hours_of(pd.to_datetime(["2024-01-01 00:30", "2024-01-01 01:00"]).tolist())[1].tolist() == [0, 0.5]
    assert spacing(np.array([0, 0.5, 1.0])) == 0.5
    assert driven({"rain": np.array([0.0]), "wind": np.array([2.0])}).tolist() == [[0, 2]]


TIMES = list(table()["time"])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"time": TIMES[:3] + TIMES[2:5]}, {}, "column time: row 3 is not later than the row before"),
        ({"time": [*TIMES[:5], "2024-03-01T09:00"]}, {}, "column time: gap after row 4, 5 hours where 1 are"),
        ({"time": ["yesterday"] * ROWS}, {}, "column time: neither ISO 8601 times nor numbers"),
        ({"temperature_F": [1.0, None, 1.0, 1.0, 1.0, 1.0]}, {}, "column temperature_F: row 1 is missing"),
        ({"temperature_F": [1.0, 900.0, 1.0, 1.0, 1.0, 1.0]}, {}, "row 1 is 482.222 C; possible are -90 to 80 C"),
        ({"humidity_percent": ["wet"] * ROWS}, {}, "column humidity_percent: not numbers"),
        ({"wind_furlong": [1.0] * ROWS}, {}, "column wind_furlong: no unit; name it wind_m_s, wind_km_h"),
        (
            {"temperature_C": [10.0] * ROWS},
            {},
            "columns temperature_F and temperature_C both hold temperature; keep one",
        ),
        ({}, {"inputs": ("wind",)}, "there is no column wind_m_s; it has time, temperature_F"),
        ({}, {"inputs": ("pressure",)}, "there is no column pressure"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, changes, options, message):
    table(**changes).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.csv", **options)


def test_files_without_what_is_needed(tmp_path):
    bare = table()[["time", "acidity"]]
    bare.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match="no input column"):
        read_table(tmp_path / "t.csv")
    table().drop(columns="mass_loss_mg_cm2").to_csv(tmp_path / "u.csv", index=False)
    with pytest.raises(InputError, match="there is no mass loss; name its column mass_loss_g_m2"):
        read_table(tmp_path / "u.csv")
    table().drop(columns="time").to_csv(tmp_path / "v.csv", index=False)
    with pytest.raises(InputError, match="no column 'time'"):
        read_table(tmp_path / "v.csv")
    table(mass_loss_mg_cm2=[0.0] + [None] * 5).to_csv(tmp_path / "w.csv", index=False)
    with pytest.raises(InputError, match="1 values; a rate needs at least 2"):
        mean_rates(read_table(tmp_path / "w.csv"))
    for name in ("nowhere.csv", "t.xlsx"):
        with pytest.raises(InputError, match=name):
            read_table(tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "broken.parquet")
