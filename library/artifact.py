"""Artifact: a trained thing on disk. A folder with `artifact.json`, safetensors, and text files; never a pickle.

artifact.json           kind, recipe, metrics, versions, data fingerprint, and size and SHA-256 of each file
weights.safetensors     the model's state by name (several files `weights-00001-of-00003` when it is large)
arrays.safetensors      further named tensors of the method, if any
*.json, *.txt           further named texts of the method (a tokeniser, say), if any
"""

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pydantic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from library import files
from library.errors import ArtifactError, InputError, PrismError

MANIFEST = "artifact.json"
FILE_BYTES = 4 << 30  # a larger state is written as several files of at most about this size


class FileEntry(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Size in bytes and SHA-256 of one file of an artifact."""

    size: int
    sha256: str


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What `artifact.json` holds."""

    format: Literal["prism-artifact/1"] = "prism-artifact/1"
    kind: str
    recipe: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    data: str
    created: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Artifact:
    """An artifact that has been checked. Get one from `open_artifact` or `write_artifact`."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """The method's name, such as `send`."""
        return self.manifest.kind

    @property
    def recipe(self) -> dict[str, Any]:
        """The configuration that made it, as plain JSON values."""
        return self.manifest.recipe

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of its evaluation."""
        return self.manifest.metrics

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that change when any content changes."""
        return sha256(self.manifest.model_dump_json().encode()).hexdigest()[:12]

    def weights(self) -> dict[str, Tensor]:
        """The model's state by name, on the CPU. Large: read once."""
        return dict(self.iter_weights())

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's state, one tensor in memory at a time."""
        for file in self.weight_files():
            yield from _read_tensors(file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's state by name; reads no weights."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self.weight_files():
            with _opened(file) as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        return found

    def weight_files(self) -> list[Path]:
        """The files that hold the model's state, in order."""
        names = sorted(self.manifest.files)
        return [self.path / name for name in names if name.startswith("weights") and name.endswith(".safetensors")]

    def arrays(self) -> dict[str, Tensor]:
        """The method's further named tensors; empty when it has none."""
        return (
            dict(_read_tensors(self.path / "arrays.safetensors")) if "arrays.safetensors" in self.manifest.files else {}
        )

    def text(self, name: str) -> str:
        """The content of a named text file, such as `tokenizer.json`. Raises ArtifactError when there is none."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path} holds no {name}; it holds {', '.join(sorted(self.manifest.files))}")
        return (self.path / name).read_text(encoding="utf-8")


def write_artifact(
    path: str | Path,
    *,
    kind: str,
    recipe: Mapping[str, Any],
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    metrics: Mapping[str, float],
    data: str,
    arrays: Mapping[str, Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Artifact:
    """Write an artifact to the folder `path`, whole or not at all; an artifact that was there is replaced.

    `weights` may be an iterator of (name, tensor): it is streamed into files of at most 4 GiB, so that a model
    larger than the memory can be written. Raises InputError for a `path` that holds something else, PrismError
    when the place cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an artifact; choose a new or empty folder")
    with files.atomic_folder(path) as folder:
        _write_weights(folder, weights.items() if isinstance(weights, Mapping) else weights)
        if arrays:
            save_tensors({k: v.detach().cpu().contiguous() for k, v in arrays.items()}, folder / "arrays.safetensors")
        for name, text in (texts or {}).items():
            if Path(name).name != name or name == MANIFEST:
                raise InputError(f"text name {name!r} is not a plain file name")
            (folder / name).write_text(text, encoding="utf-8")
        manifest = Manifest(
            kind=kind,
            recipe=dict(recipe),
            metrics={k: float(v) for k, v in metrics.items() if math.isfinite(v)},  # JSON has no others
            versions={name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")},
            data=data,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={
                file.name: FileEntry(size=file.stat().st_size, sha256=files.sha256(file))
                for file in sorted(folder.iterdir())
            },
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return Artifact(path, manifest)


def open_artifact(path: str | Path, *, kind: str | None = None, verify: bool = True) -> Artifact:
    """Open the artifact in folder `path` and check it: form, kind, sizes, and with `verify` the hashes.

    Raises ArtifactError that says what is missing, foreign or corrupt.
    """
    path = Path(path).absolute()
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"no artifact at {path}: there is no {MANIFEST}")
    try:
        manifest = Manifest.model_validate(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is corrupt or foreign: {_first_line(error)}") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} is an artifact of {manifest.kind!r}, not of {kind!r}")
    for name, entry in manifest.files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ArtifactError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != entry.size:
            raise ArtifactError(f"{file} is truncated: {file.stat().st_size} bytes, {entry.size} were written")
        if verify and files.sha256(file) != entry.sha256:
            raise ArtifactError(f"{file} is corrupt: its SHA-256 is not the one that was written")
    return Artifact(path, manifest)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. What the operating system refuses is an OSError, as for any other file."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]), os.strerror(int(found[1]))) if found else PrismError(str(error)) from error


def _write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    shard: dict[str, Tensor] = {}
    size, written = 0, []

    def flush() -> None:
        nonlocal shard, size
        written.append(folder / f"weights-part{len(written):05d}.safetensors")
        save_tensors(shard, written[-1])
        shard, size = {}, 0

    for name, tensor in weights:
        value = tensor.detach().cpu().contiguous()
        if shard and size + value.nbytes > FILE_BYTES:
            flush()
        shard[name] = value
        size += value.nbytes
    flush()
    for i, file in enumerate(written, 1):
        file.rename(
            folder / (f"weights-{i:05d}-of-{len(written):05d}.safetensors" if written[1:] else "weights.safetensors")
        )


def _read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            yield name, tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"
    return str(error).splitlines()[0]
