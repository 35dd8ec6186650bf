"""The same faults behind HAProxy: requests that fit its buffer are asked again, all others get 503."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from cluster.ports import free_port
from serving.client import ask
from serving.trial import trial_artifacts
from tests.faults.load import PATIENCE_S, Load, check


class Server:
    """`prism serve --ingress haproxy` with two replicas, on a Ray of its own."""

    def __init__(self, artifact: Path):
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "prism", "serve", "spectrum", "--artifact", f"spectrum={artifact}"]
        self.process = subprocess.Popen(
            [*command, "--port", port, "--ingress", "haproxy", "--replicas", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        while self.status("spectrum/readyz") != 200:
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.5)
        self.right = ask("spectrum", None, self.url)["alpha"]

    def status(self, path: str) -> int:
        try:
            return httpx.get(f"{self.url}/{path}", trust_env=False, timeout=10).status_code
        except httpx.TransportError:
            return 0

    def processes(self, title: str) -> set[int]:
        """Of this Ray's living processes, those with such a title."""
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.add(process.pid)
            except psutil.Error:
                continue
        return found

    def listening(self, name: str) -> set[tuple[str, int]]:
        """Where this Ray's processes with such a name take connections."""
        found = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in process.name():
                    found |= {each.laddr for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, title: str, count: int = 1) -> None:
        """kill -9 some of them."""
        for process in sorted(self.processes(title))[:count]:
            os.kill(process, signal.SIGKILL)

    def wait_for_new(self, title: str, before: set[int]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(now := self.processes(title)) < len(before) or now <= before:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)


REPLICA, CONTROLLER, MANAGER = "ray::ServeReplica", "ray::ServeController", "ray::HAProxyManager"
RAYLET = str(Path(ray.__file__).with_name("core") / "src" / "ray" / "raylet" / "raylet")


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return Path(trial_artifacts(["spectrum"], tmp_path_factory.mktemp("trial"))["spectrum"])


@pytest.fixture(scope="module")
def server(artifact) -> Iterator[Server]:
    server = Server(artifact)
    yield server
    server.stop()


def test_statistics_are_on_this_machine_alone_and_paths_are_those_of_the_proxy(server):
    listening = server.listening("haproxy")
    assert len(listening) == 3  # requests, statistics, metrics
    assert {host for host, _ in listening} == {"127.0.0.1"}
    assert server.status("nothing") == 404


def test_no_port_is_one_that_every_ray_on_this_machine_would_take(server):
    ports = {port for _, port in server.listening("")}
    assert len(ports) > 10
    assert not ports & {8404, 9101, 8500, 30000}  # statistics, metrics, fallback proxy, first replica


def test_half_of_the_processors_are_left_to_the_replicas(server):
    children = psutil.Process(server.process.pid).children(recursive=True)
    threads = {process.num_threads() for process in children if process.name() == "haproxy"}
    assert threads == {max(1, min(4, os.cpu_count() // 2))}


@pytest.mark.parametrize("title", [REPLICA, CONTROLLER])
def test_a_replica_or_the_controller_is_killed(server, title):
    before = server.processes(title)
    with Load(server.url) as load:
        server.kill(title)
        load.wait_for(200, 30)
        server.wait_for_new(title, before)
        load.wait_for(200, 30)
    assert load.statuses() <= {200, 503}
    assert load.count(503) < 3  # of six that were in flight most were asked again
    check(load, server.right)


def test_haproxys_manager_is_killed_and_comes_back(server):
    before = server.processes(MANAGER)
    old = [process for pid in before for process in psutil.Process(pid).children() if process.name() == "haproxy"]
    assert old
    with Load(server.url) as load:
        server.kill(MANAGER)
        server.wait_for_new(MANAGER, before)
        load.wait_for(200, 30)
    assert load.statuses() <= {200, 503, "cut"}
    assert not [process for process in old if alive(process)]  # they would ask replicas of the past
    check(load, server.right)


def test_all_replicas_are_lost_and_cannot_come_back_for_a_while(server, artifact):
    before = server.processes(REPLICA)
    hidden = artifact.rename(artifact.with_name("hidden"))
    with Load(server.url) as load:
        server.kill(REPLICA, 2)
        load.wait_for(503, 6)
        hidden.rename(artifact)
        load.wait_for(200, 30)
        server.wait_for_new(REPLICA, before)
    assert load.statuses() <= {200, 503}
    check(load, server.right)


def test_a_cluster_that_is_gone_ends_the_command_in_one_line(artifact):
    server = Server(artifact)
    try:
        server.kill(RAYLET)
        assert server.process.wait(PATIENCE_S) == 1
    finally:
        server.process.kill()
    assert re.search(r"^prism: the Ray cluster .* is gone$", server.process.stderr.read(), re.MULTILINE)
    assert server.status("spectrum/readyz") == 0
