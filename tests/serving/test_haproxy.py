"""What `prism-haproxy` changes in a configuration, asked of the real HAProxy."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

import prism

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
    server one 127.0.0.1:{replica}
listen stats
  bind *:{stats}
  stats enable
"""


@contextlib.contextmanager
def haproxy(folder: Path, replica: int, use: str = "use_backend one if is_one") -> Iterator[str]:
    """Its address, with a configuration such as Ray writes."""
    (folder / "500.http").write_bytes(b"HTTP/1.1 500 Plain\r\nContent-Length: 0\r\n\r\n")
    ports = {name: prism.free_port() for name in ("metrics", "port", "stats")}
    file = folder / "haproxy.cfg"
    file.write_text(RAYS.format(folder=folder, replica=replica, use=use, **ports))
    command = Path(sys.executable).with_name("prism-haproxy")
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(command)}  # as in the processes that Ray starts
    process = subprocess.Popen([command, "-db", "-f", file], env=environment, stderr=subprocess.PIPE, text=True)
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
def replica(behave: list[str]) -> Iterator[int]:
    """The port of a server that does, request by request, what `behave` says, and answers 200 after that."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            match behave.pop(0) if behave else "answer":
                case "die":
                    self.connection.close()
                case "hang":
                    time.sleep(4)
                case _:
                    self.send_response(200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


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


@pytest.mark.parametrize(("behave", "size"), [(["die"], 300_000), (["die"] * 9, 10), (["hang"], 10)])
def test_one_that_cannot_be_asked_again_is_refused_in_our_words(tmp_path, behave, size):
    """Too large for the buffer, lost again and again, or too slow."""
    with replica(behave) as port, haproxy(tmp_path, port) as url:
        name = 'it"s'
        response = httpx.post(
            f"{url}/one/predict", content=b"x" * size, headers={"x-request-id": name}, trust_env=False, timeout=20
        )
    assert refusal(response, name) == "no process answered for this model; retry after a moment"


def test_a_replica_that_is_not_there(tmp_path):
    with haproxy(tmp_path, prism.free_port()) as url:
        response = httpx.post(f"{url}/one/predict", content=b"x", trust_env=False)
        assert "no process answered" in refusal(response, response.headers["x-request-id"])
        assert len(response.headers["x-request-id"]) == 36  # made on the way in
        assert httpx.get(f"{url}/other", trust_env=False).status_code == 404


def test_before_any_endpoint_is_known_paths_are_not_unknown(tmp_path):
    with haproxy(tmp_path, 1, use="") as url:
        response = httpx.get(f"{url}/one/predict", headers={"x-request-id": "7"}, trust_env=False)
    assert refusal(response, "7") == "the server is starting; retry after a moment"
