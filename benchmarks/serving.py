"""Time the endpoints against their models called directly and against plain FastAPI servers, on loopback, in one run.

Each endpoint serves a small model (`serving.trial`), so that the way to the model counts and not the model. Peers:

direct    the model called in this process, in batches of 32 requests: no server, no JSON
plain     FastAPI and uvicorn around the same endpoint, a function per request: what a user would write in ten lines
empty     a Serve deployment that reads the body and answers at once, behind the same ingress: what Serve itself takes

Goals: requests that hold many items reach 0.8 of direct; 32 clients with small requests get 1.5 times the answers of
plain; one client waits less than 8 ms longer than the model takes. Every number is of this machine in this run.

Without flags: every endpoint behind HAProxy, the default, and FEW of them behind the two others.

    python benchmarks/serving.py [--endpoints NAME ...] [--seconds S] [--ingress haproxy proxy fast] [--out FILE.json]
"""

import argparse
import asyncio
import contextlib
import io
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file's name would hide the package of that name

from cluster.ports import free_port  # noqa: E402
from library.artifact import open_artifact  # noqa: E402
from library.errors import PrismError  # noqa: E402
from serving.app import ENDPOINTS, serve_endpoints  # noqa: E402
from serving.endpoint import ARROW, NPY, Endpoint, answer_batch  # noqa: E402
from serving.payloads import JSON, read  # noqa: E402
from serving.rqgnn import ASPIRIN  # noqa: E402
from serving.trial import trial_artifacts  # noqa: E402

CLIENTS = (1, 8, 32)
TOGETHER = 32  # requests in a direct call
WARM_UP, FEWEST_CALLS, LONGEST_S = 5, 50, 30.0  # of a lone client
TURNS, CALLS, LONGEST_TURN_S = 2, 20, 5.0  # of many items
GOALS = {"direct": 0.8, "plain": 1.5, "added ms": 8.0}
INGRESSES = ("haproxy", "proxy", "fast")
TAKES_TURNS = ("hallucination",)  # its model listens to itself while it writes: not two texts at once
FEW = ("score", "classify", "graph-anomaly")
SMALL = {"molecule": {"samples": 4, "steps": 20}}  # where the first example asks for much
MANY: dict[str, dict[str, Any]] = {  # requests of many items, where the first example has one
    "hallucination": {"prompts": ["The capital of France is"] * 8, "samples": 4},
    "score": {"texts": ["The river Thames flows through London."] * 64},
    "corrosion": {},
    "advise": {
        "fraction": 0.5,
        "traces": [1 / (1 + layer) for layer in range(160)],
        "n_params": [1000 + 100 * layer for layer in range(160)],
        "bits": [2, 3, 4, 6, 8],
        "perturbation": [[4.0**-bits * (1 + layer) for bits in (2, 3, 4, 6, 8)] for layer in range(160)],
    },
    "graph-property": {"graphs": [{"smiles": "CC(=O)Oc1ccccc1C(=O)O"}] * 32},
    "graph-encoding": {"graphs": [{"smiles": "CC(=O)Oc1ccccc1C(=O)O"}] * 32},
}


class Body(NamedTuple):
    """A request as bytes, and as the endpoint reads it."""

    content: bytes
    kind: str
    request: Any


class Timing(NamedTuple):
    """Of one number of clients."""

    per_second: float
    p50_ms: float
    p99_ms: float


def bodies(endpoint: type[Endpoint]) -> tuple[Body, Body]:
    """A small request, and one of many items."""
    example = next(iter(endpoint.examples.values()))
    small = json.dumps(example | SMALL.get(endpoint.name, {})).encode()
    if endpoint.name == "graph-anomaly":
        many, kind = _molecules(640), ARROW
    elif endpoint.name in ("classify", "spectrum"):
        file = io.BytesIO()
        noise = np.random.default_rng(0)
        np.save(
            file,
            noise.integers(0, 256, (256, 28, 28), np.uint8)
            if endpoint.name == "classify"
            else noise.standard_normal((512, 256), np.float32),
        )
        many, kind = file.getvalue(), NPY
    else:
        wanted = MANY.get(endpoint.name, example)
        many = json.dumps(wanted or example | {"series": example["series"] * 32}).encode()
        kind = JSON
    return Body(small, JSON, read(endpoint, JSON, {}, small)), Body(many, kind, read(endpoint, kind, {}, many))


def _molecules(count: int) -> bytes:
    """A table of so many molecules."""
    import pyarrow as pa

    columns = {name: [ASPIRIN[name]] * count for name in ("kinds", "edges")}
    file = io.BytesIO()
    table = pa.table(
        columns, pa.schema([("kinds", pa.list_(pa.string())), ("edges", pa.list_(pa.list_(pa.int32(), 2)))])
    )
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


def called(model: Endpoint, requests: list[Any]) -> list[Any]:
    """What the model answers; also one that answers in steps, or not all of them in one call."""
    answers = []
    for _, outcomes in answer_batch(model, requests):
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        answers += outcomes
    return answers


def direct(model: Endpoint, body: Body, seconds: float, together: int) -> Timing:
    """Requests per second of the model itself, and how long one call of it takes."""
    requests = [read(type(model), body.kind, {}, body.content) for _ in range(together)]
    called(model, requests)
    calls = []
    end = time.perf_counter() + seconds
    while not calls or time.perf_counter() < end:
        began = time.perf_counter()
        called(model, requests)
        calls.append(time.perf_counter() - began)
    return Timing(together * len(calls) / sum(calls), *_quantiles(calls))


def beside(model: Endpoint, body: Body, url: str, together: int, count: int, seconds: float) -> tuple[Timing, Timing]:
    """The model itself and `count` clients, TURNS times in turn, each as the mean: a machine's speed wanders.

    A turn lasts for CALLS calls of the model, if that is longer: clients begin and end with batches that are not full.
    """
    call = direct(model, body, 0.0, together).p50_ms / 1000
    turn = max(seconds / TURNS, min(CALLS * call, LONGEST_TURN_S))
    pairs = [(direct(model, body, turn, together), asyncio.run(clients(url, body, count, turn))) for _ in range(TURNS)]
    own, asked = (Timing(*map(statistics.mean, zip(*timings, strict=True))) for timings in zip(*pairs, strict=True))
    return own, asked


async def alone(model: Endpoint, body: Body, url: str, seconds: float) -> tuple[Timing, Timing]:
    """The model itself and a lone client, call by call in turn: what the way adds is less than a machine wanders."""
    requests = [read(type(model), body.kind, {}, body.content)]
    own: list[float] = []
    asked: list[float] = []
    async with asking(url, body) as ask:
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds or len(own) < WARM_UP + FEWEST_CALLS:
            if passed > LONGEST_S and len(own) > WARM_UP:
                break
            began = time.perf_counter()
            called(model, requests)
            own.append(time.perf_counter() - began)
            asked.append(await ask())
    return tuple(Timing(1 / statistics.mean(kept), *_quantiles(kept)) for kept in (own[WARM_UP:], asked[WARM_UP:]))


async def clients(url: str, body: Body, count: int, seconds: float) -> Timing:
    """What `count` clients get that each ask again as soon as they have their answer."""
    times: list[float] = []

    async def client(end: float, kept: list[float]) -> None:
        async with asking(url, body) as ask:
            while time.perf_counter() < end:
                kept.append(await ask())

    await asyncio.gather(*(client(time.perf_counter() + seconds / 3, []) for _ in range(count)))  # warms up
    began = time.perf_counter()
    await asyncio.gather(*(client(began + seconds, times) for _ in range(count)))
    return Timing(len(times) / (time.perf_counter() - began), *_quantiles(times))


@contextlib.asynccontextmanager
async def asking(url: str, body: Body) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Asks over a connection of its own, and gives the seconds until the whole answer was there."""
    host, _, rest = url.removeprefix("http://").partition(":")
    port, _, path = rest.partition("/")
    lines = (
        f"POST /{path} HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: {body.kind}",
        f"Content-Length: {len(body.content)}",
    )
    sent = "".join(f"{line}\r\n" for line in (*lines, "")).encode() + body.content
    reader, writer = await asyncio.open_connection(host, int(port))
    closes = False  # the server said that it will hang up, as HAProxy does when it is given other replicas

    async def ask() -> float:
        nonlocal reader, writer, closes
        began = time.perf_counter()
        if closes:
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        content = await reader.readexactly(length)
        if not answer.startswith(b"http/1.1 200"):
            raise PrismError(f"{url} answered {answer[:20].decode()}: {content[:200].decode()}")
        closes = b"\r\nconnection: close\r\n" in answer
        return time.perf_counter() - began

    try:
        yield ask
    finally:
        writer.close()


def _quantiles(times: list[float]) -> tuple[float, float]:
    return 1000 * statistics.median(times), 1000 * float(np.quantile(times, 0.99))


def plain_server(name: str, folder: str, port: int) -> None:
    """The peer: FastAPI around the same model, one request at a time per thread of its pool."""
    import uvicorn
    from fastapi import FastAPI

    torch.set_num_threads(1)
    kind = ENDPOINTS[name]
    model = kind.load(open_artifact(folder), "cpu")
    app = FastAPI()
    turn = threading.Lock() if name in TAKES_TURNS else contextlib.nullcontext()

    @app.post(f"/{name}/predict")
    def predict(body: kind.Request) -> kind.Response:
        with turn:
            return called(model, [body])[0]

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False)


@contextlib.contextmanager
def plain(name: str, folder: str) -> Iterator[str]:
    """The address of the peer, in a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--plain", name, folder, str(port)])
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise PrismError(f"the plain server of {name} does not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/{name}/predict"
    finally:
        process.terminate()
        process.wait()


def empty(base: str, seconds: float) -> dict[str, Timing]:
    """What clients get from a deployment that does nothing; it stays until Serve ends."""
    from ray import serve
    from starlette.responses import Response

    @serve.deployment(max_ongoing_requests=2 * max(CLIENTS), ray_actor_options={"num_cpus": 0})
    class Empty:
        async def __call__(self, request: Any) -> Response:
            await request.body()
            return Response(b"{}", media_type=JSON)

    serve.run(Empty.bind(), name="empty", route_prefix="/empty")
    body, _ = bodies(ENDPOINTS["score"])
    return {f"empty {count}": asyncio.run(clients(f"{base}/empty", body, count, seconds)) for count in CLIENTS}


def measure(name: str, folder: str, url: str, seconds: float) -> dict[str, Any]:
    """All timings of one endpoint, and its three ratios."""
    kind = ENDPOINTS[name]
    model = kind.load(open_artifact(folder), "cpu")
    small, many = bodies(kind)
    found: dict[str, Any] = {"direct 32": direct(model, small, seconds / 2, TOGETHER)}
    found["direct 1"], found["prism 1"] = asyncio.run(alone(model, small, url, seconds))
    for count in CLIENTS[1:]:
        found[f"prism {count}"] = asyncio.run(clients(url, small, count, seconds))
    found["direct many"], found["prism many"] = beside(model, many, url, 4, 8, seconds)
    with plain(name, folder) as peer:
        for count in CLIENTS:
            found[f"plain {count}"] = asyncio.run(clients(peer, small, count, seconds))
    ratios = {
        "direct": found["prism many"].per_second / found["direct many"].per_second,
        "plain": found["prism 32"].per_second / found["plain 32"].per_second,
        "added ms": found["prism 1"].p50_ms - found["direct 1"].p50_ms,
    }
    return {"timings": {key: timing._asdict() for key, timing in found.items()}, "ratios": ratios}


def shown(results: dict[str, Any], floor: dict[str, Any], ingress: str) -> Table:
    """One row for each endpoint and way; `docs/pages.py` reads them."""
    table = Table(
        "endpoint",
        "way",
        "1: p50 / p99 ms",
        "8",
        "32: p50 / p99 ms",
        "answers/s at 1, 8, 32",
        "many of direct",
        "32 of plain",
        "alone +ms",
        title=f"ingress {ingress}",
        caption="goals: many items at least {direct} of direct, 32 clients at least {plain} of plain, "
        "alone less than {added ms:g} ms longer".format_map(GOALS),
    )
    table.add_row("none", "empty", *_numbers(floor, "empty"))
    for name, found in results.items():
        timings, ratios = found["timings"], found["ratios"]
        said = [f"{ratios['direct']:.2f}", f"{ratios['plain']:.2f}", f"{ratios['added ms']:+.1f}"]
        table.add_row(name, "prism", *_numbers(timings, "prism"), *said)
        table.add_row(name, "plain", *_numbers(timings, "plain"))
        batches = f"{timings['direct 32']['per_second']:.0f} in batches"
        table.add_row(name, "direct", f"{timings['direct 1']['p50_ms']:.1f}", "", "", batches)
    return table


def _numbers(timings: dict[str, Any], way: str) -> list[str]:
    at = [timings[f"{way} {count}"] for count in CLIENTS]
    spans = [f"{one['p50_ms']:.1f} / {one['p99_ms']:.1f}" for one in at]
    return [*spans, ", ".join(f"{one['per_second']:.0f}" for one in at)]


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--endpoints", nargs="+", choices=sorted(ENDPOINTS))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--ingress", nargs="+", default=list(INGRESSES), choices=INGRESSES, help="in turn")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.plain:
        plain_server(flags.plain[0], flags.plain[1], int(flags.plain[2]))
        return
    if len(flags.ingress) > 1:  # Ray takes one for its whole process
        same = ["--endpoints", *flags.endpoints] if flags.endpoints else []
        same += ["--seconds", str(flags.seconds)]
        for ingress in flags.ingress:
            out = [] if flags.out is None else ["--out", str(flags.out.with_stem(f"{flags.out.stem}-{ingress}"))]
            subprocess.run([sys.executable, __file__, *same, *out, "--ingress", ingress], check=True)
        return
    [ingress] = flags.ingress
    names = flags.endpoints or (list(ENDPOINTS) if ingress == INGRESSES[0] else FEW)
    torch.set_num_threads(1)
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        artifacts = trial_artifacts(names, Path(folder))
        with serve_endpoints(artifacts=artifacts, port=free_port(), ingress=ingress) as served:
            results = {
                name: measure(name, artifacts[name], f"{served.url}/{name}/predict", flags.seconds) for name in names
            }
            floor = {key: timing._asdict() for key, timing in empty(served.url, flags.seconds).items()}
    console.print(shown(results, floor, ingress))
    if flags.out:
        record = {
            "machine": platform.machine(),
            "ingress": ingress,
            "goals": GOALS,
            "empty": floor,
            "endpoints": results,
        }
        flags.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
