"""Starting, joining and not reaching Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster import connect, probe
from cluster.connection import FOLDER, ONE_THREAD, ROOT, SETUP, enter_folder, runtime_environment
from library.errors import InputError, PrismError

pytestmark = pytest.mark.ray
PATIENCE = 15.0


@ray.remote(num_cpus=2)
def environment() -> dict[str, str]:
    import cluster.storage
    import library.order

    assert library.order.split(4, 2) == [range(2), range(2, 4)]
    return dict(os.environ) | {"CLUSTER_FILE": cluster.storage.__file__}


def test_workers_get_one_thread_and_this_project(ray_cluster):
    seen = ray.get(environment.remote())
    assert {name: seen[name] for name in ONE_THREAD} == ONE_THREAD  # although the task has two CPUs
    assert seen["TOKENIZERS_PARALLELISM"] == "false"


def test_connection_reports_the_cluster(ray_cluster):
    assert (ray_cluster.nodes, ray_cluster.cpus, ray_cluster.gpus) == (1, 4, 0)
    assert ray_cluster.memory_gib > 0.1
    assert ray_cluster.started
    assert str(ray_cluster).startswith(f"started Ray at {ray_cluster.address}: 1 node, 4 CPUs, 0 GPUs, ")
    assert "\n" not in str(ray_cluster)
    assert ray.get_runtime_context().namespace == "prism"


def test_a_connected_process_keeps_its_connection(ray_cluster):
    again = connect()
    assert (again.address, again.cpus, again.started) == (ray_cluster.address, 4, False)
    again.disconnect()
    assert ray.is_initialized()
    assert connect(ray_cluster.address).address == ray_cluster.address
    with pytest.raises(InputError, match=r"disconnect before joining 127\.0\.0\.1:1"):
        connect("127.0.0.1:1")


def test_a_task_keeps_its_connection(ray_cluster):
    @ray.remote
    def nested() -> bool:
        return connect().joined

    assert ray.get(nested.remote()) is False


JOINER = """
import os, sys, ray
from cluster import connect
connection = connect()
@ray.remote
def where():
    import library.order, cluster.storage
    return os.environ["OMP_NUM_THREADS"], os.path.realpath(os.path.dirname(library.order.__file__)), os.getcwd()
print(connection.started, connection.cpus, *ray.get(where.remote()))
connection.disconnect()
"""


def join(address: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address} | environment
    command = [sys.executable, "-c", JOINER]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_another_process_joins_by_ray_address_ships_the_project_and_keeps_its_folder(ray_cluster, tmp_path):
    done = join(ray_cluster.address, tmp_path)
    assert done.returncode == 0, done.stderr
    started, cpus, threads, code, folder = done.stdout.split()
    assert (started, cpus, threads) == ("False", "4.0", "1")
    assert "working_dir_files" in code  # the workers run the copy, not the checkout
    assert folder == str(tmp_path)
    assert done.stderr == ""
    assert ray.is_initialized()
    assert ray.nodes()[0]["Alive"]


@pytest.fixture
def client_server(ray_cluster, closed_port) -> Iterator[str]:
    """The address of a Ray Client server in front of the session's Ray, as `ray start --head` runs one."""
    agent = ray.nodes()[0]["RuntimeEnvAgentPort"]
    host = ray_cluster.address.rpartition(":")[0]
    arguments = ["--host=127.0.0.1", f"--port={closed_port}", "--mode=proxy", f"--address={ray_cluster.address}"]
    arguments.append(f"--runtime-env-agent-address=http://{host}:{agent}")
    patient = os.environ | {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "100"}  # a cold start may need over 30 s
    command = [sys.executable, "-m", "ray.util.client.server", *arguments]
    server = subprocess.Popen(command, env=patient, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            probe.ray_client(f"127.0.0.1:{closed_port}")
            break
        except PrismError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield f"ray://127.0.0.1:{closed_port}"
    server.terminate()
    server.wait()


def test_another_machine_joins_through_ray_client_and_ships_the_project(client_server, tmp_path):
    done = join(client_server, tmp_path)
    logs = Path("/tmp/ray/session_latest/logs").glob("ray_client_server*")
    assert done.returncode == 0, "\n".join([done.stderr, *(file.read_text()[-5000:] for file in logs)])
    started, cpus, threads, code, _ = done.stdout.split()
    assert (started, cpus, threads) == ("False", "4.0", "1")
    assert "working_dir_files" in code
    assert done.stderr == ""


def test_a_folder_that_a_machine_does_not_have_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FOLDER, str(tmp_path / "elsewhere"))
    enter_folder()
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("reason", "tries"),
    [
        ("Starting Ray client server failed. See its log.", 3),
        ("psutil.ZombieProcess: PID still exists but it's a zombie", 3),
        ("Refused", 1),
    ],
)
def test_a_client_process_that_fails_to_start_gets_other_chances(no_ray, monkeypatch, reason, tries):
    calls = []

    def init(address: str, **options: object) -> None:
        calls.append(address)
        raise ConnectionAbortedError(f"Initialization failure from server:\nTraceback:\nRuntimeError: {reason}")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(probe, "ray_client", lambda address: None)
    with pytest.raises(PrismError, match=f"ray://head:10001: RuntimeError: {reason}"):
        connect("ray://head:10001")
    assert calls == ["ray://head:10001"] * tries


def test_inside_a_ray_job_what_the_job_set_is_left_alone(ray_cluster, tmp_path):
    assert SETUP not in _inside({"runtime_env": {SETUP: "theirs.setup"}})
    job = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "3", "PYTHONPATH": str(ROOT)}, "working_dir": "gcs://x.zip"}}
    wanted = _inside(job)
    assert "OMP_NUM_THREADS" not in wanted["env_vars"]
    assert wanted["env_vars"]["MKL_NUM_THREADS"] == "1"
    assert not {"working_dir", "py_modules"} & wanted.keys()
    config = json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "3"}}, "metadata": {}})
    done = join(ray_cluster.address, tmp_path, RAY_JOB_CONFIG_JSON_ENV_VAR=config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2] == "3"


def _inside(job: dict) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        return runtime_environment(ship=True)


def test_an_installed_package_ships_its_modules(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.connection.ROOT", tmp_path)
    wanted = runtime_environment(ship=True)
    assert [path.rpartition("/")[2] for path in wanted["py_modules"]][:2] == ["library", "cluster"]
    assert "PYTHONPATH" not in runtime_environment(ship=False)["env_vars"]


def test_a_raylets_port_is_not_a_cluster(ray_cluster):
    """The raylet's own port speaks gRPC but is not the head's."""
    node = ray.nodes()[0]
    with pytest.raises(PrismError, match="another service uses that port"):
        probe.ray_cluster(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    probe.ray_cluster(ray_cluster.address)


@pytest.mark.parametrize(
    ("scheme", "port"),
    [("", "closed_port"), ("", "silent_port"), ("", "web_port"), ("ray://", "closed_port"), ("ray://", "silent_port")],
)
def test_no_ray_at_the_address_is_one_line_soon(no_ray, request, scheme, port):
    address = f"{scheme}127.0.0.1:{request.getfixturevalue(port)}"
    start = time.monotonic()
    with pytest.raises(PrismError) as caught:
        connect(address)
    assert time.monotonic() - start < PATIENCE
    assert address.removeprefix("ray://") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()


def test_an_unknown_host_is_one_line(no_ray):
    with pytest.raises(PrismError, match=r"no Ray cluster at nosuchhost\.invalid:6379: "):
        connect("nosuchhost.invalid:6379")


@pytest.mark.parametrize(
    "address", ["http://head:8265", "head", "head:port", "head:70000", ":6379", "redis://head:6379", "head:1/path", ""]
)
def test_a_malformed_address_says_what_is_allowed(no_ray, address):
    with pytest.raises(InputError, match="HOST:PORT and ray://HOST:PORT"):
        connect(address)


def test_a_malformed_ray_address_is_named(no_ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(InputError, match=r"RAY_ADDRESS=http://head:8265 is that of a dashboard"):
        connect()


def test_cpus_belong_to_a_ray_that_is_started_here(no_ray):
    with pytest.raises(InputError, match="has its own number"):
        connect("127.0.0.1:6379", cpus=2)
    with pytest.raises(InputError, match="at least one CPU"):
        connect("local", cpus=0)
