"""What the HTTP layer promises whatever the model does: tokens, sizes, ids, and failures that show nothing."""

import asyncio
import logging
from hashlib import sha256
from types import SimpleNamespace

import httpx
import pytest

from library.errors import InputError, PrismError
from serving.batcher import Ticket
from serving.metrics import Meter
from serving.problems import Late, Overloaded
from serving.routes import Update, application
from serving.send import Score, ScoreResponse
from serving.settings import EndpointArgs, token_digest
from serving.updates import Loaded

BODY = {"text": "some words"}
TOKEN = "s3cret"


class Service:
    """Stands in for a replica: answers with what it is given, or raises it."""

    def __init__(self, artifact, outcome=None, busy=None):
        self.current = Loaded(Score(SimpleNamespace(), artifact.version), artifact)
        self.args = EndpointArgs(endpoint="score", artifact="models:/send@champion", max_body_bytes=1000)
        self.meter = Meter("score", Score.score_bounds)
        self.outcome, self.busy = outcome, busy
        self.asked = 0

    def accept(self, request, *, wants_progress=False):
        self.asked += 1
        return Ticket(request, 1, wants_progress=wants_progress)

    async def answer(self, ticket):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return ScoreResponse(model=self.current.artifact.version, results=[])

    def not_ready(self):
        return self.busy

    def limits(self):
        return {"positions": 7}

    def update(self):
        return Update(reference=self.args.artifact, followed=True, refused=None)


def call(service, method="POST", path="/predict", *, digest=None, **request) -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(application(service, digest))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


@pytest.fixture
def service(send_artifact) -> Service:
    return Service(send_artifact)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("texts[2]: too long"), 422, "texts[2]: too long"),
        (Overloaded("64 requests are waiting"), 429, "64 requests are waiting"),
        (Late("no answer within 60 seconds"), 503, "no answer within 60 seconds"),
        (RuntimeError("/secret/path in a trace"), 500, "an unexpected failure; the server's log has the request's id"),
        (PrismError("/secret/path"), 500, "an unexpected failure; the server's log has the request's id"),
    ],
)
def test_each_failure_has_its_status_and_shows_nothing_of_the_inside(send_artifact, error, status, line):
    response = call(Service(send_artifact, error), json=BODY, headers={"X-Request-Id": "mine"})
    assert response.status_code == status
    fields = [{"field": "texts[2]", "problem": "too long"}] if status == 422 else []
    assert response.json() == {"error": line, "fields": fields, "request_id": "mine"}
    assert response.headers["x-prism-model"] == f"send/{send_artifact.version}"
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_request_without_an_id_gets_one(service):
    response = call(service, json=[])
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ["/predict", "/info", "/nothing"])
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"]
)
def test_nothing_but_health_and_the_page_is_open_without_the_token(service, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = call(service, path=path, digest=sha256(TOKEN.encode()).hexdigest(), headers=headers, content=b"{")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert service.asked == 0


def test_the_token_opens_and_health_needs_none(service):
    digest = sha256(TOKEN.encode()).hexdigest()
    assert call(service, digest=digest, json=BODY, headers={"Authorization": f"bearer  {TOKEN}"}).status_code == 200
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert call(service, "GET", path, digest=digest).status_code == 200
    page = call(service, "GET", "/openapi.json", digest=digest).json()
    assert page["paths"]["/predict"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "401" in page["paths"]["/predict"]["post"]["responses"]


def test_tokens_come_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv("PRISM_TOKEN", raising=False)
    assert token_digest(None) is None
    monkeypatch.setenv("PRISM_TOKEN", "other")
    assert token_digest(None) == sha256(b"other").hexdigest()
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert token_digest(str(file)) == sha256(TOKEN.encode()).hexdigest()
    for bad in ("", " \n", "two words", "clé"):
        file.write_text(bad)
        with pytest.raises(InputError, match="holds no token"):
            token_digest(str(file))
    with pytest.raises(PrismError, match="cannot be read"):
        token_digest(str(tmp_path / "none"))


async def chunks():
    for _ in range(3):
        yield b" " * 400


def test_a_path_that_a_client_made_up_stays_in_one_line_of_the_log(service, caplog):
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        caplog.handler.addFilter(lambda record: hasattr(record, "endpoint"))
        call(service, "GET", "/x%0AINFO score/predict 200%0D%E2%80%A8", digest="0" * 64)
    [record] = caplog.records
    assert record.path == "/x%0AINFO%20score/predict%20200%0D%E2%80%A8"
    assert record.getMessage().splitlines() == [record.getMessage()]
    assert "score/x%0AINFO%20score/predict%20200%0D%E2%80%A8 401" in record.getMessage()


@pytest.mark.parametrize("content", [b" " * 1001, chunks()], ids=["announced", "in chunks"])
def test_too_large_a_body_is_refused(service, content):
    response = call(service, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "1000 bytes" in response.json()["error"]


def test_not_ready_says_why_while_the_process_is_healthy(send_artifact):
    service = Service(send_artifact, busy="64 requests are waiting")
    assert call(service, "GET", "/healthz").json() == {"status": "ok"}
    response = call(service, "GET", "/readyz")
    assert (response.status_code, response.json()["error"]) == (503, "64 requests are waiting")
    assert call(Service(send_artifact), "GET", "/readyz").json() == {"status": "ready", "model": send_artifact.version}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b"\xff{}", "body"),
        (b"[" * 990, "body"),
        (b'{"text": NaN}', "text"),
        (b'{"text": "\\ud800"}', "body"),
        (b'{"\\ud800": 1}', "body"),
        (b'{"text": "a", "' + b"x" * 100 + b'": 1}', "x" * 64 + "..."),
        (b'{"texts": ["a", 5]}', "texts[1]"),
    ],
)
def test_what_is_no_valid_body_is_told_so(service, content, field):
    response = call(service, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["fields"][0]["field"] == field
    assert "Traceback" not in response.text
