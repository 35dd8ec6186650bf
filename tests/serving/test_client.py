"""Asking: what a caller is told when the answer is not an answer."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from library.errors import InputError, PrismError
from serving.client import ask


class Scripted(BaseHTTPRequestHandler):
    """Answers every POST with the server's script, and /-/routes like Serve."""

    def do_POST(self):
        self.server.seen.append(
            (self.path, self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        )
        self._reply(*self.server.script)

    def do_GET(self):
        self._reply(200, '{"/score": "score", "/hallucination": "hallucination"}')

    def _reply(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.delenv("PRISM_TOKEN", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def problem(text: str) -> str:
    return json.dumps({"error": text, "fields": [], "request_id": "r1"})


def test_the_payload_or_the_example_is_sent_with_the_token(server, monkeypatch):
    server.script = (200, '{"results": []}')
    assert ask("score", {"text": "a b"}, server.url + "/") == {"results": []}
    monkeypatch.setenv("PRISM_TOKEN", "from-environment")
    ask("score", None, server.url)
    ask("hallucination", {"prompt": "a"}, server.url, token="given")
    assert server.seen == [
        ("/score/predict", None, {"text": "a b"}),
        ("/score/predict", "Bearer from-environment", {"text": "The capital of France is Paris."}),
        ("/hallucination/predict", "Bearer given", {"prompt": "a"}),
    ]


@pytest.mark.parametrize(
    ("script", "kind", "line"),
    [
        ((422, problem("text: too short")), InputError, "score: text: too short"),
        ((413, problem("the body is larger")), InputError, "score: the body is larger"),
        ((401, problem("a token")), PrismError, "score at URL needs a token: set PRISM_TOKEN"),
        ((404, "Path not found"), PrismError, "score is not served at URL; served there: hallucination, score"),
        ((429, problem("64 wait"), {"X-Request-Id": "r1"}), PrismError, "answered 429: 64 wait (request r1)"),
        ((503, "unavailable", {"X-Request-Id": "r2"}), PrismError, "answered 503: unavailable (request r2)"),
        ((200, "<html>hello</html>"), PrismError, "what answers at URL is not a Prism endpoint"),
        ((500, "<html>oops</html>"), PrismError, "what answers at URL is not a Prism endpoint"),
    ],
)
def test_each_refusal_becomes_one_clear_line(server, script, kind, line):
    server.script = script
    with pytest.raises(PrismError) as raised:
        ask("score", {"text": "a"}, server.url)
    assert type(raised.value) is kind
    assert line.replace("URL", server.url) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nobody_there_and_nonsense_are_told_apart(free_port):
    port = free_port
    with pytest.raises(PrismError, match=f"nothing answers at http://127.0.0.1:{port}; start .*prism serve score"):
        ask("score", {"text": "a"}, f"http://127.0.0.1:{port}")
    for url in ("127.0.0.1:8000", "ftp://there", ""):
        with pytest.raises(InputError, match="is not an address"):
            ask("score", {"text": "a"}, url)
    for payload in ({"text": object()}, {"temperature": float("nan")}):
        with pytest.raises(InputError, match="the payload is not JSON"):
            ask("score", payload, f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="no endpoint 'clarify'; there are hallucination, score"):
        ask("clarify", None)


def test_an_answer_that_does_not_come_is_not_waited_for(server):
    held = threading.Event()
    server.script = (200, "{}")
    original, Scripted._reply = Scripted._reply, lambda *_: held.wait(10)
    try:
        with pytest.raises(PrismError, match=r"gave no answer within 0\.3 seconds"):
            ask("score", {"text": "a"}, server.url, timeout=0.3)
    finally:
        held.set()
        Scripted._reply = original


def test_a_request_that_may_be_retried_is_sent_again_for_a_while(server, monkeypatch):
    scripts = [
        (503, problem("lost"), {"Retry-After": "1"}),
        (429, problem("64 wait"), {"Retry-After": "1"}),
        (200, "{}"),
    ]
    reply = Scripted._reply
    monkeypatch.setattr(Scripted, "_reply", lambda self, *_: reply(self, *scripts[min(len(server.seen), 3) - 1]))
    server.script = (200, "{}")
    assert ask("score", {"text": "a"}, server.url) == {}
    assert len(server.seen) == 3
    monkeypatch.setattr("serving.client.RETRY_S", 0.0)
    scripts[:] = scripts[:1] * 3
    with pytest.raises(PrismError, match="answered 503: lost"):
        ask("score", {"text": "a"}, server.url)
