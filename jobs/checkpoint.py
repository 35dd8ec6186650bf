"""Checkpoints that belong to no engine and no number of workers.

A checkpoint is a folder in which every tensor of the run (parameters in full precision, optimiser moments, buffers)
is stored by name as pieces: stretches [start, start + length) of the flattened tensor. Each worker writes the pieces
that it owns into its own safetensors file, so nothing is gathered; a reader asks for any stretch of any tensor, so a
run saved by ZeRO-3 on eight workers is read by DDP on one. DDP owns whole tensors, FSDP2 runs of rows, and ZeRO
stretches that may end in the middle of a row: stretches describe all three.

    step-00000100-3f2a9c1e/
        worker-00000.safetensors    this worker's pieces, named `key@start`
        worker-00000.json           their places, the file's size and SHA-256
        index.json                  written last: the checkpoint exists once this file does
        metrics.json                the evaluation at this step, when there was one

Writes run in a background thread from a copy of the state; a folder without an index is never read.
"""

import contextlib
import json
import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster import storage
from library import collective, files
from library.artifact import save_tensors
from library.errors import ArtifactError, InputError, PrismError

INDEX = "index.json"
METRICS = "metrics.json"
FAILED = ".failed"  # of a worker that could not write its pieces, so that the others need not wait for them


class Piece(NamedTuple):
    """A stretch of a flattened tensor, from `start` on: `data` is one-dimensional, `shape` the whole tensor's."""

    key: str
    start: int
    data: Tensor
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where a stretch of a tensor lies."""

    file: str
    start: int
    length: int


class StoredTensor(BaseModel, frozen=True):
    """Shape, type and places of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    places: list[Place]


class WorkerFile(BaseModel, frozen=True):
    """What one worker wrote: the file's size and hash, and the tensors' pieces in it."""

    name: str
    size: int
    sha256: str
    tensors: dict[str, StoredTensor]


class Index(BaseModel, frozen=True):
    """What `index.json` holds: everything of the run that is not a tensor, and where the tensors are."""

    format: Literal["prism-checkpoint/1"] = "prism-checkpoint/1"
    step: int
    kind: str
    recipe: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, tuple[int, str]]
    tensors: dict[str, StoredTensor]


class Checkpoint:
    """A complete checkpoint at a local path or storage URI, opened for reading."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        try:
            self.index = Index.model_validate_json(storage.read_bytes(storage.join(place, INDEX)))
        except (ValidationError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{storage.join(place, INDEX)} is corrupt or foreign") from error
        except PrismError as error:
            raise ArtifactError(f"no checkpoint at {place}: {error}") from error
        for key, tensor in self.index.tensors.items():
            if sum(place.length for place in tensor.places) != torch.Size(tensor.shape).numel():
                raise ArtifactError(f"checkpoint {self.place} is incomplete: pieces of {key} are missing")
        self._copies = tempfile.TemporaryDirectory(prefix="prism-checkpoint-")
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Optimiser steps that were done."""
        return self.index.step

    @property
    def metrics(self) -> dict[str, float]:
        """The evaluation at this step; empty when there was none."""
        return _metrics(self.place)

    def keys(self, prefix: str) -> list[str]:
        """The stored tensors whose key begins with `prefix`."""
        return [key for key in self.index.tensors if key.startswith(prefix)]

    def read(self, key: str, start: int = 0, length: int | None = None) -> Tensor:
        """The stretch [start, start + length) of a flattened tensor (default: to its end), on the CPU."""
        stored = self.index.tensors.get(key)
        if stored is None:
            raise ArtifactError(f"checkpoint {self.place} is of another model or optimiser: it has no {key}")
        end = torch.Size(stored.shape).numel() if length is None else start + length
        parts = []
        for place in sorted(stored.places, key=lambda place: place.start):
            first, last = max(start, place.start), min(end, place.start + place.length)
            if first < last:
                stretch = self._file(place.file).get_slice(f"{key}@{place.start}")
                parts.append(stretch[first - place.start : last - place.start])
        return torch.cat(parts) if parts else torch.empty(0, dtype=getattr(torch, stored.dtype))

    def tensor(self, key: str) -> Tensor:
        """A whole tensor in its shape."""
        return self.read(key).reshape(self.index.tensors[key].shape)

    def fault(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files `part::parts`, by size and SHA-256; None when nothing is."""
        for name, (size, digest) in sorted(self.index.files.items())[part::parts]:
            try:
                file = self._local(name)
            except (PrismError, FileNotFoundError):
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} is truncated"
            if files.sha256(file) != digest:
                return f"{name} is corrupt"
        return None

    def _local(self, name: str) -> Path:
        """A file of the checkpoint on this machine: itself, or a copy made once."""
        place = storage.join(self.place, name)
        if storage.is_local(place):
            path = storage.local_path(place)
            if not path.is_file():
                raise FileNotFoundError(path)
            return path
        copy = Path(self._copies.name) / name
        if not copy.exists():
            with storage.open_input(place) as stream, copy.open("wb") as out:
                shutil.copyfileobj(stream, out, 8 << 20)
        return copy

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._local(name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{storage.join(self.place, name)} cannot be read: {error}") from error
        return self._open[name]


def complete(root: str | Path) -> list[str]:
    """The complete checkpoints under `root`, newest step first."""
    places = [storage.join(root, name) for name in storage.list(root) if name.startswith("step-")]
    return sorted((place for place in places if storage.exists(storage.join(place, INDEX))), reverse=True)


def latest(root: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint under `root`, or None; and a line for each damaged one that was passed over.

    Called by all workers together: each checks its share of the files, and all of them choose the same checkpoint.
    """
    faults = []
    for place in collective.broadcast(complete(root)):
        try:
            checkpoint = Checkpoint(place)
            fault = checkpoint.fault(collective.rank(), collective.world_size())
        except ArtifactError as error:
            checkpoint, fault = None, str(error)
        found = [fault for fault in collective.all_gather(fault) if fault]
        if not found:
            return checkpoint, faults
        faults.append(f"checkpoint {place} is damaged ({found[0]}); the one before it is used")
    return None, faults


class CheckpointWriter:
    """Writes one run's checkpoints; every worker holds one and calls it alike.

    `keep` newest ones stay, and the best by `metric` (the least for mode `min`).
    """

    def __init__(
        self, root: str | Path, *, kind: str, recipe: dict[str, Any], metric: str, mode: str, keep: int = 2
    ) -> None:
        self.root, self.kind, self.recipe, self.metric, self.mode, self.keep = root, kind, recipe, metric, mode, keep
        self._attempt = collective.broadcast(uuid.uuid4().hex[:8])
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if collective.rank() == 0:
            whole = complete(root)
            for name in storage.list(root):
                if name.startswith("step-") and storage.join(root, name) not in whole:
                    storage.remove(storage.join(root, name))
        collective.barrier()

    def place(self, step: int) -> str:
        """Where this writer puts the checkpoint of a step."""
        return storage.join(self.root, f"step-{step:08d}-{self._attempt}")

    def save(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Copy the state now and write it in the background. Raises what an earlier write failed with."""
        self.wait()
        snapshot = [piece._replace(data=piece.data.detach().to("cpu", copy=True)) for piece in pieces]
        rank, workers = collective.rank(), collective.world_size()
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, state, rank, workers), daemon=True)
        self._thread.start()

    def annotate(self, step: int, metrics: dict[str, float]) -> None:
        """Store the evaluation at a step beside its checkpoint; a failure is kept as one of the write."""
        if collective.rank() == 0:
            with self.keeping_errors():
                storage.write_bytes(storage.join(self.place(step), METRICS), json.dumps(metrics).encode())

    def wait(self) -> None:
        """Wait for this worker's write in the background; raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def refusal(self) -> str | None:
        """Wait for all workers' writes: why the storage refused one (a full disk, no permission), the same on each.

        When it refused none, raises what this worker's write failed with otherwise: another attempt may not meet it.
        """
        failure: Exception | None = None
        try:
            self.wait()
        except Exception as error:  # raised below, once the workers have told each other
            failure = error
        refusals = collective.all_gather(str(failure) if isinstance(failure, InputError) else None)
        refusal = next(filter(None, refusals), None)
        if failure is not None and refusal is None:
            raise failure
        return refusal

    @contextlib.contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keep what fails inside the block for `wait` and `refusal`, as the failure of a write."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def _write(self, step: int, pieces: list[Piece], state: dict[str, Any], rank: int, workers: int) -> None:
        place, name = self.place(step), f"worker-{rank:05d}.safetensors"
        try:
            size, digest = _store({f"{p.key}@{p.start}": p.data for p in pieces}, storage.join(place, name))
            record = WorkerFile(name=name, size=size, sha256=digest, tensors=_places(pieces, name))
            storage.write_bytes(storage.join(place, f"worker-{rank:05d}.json"), record.model_dump_json().encode())
            if rank == 0:
                self._commit(step, state, workers)
        except Exception as error:  # handed to the training thread, which raises it at the next save or wait
            self._error = error
            with contextlib.suppress(PrismError):
                storage.remove(storage.join(place, name))
                storage.write_bytes(storage.join(place, f"worker-{rank:05d}{FAILED}"), b"")

    def _commit(self, step: int, state: dict[str, Any], workers: int, timeout_s: float = 1800.0) -> None:
        place = self.place(step)
        deadline = time.monotonic() + timeout_s
        records = [storage.join(place, f"worker-{rank:05d}.json") for rank in range(workers)]
        while not all(storage.exists(record) for record in records):
            failed = any(name.endswith(FAILED) for name in storage.list(place))
            if failed or time.monotonic() > deadline:
                raise PrismError(f"checkpoint {place} was given up: not every worker wrote its part")
            time.sleep(0.02)
        parts = [WorkerFile.model_validate_json(storage.read_bytes(record)) for record in records]
        tensors: dict[str, StoredTensor] = {}
        for part in parts:
            for key, tensor in part.tensors.items():
                places = tensors[key].places if key in tensors else []
                tensors[key] = tensor.model_copy(update={"places": places + tensor.places})
        index = Index(
            step=step,
            kind=self.kind,
            recipe=self.recipe,
            state=state,
            files={part.name: (part.size, part.sha256) for part in parts},
            tensors=tensors,
        )
        storage.write_bytes(storage.join(place, INDEX), index.model_dump_json().encode())
        if storage.is_local(place):
            files.flush(storage.local_path(place))
            files.flush(storage.local_path(self.root))
        self._prune()

    def _prune(self) -> None:
        found = complete(self.root)
        best = best_checkpoint(self.root, self.metric, self.mode)
        for place in found[self.keep :]:
            if place != best:
                storage.remove(storage.join(place, INDEX))
                storage.remove(place)


def best_checkpoint(root: str | Path, metric: str, mode: str) -> str | None:
    """The complete checkpoint with the best evaluation under `root`; None when none was evaluated."""
    scored = [(_metrics(place).get(metric, math.nan), place) for place in complete(root)]
    scored = [(value, place) for value, place in scored if math.isfinite(value)]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored)[1]


def model_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors of a checkpoint by name, one in memory at a time: what an artifact is written from."""
    for key in checkpoint.keys("model/"):
        yield key.removeprefix("model/"), checkpoint.tensor(key)


def _places(pieces: list[Piece], file: str) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for piece in pieces:
        place = Place(file, piece.start, piece.data.numel())
        known = tensors.get(piece.key)
        tensors[piece.key] = StoredTensor(
            shape=piece.shape,
            dtype=str(piece.data.dtype).removeprefix("torch."),
            places=[*(known.places if known else []), place],
        )
    return tensors


def _metrics(place: str) -> dict[str, float]:
    file = storage.join(place, METRICS)
    return json.loads(storage.read_bytes(file)) if storage.exists(file) else {}


def _store(tensors: dict[str, Tensor], target: str) -> tuple[int, str]:
    """Write tensors as a safetensors file at `target`, whole or not at all; its size and SHA-256."""
    folder = storage.local_path(target).parent if storage.is_local(target) else Path(tempfile.gettempdir())
    temporary = folder / f".{uuid.uuid4().hex}.safetensors.tmp"
    with files.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_tensors(tensors, temporary)
            size, digest = temporary.stat().st_size, files.sha256(temporary)
            if storage.is_local(target):
                files.flush(temporary)
                temporary.replace(storage.local_path(target))
                files.flush(folder)
            else:
                with storage.open_output(target) as out, temporary.open("rb") as stream:
                    shutil.copyfileobj(stream, out, 8 << 20)
        finally:
            temporary.unlink(missing_ok=True)
    return size, digest
