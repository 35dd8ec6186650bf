"""Serving while its processes are killed under load: requests are asked again or get 503, none hangs, none is wrong."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from cluster.ports import free_port
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.trial import trial_artifacts
from tests.faults.load import PATIENCE_S, Load, check


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return Path(trial_artifacts(["spectrum"], tmp_path_factory.mktemp("trial"))["spectrum"])


@pytest.fixture(scope="module")
def served(shared_ray, artifact) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"spectrum": str(artifact)}, port=free_port(), replicas=2) as served:
        yield served


@pytest.fixture(scope="module")
def right(served) -> float:
    return ask("spectrum", None, served.url)["alpha"]


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
    deadline = time.monotonic() + PATIENCE_S
    while serve.status().applications["spectrum"].status != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.2)


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
