"""The same promises on a local disk, on a file system behind fsspec, and on an object store."""

import errno
import os
from pathlib import Path

import fsspec
import pytest

from cluster import storage
from library.errors import InputError, PrismError


@pytest.fixture(params=["path", "file", "memory"])
def root(request, tmp_path):
    """A place of each kind."""
    if request.param == "memory":
        yield f"memory://bucket/{tmp_path.name}"
        fsspec.filesystem("memory").rm("/bucket", recursive=True) if storage.exists("memory://bucket") else None
    else:
        yield str(tmp_path / "store") if request.param == "path" else (tmp_path / "store").as_uri()


def test_bytes_come_back(root):
    uri = storage.join(root, "run", "part-0.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.exists(uri)
    assert storage.exists(storage.join(root, "run"))
    assert list(storage.list(root)) == ["run"]
    assert list(storage.list(storage.join(root, "run"))) == ["part-0.bin"]
    assert list(storage.list(storage.join(root, "nothing"))) == []


def test_streams_seek(root):
    uri = storage.join(root, "stream.bin")
    with storage.open_output(uri) as stream:
        stream.write(b"0123")
        stream.write(b"4567")
    with storage.open_input(uri) as stream:
        stream.seek(5)
        assert stream.read() == b"567"


@pytest.mark.parametrize("failure", [RuntimeError("halfway"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(root, failure):
    uri = storage.join(root, "state.bin")

    def fail() -> None:
        with storage.open_output(uri) as stream:
            stream.write(b"half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert list(storage.list(root)) == []
    storage.write_bytes(uri, b"whole")
    with pytest.raises(type(failure)):
        fail()
    assert storage.read_bytes(uri) == b"whole"
    assert list(storage.list(root)) == ["state.bin"]


def test_a_failed_upload_leaves_what_was_there(monkeypatch):
    uri = "memory://bucket/upload/state.bin"
    storage.write_bytes(uri, b"whole")
    filesystem = fsspec.filesystem("memory")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "mv", fail)
        with pytest.raises(PrismError, match=r"cannot write memory://bucket/upload/state\.bin: "):
            storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"whole"
    assert list(storage.list("memory://bucket/upload")) == ["state.bin"]
    storage.remove("memory://bucket/upload")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a subfolder."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "index.json").write_text("{}")
    (source / "a.bin").write_bytes(b"a" * 3)
    (source / "deep" / "z.bin").write_bytes(b"z")
    return source


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_folders_go_and_come_back(root, folder, tmp_path):
    uri = storage.join(root, "copy")
    storage.upload_folder(folder, uri, last="index.json")
    back = storage.download_folder(uri, tmp_path / "back")
    assert contents(back) == contents(folder)
    storage.remove(uri)
    assert not storage.exists(uri)
    storage.remove(uri)


def test_the_last_file_is_written_last_and_withdrawn_first(folder, monkeypatch):
    uri = "memory://bucket/checkpoint"
    storage.upload_folder(folder, uri, last="index.json")
    real, uploaded = storage._put, []

    def put(file: Path, target: str) -> None:
        assert not storage.exists(storage.join(uri, "index.json"))
        if len(uploaded) == 2:
            raise PrismError("the line broke")
        uploaded.append(target)
        real(file, target)

    monkeypatch.setattr(storage, "_put", put)
    with pytest.raises(PrismError, match="the line broke"):
        storage.upload_folder(folder, uri, last="index.json")
    assert not storage.exists(storage.join(uri, "index.json"))
    storage.remove(uri)


def test_a_failed_download_leaves_nothing(folder, tmp_path, monkeypatch):
    uri = "memory://bucket/broken"
    storage.upload_folder(folder, uri)
    filesystem = fsspec.filesystem("memory")
    real = filesystem.open

    def fail(path: str, *arguments: object, **options: object) -> object:
        if path.endswith("z.bin"):
            raise PermissionError(errno.EACCES, "denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(filesystem, "open", fail)
    with pytest.raises(PrismError, match="no permission"):
        storage.download_folder(uri, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir() if "back" in path.name) == []
    storage.remove(uri)


def test_join_keeps_options_and_makes_paths_absolute(tmp_path, monkeypatch):
    assert storage.join("s3://bucket/a/?region=x&scheme=http", "b", "c") == "s3://bucket/a/b/c?region=x&scheme=http"
    assert storage.join("gs://bucket", "b") == "gs://bucket/b"
    monkeypatch.chdir(tmp_path)
    assert storage.join("runs", "b") == str(tmp_path / "runs" / "b")
    assert storage.join(f"file://{tmp_path}", "b") == str(tmp_path / "b")
    assert [storage.is_local(uri) for uri in ("a", Path("a"), "file:///a", "s3://a/b", "memory://a")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("floppy://a/b", "unknown kind of storage 'floppy'; allowed are"),
        ("s3://bucket/key?colour=red", "not a valid storage URI: Unexpected query parameter in S3 URI: 'colour'"),
        ("sftp://host/path", "paramiko"),
    ],
)
def test_a_bad_uri_says_what_is_allowed(uri, message):
    for act in (
        storage.read_bytes,
        storage.exists,
        storage.list,
        storage.remove,
        lambda u: storage.write_bytes(u, b""),
    ):
        with pytest.raises(InputError, match=message):
            act(uri)


def test_a_missing_file_is_named(root):
    uri = storage.join(root, "missing.bin")
    with pytest.raises(PrismError, match=r"cannot read .*missing.bin: there is no such file or folder"):
        storage.read_bytes(uri)


def test_an_unreachable_store_is_one_line(closed_port):
    uri = f"s3://bucket/key?endpoint_override=127.0.0.1:{closed_port}&scheme=http&region=us-east-1"
    with pytest.raises(PrismError, match="the storage service cannot be reached"):
        storage.write_bytes(uri, b"1")


def test_full_disk_and_missing_permission_are_one_line(tmp_path, monkeypatch):
    for code, reason in ((errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission")):

        def fail(_: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(PrismError, match=reason):
                storage.write_bytes(tmp_path / "file.bin", b"1")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="a parent of it is a file"):
        storage.write_bytes(tmp_path / "file" / "inside", b"1")
