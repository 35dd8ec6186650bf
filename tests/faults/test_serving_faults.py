"""Serving while its processes are killed under load: requests are asked again or get 503, none hangs, none is wrong."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve

import prism
from serving.app import Served, serve_endpoints
from serving.client import ask, example
from serving.trial import trial_artifacts

LONGEST_S = 30.0
PATIENCE_S = 120.0  # that a loaded machine may need to start a process


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return Path(trial_artifacts(["spectrum"], tmp_path_factory.mktemp("trial"))["spectrum"])


@pytest.fixture(scope="module")
def served(shared_ray, artifact) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"spectrum": str(artifact)}, port=prism.free_port(), replicas=2) as served:
        yield served


@pytest.fixture(scope="module")
def right(served) -> float:
    return ask("spectrum", None, served.url)["alpha"]


class Load:
    """Six clients that ask all the time, and keep what they got, how long it took, and the answer."""

    def __init__(self, url: str):
        self.url, self.body, self.going = f"{url}/spectrum/predict", example("spectrum"), True
        self.outcomes: list[tuple[int | str, float, float | None]] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(6)]

    def _ask(self):
        while self.going:
            began = time.monotonic()
            outcome, alpha = self._outcome()
            self.outcomes.append((outcome, time.monotonic() - began, alpha))

    def _outcome(self) -> tuple[int | str, float | None]:
        try:
            response = httpx.post(self.url, json=self.body, timeout=LONGEST_S, trust_env=False)
        except httpx.TimeoutException:
            return "hung", None
        except httpx.TransportError:  # the process at the other end of the connection is gone
            time.sleep(0.2)
            return "cut", None
        try:
            body = response.json()
        except ValueError:
            return f"{response.status_code} {response.text}", None
        if response.status_code == 503:
            whole = "retry-after" in response.headers and body.keys() == {"error", "fields", "request_id"}
            return 503 if whole else f"503 {body}", None
        return response.status_code, body.get("alpha")

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.wait_for(200, 10)
        return self

    def __exit__(self, *_):
        self.going = False
        for thread in self.threads:
            thread.join()

    def wait_for(self, status: int, count: int) -> None:
        """Until so many more requests ended like that."""
        wanted = self.count(status) + count
        deadline = time.monotonic() + PATIENCE_S
        while self.count(status) < wanted:
            assert time.monotonic() < deadline, self.outcomes[-5:]
            time.sleep(0.05)

    def count(self, status: int) -> int:
        return sum(found == status for found, _, _ in self.outcomes)

    def statuses(self) -> set[int | str]:
        return {status for status, _, _ in self.outcomes}


def processes(kind: str) -> set[int]:
    """Of Serve's living actors of a class."""
    from ray._private.state import actors

    return {
        found["Pid"]
        for found in actors().values()
        if found["State"] == "ALIVE" and found["ActorClassName"].startswith(kind)
    }


def kill(kind: str, count: int = 1) -> None:
    """kill -9 some of Serve's processes."""
    for process in sorted(processes(kind))[:count]:
        os.kill(process, signal.SIGKILL)


def wait_for_new(kind: str, before: set[int]) -> None:
    """Until as many actors of a class live as before, others among them."""
    deadline = time.monotonic() + PATIENCE_S
    while len(now := processes(kind)) < len(before) or now <= before:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check(load: Load, right: float) -> None:
    """No answer is wrong, none came too late."""
    assert {alpha for status, _, alpha in load.outcomes if status == 200} == {right}
    assert max(seconds for _, seconds, _ in load.outcomes) < LONGEST_S


@pytest.mark.parametrize("kind", ["ServeReplica", "ServeController"])
def test_a_replica_or_the_controller_is_killed_and_nobody_notices(served, right, kind):
    before = processes(kind)
    with Load(served.url) as load:
        kill(kind)
        load.wait_for(200, 30)
        wait_for_new(kind, before)
        load.wait_for(200, 30)
    assert load.statuses() == {200}
    check(load, right)
    assert serve.status().applications["spectrum"].status == "RUNNING"


def test_the_proxy_is_killed_and_comes_back(served, right):
    before = processes("ProxyActor")
    with Load(served.url) as load:
        kill("ProxyActor")
        wait_for_new("ProxyActor", before)
        load.wait_for(200, 30)
    assert load.statuses() <= {200, 503, "cut"}  # a connection does not outlive its process
    check(load, right)


def test_all_replicas_are_lost_and_cannot_come_back_for_a_while(served, right, artifact):
    before = processes("ServeReplica")
    hidden = artifact.rename(artifact.with_name("hidden"))
    with Load(served.url) as load:
        kill("ServeReplica", 2)
        load.wait_for(503, 6)
        hidden.rename(artifact)
        load.wait_for(200, 30)
        wait_for_new("ServeReplica", before)
    assert load.statuses() == {200, 503}
    check(load, right)
