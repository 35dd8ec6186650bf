"""The graphs of a request in one piece, from the bodies of JSON or from an Arrow table with one row for each graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from library.errors import InputError
from serving.arrays import is_list

if TYPE_CHECKING:
    import pyarrow

MOST_GRAPHS = 4096
LONGEST_KIND = 64


class Body(Protocol):
    """A graph as JSON has it: kinds or features of its nodes, and its edges."""

    kinds: list[str] | None
    features: list[list[float]] | None
    edges: list[list[int]]


@dataclass(frozen=True, eq=False)
class GraphList:
    """Graphs after each other.

    `sizes` and `edge_counts` of each, `ends` int64 (edges, 2) with nodes from 0 in each graph, and of all nodes the
    `kinds`, a list for each graph, or the `features` float64 (nodes, width).
    """

    sizes: list[int]
    edge_counts: list[int]
    ends: np.ndarray
    kinds: list[list[str]] | None
    features: np.ndarray | None

    @classmethod
    def of_bodies(cls, graphs: Sequence[Body]) -> Self:
        """Checked bodies; all have kinds, or all features of one width. Raises InputError otherwise."""
        has_kinds = graphs[0].kinds is not None
        if any((graph.kinds is not None) != has_kinds for graph in graphs):
            raise InputError("graphs: some have kinds, others features")
        ends = np.fromiter(chain.from_iterable(edge for graph in graphs for edge in graph.edges), np.int64)
        kinds = features = None
        if has_kinds:
            kinds = [graph.kinds for graph in graphs]
        else:
            rows = [row for graph in graphs for row in graph.features]
            if len({len(row) for row in rows}) > 1:
                raise InputError("graphs: features differ in length")
            features = np.array(rows, np.float64)
        sizes = [len(graph.kinds if has_kinds else graph.features) for graph in graphs]
        return cls(sizes, [len(graph.edges) for graph in graphs], ends.reshape(-1, 2), kinds, features)

    @classmethod
    def of_table(cls, table: "pyarrow.Table") -> Self:
        """Columns `edges`, lists of pairs of node numbers, and `kinds` or `features`, lists of texts or of rows.

        Raises InputError about the body.
        """
        names = sorted(table.column_names)
        if names not in (["edges", "kinds"], ["edges", "features"]):
            raise InputError("body: a table with the columns `edges` and `kinds`, or `edges` and `features`, is needed")
        if table.num_rows > MOST_GRAPHS:
            raise InputError(f"body: {table.num_rows} graphs; at most {MOST_GRAPHS} are allowed")
        edge_counts, pairs = _lists(table, "edges")
        ends = _rows("edges", pairs, "integer")
        if len(ends) and ends.shape[1] != 2:
            raise InputError(f"body: column edges holds {ends.shape[1]} node numbers in a row; edges have 2")
        sizes, nodes = _lists(table, names[1])
        if names[1] == "features":
            features = _rows("features", nodes, "floating", "integer").astype(np.float64)
            return cls(sizes, edge_counts, ends.astype(np.int64).reshape(-1, 2), None, features)
        flat = iter(_texts(nodes))
        kinds = [[next(flat) for _ in range(size)] for size in sizes]
        return cls(sizes, edge_counts, ends.astype(np.int64).reshape(-1, 2), kinds, None)

    @classmethod
    def joined(cls, parts: "Sequence[GraphList]") -> "GraphList":
        """One after the other; all have kinds, or all features. Raises InputError otherwise."""
        if len(parts) == 1:
            return parts[0]
        if len({part.kinds is None for part in parts}) > 1 or len({part.width for part in parts}) > 1:
            raise InputError("graphs: some have kinds, others features, or features of another width")
        return cls(
            [size for part in parts for size in part.sizes],
            [count for part in parts for count in part.edge_counts],
            np.concatenate([part.ends for part in parts]),
            None if parts[0].kinds is None else [own for part in parts for own in part.kinds],
            None if parts[0].features is None else np.concatenate([part.features for part in parts]),
        )

    @property
    def width(self) -> int | None:
        """Features of a node; None when nodes have kinds."""
        return None if self.features is None else self.features.shape[1]


def _lists(table: "pyarrow.Table", name: str) -> tuple[list[int], Any]:
    """Lengths of the lists in a column, and what is in them. Raises InputError."""
    import pyarrow as pa
    from pyarrow import compute

    column = table.column(name).combine_chunks()
    if not is_list(column.type):
        raise InputError(f"body: column {name} is of {str(column.type)[:80]}; a list for each graph is needed")
    if column.null_count:
        raise InputError(f"body: column {name} has missing entries")
    content = column.flatten()
    if content.null_count:
        raise InputError(f"body: column {name} has missing entries in a list")
    return compute.list_value_length(column).cast(pa.int64()).to_pylist(), content


def _rows(name: str, lists: Any, *kinds: str) -> np.ndarray:
    """Lists of equal length as the rows of an array. Raises InputError."""
    import pyarrow as pa
    from pyarrow import compute

    wanted = f"rows of {'numbers' if 'floating' in kinds else 'node numbers'}"
    if not is_list(lists.type) or not any(getattr(pa.types, f"is_{kind}")(lists.type.value_type) for kind in kinds):
        raise InputError(f"body: column {name} holds lists of {str(lists.type)[:80]}; lists of {wanted} are needed")
    numbers = lists.flatten()
    if numbers.null_count:
        raise InputError(f"body: column {name} has missing entries in a list")
    lengths = compute.min_max(compute.list_value_length(lists)).as_py() if len(lists) else {"min": 0, "max": 0}
    if lengths["min"] != lengths["max"]:
        raise InputError(f"body: column {name} holds rows of {lengths['min']} to {lengths['max']} numbers")
    return numbers.to_numpy(zero_copy_only=False).reshape(len(lists), lengths["max"])


def _texts(content: Any) -> list[str]:
    """Kinds of nodes. Raises InputError."""
    import pyarrow as pa
    from pyarrow import compute

    if not (pa.types.is_string(content.type) or pa.types.is_large_string(content.type)):
        raise InputError(f"body: column kinds holds lists of {str(content.type)[:80]}; lists of texts are needed")
    lengths = compute.min_max(compute.utf8_length(content)).as_py()
    if len(content) and not 1 <= lengths["min"] <= lengths["max"] <= LONGEST_KIND:
        raise InputError(f"body: column kinds: texts of 1 to {LONGEST_KIND} characters are needed")
    return content.to_pylist()
