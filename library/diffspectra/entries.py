"""Files of measured spectra: JSON, JSON lines, CSV and Parquet, each molecule checked when it is asked for."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel, ValidationError, field_validator

from library.diffspectra.formulas import parse_formula
from library.diffspectra.measured import Recording
from library.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

KINDS = (".json", ".jsonl", ".csv", ".parquet")
COLUMNS = ("molecule", "modality", "x", "y")


class Entry(BaseModel, frozen=True, extra="forbid"):
    """A molecule of a file: its name, its spectra, and what else is known."""

    name: str
    spectra: dict[str, Recording]
    """uv, ir and raman, or some of them."""
    atoms: int | None = None
    """Atoms, hydrogens included."""
    formula: dict[str, int] | None = None
    """Such as C2H6O."""

    @field_validator("formula", mode="before")
    @classmethod
    def _counts(cls, formula: Any) -> Any:
        return parse_formula(formula) if isinstance(formula, str) else formula


def read_entries(stream: BinaryIO, name: str) -> list[dict[str, Any]]:
    """The molecules of a file as plain values, in order, each with what `Entry` needs; `name` ends in its kind.

    * `.json`, a list of objects with name, spectra and perhaps atoms and formula; `.jsonl`, an object on each line;
    * `.csv` or `.parquet`, a row for each point: columns molecule, modality, x, y, and perhaps axis, values, absolute,
      atoms and formula, which are the same in all rows of a spectrum or molecule.

    Raises InputError for another kind of file, one that cannot be read, missing columns, rows without a molecule or
    modality or at odds with each other, and no or repeated names.
    """
    kind = name[name.rfind(".") :]
    if kind not in KINDS:
        raise InputError(f"{name} ends in none of {', '.join(KINDS)}")
    try:
        found = list(_tabled(stream, kind)) if kind in (".csv", ".parquet") else _listed(stream, kind)
    except (ValueError, OSError, ImportError) as error:
        raise InputError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
    if not found:
        raise InputError(f"{name} holds no molecules")
    seen: set[str] = set()
    for number, entry in enumerate(found, 1):
        own = str(entry.get("name", "")) if isinstance(entry, dict) else ""
        if not own or own in seen:
            raise InputError(f"{name}: molecule {number} has no name of its own" + (f", {own!r} is taken" * bool(own)))
        seen.add(own)
    return found


def checked(entry: dict[str, Any]) -> Entry:
    """The entry of plain values. Raises InputError that names what does not fit."""
    try:
        return Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc'])) or 'molecule'}: {first['msg']}") from error


def _listed(stream: BinaryIO, kind: str) -> list[dict[str, Any]]:
    text = stream.read().decode()
    found = [json.loads(line) for line in text.splitlines() if line.strip()] if kind == ".jsonl" else json.loads(text)
    if not isinstance(found, list):
        raise ValueError("it holds no list of molecules")
    return found


def _tabled(stream: BinaryIO, kind: str) -> Iterator[dict[str, Any]]:
    import pandas as pd

    table = pd.read_csv(stream) if kind == ".csv" else pd.read_parquet(stream)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(f"there is no column {missing[0]!r}; there are {', '.join(map(str, table.columns))}")
    for column in COLUMNS[:2]:
        if table[column].isna().any():
            raise InputError(f"row {int(table[column].isna().to_numpy().argmax()) + 1} has no {column}")
    for molecule, rows in table.groupby("molecule", sort=False):
        spectra = {str(name): _recording(part) for name, part in rows.groupby("modality", sort=False)}
        entry = {"name": str(molecule), "spectra": spectra}
        atoms, formula = _same(rows, "atoms"), _same(rows, "formula")
        yield entry | ({"atoms": atoms} if atoms is not None else {}) | ({"formula": formula} if formula else {})


def _recording(rows: "pd.DataFrame") -> dict[str, Any]:
    given = {name: value for name in ("axis", "values", "absolute") if (value := _same(rows, name)) is not None}
    return {"x": rows["x"].tolist(), "y": rows["y"].tolist(), **given}


def _same(rows: "pd.DataFrame", column: str) -> Any:
    """The one value of a column; None where it is not there or empty. Raises InputError for several."""
    values = rows[column].dropna().unique().tolist() if column in rows else []
    if len(values) > 1:
        raise InputError(f"{column} is both {values[0]} and {values[1]} for molecule {rows['molecule'].iloc[0]}")
    return values[0] if values else None
