"""What every test may rely on: its own registry, one BLAS thread, and Ray when it asks for it."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from cluster import Connection, connect
from cluster.local import LocalCluster
from cluster.registry_session import session

CPUS = 4  # logical: Ray only schedules by them
WITH_RAY = ("cluster", "faults", "jobs", "serving", "test_prism.py")  # in tests/
WITHOUT_RAY = {  # but these start none in the tests' process, and take long
    "cluster/test_registry.py",
    "jobs/test_curvature.py",
    "jobs/test_engines.py",
    "jobs/test_farms_rates.py",
    "jobs/test_plan.py",
    "serving/test_console.py",
    "serving/test_haproxy.py",
}


class WithRayApart(LoadScopeScheduling):
    """With `-n 2`, all tests that may start Ray go to one process, which starts it once; the others go by file."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).relative_to("tests")
        alone = file.parts[0] not in WITH_RAY or file.as_posix() in WITHOUT_RAY
        return str(file) if alone else "ray"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> WithRayApart:
    """The scheduler of `pytest -n 2`."""
    return WithRayApart(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a test that asks for the session's Ray in a process that is to have none."""
    tests = Path(__file__).parent
    if missing := sorted(file for file in WITHOUT_RAY if not (tests / file).exists()):
        raise pytest.UsageError(f"tests/conftest.py: WITHOUT_RAY names files that are not there: {', '.join(missing)}")
    for item in items:
        apart = item.path.is_relative_to(tests) and item.path.relative_to(tests).as_posix() in WITHOUT_RAY
        if apart and "shared_ray" in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid} asks for Ray, but its file is in WITHOUT_RAY of tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    """Let what tests start hear SIGINT, even where the tests themselves were started in the background, deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class SharedRay:
    """The one Ray of the session: started by the first test that wants it, and again after a test had its own."""

    def __init__(self) -> None:
        self._connection: Connection | None = None

    def connection(self) -> Connection:
        import ray

        if self._connection is None or not ray.is_initialized():
            self._connection = connect("local", cpus=CPUS)
        return self._connection

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    """The holder of the session's Ray. Tests that connect by themselves call its `stop` first."""
    shared = SharedRay()
    yield shared
    shared.stop()


@pytest.fixture
def ray_cluster(shared_ray: SharedRay) -> Connection:
    """A connection to the session's Ray of four logical CPUs."""
    return shared_ray.connection()


@pytest.fixture
def no_ray(shared_ray: SharedRay) -> Iterator[None]:
    """A process that is connected to no Ray, for tests that connect by themselves; they are disconnected after it."""
    import ray

    shared_ray.stop()
    yield
    if ray.is_initialized():
        ray.shutdown()


@pytest.fixture
def local_cluster(no_ray: None) -> Iterator[Callable[..., LocalCluster]]:
    """Starts a LocalCluster with the given arguments; it is connected, and stopped after the test."""
    started: list[LocalCluster] = []

    def start(nodes: int = 2, cpus_per_node: int = 2, **options: bool) -> LocalCluster:
        started.append(LocalCluster(nodes, cpus_per_node, **options).__enter__())
        return started[-1]

    yield start
    for cluster in reversed(started):
        cluster.__exit__(None, None, None)


@pytest.fixture(autouse=True, scope="session")
def nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's registry, server and cluster are out of reach, also of what fixtures of a module or session run."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRISM_HOME", str(tmp_path_factory.mktemp("home") / "prism-home"))
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            environment.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PRISM_HOME of this test alone."""
    home = tmp_path / "prism-home"
    monkeypatch.setenv("PRISM_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an embedded registry that holds nothing: creating one takes MLflow several seconds."""
    file = tmp_path_factory.mktemp("registry") / "registry.db"
    with session(f"sqlite:///{file}", create=True):
        return file


@pytest.fixture
def ready_registry(private_home: Path, empty_registry: Path) -> Path:
    """This test's own registry, created already; for tests that register but do not test the creation."""
    private_home.mkdir()
    return Path(shutil.copy(empty_registry, private_home))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Several tests' processes share few cores."""
    torch.set_num_threads(1)
