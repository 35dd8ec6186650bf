"""Graphs with targets: the shipped molecules, simulated counting tasks, other sources by name, and their eigenpairs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.samples import sample_file
from library.spe.batch import GraphSample
from library.spe.counting import cycle_counts, simulated_graphs
from library.spe.features import ATOM_FEATURES, BOND_FEATURES, atom_features, bond_features
from library.spe.settings import Encoding, Schema
from library.spectral.graph_spectra import GraphSpectra, eigenpairs
from library.spectral.graphs import Graphs

CYCLES = (3, 4, 5, 6)
COUNTING = (1500, 1000, 2500)  # simulated graphs to train, validate and test on
LOWEST, HIGHEST = -1e-5, 2 + 1e-5  # that an eigenvalue of a normalised Laplacian may have by rounding


@dataclass(frozen=True, eq=False)
class GraphData:
    """Graphs, what their nodes and edges hold, their targets, and which are for what.

    nodes       (nodes,) types or (nodes, features)
    attributes  (edges,) types or (edges, features), in the order of `graphs.edges`
    targets     float32 (graphs, targets), nan where not known
    parts       train, validation, test and others: numbers of graphs
    standardized  whether targets are trained on with mean 0 and deviation 1
    """

    graphs: Graphs
    nodes: Tensor
    attributes: Tensor
    targets: Tensor
    parts: Mapping[str, Tensor]
    schema: Schema
    standardized: bool
    name: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        content = sha256(self.schema.model_dump_json().encode())
        for part in (self.graphs.sizes, self.graphs.edges, self.nodes, self.attributes, self.targets):
            content.update(part.contiguous().numpy().tobytes())
        for name, part in self.parts.items():
            content.update(name.encode() + part.contiguous().numpy().tobytes())
        return content.hexdigest()

    def of_target(self, target: str | None) -> "GraphData":
        """The same with one of the targets alone; all for None. Raises InputError that lists them."""
        names = self.schema.targets
        if target is None:
            return self
        if target not in names:
            raise InputError(f"target {target!r} is none of those of {self.name}: {', '.join(names)}")
        chosen = self.targets[:, names.index(target), None]
        return replace(self, targets=chosen, schema=self.schema.model_copy(update={"targets": (target,)}))

    def target_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training targets (targets,), or 0 and 1 where they are not standardised."""
        known = self.targets[self.parts["train"]].double()
        if not self.standardized:
            return torch.zeros(known.shape[1]), torch.ones(known.shape[1])
        return known.nanmean(0).float(), (known - known.nanmean(0)).square().nanmean(0).sqrt().clamp(min=1e-8).float()


class GraphSamples:
    """Some graphs of a data set as samples: what they hold, and their eigenpairs, by default in float32."""

    def __init__(
        self, data: GraphData, spectra: GraphSpectra, chosen: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        graphs, self._chosen = data.graphs, chosen.tolist()
        ends = graphs.edge_counts.cumsum(0)
        self._sizes, self._firsts = graphs.sizes.tolist(), graphs.offsets.tolist()
        self._edges = list(zip((ends - graphs.edge_counts).tolist(), ends.tolist(), strict=True))
        self._values = spectra.values.to(dtype).split(spectra.counts.tolist())
        self._vectors = spectra.vectors.to(dtype).split((spectra.sizes * spectra.counts).tolist())
        self._data = data

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> GraphSample:
        place = self._chosen[index]
        data, size, first = self._data, self._sizes[place], self._firsts[place]
        start, end = self._edges[place]
        return GraphSample(
            data.nodes[first : first + size],
            data.graphs.edges[:, start:end] - first,
            data.attributes[start:end],
            self._values[place],
            self._vectors[place].view(size, -1),
            data.targets[place],
        )


def spectra_of(graphs: Graphs, encoding: Encoding, cache: Path | None = None) -> GraphSpectra:
    """The eigenpairs of the normalised Laplacian that an encoding uses; isolated nodes have eigenvalue 0.

    Method none uses none, and so computes none.

    Raises InputError for a graph that is too large (`Encoding.most_nodes`), a cut that is refused (`Encoding.split`),
    and an eigenvalue outside [0, 2].
    """
    if encoding.method == "none":
        nothing = torch.zeros(0, dtype=torch.float64)
        gaps = torch.full((len(graphs),), torch.inf, dtype=torch.float64)
        return GraphSpectra(graphs.sizes, torch.zeros_like(graphs.sizes), nothing, nothing, gaps)
    large = graphs.sizes > encoding.most_nodes
    if encoding.method == "spe" and bool(large.any()):
        place = int(large.nonzero()[0])
        raise InputError(
            f"graph {place} has {int(graphs.sizes[place])} nodes, and memory grows with their square; at most "
            f"{encoding.most_nodes} are allowed (encoding.most_nodes)"
        )
    found = eigenpairs(graphs, count=encoding.eigenpairs, split=encoding.split, cache=cache)
    low, high = float(found.values.min()), float(found.values.max())
    if low < LOWEST or high > HIGHEST:
        raise InputError(f"eigenvalues go from {low:g} to {high:g}; a normalised Laplacian has none outside 0 to 2")
    return found


@lru_cache(maxsize=4)
def load_graphs(
    source: str,
    *,
    root: str | None = None,
    smiles_column: str = "smiles",
    target_columns: tuple[str, ...] = (),
    by: str = "random",
) -> GraphData:
    """Graphs with targets, by name or place.

    * `zinc12k`, shipped: 12 000 ZINC molecules, penalised logP (substitute training set, see the sample's README);
    * `hiv-scaffold`, `hiv-size`, shipped: active or not against HIV, other scaffolds or sizes in `ood_validation` and
      `ood_test`;
    * `counting`: simulated random graphs, targets `cycles3` to `cycles6`;
    * `zinc`: the benchmark ZINC-12k, which PyTorch Geometric downloads into `root`; `alchemy`: Alchemy likewise;
    * a JSON file of DrugOOD: SMILES and labels by part;
    * a CSV or Parquet table with `smiles_column` and `target_columns`, cut `by` random, scaffold or size.

    Raises InputError that says what is missing or malformed.

    >>> data = load_graphs("zinc12k")
    >>> len(data.graphs), len(data.parts["test"]), data.schema.node_types
    (12000, 1000, 28)
    """
    from library.spe import sources

    if source == "zinc12k":
        return _zinc12k()
    if source in ("hiv-scaffold", "hiv-size"):
        return _hiv(source)
    if source == "counting":
        return counting_data(COUNTING, seed=0)
    if source == "zinc":
        return sources.pyg_zinc(root)
    if source == "alchemy":
        return sources.alchemy(root)
    place = Path(source)
    if place.suffix == ".json" and place.is_file():
        return sources.drugood(place)
    if place.suffix in (".csv", ".parquet") and place.is_file():
        return sources.table(place, smiles_column, target_columns, by)
    raise InputError(
        f"no graphs at {source!r}; there are zinc12k, hiv-scaffold, hiv-size, counting, zinc, alchemy, a DrugOOD JSON "
        "file, and a CSV or Parquet table of SMILES"
    )


def counting_data(counts: tuple[int, int, int], *, seed: int) -> GraphData:
    """Simulated graphs of `library.spe.counting` for training, validation and test, with all four targets."""
    graphs = simulated_graphs(sum(counts), seed)
    targets = torch.stack([cycle_counts(graphs, length) for length in CYCLES], 1).float()
    parts = torch.arange(sum(counts)).split(list(counts))
    return GraphData(
        graphs,
        torch.zeros(graphs.num_nodes, dtype=torch.int64),
        torch.zeros(graphs.num_edges, dtype=torch.int64),
        targets,
        dict(zip(("train", "validation", "test"), parts, strict=True)),
        Schema(node_types=1, targets=tuple(f"cycles{length}" for length in CYCLES), unit="simulated cycles"),
        standardized=True,
        name="counting",
    )


def _zinc12k() -> GraphData:
    with sample_file("spe", "zinc12k.npz").open("rb") as stream, np.load(stream) as arrays:
        found = dict(arrays)
    graphs = _graphs(found)
    tokens = tuple(map(str, found["atom_token"]))
    schema = Schema(
        node_types=len(tokens),
        edge_types=4,
        targets=("penalised_logp",),
        unit="standard deviations",
        reader="tokens",
        vocabulary=tokens,
    )
    parts = {name: torch.from_numpy(np.flatnonzero(found["split"] == i)) for i, name in enumerate(PARTS[:3])}
    targets = torch.from_numpy(found["y"]).float()[:, None]
    types = (torch.from_numpy(found[name].astype(np.int64)) for name in ("atom", "bond"))
    return GraphData(graphs, *types, targets, parts, schema, standardized=False, name="zinc12k")


PARTS = ("train", "validation", "test", "ood_validation", "ood_test")


def _hiv(name: str) -> GraphData:
    with sample_file("spe", "hiv_ood.npz").open("rb") as stream, np.load(stream) as arrays:
        found = dict(arrays)
    split = found[f"split_{name.removeprefix('hiv-')}"]
    return GraphData(
        _graphs(found),
        atom_features(found["atom"]),
        bond_features(found["bond"]),
        torch.from_numpy(found["label"]).float()[:, None],
        {part: torch.from_numpy(np.flatnonzero(split == i)) for i, part in enumerate(PARTS)},
        Schema(
            node_features=ATOM_FEATURES,
            edge_features=BOND_FEATURES,
            targets=("active",),
            task="binary",
            unit="probability",
            reader="features",
        ),
        standardized=False,
        name=name,
    )


def _graphs(arrays: Mapping[str, np.ndarray]) -> Graphs:
    sizes, counts, edges = (arrays[name].astype(np.int64) for name in ("num_nodes", "num_edges", "edge"))
    return Graphs.from_edges(sizes, edges.T, edge_counts=counts)
