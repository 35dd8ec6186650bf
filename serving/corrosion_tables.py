"""Weather as an Arrow table: a column `time`, one for each input, and `site` when there are several."""

from typing import TYPE_CHECKING, Any

from library.errors import InputError
from serving.corrosion_bodies import MOST_ROWS

if TYPE_CHECKING:
    import pyarrow


def sites_of(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """The `series` of a request: sites in the order of their first rows, rows in their order. Raises InputError.

    `time` holds ISO 8601 texts, hours since 1970, or timestamps (UTC where they have no zone); inputs are numbers.
    """
    import pyarrow as pa

    if table.num_rows > MOST_ROWS:
        raise InputError(f"body: {table.num_rows} rows; at most {MOST_ROWS} are allowed")
    names = table.column_names
    if len(set(names)) < len(names) or "time" not in names:
        raise InputError("body: a table with one column `time`, and inputs of different names, is needed")
    inputs = [name for name in names if name not in ("time", "site")]
    for name in inputs:
        kind = table.schema.field(name).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise InputError(f"body: column {name[:64]} is of {kind}; inputs are numbers")
    for name in {"time", "site"} & set(names):
        if table.column(name).null_count:
            raise InputError(f"body: column {name} has missing entries")
    try:
        found = _times(table.column("time"))
        values = {name: table.column(name).cast(pa.float64()).to_pylist() for name in inputs}
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise InputError("body: times or inputs are out of the range of dates or numbers") from error
    rows: dict[Any, list[int]] = {}
    for row, site in enumerate(table.column("site").to_pylist() if "site" in names else [None] * table.num_rows):
        rows.setdefault(site, []).append(row)
    return [
        {"time": [found[i] for i in at], "inputs": {name: [column[i] for i in at] for name, column in values.items()}}
        for at in rows.values()
    ]


def _times(column: "pyarrow.ChunkedArray") -> list[str | float]:
    """Times as a JSON request has them."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        micro = pa.timestamp("us", column.type.tz and "UTC")  # the same moments, of whatever zone, known here or not
        return [time.isoformat() for time in column.cast(micro, safe=column.type.unit != "ns").to_pylist()]
    return (column.cast(pa.float64()) if pa.types.is_integer(column.type) else column).to_pylist()
