"""QM9S, and other sets of molecules with tables of spectra, as memory-mapped arrays on disk.

QM9S (Zou et al., Nature Computational Science, 2023) comes as `qm9s.pt`, a list of PyTorch Geometric graphs, and
`uv_boraden.csv`, `ir_boraden.csv`, `raman_boraden.csv`: the number of a molecule, then its intensities on the grid. A
user's own folder may hold `molecules.sdf`, whose titles are those numbers, and `uv.csv`, `ir.csv`, `raman.csv`.
"""

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library import files
from library.diffspectra.building import constitution_smiles
from library.diffspectra.data import MoleculeData, split_by_constitution
from library.diffspectra.lines import MODALITIES, POINTS
from library.diffspectra.molecules import Atoms, Structure
from library.diffspectra.sdf import matched, read_sdf
from library.errors import InputError

TABLES = {name: (f"{name}_boraden.csv", f"{name}.csv") for name in MODALITIES}
MANIFEST, ARRAYS = "molecules.json", "molecules.npz"
ROWS = 2000  # of a table in memory at a time
FRACTIONS = (0.7643, 0.1357, 0.1)  # 100 000, 17 748 and 13 083 of QM9's 130 831


class Numbered(NamedTuple):
    """A molecule, the number that tables know it by, and its SMILES without stereo."""

    number: int
    smiles: str
    structure: Structure


class Converted(NamedTuple):
    """How many molecules were written, and why others were not: (number, reason)."""

    molecules: int
    left_out: list[tuple[int, str]]


def convert(
    source: Path, out: Path, *, fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0, simulated: bool = True
) -> Converted:
    """Write a folder that `library.diffspectra.data.load_molecules` reads, from a folder as QM9S comes.

    Tables are read in pieces and kept as float16 intensities. Molecules that lack a spectrum, or whose geometry does
    not give the bonds of their SMILES, are left out and reported. Parts are cut by constitution.

    Raises InputError for missing files, tables that do not fit the grid or have values that are negative, above 65504
    or not finite, and numbers that occur twice.
    """
    tables = {name: file for name in MODALITIES for file in [_first(source, TABLES[name])] if file is not None}
    if not tables:
        raise InputError(f"{source} has none of {', '.join(file for pair in TABLES.values() for file in pair)}")
    left_out: list[tuple[int, str]] = []
    with files.atomic_folder(out) as folder:
        rows = {name: _shard(file, folder / f"{name}.f16", POINTS[name]) for name, file in tables.items()}
        entries, seen = [], set()
        for number, make in _molecules(source):
            if number in seen:
                raise InputError(f"{source}: molecule {number} occurs twice")
            seen.add(number)
            lacking = [name for name, found in rows.items() if number not in found]
            try:
                if lacking:
                    raise InputError(f"no {lacking[0]} spectrum")
                entries.append(Numbered(number, *make()))
            except InputError as reason:
                left_out.append((number, str(reason)))
        if len(entries) < len(fractions):
            raise InputError(f"{source}: {len(entries)} molecules have all their spectra; at least 3 are needed")
        _write(folder, entries, rows, split_by_constitution([e.smiles for e in entries], fractions, seed), simulated)
    return Converted(len(entries), left_out)


def read_folder(folder: Path) -> MoleculeData:
    """The data set of a folder that `convert` wrote; spectra stay on disk. Raises InputError when a part is missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        signals = {
            name: _stored(folder / f"{name}.f16", manifest["rows"][name], POINTS[name], found[f"{name}_row"])
            for name in manifest["rows"]
        }
        parts = {name: found[f"part_{name}"] for name in manifest["parts"]}
        fields = ("offsets", "positions", "types", "charges", "bond_offsets", "bonds")
        atoms = Atoms(*(found[name] for name in fields))
        return MoleculeData(
            folder.name, atoms, signals, manifest["smiles"], parts, manifest["content"], manifest["simulated"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no converted set of molecules: {str(error).splitlines()[0]}") from error


def _write(
    folder: Path, entries: list[Numbered], rows: dict[str, dict[int, int]], parts: dict[str, Tensor], simulated: bool
) -> None:
    atoms = Atoms.of([entry.structure for entry in entries])
    arrays = {name: getattr(atoms, name).numpy() for name in atoms.__dataclass_fields__}
    arrays |= {f"part_{name}": part.numpy() for name, part in parts.items()}
    for name, places in rows.items():
        arrays[f"{name}_row"] = np.array([places[entry.number] for entry in entries])
    np.savez_compressed(folder / ARRAYS, **arrays)
    digests = [files.sha256(folder / f"{name}.f16") for name in rows]
    content = sha256("".join([files.sha256(folder / ARRAYS), *digests]).encode()).hexdigest()
    manifest = {
        "smiles": [entry.smiles for entry in entries],
        "numbers": [entry.number for entry in entries],
        "rows": {name: len(places) for name, places in rows.items()},
        "parts": list(parts),
        "simulated": simulated,
        "content": content,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _first(source: Path, names: tuple[str, ...]) -> Path | None:
    return next((source / name for name in names if (source / name).is_file()), None)


def _shard(table: Path, target: Path, points: int) -> dict[int, int]:
    """Write a table's intensities as float16, row after row; returns which row each number has."""
    import pandas as pd

    places: dict[int, int] = {}
    try:
        with target.open("wb") as stream:
            for piece in pd.read_csv(table, chunksize=ROWS):
                if piece.shape[1] != points + 1:
                    raise InputError(f"{table.name}: {piece.shape[1]} columns; a number and {points} points are needed")
                values = piece.iloc[:, 1:].to_numpy(np.float64)
                wrong = ~(np.isfinite(values) & (values >= 0) & (values <= np.finfo(np.float16).max)).all(1)
                numbers = piece.iloc[:, 0].to_numpy().astype(np.int64)
                if wrong.any():
                    raise InputError(
                        f"{table.name}: molecule {numbers[wrong][0]} has intensities that are not within 0 to 65504"
                    )
                start = len(places)
                places |= {int(number): start + i for i, number in enumerate(numbers)}
                if len(places) != start + len(numbers):
                    raise InputError(
                        f"{table.name}: a molecule occurs twice among rows {start} to {start + len(piece)}"
                    )
                stream.write(values.astype(np.float16).tobytes())
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{table.name} is no table of numbers: {str(error).splitlines()[0]}") from error
    return places


def _molecules(source: Path) -> Iterator[tuple[int, Callable[[], tuple[str, Structure]]]]:
    """Number of every molecule, and what makes its SMILES and structure."""
    if (source / "qm9s.pt").is_file():
        for place, graph in enumerate(_graphs(source / "qm9s.pt")):
            yield int(getattr(graph, "number", place)), lambda graph=graph: _of_graph(graph)
    elif (source / "molecules.sdf").is_file():
        for name, smiles, structure in read_sdf(source / "molecules.sdf"):
            if not name.isdecimal():
                raise InputError(f"molecules.sdf: the title {name[:40]!r} must be the number in the tables")
            yield int(name), lambda found=(smiles, structure): found
    else:
        raise InputError(f"{source} has neither qm9s.pt nor molecules.sdf")


def _graphs(file: Path) -> list[Any]:
    """PyTorch Geometric graphs, loaded without running what a pickle might hold: tensors and graphs alone."""
    from torch_geometric.data import Data
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        try:
            found = torch.load(file, weights_only=True)
        except Exception as error:  # whatever an unpickler says of a foreign file
            raise InputError(f"{file.name} is no list of graphs that loads safely") from error
    if not isinstance(found, list) or not all(isinstance(graph, Data) for graph in found):
        raise InputError(f"{file.name} holds no list of graphs")
    return found


def _of_graph(graph: Any) -> tuple[str, Structure]:
    from rdkit import Chem

    smiles = getattr(graph, "smile", None) or getattr(graph, "smiles", None)
    if not isinstance(smiles, str) or getattr(graph, "z", None) is None or getattr(graph, "pos", None) is None:
        raise InputError("a graph needs smile, z and pos")
    structure = matched(smiles, graph.z.numpy(), graph.pos.numpy())
    return constitution_smiles(Chem.MolFromSmiles(smiles)), structure


def _stored(file: Path, rows: int, points: int, places: Tensor) -> Callable[[int], Tensor]:
    values = np.memmap(file, dtype=np.float16, mode="r", shape=(rows, points))
    return lambda i: torch.from_numpy(values[int(places[i])].astype(np.float32))
