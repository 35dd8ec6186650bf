"""Slow endpoints over HTTP: progress while it happens, the answer last, and work that ends when nobody waits."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import ray
from ray import serve

from library.artifact import Artifact
from library.errors import InputError
from serving import app
from serving.endpoint import Endpoint, Progress, Request, Response
from serving.replica import Replica
from serving.settings import EndpointArgs

STREAM = {"Accept": "text/event-stream"}


class CountRequest(Request):
    """How far to count, how fast, and where to fail."""

    steps: int
    pause: float = 0.02
    refuse_at: int | None = None
    break_at: int | None = None


class CountResponse(Response):
    """How far it came, and how many answers were stopped before this one."""

    counted: int
    stopped: int


class Named(Progress):
    """Progress that shows more."""

    word: str


class Counter(Endpoint):
    """Counts slowly."""

    name, summary, kind, model = "counter", "Counts.", None, "send"
    Request, Response = CountRequest, CountResponse
    examples = {"three": {"steps": 3}}  # noqa: RUF012
    cost_unit, request_cost, batch_cost = "requests", 1, 4

    def __init__(self, version: str):
        self.version, self.stopped, self.taken = version, 0, 0

    @classmethod
    def load(cls, artifact, device):
        return cls(artifact.version)

    def cost(self, request):
        return 1

    def group(self, request):
        return request.steps

    def answer(self, requests):
        try:
            for step in range(requests[0].steps):
                if any(request.refuse_at == step for request in requests):
                    raise InputError(f"refuse_at: {step} is not liked")
                if any(request.break_at == step for request in requests):
                    raise RuntimeError("/secret/path")
                time.sleep(requests[0].pause)
                self.taken += 1
                yield Named(done=step + 1, total=requests[0].steps, word=f"step {step + 1}")
        except GeneratorExit:
            self.stopped += 1
            raise
        return [CountResponse(model=self.version, counted=request.steps, stopped=self.stopped) for request in requests]


class CountingReplica(Replica):
    """A replica of the counter, wherever it runs."""

    def __init__(self, path: str):
        app.ENDPOINTS["counter"] = Counter  # through the module: a table of its own would travel with this class
        super().__init__(EndpointArgs(endpoint="counter", artifact=path, timeout_s=5), None)


def events(response: httpx.Response) -> Iterator[tuple[str, dict]]:
    """The events of a stream, as they come."""
    name = None
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


@pytest.fixture
def counter(ray_cluster, send_artifact: Artifact, served_here, monkeypatch) -> Iterator[tuple[str, Counter]]:
    """The address of a counter that runs in this process, and the counter."""
    monkeypatch.setitem(app.ENDPOINTS, "counter", Counter)
    replica = CountingReplica(str(send_artifact.path))
    with served_here(replica) as url:
        yield f"{url}/predict", replica.current.endpoint


def wait_until(happened) -> None:
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_progress_comes_while_it_happens_and_the_answer_last(counter):
    url, _ = counter
    with httpx.stream("POST", url, json={"steps": 5, "pause": 0.1}, headers=STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert {"x-prism-model", "x-request-id"} <= response.headers.keys()
        found = [(name, data, time.monotonic()) for name, data in events(response)]
    *steps, (name, answer, end) = found
    assert [data for _, data, _ in steps] == [{"done": i, "total": 5, "word": f"step {i}"} for i in range(1, 6)]
    assert {name for name, _, _ in steps} == {"progress"}
    assert (name, answer["counted"]) == ("result", 5)
    assert end - steps[0][2] > 0.3  # the first was there long before the last


def test_who_asks_normally_gets_the_answer_alone(counter):
    url, _ = counter
    response = httpx.post(url, json={"steps": 3})
    assert response.headers["content-type"] == "application/json"
    assert response.json()["counted"] == 3


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["json", "events"])
def test_a_client_that_goes_away_stops_the_work_within_a_step(counter, headers):
    url, endpoint = counter
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", url, json={"steps": 1000}, headers=headers, timeout=0.3) as response,
    ):
        for number, _ in enumerate(events(response)):
            if number == 5:
                break
    wait_until(lambda: endpoint.stopped == 1)
    taken = endpoint.taken
    assert taken < 50
    assert httpx.post(url, json={"steps": 2}).json() == {"model": endpoint.version, "counted": 2, "stopped": 1}
    assert endpoint.taken == taken + 2


def test_work_that_somebody_else_waits_for_goes_on(counter):
    url, endpoint = counter
    with httpx.Client() as first, httpx.Client() as second, httpx.Client() as third:
        body = {"steps": 20, "pause": 0.05}
        with first.stream("POST", url, json={"steps": 4, "pause": 0.1}, headers=STREAM) as busy:
            steps = events(busy)
            next(steps)
            answers = []
            staying = threading.Thread(target=lambda: answers.append(second.post(url, json=body)))
            staying.start()
            with contextlib.suppress(httpx.ReadTimeout):  # shares the batch, then leaves
                third.post(url, json=body, timeout=0.8)
            staying.join()
            list(steps)
    assert answers[0].json()["counted"] == 20
    assert (endpoint.stopped, endpoint.taken) == (0, 24)


def test_a_request_that_is_given_up_while_it_waits_is_never_begun(counter):
    url, endpoint = counter
    with httpx.stream("POST", url, json={"steps": 10, "pause": 0.1}, headers=STREAM) as busy:
        steps = events(busy)
        next(steps)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={"steps": 7}, timeout=0.2)
        assert [name for name, _ in steps][-1] == "result"
    time.sleep(0.2)
    assert endpoint.taken == 10


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ({"steps": 3, "refuse_at": 0}, 422, "refuse_at: 0 is not liked"),
        ({"steps": "x"}, 422, "steps: Input should be a valid integer"),
        ({"steps": 3, "break_at": 0}, 500, "an unexpected failure; the server's log has the request's id"),
    ],
)
def test_what_fails_before_the_first_step_has_its_status(counter, body, status, line):
    response = httpx.post(counter[0], json=body, headers=STREAM | {"X-Request-Id": "mine"})
    assert (response.status_code, response.json()["error"]) == (status, line)
    assert response.json()["request_id"] == "mine"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"steps": 3, "refuse_at": 2}, {"status": 422, "error": "refuse_at: 2 is not liked"}),
        ({"steps": 3, "break_at": 1}, {"status": 500}),
        ({"steps": 100, "pause": 0.1}, {"status": 503, "error": "no answer within 5 seconds; ask for less, or retry"}),
    ],
)
def test_what_fails_later_ends_the_stream_with_its_problem(counter, body, problem):
    url, endpoint = counter
    with httpx.stream("POST", url, json=body, headers=STREAM | {"X-Request-Id": "mine"}) as response:
        *steps, (name, found) = events(response)
    assert steps
    assert (name, found["request_id"]) == ("problem", "mine")
    assert all(str(found[key]).startswith(str(value)) for key, value in problem.items())
    assert "/secret" not in str(found)
    if problem["status"] == 503:
        wait_until(lambda: endpoint.stopped == 1)


def test_it_is_the_same_through_ray_serve(shared_ray, send_artifact, free_port):
    shared_ray.connection()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import a test
    serve.start(http_options={"host": "127.0.0.1", "port": free_port})
    try:
        deployment = serve.deployment(serve.ingress()(CountingReplica), name="counter")
        serve.run(deployment.bind(str(send_artifact.path)), name="counter", route_prefix="/counter")
        url = f"http://127.0.0.1:{free_port}/counter/predict"
        with httpx.stream("POST", url, json={"steps": 4, "pause": 0.2}, headers=STREAM, timeout=30) as response:
            times = [(name, time.monotonic()) for name, _ in events(response)]
        assert [name for name, _ in times] == ["progress"] * 4 + ["result"]
        assert times[-1][1] - times[0][1] > 0.4
        for headers in ({}, STREAM):
            with (
                contextlib.suppress(httpx.ReadTimeout),
                httpx.stream("POST", url, json={"steps": 200}, headers=headers, timeout=0.5) as response,
            ):
                next(events(response))
        assert httpx.post(url, json={"steps": 1}, timeout=30).json()["stopped"] == 2
    finally:
        serve.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
