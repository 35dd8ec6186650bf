"""Folders of runs and searches: each has a name, and the record of its job before anything else is in it."""

import json
import platform
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from cluster import registry, storage
from library import collective
from library.errors import InputError, PrismError

MOST_LISTED = 5  # of the names that there are
PATIENCE_S = 90.0  # a network folder may show what another machine wrote only a minute later


class Kind(NamedTuple):
    """What is kept, under which folder of PRISM_HOME when nothing else is said, and in which file its record is."""

    what: str
    place: str
    record: str


RUN = Kind("run", "runs", "job.json")
SEARCH = Kind("search", "searches", "search.json")


def root_of(kind: Kind, given: str | None) -> str:
    """The folder or URI that holds all of a kind."""
    return given or str(registry.home() / kind.place)


def new_folder(
    kind: Kind, root: str, record: Mapping[str, Any], *, prefix: str, name: str | None = None, resumable: bool = True
) -> str:
    """A new folder with its record; without a name it gets one from `prefix` and the time.

    Raises InputError for a name that is taken.
    """
    name = name or f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    folder = storage.join(root, name)
    place = storage.join(folder, kind.record)
    if storage.exists(place):
        advice = ", or go on with --resume" if resumable else ""
        raise InputError(f"a {kind.what} {name!r} exists at {folder}; choose another name{advice}")
    storage.write_bytes(place, json.dumps(dict(record), indent=1).encode())
    return folder


def resumed_folder(kind: Kind, root: str, name: str) -> tuple[str, dict[str, Any]]:
    """The folder of that name, and the record in it. Raises InputError that lists what there is."""
    folder = storage.join(root, name)
    place = storage.join(folder, kind.record)
    if not storage.exists(place):
        names = [found for found in storage.list(root) if not found.startswith(".")][-MOST_LISTED:]
        known = ", ".join(names) or f"no {kind.place}"
        raise InputError(f"there is no {kind.what} {name!r} at {root} to go on with; it has {known}")
    return folder, json.loads(storage.read_bytes(place))


def refusal_to_share(folder: str, patience_s: float = PATIENCE_S) -> str | None:
    """Why the workers cannot keep a run together in `folder`, which has to be the same for all; None when they can.

    Called by all workers together, and the same on each: the first writes a file that every other has to see.
    """
    if collective.world_size() == 1:
        return None
    token = storage.join(folder, collective.broadcast(f".shared-{uuid.uuid4().hex[:8]}"))
    refusal = None
    if collective.rank() == 0:
        try:
            storage.write_bytes(token, b"")
        except PrismError as error:
            refusal = str(error)
    refusal = collective.broadcast(refusal)
    if refusal is not None:
        return refusal
    deadline = time.monotonic() + patience_s
    while not (seen := storage.exists(token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    machines = collective.all_gather(None if seen else platform.node())
    if collective.rank() == 0:
        storage.remove(token)
    blind = ", ".join(sorted({machine for machine in machines if machine is not None}))
    return f"{folder} is another folder on {blind}; give --storage a folder that all nodes share" if blind else None
