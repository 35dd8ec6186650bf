"""Artifacts and broken services that the tests of this floor share."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cluster.ports import free_port
from library.artifact import Artifact, write_artifact


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Writes a small artifact whose content depends on `seed`."""

    def make(seed: int = 0, kind: str = "send") -> Artifact:
        weights = {"weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))}
        return write_artifact(
            tmp_path / f"artifact-{kind}-{seed}",
            kind=kind,
            recipe={"steps": 3, "seed": seed},
            weights=weights,
            metrics={"loss": 1.5},
            data="none",
        )

    return make


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web_port() -> Iterator[int]:
    """The port of a web server that is neither Ray nor a registry: it answers 404 to everything."""

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def ssh_port() -> Iterator[int]:
    """A port where another protocol greets whoever comes, as SSH does, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    with server.accept()[0] as caller:
                        caller.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                        caller.shutdown(socket.SHUT_WR)
                        caller.recv(4096)

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def closed_port() -> int:
    """A port where nothing listens."""
    return free_port()
