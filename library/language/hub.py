"""What can be loaded through transformers by a folder or a hub name, and its failures as one clear line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from library.errors import InputError


def is_loadable(name: str) -> bool:
    """Whether `name` is a local folder or has the form OWNER/NAME of a hub."""
    owner, _, rest = name.partition("/")
    return Path(name).is_dir() or (bool(owner.strip(".~")) and bool(rest) and "/" not in rest)


@contextlib.contextmanager
def load_errors(what: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever transformers and its backends raise while loading into an InputError that says what to check."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the backends raise bare Exception, OSError, ValueError, KeyError, ...
        where, check = f"{name!r}", "the files there"
        if not Path(name).exists():
            where, check = f"{name!r} at revision {revision or 'main'!r}", "the name, the revision and the network"
        raise InputError(f"{what} {where} cannot be loaded: {first_line(error)}; check {check}") from error


def first_line(error: Exception) -> str:
    """The first line of a foreign library's message, or the error's type when it has none."""
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
