"""Files and folders on any storage: a local path, or a URI such as s3://bucket/folder.

A file is there whole or not at all, wherever it is. Locally it is written under a temporary name, flushed and
renamed; an object store makes an object visible when its upload is complete; on any other system it is uploaded
under a temporary name and renamed.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import parse_qs, urlsplit, urlunsplit

from library import files
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

Location = str | Path
OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
ALLOWED = "allowed are a local path, file://, s3://, gs://, abfs://, and any scheme whose fsspec package is installed"
CHUNK_BYTES = 8 << 20
GCS_RETRY_SECONDS = 30  # pyarrow's default is 15 minutes of silence


def is_local(uri: Location) -> bool:
    """Whether `uri` is a path on this machine's file system (a mounted network folder included)."""
    return isinstance(uri, Path) or urlsplit(uri).scheme in ("", "file")


def local_path(uri: Location) -> Path:
    """The absolute path of a local `uri`. Raises InputError for a remote one."""
    if not is_local(uri):
        raise InputError(f"{uri} is not on this machine; a local path is needed here")
    if isinstance(uri, str) and uri.startswith("file:"):
        uri = urlsplit(uri).path
    return Path(os.path.abspath(Path(uri).expanduser()))


def join(uri: Location, *parts: str) -> str:
    """`uri` followed by `parts`, as an absolute path or a URI; the options in a URI's query stay at its end.

    >>> join("s3://bucket/runs?region=eu-west-1", "send", "index.json")
    's3://bucket/runs/send/index.json?region=eu-west-1'
    """
    if is_local(uri):
        return str(local_path(uri).joinpath(*parts))
    split = urlsplit(str(uri))
    return urlunsplit(split._replace(path="/".join([split.path.rstrip("/"), *parts])))


def exists(uri: Location) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    from pyarrow.fs import FileType

    filesystem, path = _open(uri)
    with _clear_errors(uri, "read"):
        return filesystem.get_file_info(path).type != FileType.NotFound


def list(uri: Location) -> Sequence[str]:
    """The names of the files and folders directly inside folder `uri`, sorted; none when there is no such folder."""
    if is_local(uri):
        folder = local_path(uri)
        with _clear_errors(uri, "read"):
            return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    from pyarrow.fs import FileSelector

    filesystem, path = _open(uri)
    with _clear_errors(uri, "read"):
        found = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.base_name)


def read_bytes(uri: Location) -> bytes:
    """The content of a file. Raises PrismError when it is not there or cannot be read."""
    with _clear_errors(uri, "read"), open_input(uri) as stream:
        return stream.read()


def write_bytes(uri: Location, content: bytes) -> None:
    """Write a file, whole or not at all; one that was there is replaced."""
    with open_output(uri) as stream:
        stream.write(content)


@contextlib.contextmanager
def open_input(uri: Location) -> Iterator[BinaryIO]:
    """A stream to read a file from, seekable."""
    with _clear_errors(uri, "read"):
        if is_local(uri):
            stream = local_path(uri).open("rb")
        else:
            filesystem, path = _open(uri)
            stream = filesystem.open_input_file(path)
    with stream:
        yield stream


@contextlib.contextmanager
def open_output(uri: Location) -> Iterator[BinaryIO]:
    """A stream to write a file to, which appears when the block ends well and not at all when it raises.

    For remote storage the stream goes through a temporary file on this machine, because an upload that has begun
    cannot be taken back.
    """
    if is_local(uri):
        path = local_path(uri)
        with files.storage_errors(path):
            _make_parent(path)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with temporary.open("wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return
    _open(uri)
    with tempfile.NamedTemporaryFile(prefix="prism-upload-") as spool:
        with files.storage_errors(Path(spool.name)):
            yield spool
            spool.flush()
        _put(Path(spool.name), uri)


def upload_folder(folder: Location, uri: Location, *, last: str | None = None) -> None:
    """Copy a local folder to `uri`, replacing files that are there.

    A local destination is replaced as a whole. On remote storage `last` names the file that says that the folder
    is complete: it is removed first and written last, so that no reader takes a half-written folder for a whole one.
    """
    source = local_path(folder)
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; there is nothing to upload")
    if last is not None and not (source / last).is_file():
        raise InputError(f"{source} holds no {last}, which should be uploaded last")
    if is_local(uri):
        with files.atomic_folder(local_path(uri)) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return
    if last is not None:
        remove(join(uri, last))
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: name == last):
        _put(source / name, join(uri, *PurePosixPath(name).parts))


def download_folder(uri: Location, folder: Location) -> Path:
    """Copy folder `uri` to the local `folder`, whole or not at all, and return its path."""
    target = local_path(folder)
    if is_local(uri):
        source = local_path(uri)
        if not source.is_dir():
            raise PrismError(f"cannot read {source}: there is no such folder")
        upload_folder(source, target)
        return target
    from pyarrow.fs import FileSelector

    filesystem, root = _open(uri)
    with _clear_errors(uri, "read"):
        found = [i for i in filesystem.get_file_info(FileSelector(root, recursive=True)) if i.is_file]
    with files.atomic_folder(target) as temporary:
        for info in found:
            local = temporary / PurePosixPath(info.path.lstrip("/")).relative_to(root.strip("/"))
            local.parent.mkdir(parents=True, exist_ok=True)
            with _clear_errors(uri, "read"), filesystem.open_input_stream(info.path) as stream, local.open("wb") as out:
                shutil.copyfileobj(stream, out, CHUNK_BYTES)
    return target


def remove(uri: Location) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens when it is not there."""
    if is_local(uri):
        path = local_path(uri)
        with _clear_errors(uri, "remove"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return
    from pyarrow.fs import FileType

    filesystem, path = _open(uri)
    with _clear_errors(uri, "remove"):
        kind = filesystem.get_file_info(path).type
        if kind == FileType.Directory:
            filesystem.delete_dir(path)
        elif kind != FileType.NotFound:
            filesystem.delete_file(path)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"cannot write {path}: a parent of it is a file; choose another folder") from error


def _put(file: Path, uri: Location) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    filesystem, path = _open(uri)
    direct = urlsplit(str(uri)).scheme in OBJECT_STORES
    parent, _, name = path.rpartition("/")
    upload = path if direct else f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    with _clear_errors(uri, "write"):
        if direct:
            copy_files(str(file), upload, LocalFileSystem(), filesystem, chunk_size=CHUNK_BYTES)
            return
        filesystem.create_dir(parent, recursive=True)
        try:
            copy_files(str(file), upload, LocalFileSystem(), filesystem, chunk_size=CHUNK_BYTES)
            filesystem.move(upload, path)
        except BaseException:
            with contextlib.suppress(OSError):
                filesystem.delete_file(upload)
            raise


def _open(uri: Location) -> tuple["FileSystem", str]:
    """The file system of a remote `uri`, kept open for the next call, and the path inside it."""
    split = urlsplit(str(uri))
    root = urlunsplit(split._replace(path=""))
    inside = split.path.strip("/")
    with _clear_errors(uri, "open"):
        filesystem, base = _filesystem(root)
    return filesystem, "/".join(part for part in (base.rstrip("/"), inside) if part)


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple["FileSystem", str]:
    import fsspec
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    split = urlsplit(root)
    if split.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parse_qs(split.query):
        query = "&".join(part for part in (split.query, f"retry_limit_seconds={GCS_RETRY_SECONDS}") if part)
        root = urlunsplit(split._replace(query=query))
    if split.scheme in OBJECT_STORES:
        try:
            return FileSystem.from_uri(root)
        except ArrowInvalid as error:
            raise InputError(f"{root} is not a valid storage URI: {_first_line(error)}") from error
    try:
        system, base = fsspec.core.url_to_fs(root)
    except ValueError as error:
        raise InputError(f"{root}: unknown kind of storage {split.scheme!r}; {ALLOWED}") from error
    except ImportError as error:
        raise InputError(f"{root}: {_first_line(error)}") from error
    return PyFileSystem(FSSpecHandler(system)), base


@contextlib.contextmanager
def _clear_errors(uri: Location, verb: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PrismError(f"cannot {verb} {uri}: there is no such file or folder") from error
    except IsADirectoryError as error:
        raise PrismError(f"cannot {verb} {uri}: it is a folder") from error
    except PermissionError as error:
        raise PrismError(f"cannot {verb} {uri}: no permission; check the credentials or the folder's owner") from error
    except OSError as error:
        raise PrismError(f"cannot {verb} {uri}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    text = str(error)
    for sign, reason in (
        ("NO_SUCH_BUCKET", "there is no such bucket"),
        ("ACCESS_DENIED", "access is denied; check the credentials"),
        ("NETWORK_CONNECTION", "the storage service cannot be reached"),
        ("UNAVAILABLE", "the storage service cannot be reached"),
    ):
        if sign in text:
            return reason
    return error.strerror or _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
