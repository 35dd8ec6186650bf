"""Who takes requests in: Serve's own proxy, or HAProxy, which hands them straight to the replicas.

proxy       one Python process on each node; nothing but its port takes HTTP
haproxy     Ray's HAProxy, compiled code on each node, hands requests straight to the replicas, which listen on ports of
            their own, on the server's host; its refusals are ours, its statistics are on ports 8404 and 9101 of
            127.0.0.1 (`serving.haproxy`)
fast        haproxy with Serve's throughput options: no thread apart for our code in a replica, logs in blocks

Ray decides this when it starts, from the environment: RAY_SERVE_ENABLE_HA_PROXY, RAY_SERVE_THROUGHPUT_OPTIMIZED and
RAY_SERVE_HAPROXY_BINARY_PATH on every machine of a cluster, or `prepare` for a Ray that is started here.
"""

import os
import sys
from pathlib import Path
from typing import Literal

from library.errors import InputError

Ingress = Literal["proxy", "haproxy", "fast"]
VARIABLES: dict[Ingress, dict[str, str]] = {
    "proxy": {},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "fast": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}

ENVIRONMENT = {  # of Serve's controller, and so of its proxies
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.shield:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a proxy that fails three looks in a row is replaced
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # predictions change nothing
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",  # a request that fits can be asked again
}
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"


def prepare(ingress: Ingress, address: str | None) -> None:
    """Set the environment of the Ray that will be started here.

    Raises InputError when Ray runs already without it: then it must be set where the cluster is started.
    """
    wanted = {name: value for name, value in VARIABLES[ingress].items() if os.environ.get(name) != value}
    if address not in (None, "local") or os.environ.get("RAY_ADDRESS") or _runs():
        if wanted:
            pairs = " ".join(f"{name}={value}" for name, value in VARIABLES[ingress].items())
            pairs += f" {BINARY}=$(command -v prism-haproxy)"
            raise InputError(
                f"--ingress {ingress} is decided when Ray starts: set {pairs} on the machines of the cluster"
            )
        return
    os.environ |= wanted
    ours = Path(sys.executable).with_name("prism-haproxy")
    if ingress != "proxy" and ours.exists():
        os.environ.setdefault(BINARY, str(ours))


def _runs() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized() or "ray.serve" in sys.modules
