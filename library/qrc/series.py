"""Series from people: quantities with their units, times on a regular grid, and tables in CSV or Parquet.

A table has a column `time` (ISO 8601, UTC where no zone is given, or numbers of hours), a column `QUANTITY_UNIT` for
each input, such as `temperature_C` or `wind_m_s`, and `mass_loss_UNIT` where losses were measured. Rows are equally
spaced, inputs have no gaps; mass loss may be empty where nothing was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from library.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

TIME = "time"
TARGET = "mass_loss"
EVEN = 1e-6  # hours by which spacings may differ


class Quantity(NamedTuple):
    """Units by name as (factor, offset) to the first one, and the least and largest value that can be."""

    units: Mapping[str, tuple[float, float]]
    low: float
    high: float

    @property
    def unit(self) -> str:
        """The unit in which values are kept."""
        return next(iter(self.units))


QUANTITIES: dict[str, Quantity] = {
    "temperature": Quantity({"C": (1, 0), "F": (5 / 9, -160 / 9), "K": (1, -273.15)}, -90, 80),
    "humidity": Quantity({"percent": (1, 0), "fraction": (100, 0)}, 0, 100),
    "rain": Quantity({"mm/h": (1, 0), "in/h": (25.4, 0)}, 0, 500),
    "wind": Quantity({"m/s": (1, 0), "km/h": (1 / 3.6, 0), "mph": (0.44704, 0), "kn": (1852 / 3600, 0)}, 0, 120),
    "salt": Quantity({"mg/m2/d": (1, 0), "g/m2/d": (1000, 0)}, 0, 10_000),
    "sulphur": Quantity({"mg/m2/d": (1, 0), "g/m2/d": (1000, 0)}, 0, 10_000),
    TARGET: Quantity({"g/m2": (1, 0), "mg/cm2": (10, 0), "um": (2.7, 0)}, 0, 1e6),  # um of aluminium, 2.7 g/cm3
}
LOGARITHMIC = ("rain", "salt", "sulphur")  # shown to a reservoir as log(1 + value): most of them are near zero


@dataclass(frozen=True)
class Series:
    """A table that has been checked.

    hours      (rows,) since `start`
    step       hours between rows
    inputs     column name -> (rows,) in the quantity's first unit
    loss       (rows,) g/m2, NaN where not measured; None without such a column
    """

    start: datetime
    hours: np.ndarray
    step: float
    inputs: dict[str, np.ndarray]
    loss: np.ndarray | None

    def driven(self) -> np.ndarray:
        """What a reservoir is driven with, (rows, channels), in the order of `inputs`."""
        return driven(self.inputs)


def driven(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inputs by name as columns, those of `LOGARITHMIC` as log(1 + value)."""
    return np.stack([np.log1p(v) if name in LOGARITHMIC else v for name, v in inputs.items()], -1)


def converted(values: Any, quantity: str, unit: str, where: str) -> np.ndarray:
    """Values (rows,) in the quantity's first unit, float64. NaN stays.

    Raises InputError, beginning with `where`, for an unknown unit, what are no numbers, and values that cannot be.

    >>> converted([32.0, 104.0], "temperature", "F", "temperature").round(9).tolist()
    [0.0, 40.0]
    """
    known = QUANTITIES[quantity]
    if unit not in known.units:
        raise InputError(f"{where}: unit {unit!r} of {quantity}; there are {', '.join(known.units)}")
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: not numbers ({error})") from error
    factor, offset = known.units[unit]
    found = found * factor + offset
    wrong = np.flatnonzero(np.isinf(found) | (found < known.low - 1e-9) | (found > known.high + 1e-9))
    if len(wrong):
        raise InputError(
            f"{where}: row {wrong[0]} is {found[wrong[0]]:.6g} {known.unit}; possible are {known.low:g} to "
            f"{known.high:g} {known.unit}, is the unit right?"
        )
    return found


def hours_of(times: Sequence[Any], where: str = TIME) -> tuple[datetime, np.ndarray]:
    """The first time, and hours (rows,) since it, of ISO 8601 texts or of numbers of hours.

    Numbers count from 1970-01-01 UTC. Raises InputError, beginning with `where`, for anything else.
    """
    try:
        if len(times) and all(isinstance(t, int | float | np.number) and not isinstance(t, bool) for t in times):
            found = np.asarray(times, np.float64)
        else:
            found = np.array([_stamp(t) / 3600 for t in times], np.float64)
        if not len(found) or not np.isfinite(found).all():
            raise ValueError("empty or not finite")
        start = datetime.fromtimestamp(found[0] * 3600, UTC)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise InputError(f"{where}: neither ISO 8601 times nor numbers of hours ({error})") from error
    return start, found - found[0]


def spacing(hours: np.ndarray, where: str = TIME, *, step: float | None = None) -> float:
    """The hours between rows, which must rise and be equally spaced, by `step` if that is given.

    Raises InputError, beginning with `where`, that names the first row at fault.
    """
    between = np.diff(hours)
    if (back := np.flatnonzero(between <= 0)).size:
        raise InputError(f"{where}: row {back[0] + 1} is not later than the row before; times must rise")
    if step is None:
        if not len(between):
            raise InputError(f"{where}: one row has no spacing; at least 2 are needed")
        step = float(np.median(between))
    if (uneven := np.flatnonzero(np.abs(between - step) > EVEN * max(1.0, step))).size:
        row = uneven[0]
        kind = "gap" if between[row] > step else "uneven step"
        raise InputError(
            f"{where}: {kind} after row {row}, {between[row]:g} hours where {step:g} are between rows; fill it before"
        )
    return step


def read_table(place: str | Path, inputs: Sequence[str] = (), *, target: bool = True) -> Series:
    """A checked table from a CSV (.csv, .csv.gz) or Parquet file.

    `inputs` are the names of the quantities to take, or of columns with numbers of any other kind; none takes every
    quantity that there is. With `target` the table must hold a mass loss.

    Raises InputError for a file that cannot be read, a missing column, an unknown unit, values that are missing or
    cannot be, two columns of a quantity, times that do not rise, and gaps, naming the column and row.
    """
    table = _table(Path(place))
    if TIME not in table:
        raise InputError(f"{place}: there is no column {TIME!r}; it has {', '.join(map(str, table.columns))}")
    start, hours = hours_of(table[TIME].tolist(), f"{place}, column {TIME}")
    step = spacing(hours, f"{place}, column {TIME}")
    found = _quantities(table, place)
    wanted = list(inputs) or [name for name in found if name != TARGET]
    if not wanted:
        raise InputError(f"{place}: no input column; name them QUANTITY_UNIT, such as {', '.join(_examples())}")
    values = {name: _column(table, place, name, found) for name in wanted}
    for name, column in values.items():
        if (missing := np.flatnonzero(~np.isfinite(column))).size:
            raise InputError(f"{place}, column {found.get(name, name)}: row {missing[0]} is missing or not finite")
    loss = _column(table, place, TARGET, found) if TARGET in found else None
    if loss is None and target:
        raise InputError(
            f"{place}: there is no mass loss; name its column {TARGET}_g_m2, {TARGET}_mg_cm2 or {TARGET}_um"
        )
    return Series(start, hours, step, values, loss)


def mean_rates(series: Series) -> tuple[int, int, np.ndarray]:
    """First and last row between which losses were measured, and the rate (rows between,) in g/m2 per hour.

    Between two measurements it is their mean rate. Raises InputError for fewer than two measurements.
    """
    known = np.flatnonzero(np.isfinite(series.loss)) if series.loss is not None else np.zeros(0, np.int64)
    if len(known) < 2:
        raise InputError(f"{TARGET}: {len(known)} values; a rate needs at least 2 measurements")
    rates = np.diff(series.loss[known]) / np.diff(series.hours[known])
    return int(known[0]), int(known[-1]), np.repeat(rates, np.diff(known))


def _table(place: Path) -> "pd.DataFrame":
    import pandas as pd

    kind = "".join(place.suffixes[-2:]) if place.name.endswith(".csv.gz") else place.suffix
    if kind not in (".csv", ".csv.gz", ".parquet"):
        raise InputError(f"{place}: a table is a .csv, .csv.gz or .parquet file")
    try:
        return pd.read_parquet(place) if kind == ".parquet" else pd.read_csv(place)
    except (OSError, ValueError) as error:  # pandas and pyarrow raise ValueErrors for what they cannot parse
        raise InputError(f"{place} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _column(table: "pd.DataFrame", place: str | Path, name: str, found: Mapping[str, Any]) -> np.ndarray:
    if name in found:
        column = str(found[name])
        unit = next(u for u in QUANTITIES[name].units if _suffix(u) == column.removeprefix(f"{name}_"))
        return converted(table[found[name]], name, unit, f"{place}, column {column}")
    if name in QUANTITIES or name not in table:
        example = f"{name}_{_suffix(QUANTITIES[name].unit)}" if name in QUANTITIES else name
        columns = ", ".join(map(str, table.columns))
        raise InputError(f"{place}: there is no column {example}; it has {columns}")
    try:
        return table[name].to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}, column {name}: not numbers ({error})") from error


def _quantities(table: "pd.DataFrame", place: str | Path) -> dict[str, Any]:
    """The column of each quantity. InputError for a quantity with two."""
    found: dict[str, Any] = {}
    for column in table.columns:
        if quantity := _quantity(str(column)):
            if quantity in found:
                raise InputError(f"{place}: columns {found[quantity]} and {column} both hold {quantity}; keep one")
            found[quantity] = column
    return found


def _quantity(column: str) -> str | None:
    """The quantity of a column name. InputError for a quantity with a unit that is unknown."""
    for name, quantity in QUANTITIES.items():
        if column == name or column.startswith(f"{name}_"):
            suffixes = [_suffix(unit) for unit in quantity.units]
            if column.removeprefix(f"{name}_") not in suffixes:
                raise InputError(f"column {column}: no unit; name it {', '.join(f'{name}_{s}' for s in suffixes)}")
            return name
    return None


def _suffix(unit: str) -> str:
    return unit.replace("/", "_")


def _examples() -> list[str]:
    return [f"{name}_{_suffix(quantity.unit)}" for name, quantity in QUANTITIES.items() if name != TARGET]


def _stamp(text: Any) -> float:
    moment = text.to_pydatetime() if hasattr(text, "to_pydatetime") else datetime.fromisoformat(str(text))
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError("not a time")
    return seconds
