"""Opening the registry: where it is, and how several processes and an unreliable network share it safely."""

import contextlib
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import probe
from library import files
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {  # a registry that is down is noticed in seconds, and MLflow keeps to itself
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
LOCK_SECONDS = 60


def home() -> Path:
    """The folder of the embedded registry and of downloaded artifacts: PRISM_HOME, else ~/.prism."""
    return Path(os.path.abspath(Path(os.environ.get("PRISM_HOME") or "~/.prism").expanduser()))


def location() -> str:
    """The registry in use: the value of MLFLOW_TRACKING_URI, else the SQLite file under PRISM_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'registry.db'}"


def database(uri: str) -> Path | None:
    """The file of an embedded registry; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def session(uri: str, *, create: bool = False, exclusive: bool = True) -> Iterator["MlflowClient"]:
    """A client of the registry at `uri`, for one short piece of work.

    One process at a time works on an embedded registry (`exclusive`), so that nobody meets a locked or half-made
    database; only `create` makes a new one, else InputError when there is none. A server is asked for a sign of life
    first. Raises PrismError with one line for anything that the registry or the way to it does wrong.
    """
    file = database(uri)
    if file and not create and not file.is_file():
        raise InputError(
            f"there is no model registry at {file}: nothing was registered there yet, "
            "or this is another machine and MLFLOW_TRACKING_URI must name a server"
        )
    if uri.startswith(("http://", "https://")):
        probe.web_service(uri, what="model registry")
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from filelock import Timeout
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with _lock(file) if file and exclusive else contextlib.nullcontext():
            if file and not file.is_file():
                _create(file)
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except Timeout as error:
        raise PrismError(f"another process has used the model registry at {file} for {LOCK_SECONDS} seconds") from error
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        first = str(error).splitlines()[0]
        raise PrismError(f"the model registry at {file or probe.shown(uri)} failed: {probe.shown(first)}") from error


def _create(file: Path) -> None:
    """A new database, made under another name so that a process killed meanwhile leaves no half of one."""
    from mlflow import MlflowClient

    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _lock(file: Path) -> Any:
    from filelock import FileLock

    with files.storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{file}.lock").touch()
    return FileLock(f"{file}.lock", timeout=LOCK_SECONDS)
