"""A real artifact of a micro model, with a calibration, and a free port."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import uvicorn

from cluster import ports
from library.artifact import Artifact, open_artifact, write_artifact
from serving.trial import trial_artifacts


class Heard(logging.Handler):
    """A logger outside of logging's tree, whose lines are kept: Ray changes handlers of those that are inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.Logger("heard", logging.WARNING)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Heard:
    """Put its logger in a module's place, and read its lines."""
    return Heard()


@pytest.fixture(scope="session")
def send_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model trained for 8 steps, whose risk rises from 0 at a score of -5 to 1 at 5."""
    found = trial_artifacts(["hallucination"], tmp_path_factory.mktemp("send"))
    return open_artifact(found["hallucination"])


@pytest.fixture(scope="session")
def rewritten() -> Callable[..., Artifact]:
    """Writes a copy of an artifact to a path, with some of its parts replaced."""
    return _rewritten


def _rewritten(artifact: Artifact, path: Path, **changes) -> Artifact:
    parts = {
        "kind": artifact.kind,
        "recipe": artifact.recipe,
        "weights": artifact.weights(),
        "metrics": artifact.metrics,
        "data": artifact.manifest.data,
        "texts": {name: artifact.text(name) for name in artifact.manifest.files if not name.endswith(".safetensors")},
    }
    return write_artifact(path, **(parts | changes))


@pytest.fixture(scope="module")
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return ports.free_port()


@pytest.fixture(scope="session")
def served_here() -> Callable[..., AbstractContextManager[str]]:
    """Serves a replica that is in this process over HTTP, and gives the address."""

    @contextmanager
    def serving(replica) -> Iterator[str]:
        from serving.routes import application

        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(application(replica, replica.token_digest), log_level="critical", lifespan="off")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            replica.close()

    return serving
