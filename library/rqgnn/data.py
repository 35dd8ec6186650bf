"""Labelled graphs: the shipped samples, files in the TU format or as NPZ, TU data sets by name, and the split."""

import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.samples import sample_file
from library.spectral.graphs import Graphs

OTHER = "other"


@dataclass(frozen=True, eq=False)
class GraphData:
    """Graphs with a label each and a kind or features at each node.

    `labels` int64 (graphs,): 0 normal, 1 anomalous. Either `kinds` int64 (nodes,), numbers into `vocabulary`, or
    `features` float32 (nodes, features) with an empty vocabulary.
    """

    graphs: Graphs
    labels: Tensor
    kinds: Tensor | None
    features: Tensor | None
    vocabulary: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        content = sha256(" ".join(self.vocabulary).encode())
        for part in (self.graphs.sizes, self.graphs.edges, self.labels, self.kinds, self.features):
            if part is not None:
                content.update(part.contiguous().numpy().tobytes())
        return content.hexdigest()

    def select(self, chosen: Tensor) -> "GraphData":
        """The chosen graphs, in that order."""
        nodes = self.graphs.nodes_of(chosen)
        kinds = None if self.kinds is None else self.kinds[nodes]
        features = None if self.features is None else self.features[nodes]
        return GraphData(self.graphs.select(chosen), self.labels[chosen], kinds, features, self.vocabulary, self.name)


@dataclass(frozen=True)
class Vocabulary:
    """The kinds of nodes that a model knows; with `other` the last one stands for all that are not named."""

    symbols: tuple[str, ...]
    other: bool

    def __len__(self) -> int:
        return len(self.symbols)

    def numbers(self, kinds: tuple[str, ...]) -> Tensor:
        """The number of each kind, int64. Raises InputError for one that the model does not know."""
        known = {symbol: place for place, symbol in enumerate(self.symbols)}
        unknown = [kind for kind in kinds if kind not in known]
        if unknown and not self.other:
            some = ", ".join(self.symbols[:12]) + (", ..." if len(self.symbols) > 12 else "")
            raise InputError(f"node kind {unknown[0]!r} is none of the {len(self)} that the model knows ({some})")
        return torch.tensor([known.get(kind, len(self) - 1) for kind in kinds], dtype=torch.int64)

    @classmethod
    def of_training(cls, data: GraphData, train: Tensor, most: int | None) -> "Vocabulary":
        """All kinds of the data or, with `most`, those most frequent in the training graphs and one for all others."""
        if most is None:
            return cls(data.vocabulary, other=False)
        counts = torch.bincount(data.kinds[data.graphs.nodes_of(train)], minlength=len(data.vocabulary))
        frequent = counts.argsort(descending=True, stable=True)[: most - 1].tolist()
        return cls((*(data.vocabulary[place] for place in frequent if counts[place] > 0), OTHER), other=True)


@lru_cache(maxsize=4)
def load_graphs(source: str, *, tu_root: str | None = None) -> GraphData:
    """Labelled graphs by name or place.

    * `tox21:TASK`, an assay of Tox21 such as `tox21:SR-p53`, and `hiv`, the AIDS antiviral screen; both are shipped;
    * a folder with the files of a TU data set (`NAME_A.txt`, `NAME_graph_indicator.txt`, ...), see `library.rqgnn.tu`;
    * an NPZ file with `num_nodes`, `num_edges` (graphs,), `edge` (2, edges) or (edges, 2) numbered within each graph,
      `label` (graphs,) of 0 and 1, and `atom` (nodes,) with `atom_symbol`, or `features` (nodes, features);
    * the name of a TU data set, such as MCF-7, which PyTorch Geometric downloads into `tu_root`;
    * `simulated`, graphs with a planted signal anomaly, see `library.rqgnn.simulated`.

    Raises InputError that says what is missing or malformed.

    >>> data = load_graphs("tox21:SR-p53")
    >>> len(data), int(data.labels.sum()), data.vocabulary[:3]
    (6902, 431, ('C', 'O', 'N'))
    """
    from library.rqgnn import simulated, tu

    family, _, task = source.partition(":")
    if family == "tox21":
        return _tox21(task)
    if source == "hiv":
        with sample_file("rqgnn", "hiv.npz").open("rb") as stream, np.load(stream) as arrays:
            return from_arrays(dict(arrays), "hiv")
    if source == "simulated":
        return simulated.simulated_signal_anomaly()
    place = Path(source)
    if place.is_dir():
        return tu.read_folder(place)
    if place.is_file():
        try:
            with np.load(place, allow_pickle=False) as arrays:
                return from_arrays(dict(arrays), str(place))
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{place} is not an NPZ file of graphs: {error}") from error
    return tu.by_name(source, tu_root)


def from_arrays(arrays: Mapping[str, np.ndarray], source: str) -> GraphData:
    """Graphs from the arrays of an NPZ file, checked; see `load_graphs`."""
    missing = {"num_nodes", "num_edges", "edge", "label"} - arrays.keys()
    if missing or not {"atom", "features"} & arrays.keys():
        needed = ", ".join(sorted(missing)) or "atom or features"
        raise InputError(f"{source} lacks {needed}; it holds {', '.join(sorted(arrays))}")
    sizes, counts, edges, labels = (
        _whole(arrays, name, source) for name in ("num_nodes", "num_edges", "edge", "label")
    )
    edges = edges.T if edges.ndim == 2 and edges.shape[0] != 2 else edges
    if edges.shape == (2, 2) and edges[0, 1] != edges[1, 0]:
        raise InputError(f"{source}: edge of shape (2, 2) may be (2, edges) or (edges, 2); give data of more edges")
    try:
        graphs = Graphs.from_edges(sizes, edges, edge_counts=counts)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    labels = checked_labels(torch.from_numpy(labels), len(graphs), source)
    if "features" in arrays:
        features = np.asarray(arrays["features"])
        if features.dtype.kind not in "iufb":
            raise InputError(f"{source}: features must be numbers, got {features.dtype}")
        features = checked_features(torch.from_numpy(features.astype(np.float32)), graphs.num_nodes, source)
        return GraphData(graphs, labels, None, features, (), source)
    kinds = torch.from_numpy(_whole(arrays, "atom", source))
    symbols = tuple(map(str, arrays.get("atom_symbol", range(int(kinds.max()) + 1))))
    if kinds.shape != (graphs.num_nodes,) or bool(((kinds < 0) | (kinds >= len(symbols))).any()):
        raise InputError(f"{source}: atom must be a number into the {len(symbols)} symbols for each of the nodes")
    return GraphData(graphs, labels, kinds, None, symbols, source)


def _whole(arrays: Mapping[str, np.ndarray], name: str, source: str) -> np.ndarray:
    """An array as int64. Raises InputError where it has anything but whole numbers."""
    found = np.asarray(arrays[name])
    if found.dtype.kind in "iub":
        return found.astype(np.int64)
    if found.dtype.kind != "f" or not bool((found % 1 == 0).all()):
        raise InputError(f"{source}: {name} must be whole numbers, got {found.dtype} such as {found.flat[0]}")
    return found.astype(np.int64)


def checked_labels(labels: Tensor, count: int, source: str) -> Tensor:
    """Labels (graphs,) as 0 and 1, -1 counting as 0. Raises InputError for others."""
    labels = torch.where(labels == -1, 0, labels)
    if labels.shape != (count,) or bool(((labels != 0) & (labels != 1)).any()):
        raise InputError(f"{source}: each of the {count} graphs needs a label, 0 (or -1) for normal, 1 for anomalous")
    return labels


def checked_features(features: Tensor, count: int, source: str) -> Tensor:
    """Features (nodes, features), finite. Raises InputError otherwise."""
    if features.ndim != 2 or len(features) != count or features.shape[1] == 0:
        raise InputError(f"{source}: features must be ({count}, features), got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"{source}: node {int((~torch.isfinite(features)).any(1).nonzero()[0])} has a NaN or infinity")
    return features


def stratified_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the training, validation and test graphs: of each class 70 %, 15 % and the rest.

    Of N graphs of a class, shuffled by `seed`, int(0.7 N) train, and those up to int(0.85 N) validate. Raises
    InputError when a class is missing in a part, where an area under the ROC curve would mean nothing.
    """
    generator = random.Random(seed)
    parts: tuple[list[int], ...] = ([], [], [])
    for label in (0, 1):
        numbers = (labels == label).nonzero().flatten().tolist()
        generator.shuffle(numbers)
        first, second = int(0.7 * len(numbers)), int(0.85 * len(numbers))
        if not 0 < first < second < len(numbers):
            raise InputError(
                f"{len(numbers)} graphs of class {label} cannot be split 70 / 15 / 15 with at least one in each part"
            )
        for part, chosen in zip(parts, (numbers[:first], numbers[first:second], numbers[second:]), strict=True):
            part += chosen
    return tuple(torch.tensor(part) for part in parts)


def _tox21(task: str) -> GraphData:
    with sample_file("rqgnn", "tox21.npz").open("rb") as stream, np.load(stream) as stored:
        arrays = dict(stored)
    tasks = arrays["task"].tolist()
    if task not in tasks:
        raise InputError(f"tox21:{task} is no assay; there are {', '.join(f'tox21:{name}' for name in tasks)}")
    labels = arrays["label"][:, tasks.index(task)]
    known = torch.from_numpy((labels >= 0).nonzero()[0])
    whole = from_arrays(arrays | {"label": labels}, f"tox21:{task}")
    return whole.select(known)
