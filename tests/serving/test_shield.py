"""The middleware of the proxy: a lost replica's requests are asked again, everything else passes as it is."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from serving import shield
from serving.shield import Shield

MODEL = {"X-Prism-Model": "send/1"}


class Proxy:
    """Stands in for Serve's proxy: loses the first requests without a word, as that does; keeps what it was given."""

    def __init__(self, losses: int = 0, response: Response | None = None, *, routes: int = 200):
        self.losses, self.bodies, self.identifiers, self.routes = losses, [], [], routes
        self.response = response or PlainTextResponse("answer", headers=MODEL)

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/-/routes":
            await PlainTextResponse("{}", self.routes)(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.identifiers.append(dict(scope["headers"])[b"x-request-id"])
        if len(self.bodies) > self.losses:
            await self.response(scope, receive, send)


class Stopped:
    """Begins an answer, and is lost."""

    def __init__(self, kind: str):
        self.kind = kind

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", self.kind.encode()), (b"x-prism-model", b"send/1"), (b"x-request-id", b"mine")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})


async def chunks():
    for part in (b"one ", b"two ", b"three"):
        yield part


def post(proxy, path: str = "/score/predict") -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(Shield(RequestIdMiddleware(proxy)))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post(path, content=chunks(), headers={"X-Request-Id": "mine"})

    return asyncio.run(send())


def problem(response: httpx.Response) -> str:
    """The one line of a refusal that is complete."""
    content = response.json()
    assert content == {"error": content["error"], "fields": [], "request_id": "mine"}
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["retry-after"] == "1"
    return content["error"]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shield, "PAUSE_S", 0.0)


@pytest.mark.parametrize("losses", [0, 1, shield.RETRIES])
def test_a_lost_request_is_asked_again_with_its_whole_body_and_its_id(losses):
    proxy = Proxy(losses)
    response = post(proxy)
    assert (response.status_code, response.text) == (200, "answer")
    assert proxy.bodies == [b"one two three"] * (losses + 1)
    assert set(proxy.identifiers) == {b"mine"}


def test_what_is_lost_too_often_gets_503():
    proxy = Proxy(99)
    response = post(proxy)
    assert (response.status_code, problem(response)) == (503, shield.LOST)
    assert len(proxy.bodies) == 1 + shield.RETRIES


def test_what_cannot_or_must_not_be_asked_again_gets_503_at_once(monkeypatch):
    strange = Proxy(1)
    assert post(strange, "/shop/buy").status_code == 503
    monkeypatch.setattr(shield, "MOST_KEPT", 8)
    large = Proxy(1)
    assert post(large).status_code == 503
    assert len(strange.bodies) == len(large.bodies) == 1


@pytest.mark.parametrize(("said", "status", "line"), [(said, *ours) for said, ours in shield.WORDS.items()])
def test_what_serve_itself_says_is_said_as_all_refusals_are(said, status, line):
    proxy = Proxy(0, PlainTextResponse("Request dropped due to backpressure (num_queued_requests=7)", said))
    response = post(proxy)
    assert (response.status_code, problem(response), len(proxy.bodies)) == (status, line, 1)


def test_a_path_is_unknown_only_once_the_proxy_knows_its_paths():
    unknown = PlainTextResponse("Path '/nothing' not found.", 404)
    response = post(Proxy(0, unknown), "/nothing")
    assert (response.status_code, response.text) == (404, unknown.body.decode())
    response = post(Proxy(0, unknown, routes=503))
    assert (response.status_code, problem(response)) == (503, shield.STARTING)


@pytest.mark.parametrize("status", [404, 500, 503])
def test_what_a_replica_says_passes_as_it_is(status):
    own = PlainTextResponse("its own words", status, MODEL)
    proxy = Proxy(0, own)
    response = post(proxy)
    assert (response.status_code, response.text, len(proxy.bodies)) == (status, "its own words", 1)


def test_a_stream_passes_part_by_part():
    assert post(Proxy(1, StreamingResponse(chunks(), headers=MODEL))).text == "one two three"


def test_events_that_had_begun_end_with_the_problem_and_other_answers_are_cut():
    first, _, last = post(Stopped("text/event-stream")).text.partition("event: problem\ndata: ")
    assert first == "first "
    assert json.loads(last) == {"status": 503, "error": shield.LOST, "fields": [], "request_id": "mine"}
    sent = []

    async def cut():
        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/score/predict", "headers": []}
        await Shield(Stopped("application/json"))(scope, None, send)

    asyncio.run(cut())
    assert [message.get("more_body") for message in sent] == [None, True]  # the web server closes the connection


def test_nobody_asks_again_for_a_client_that_went_away():
    calls = []

    async def gone(scope, receive, send):
        calls.append((await receive())["type"])

    async def disconnected():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/score/predict", "headers": []}
    asyncio.run(Shield(gone)(scope, disconnected, None))
    assert calls == ["http.disconnect"]


class Waiting(Proxy):
    """Waits for a replica, of which Serve's router has `replicas`; when it is told to stop it ends without a word."""

    def __init__(self, replicas: dict, seconds: float):
        super().__init__()
        router = SimpleNamespace(_request_router=SimpleNamespace(curr_replicas=replicas))
        handle = SimpleNamespace(_router=SimpleNamespace(_asyncio_router=router))
        self.proxy_router = SimpleNamespace(match_route=lambda path: ("/score", handle, False))
        self.seconds = seconds

    async def __call__(self, scope, receive, send):
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            return
        await super().__call__(scope, receive, send)


def test_a_request_waits_for_a_busy_replica_but_not_for_long_for_one_that_is_not_there(monkeypatch):
    monkeypatch.setattr(shield, "LOOK_S", 0.02)
    monkeypatch.setattr(shield, "NOBODY_S", 0.06)
    assert post(Waiting({"one": object()}, 0.3)).status_code == 200
    response = post(Waiting({}, 10))
    assert (response.status_code, problem(response)) == (503, shield.NOBODY)
