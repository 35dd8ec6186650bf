"""Serving while its controller is killed under load: no request fails, hangs or is answered wrongly."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from ray import serve

import prism
from serving.app import Served, serve_endpoints
from serving.client import ask, example
from serving.trial import trial_artifacts

LONGEST_S = 30.0


@pytest.fixture(scope="module")
def served(shared_ray, tmp_path_factory) -> Iterator[Served]:
    shared_ray.connection()
    artifacts = trial_artifacts(["spectrum"], tmp_path_factory.mktemp("trial"))
    with serve_endpoints(artifacts=artifacts, port=prism.free_port(), replicas=2) as served:
        yield served


class Load:
    """Six clients that ask all the time, and keep what they got and how long it took."""

    def __init__(self, url: str):
        self.url, self.body, self.going = f"{url}/spectrum/predict", example("spectrum"), True
        self.outcomes: list[tuple[int | str, float, float | None]] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(6)]

    def _ask(self):
        while self.going:
            began = time.monotonic()
            try:
                response = httpx.post(self.url, json=self.body, timeout=LONGEST_S, trust_env=False)
            except httpx.TimeoutException:
                outcome = ("hung", None)
            except httpx.TransportError:
                outcome = ("cut", None)  # the process at the other end of the connection is gone
            else:
                body = response.json() if response.headers["content-type"] == "application/json" else {}
                outcome = (response.status_code, body.get("alpha"))
            self.outcomes.append((outcome[0], time.monotonic() - began, outcome[1]))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.wait_for_answers(10)
        return self

    def __exit__(self, *_):
        self.going = False
        for thread in self.threads:
            thread.join()

    def wait_for_answers(self, count: int) -> None:
        """Until so many more requests have been answered."""
        wanted = self.answered() + count
        deadline = time.monotonic() + 120
        while self.answered() < wanted:
            assert time.monotonic() < deadline, self.outcomes[-5:]
            time.sleep(0.05)

    def answered(self) -> int:
        return sum(status == 200 for status, _, _ in self.outcomes)

    def statuses(self) -> set[int | str]:
        return {status for status, _, _ in self.outcomes}


def processes(kind: str) -> dict[str, int]:
    """Actor -> process of Serve's living actors of a class."""
    from ray._private.state import actors

    return {
        identifier: found["Pid"]
        for identifier, found in actors().items()
        if found["State"] == "ALIVE" and found["ActorClassName"].startswith(kind)
    }


def kill_one(kind: str) -> None:
    """kill -9 one of Serve's processes."""
    os.kill(next(iter(processes(kind).values())), signal.SIGKILL)


def wait_for(kind: str, before: dict[str, int], count: int) -> None:
    """Until `count` actors of a class live, with another process among them."""
    deadline = time.monotonic() + 120
    while len(now := processes(kind)) < count or set(now.values()) <= set(before.values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_answers(load: Load, right: float) -> None:
    """No answer is wrong, none came too late."""
    assert {alpha for status, _, alpha in load.outcomes if status == 200} == {right}
    assert max(seconds for _, seconds, _ in load.outcomes) < LONGEST_S


@pytest.fixture
def right(served) -> float:
    return ask("spectrum", None, served.url)["alpha"]


def test_the_controller_is_killed_and_nobody_notices(served, right):
    before = processes("ServeController")
    with Load(served.url) as load:
        kill_one("ServeController")
        load.wait_for_answers(30)
        wait_for("ServeController", before, 1)
        load.wait_for_answers(30)
    assert load.statuses() == {200}
    check_answers(load, right)
    assert serve.status().applications["spectrum"].status == "RUNNING"
