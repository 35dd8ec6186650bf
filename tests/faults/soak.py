"""Ten minutes of mixed load on every endpoint, two clients each: no error, and the memory of Serve stays level.

    make soak        or for a shorter look: python tests/faults/soak.py --minutes 1 --endpoints score spectrum

Small models (`serving.trial`) answer. Memory, of each endpoint's replica and of the proxy, after a fifth of the time is
what it is compared with at the end: it may grow by GROWTH of that and ALLOWANCE_MB. Exit status 1 when anything was
wrong.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from cluster.ports import free_port
from serving.app import ENDPOINTS, serve_endpoints
from serving.ingress import Ingress
from serving.trial import trial_artifacts

GROWTH, ALLOWANCE_MB = 0.05, 30.0
PROXIES = ("ProxyActor", "HAProxyManager")  # with HAProxy, whose process is the second's, both are there
REFUSED = {"nonsense": 1}  # sent now and then: a request that is refused must not leak either


class Client(threading.Thread):
    """Asks one endpoint its examples in random order until told to stop."""

    def __init__(self, url: str, endpoint: str, seed: int):
        super().__init__(daemon=True)
        self.url, self.endpoint = f"{url}/{endpoint}/predict", endpoint
        self.choice = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.going = True

    def run(self) -> None:
        """Ask."""
        bodies = [*ENDPOINTS[self.endpoint].examples.values(), REFUSED]
        with httpx.Client(timeout=150, trust_env=False) as client:
            while self.going:
                body = self.choice.choice(bodies)
                try:
                    status = client.post(self.url, json=body).status_code
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                right = status == (422 if body is REFUSED else 200)
                self.statuses["right" if right else str(status)] += 1


def memory(endpoints: list[str]) -> dict[str, float]:
    """Megabytes of each endpoint's replicas and of the proxies, in the Ray that this process started."""
    from ray._private.state import actors

    found = dict.fromkeys([*endpoints, *PROXIES], 0.0)
    for actor in actors().values():
        kind, _, rest = actor["ActorClassName"].partition(":")
        name = rest.partition(":")[0] if kind == "ServeReplica" else kind
        if name in found and actor["State"] == "ALIVE":
            process = psutil.Process(actor["Pid"])
            found[name] += sum(one.memory_info().rss for one in (process, *process.children())) / 2**20
    return {name: size for name, size in found.items() if size}


def main() -> int:
    """Parse the flags, load, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--endpoints", nargs="+", default=list(ENDPOINTS), choices=sorted(ENDPOINTS))
    parser.add_argument("--ingress", default="auto", choices=get_args(Ingress))
    parser.add_argument("--clients", type=int, default=2, help="of each endpoint")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifacts = trial_artifacts(flags.endpoints, Path(folder))
        with serve_endpoints(artifacts=artifacts, port=free_port(), ingress=flags.ingress) as served:
            clients = [Client(served.url, name, seed) for name in flags.endpoints for seed in range(flags.clients)]
            for client in clients:
                client.start()
            time.sleep(12 * flags.minutes)
            early = memory(flags.endpoints)
            time.sleep(48 * flags.minutes)
            late = memory(flags.endpoints)
            for client in clients:
                client.going = False
            for client in clients:
                client.join(150)
    table = Table("process", "answers", "wrong", "MB early", "MB late", title=f"{flags.minutes:g} minutes")
    failed = False
    for name in early:
        counts = sum((client.statuses for client in clients if client.endpoint == name), Counter())
        wrong = {status: count for status, count in counts.items() if status != "right"}
        grown = late[name] > early[name] * (1 + GROWTH) + ALLOWANCE_MB
        failed |= bool(wrong) or grown or (name not in PROXIES and not counts["right"])
        said = ", ".join(f"{status} {count}" for status, count in wrong.items()) or "none"
        answers = "" if name in PROXIES else str(counts["right"])
        table.add_row(name, answers, said, f"{early[name]:.0f}", f"{late[name]:.0f}{' grew' if grown else ''}")
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
