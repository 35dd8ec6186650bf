"""Load on an endpoint while its processes are killed, and what became of it."""

import threading
import time

import httpx

from serving.client import example

LONGEST_S = 30.0
PATIENCE_S = 120.0  # that a loaded machine may need to start a process


class Load:
    """Six clients that ask all the time, half of them over one connection each while it lasts.

    They keep what they got, how long it took, and the answer.
    """

    def __init__(self, url: str):
        self.url, self.body, self.going = f"{url}/spectrum/predict", example("spectrum"), True
        self.outcomes: list[tuple[int | str, float, float | None]] = []
        self.threads = [threading.Thread(target=self._ask, args=[number % 2]) for number in range(6)]

    def _ask(self, connections: int):
        limits = httpx.Limits(max_keepalive_connections=connections)
        with httpx.Client(timeout=LONGEST_S, trust_env=False, limits=limits) as client:
            while self.going:
                began = time.monotonic()
                outcome, alpha = self._outcome(client)
                self.outcomes.append((outcome, time.monotonic() - began, alpha))

    def _outcome(self, client: httpx.Client) -> tuple[int | str, float | None]:
        try:
            response = client.post(self.url, json=self.body)
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


def check(load: Load, right: float) -> None:
    """No answer is wrong, none came too late."""
    assert {alpha for status, _, alpha in load.outcomes if status == 200} == {right}
    assert max(seconds for _, seconds, _ in load.outcomes) < LONGEST_S
