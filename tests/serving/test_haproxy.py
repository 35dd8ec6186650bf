"""What `prism-haproxy` changes in a configuration, asked of the real HAProxy."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cluster.ports import free_port, free_ports

RAYS = """global
    maxconn 64
    tune.bufsize 65536
defaults
    mode http
    timeout connect 1s
    timeout client 20s
    timeout server 2s
    option redispatch 1
    retry-on conn-failure empty-response
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_one path_beg /one/
    {use}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
backend one
    http-reuse always
    default-server fastinter 250ms downinter 250ms fall 2 rise 2 inter 5s check
{servers}
listen stats
  bind *:{stats}
  stats enable
"""
STARTER = "import subprocess, sys; subprocess.run(sys.argv[1:])"  # stands where Ray's manager of HAProxy does


@contextlib.contextmanager
def haproxy(folder: Path, *replicas: int, fallback: int = 0, use: str = "use_backend one if is_one") -> Iterator[str]:
    """Its address, with a configuration such as Ray writes; who started it is killed when the block ends."""
    (folder / "500.http").write_bytes(b"HTTP/1.1 500 Plain\r\nContent-Length: 0\r\n\r\n")
    ports = dict(zip(("metrics", "port", "stats"), free_ports(3), strict=True))
    file = folder / "haproxy.cfg"
    checked = "check observe layer4 error-limit 1 on-error mark-down"
    servers = "\n".join(f"    server of{port} 127.0.0.1:{port} {checked}" for port in replicas)
    if fallback:
        servers += f"\n    server fallback 127.0.0.1:{fallback} check backup"
    file.write_text(RAYS.format(folder=folder, servers=servers, use=use, **ports))
    command = Path(sys.executable).with_name("prism-haproxy")
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(command)}  # as in the processes that Ray starts
    command = [sys.executable, "-c", STARTER, command, "-db", "-f", file]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{ports['port']}/", trust_env=False)
                break
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert f"bind 127.0.0.1:{ports['metrics']}\n" in file.read_text()
        assert f"bind 127.0.0.1:{ports['stats']}\n" in file.read_text()
        yield f"http://127.0.0.1:{ports['port']}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def replica(behave: list[str], callers: list[int] | None = None) -> Iterator[int]:
    """The port of a server that does, request by request, what `behave` says, and answers 200 after that.

    `callers` gets the port that each request came from.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if callers is not None:
                callers.append(self.client_address[1])
            body = b"".join(self.parts())
            match behave.pop(0) if behave else "answer":
                case "die":
                    self.hang_up()
                case "die for good":
                    self.server.socket.close()
                    self.hang_up()
                case "die within":
                    self.send_response(200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[:-1])
                    self.hang_up()
                case "dawdle" | "in pieces" as how:
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream" if how == "in pieces" else "text/plain")
                    self.send_header(*("connection", "close") if how == "in pieces" else ("content-length", len(body)))
                    self.end_headers()
                    for part in (body[:10], body[10:]):
                        self.wfile.write(part)
                        self.wfile.flush()
                        time.sleep(0.5)
                case "hang":
                    time.sleep(4)
                case "backpressure" | "refuse" as who:
                    self.send_response(429)
                    if who == "refuse":
                        self.send_header("x-prism-model", "send/3f2a9c0d1e4b")
                    self.send_header("content-type", "text/plain")
                    self.send_header("content-length", "4")
                    self.end_headers()
                    self.wfile.write(b"full")
                case _:
                    self.send_response(200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        def parts(self) -> Iterator[bytes]:
            if "content-length" in self.headers:
                yield self.rfile.read(int(self.headers["content-length"]))
                return
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "30000")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("behave", ["answer", "dawdle", "in pieces"])
@pytest.mark.parametrize("size", [0, 20, 30_000, 300_000])
def test_whole_answers_pass_as_they_are(tmp_path, behave, size):
    with replica([behave]) as port, haproxy(tmp_path, port) as url:
        response = httpx.post(f"{url}/one/predict", content=b"x" * size, trust_env=False)
        assert (response.status_code, len(response.content)) == (200, size)
        head = httpx.head(f"{url}/one/predict", trust_env=False)
        assert (head.status_code, head.headers["content-length"]) == (200, "30000")  # of a body that never comes


def test_events_come_when_they_happen(tmp_path):
    with (
        replica(["in pieces"]) as port,
        haproxy(tmp_path, port) as url,
        httpx.stream("POST", f"{url}/one/predict", content=b"x" * 30, trust_env=False) as response,
    ):
        times = {len(part): time.monotonic() for part in response.iter_raw()}
    assert times[20] - times[10] > 0.2


def refusal(response: httpx.Response, identifier: str) -> str:
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-request-id"] == identifier
    assert response.headers["content-type"] == "application/json"
    assert "x-prism-refusal" not in response.headers
    found = response.json()
    assert found | {"error": ""} == {"error": "", "fields": [], "request_id": identifier}
    return found["error"]


def test_a_request_whose_replica_dies_is_asked_again(tmp_path):
    with replica(["die"]) as port, haproxy(tmp_path, port) as url:
        response = httpx.post(f"{url}/one/predict", content=b"x" * 50_000, trust_env=False)
    assert (response.status_code, response.content) == (200, b"x" * 50_000)


@pytest.mark.parametrize(
    ("behave", "size"),
    [(["die"], 300_000), (["die"] * 9, 10), (["die for good"], 10), (["hang"], 10), (["die within"], 30_000)],
)
def test_one_that_cannot_be_asked_again_is_refused_in_our_words(tmp_path, behave, size):
    """Too large for the buffer, lost again and again, or too slow."""
    with replica(behave) as port, haproxy(tmp_path, port) as url:
        name = 'it"s'
        response = httpx.post(
            f"{url}/one/predict", content=b"x" * size, headers={"x-request-id": name}, trust_env=False, timeout=20
        )
    assert refusal(response, name) == "no process answered for this model; retry after a moment"


@pytest.mark.parametrize("size", [1, 300_000])
@pytest.mark.parametrize("behave", [["die"] * 9, ["die for good"], ["hang"] * 2])
def test_a_client_that_keeps_its_connection_is_told_like_any_other(tmp_path, behave, size):
    with (
        replica(["answer", *behave]) as port,
        replica([]) as fallback,
        haproxy(tmp_path, port, fallback=fallback) as url,
        httpx.Client(trust_env=False, timeout=20) as one,
    ):
        asked = [
            one.post(f"{url}/one/predict", content=b"x" * length, headers={"x-request-id": "7"}) for length in (1, size)
        ]
    assert asked[0].status_code == 200
    if (behave, size) == (["die for good"], 1):
        assert asked[1].status_code == 200  # of the fallback, which in Ray says that nobody is there
    else:
        assert refusal(asked[1], "7") == "no process answered for this model; retry after a moment"


@pytest.mark.parametrize(("size", "connections"), [(1, 1), (30_000, 1), (40_000, 4)])
def test_who_cannot_be_asked_again_gets_a_connection_of_its_own(tmp_path, size, connections):
    with replica([], callers := []) as port, haproxy(tmp_path, port) as url, httpx.Client(trust_env=False) as one:
        for _ in range(4):
            assert len(one.post(f"{url}/one/predict", content=b"x" * size).content) == size
    assert len(set(callers)) == connections


def test_a_body_of_unknown_length_gets_a_connection_of_its_own(tmp_path):
    with replica([], callers := []) as port, haproxy(tmp_path, port) as url, httpx.Client(trust_env=False) as one:
        for content in (b"x", b"x", iter([b"x"])):
            assert one.post(f"{url}/one/predict", content=content).content == b"x"
    assert callers[0] == callers[1] != callers[2]


def test_a_replica_that_is_not_there(tmp_path):
    with haproxy(tmp_path, free_port()) as url:
        response = httpx.post(f"{url}/one/predict", content=b"x", trust_env=False)
        assert "no process answered" in refusal(response, response.headers["x-request-id"])
        assert len(response.headers["x-request-id"]) == 36  # made on the way in
        assert httpx.get(f"{url}/other", trust_env=False).status_code == 404


def test_a_refusal_of_rays_own_is_json_and_one_of_the_endpoint_passes(tmp_path):
    with replica(["backpressure", "refuse"]) as port, haproxy(tmp_path, port) as url:
        answers = [
            httpx.post(f"{url}/one/predict", content=b"x", headers={"x-request-id": 'my "id"'}, trust_env=False)
            for _ in range(2)
        ]
    assert [answer.status_code for answer in answers] == [429, 429]
    problem = answers[0].json()
    assert (problem["request_id"], problem["fields"]) == ('my "id"', [])
    assert answers[0].headers["retry-after"] == "1"
    assert answers[0].headers["x-request-id"] == 'my "id"'
    assert answers[1].text == "full"


def test_before_any_endpoint_is_known_paths_are_not_unknown(tmp_path):
    with haproxy(tmp_path, 1, use="") as url:
        response = httpx.get(f"{url}/one/predict", headers={"x-request-id": "7"}, trust_env=False)
    assert refusal(response, "7") == "the server is starting; retry after a moment"


def test_it_ends_with_the_process_that_started_it(tmp_path):
    with haproxy(tmp_path, 1) as url:
        assert httpx.get(url, trust_env=False).status_code == 404
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(url, trust_env=False)
        except httpx.TransportError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
