"""Graphs from elsewhere: PyTorch Geometric's ZINC and Alchemy, files of DrugOOD, and tables of SMILES."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError
from library.molecules import read_molecules, scaffold
from library.spe.data import PARTS, GraphData
from library.spe.features import ATOM_FEATURES, BOND_FEATURES, feature_graph
from library.spe.settings import Schema
from library.spectral.graphs import Graphs

if TYPE_CHECKING:
    from torch_geometric.data import Data

DRUGOOD = {"train": "train", "iid_val": "validation", "iid_test": "test"}
DRUGOOD |= {"ood_val": "ood_validation", "ood_test": "ood_test"}
ALCHEMY = ("mu", "alpha", "homo", "lumo", "gap", "R2", "zpve", "U0", "U", "H", "G", "Cv")
ALCHEMY_PARTS = (10_000, 1_000, 1_000)
SHARES = (0.6, 0.2, 0.2)  # of the graphs in domains to learn from, to validate on and to test on


def pyg_zinc(root: str | None) -> GraphData:
    """The benchmark ZINC-12k by PyTorch Geometric's loader, downloaded into `root` when it is not there.

    Raises InputError without a root, or when it can neither be read nor downloaded.
    """
    from torch_geometric.datasets import ZINC

    folder = _root(root, "zinc")
    names = ("train", "val", "test")
    parts = [_loaded(lambda part=part: ZINC(folder, subset=True, split=part), folder) for part in names]
    schema = Schema(node_types=28, edge_types=4, targets=("penalised_logp",), unit="standard deviations")
    return from_pyg(dict(zip(PARTS, parts, strict=False)), schema, standardized=False, name="zinc")


def alchemy(root: str | None) -> GraphData:
    """Alchemy (12 quantum properties), by PyTorch Geometric's loader of TU data sets, downloaded into `root`.

    12 000 molecules by the files `train_al_10.index`, `val_al_10.index` and `test_al_10.index` in `root`, or a random
    10 000 / 1 000 / 1 000 when they are not there. Raises InputError as `pyg_zinc`.
    """
    from torch_geometric.datasets import TUDataset

    folder = _root(root, "alchemy")
    found = _loaded(lambda: TUDataset(folder, "alchemy_full", use_node_attr=True, use_edge_attr=True), folder)
    files = [Path(folder) / f"{name}_al_10.index" for name in ("train", "val", "test")]
    if all(file.is_file() for file in files):
        chosen = [[int(text) for text in file.read_text().replace(",", " ").split()] for file in files]
    else:
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(found))
        chosen = np.split(order[: sum(ALCHEMY_PARTS)], np.cumsum(ALCHEMY_PARTS)[:-1])
    schema = Schema(node_features=found.num_node_features, edge_features=found.num_edge_features, targets=ALCHEMY)
    parts = {name: [found[int(i)] for i in own] for name, own in zip(PARTS, chosen, strict=False)}
    return from_pyg(parts, schema, standardized=True, name="alchemy")


def from_pyg(parts: "Mapping[str, Iterable[Data]]", schema: Schema, *, standardized: bool, name: str) -> GraphData:
    """Data objects of PyTorch Geometric by part: `edge_index` in both directions, `x`, `edge_attr` and `y`.

    Raises InputError for an edge whose reverse is not there.
    """
    objects = [(part, item) for part, items in parts.items() for item in items]
    sizes = torch.tensor([item.num_nodes for _, item in objects])
    counts = torch.tensor([item.edge_index.shape[1] for _, item in objects])
    edges = torch.cat([item.edge_index for _, item in objects], 1)
    graphs = Graphs.from_edges(sizes, edges, edge_counts=counts, directed=True)
    forward = edges[0] < edges[1]
    attributes = torch.cat([item.edge_attr for _, item in objects])[forward]
    nodes = torch.cat([item.x for _, item in objects])
    owner = np.array([part for part, _ in objects])
    return GraphData(
        graphs,
        nodes.flatten().long() if schema.node_types else nodes.float(),
        attributes.flatten().long() if schema.edge_types else attributes.float(),
        torch.stack([item.y.flatten() for _, item in objects]).float(),
        {part: torch.from_numpy(np.flatnonzero(owner == part)) for part in parts},
        schema,
        standardized=standardized,
        name=name,
    )


def drugood(file: Path) -> GraphData:
    """A file of DrugOOD: {"split": {"train": [{"smiles": ..., "cls_label": 0 or 1}, ...], "iid_val": ..., ...}}.

    Raises InputError for another layout, and for a SMILES that cannot be read.
    """
    try:
        split = json.loads(file.read_text(encoding="utf-8"))["split"]
        rows = {ours: [(row["smiles"], row["cls_label"]) for row in split[theirs]] for theirs, ours in DRUGOOD.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a file of DrugOOD: {error} is missing or malformed") from error
    smiles = [text for part in rows.values() for text, _ in part]
    labels = torch.tensor([float(label) for part in rows.values() for _, label in part])[:, None]
    ends = np.cumsum([len(part) for part in rows.values()])
    parts = dict(zip(rows, map(torch.from_numpy, np.split(np.arange(len(smiles)), ends[:-1])), strict=True))
    return _from_smiles(smiles, labels, parts, ("active",), binary=True, name=file.stem)


def table(file: Path, smiles_column: str, target_columns: Sequence[str], by: str) -> GraphData:
    """A CSV or Parquet table of molecules; targets that are all 0 or 1 are binary, others are standardised.

    Raises InputError that names a missing column, a target that is no number, or a SMILES that cannot be read.
    """
    import pandas as pd

    if by not in ("random", "scaffold", "size"):
        raise InputError(f"by: a table is cut by random, scaffold or size, not by {by!r}")
    if not target_columns:
        raise InputError(f"{file} needs target_columns: which of its columns are predicted")
    try:
        frame = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read as a table: {str(error).splitlines()[0]}") from error
    missing = [column for column in (smiles_column, *target_columns) if column not in frame]
    if missing:
        raise InputError(f"{file} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")
    if not all(pd.api.types.is_numeric_dtype(frame[column]) for column in target_columns):
        raise InputError(f"{file}: target_columns {', '.join(target_columns)} must be numbers")
    smiles = frame[smiles_column].astype(str).tolist()
    targets = torch.from_numpy(frame[list(target_columns)].to_numpy(dtype=np.float32, copy=True))
    binary = bool(((targets == 0) | (targets == 1) | targets.isnan()).all())
    if by == "random":
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(smiles))
        cuts = np.split(order, [round(0.8 * len(smiles)), round(0.9 * len(smiles))])
        parts = {name: torch.from_numpy(np.sort(cut)) for name, cut in zip(PARTS, cuts, strict=False)}
    else:
        molecules = read_molecules(smiles)
        domains = [scaffold(text) for text in smiles] if by == "scaffold" else [len(found) for found in molecules]
        parts = domain_split(domains, by="count" if by == "scaffold" else "value", seed=0)
    return _from_smiles(smiles, targets, parts, tuple(target_columns), binary=binary, name=file.stem)


def domain_split(domains: Sequence[Any], *, by: str, seed: int) -> dict[str, Tensor]:
    """A cut of samples by their domains, as in DrugOOD.

    Whole domains, from the most frequent (`by` count) or the largest (`by` value) on, are cut near 60/20/20 into those
    to learn from, `ood_validation` and `ood_test`; the first part is cut at random 60/20/20 into `train`, `validation`
    and `test`. Raises InputError when a part would be empty.
    """
    kinds, place, counts = np.unique(np.asarray(domains), return_inverse=True, return_counts=True)
    rank = np.lexsort((kinds, -counts)) if by == "count" else np.argsort(-kinds)
    ends = np.cumsum(counts[rank]) / len(domains)
    group = np.empty(len(kinds), dtype=np.int64)
    group[rank] = np.searchsorted(np.cumsum(SHARES)[:2], ends - counts[rank] / len(domains) / 2)
    owner = group[place]
    inside = np.random.Generator(np.random.PCG64(seed)).permutation(np.flatnonzero(owner == 0))
    cuts = np.split(inside, np.round(np.cumsum(SHARES)[:2] * len(inside)).astype(int))
    outside = [np.flatnonzero(owner == which) for which in (1, 2)]
    found = {name: torch.from_numpy(np.sort(own)) for name, own in zip(PARTS, [*cuts, *outside], strict=True)}
    empty = [name for name, own in found.items() if not len(own)]
    if empty:
        raise InputError(f"{len(domains)} samples of {len(kinds)} domains leave nothing for {', '.join(empty)}")
    return found


def _from_smiles(
    smiles: Sequence[str],
    targets: Tensor,
    parts: Mapping[str, Tensor],
    names: tuple[str, ...],
    *,
    binary: bool,
    name: str,
) -> GraphData:
    found = [feature_graph(molecule) for molecule in read_molecules(smiles)]
    graphs = Graphs.from_edges(
        [len(nodes) for nodes, _, _ in found],
        torch.cat([edges for _, edges, _ in found], 1),
        edge_counts=[edges.shape[1] for _, edges, _ in found],
    )
    schema = Schema(
        node_features=ATOM_FEATURES,
        edge_features=BOND_FEATURES,
        targets=names,
        task="binary" if binary else "regression",
        unit="probability" if binary else "",
        reader="features",
    )
    nodes, attributes = (torch.cat([part[i] for part in found]) for i in (0, 2))
    return GraphData(graphs, nodes, attributes, targets, parts, schema, standardized=not binary, name=name)


def _root(root: str | None, name: str) -> str:
    if root is None:
        raise InputError(f"{name} needs root: the folder where it is, or into which it may be downloaded")
    return root


def _loaded(load: Any, folder: str) -> Any:
    """What a loader of PyTorch Geometric gives; whatever it runs into is one line."""
    try:
        return load()
    except Exception as error:  # files, archives and the network fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the data set cannot be read from or downloaded into {folder}: {reason}") from error
