"""Connecting to Ray: the one place that calls `ray.init`."""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster import probe
from library.errors import InputError, PrismError

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("library", "cluster", "tune_spaces", "jobs", "serving")
NOT_SHIPPED = (
    "/tests/",
    "/docs/",
    "/benchmarks/",
    "/outputs/",
    "/mlruns/",
    "/build/",
    "/dist/",
    "*.egg-info/",
    ".*_cache/",
    ".hypothesis/",
)
CLIENT_PROCESS_FAILED = "Starting Ray client server failed", "ZombieProcess"  # Ray's words
CLIENT_TRIES = 3
SETUP = "worker_process_setup_hook"  # of a runtime environment
FOLDER = "PRISM_FOLDER"  # for workers: where the process works that connected
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
ALLOWED = "allowed are local, auto, HOST:PORT and ray://HOST:PORT"
LOOK_SECONDS = 2.0
NODE_WAIT = 3.0  # seconds for a node that has just been started on this machine to appear in the cluster

Result = TypeVar("Result")


class ClusterGone(PrismError):
    """No node of the cluster lives any more."""


@dataclass(frozen=True)
class Connection:
    """What `connect` found. `started` tells whether it started this Ray, `joined` whether it connected this process."""

    address: str
    nodes: int
    cpus: float
    gpus: float
    memory_gib: float
    started: bool
    joined: bool

    def __str__(self) -> str:
        how = "started" if self.started else "joined"
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return (
            f"{how} Ray at {self.address}: {nodes}, {self.cpus:g} CPUs, {self.gpus:g} GPUs, {self.memory_gib:.1f} GiB"
        )

    def unless_gone(self, call: Callable[[], Result]) -> Result:
        """What `call` returns or raises; it runs in a thread of its own.

        Many of Ray's calls wait for ever when the cluster ends under them. Raises ClusterGone then, after the 20
        seconds or so in which Ray notices that no node lives.
        """
        outcome: Future[Result] = Future()

        def run() -> None:
            try:
                outcome.set_result(call())
            except BaseException as error:  # raised where it is waited for
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not futures.wait([outcome], timeout=LOOK_SECONDS).done:
            if not _living_nodes():
                raise ClusterGone(f"the Ray cluster at {self.address} is gone")
        return outcome.result()

    def metrics(self) -> list[str]:
        """Where each living node shows its metrics, ours among them, to Prometheus."""
        return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in _living_nodes()]

    def disconnect(self) -> None:
        """Leave the cluster, and stop it when this connection started it.

        Nothing happens for a connection that found the process connected already: whoever connected it disconnects.
        """
        import ray

        if self.joined and ray.is_initialized():
            ray.shutdown()


def connect(
    address: str | None = None,
    *,
    cpus: int | None = None,
    namespace: str = "prism",
    quiet: bool = True,
    ship: bool = True,
) -> Connection:
    """Join a Ray cluster, or start Ray on this machine.

    `address` is
    - None: the cluster that RAY_ADDRESS names (it does inside a Ray job), else Ray is started here;
    - "local": Ray is started here, whatever RAY_ADDRESS says;
    - "auto": the cluster that RAY_ADDRESS names, else the one that runs on this machine;
    - "HOST:PORT": the cluster with that address, of which this machine is a node;
    - "ray://HOST:PORT": the cluster behind that Ray Client server, from any machine.

    A process that is connected already keeps its connection. `cpus` is the number of logical CPUs of a Ray that is
    started here (default: the machine's). Workers of a joined cluster get a copy of this project unless `ship` is
    False, for clusters whose machines have it. All workers compute with one BLAS thread, use the registry that this
    process uses, and work in its folder where their machine has that, so that a relative path means the same file
    (Ray Client leaves that out). `quiet` keeps Ray's own messages and the workers' output off the terminal.

    Raises InputError for a malformed address or contradictory arguments, PrismError in less than 15 seconds when
    there is no Ray at the address.

    >>> connection = connect("local", cpus=2)
    >>> print(connection)  # doctest: +ELLIPSIS
    started Ray at ...: 1 node, 2 CPUs, 0 GPUs, ... GiB
    >>> connection.disconnect()
    """
    import ray

    if cpus is not None and cpus < 1:
        raise InputError(f"cpus={cpus}: Ray needs at least one CPU")
    if ray.is_initialized():
        return _reuse(address)
    target = _resolve(address)
    if target is not None and cpus is not None:
        raise InputError(f"cpus={cpus} is for a Ray that is started here; the cluster at {target} has its own number")
    logging.getLogger("ray").setLevel(logging.ERROR if quiet else logging.INFO)
    options: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": not quiet,
        "logging_level": logging.ERROR if quiet else logging.INFO,
        "runtime_env": runtime_environment(ship=ship and target is not None),
    }
    _hush_raylets(quiet)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if target is None:
        options |= {"num_cpus": cpus, "include_dashboard": False}
    elif target.startswith("ray://"):
        probe.ray_client(target.removeprefix("ray://"))
        del options["log_to_driver"]
    else:
        probe.ray_cluster(target)
        _await_local_node(target)
    try:
        _init(target, options)
    except (RuntimeError, ValueError, ConnectionError, TimeoutError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if "Traceback" in str(error) else lines[0]  # a server's trace ends with its cause
        raise PrismError(f"cannot {_verb(target)}: {reason}") from error
    return _found(target, started=target is None, joined=True)


def _living_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _init(target: str | None, options: dict[str, Any]) -> None:
    """Start or join Ray. A Ray Client server starts a process for each client; on a busy head that fails at times."""
    import ray

    for again in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(target or "local", **options)
            return
        except ConnectionError as error:
            if not again or not any(words in str(error) for words in CLIENT_PROCESS_FAILED):
                raise


def runtime_environment(*, ship: bool) -> dict[str, Any]:
    """Ray's runtime environment for this project's workers: threads, registry, folder, with `ship` the project itself.

    A source checkout is shipped as the workers' working directory, an installed package as modules. What the Ray
    job that this process runs in has set already is left out, because Ray refuses to be told twice.
    """
    environment = ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false", FOLDER: os.getcwd()}
    environment |= {key: os.environ[key] for key in ("PRISM_HOME", "MLFLOW_TRACKING_URI") if key in os.environ}
    checkout = (ROOT / "pyproject.toml").is_file()
    if checkout and not ship:
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), inherited] if inherited else [str(ROOT)])
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    wanted: dict[str, Any] = {
        "env_vars": {key: value for key, value in environment.items() if key not in job.get("env_vars", {})}
    }
    if SETUP not in job:
        wanted[SETUP] = f"{__name__}.{enter_folder.__name__}"
    if ship and not {"working_dir", "py_modules"} & job.keys():
        if checkout:
            wanted |= {"working_dir": str(ROOT), "excludes": list(NOT_SHIPPED)}
        else:
            wanted["py_modules"] = [str(ROOT / floor) for floor in FLOORS]
    return wanted


def enter_folder() -> None:
    """Work in the folder of the process that connected, where this machine has it. Each worker calls this first."""
    with contextlib.suppress(KeyError, OSError):
        os.chdir(os.environ[FOLDER])


def _resolve(address: str | None) -> str | None:
    """The address as "host:port" or "ray://host:port"; None to start Ray here."""
    named = os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        address = named or address
    if address in (None, "local"):
        return None
    if address == "auto":
        return _running_here()
    source = f"RAY_ADDRESS={address}" if address == named else f"address {address!r}"
    if address.startswith(("http://", "https://")):
        raise InputError(f"{source} is that of a dashboard, for `ray job submit`; {ALLOWED}")
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("", "ray") or not parts.hostname or not port or parts.path or parts.query:
        raise InputError(f"{source} is not understood; {ALLOWED}")
    return address


def _running_here() -> str:
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    try:
        return services.canonicalize_bootstrap_address_or_die("auto")
    except ConnectionError as error:
        raise PrismError(
            "no single Ray cluster runs on this machine; start one with `ray start --head`, or name its address"
        ) from error


def _await_local_node(target: str) -> None:
    """Make sure that a raylet of the cluster runs on this machine: without one Ray would look for it for a minute."""
    from ray._private import services
    from ray._raylet import GcsClient

    alive = {node.hex() for node in GcsClient(address=target).get_all_node_info(timeout=5)}
    deadline = time.monotonic() + NODE_WAIT
    while not alive & set(services.find_node_ids()):
        if time.monotonic() > deadline:
            host = urlsplit(f"//{target}").hostname
            raise PrismError(
                f"this machine is not a node of the Ray cluster at {target}; "
                f"connect through its Ray Client server, usually ray://{host}:10001"
            )
        time.sleep(0.2)


def _hush_raylets(quiet: bool) -> None:
    """Ray prints reports of dead raylets, with 20 lines of their log, to standard output even without the workers'."""
    from ray._private import ray_constants, ray_logging

    pattern = "." if quiet else ray_constants.RAY_DEDUP_LOGS_SKIP_REGEX
    ray_logging.stdout_deduplicator.skip_re = re.compile(pattern) if pattern else None


def _reuse(address: str | None) -> Connection:
    from ray.util import client

    current = _found(None, started=False, joined=False)
    wanted = _resolve(address) if address not in (None, "auto", "local") else None
    if wanted is not None and not client.ray.is_connected() and _endpoint(wanted) != _endpoint(current.address):
        raise InputError(f"this process is connected to Ray at {current.address}; disconnect before joining {wanted}")
    return current


def _endpoint(address: str) -> tuple[str, int | None]:
    from ray._private.services import resolve_ip_for_localhost

    parts = urlsplit(f"//{address.removeprefix('ray://')}")
    return resolve_ip_for_localhost(parts.hostname), parts.port


def _found(target: str | None, *, started: bool, joined: bool) -> Connection:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Connection(
        address=target or ray.get_runtime_context().gcs_address,
        nodes=len(nodes),
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        memory_gib=sum(node.get("memory", 0.0) for node in nodes) / 2**30,
        started=started,
        joined=joined,
    )


def _verb(target: str | None) -> str:
    return "start Ray on this machine" if target is None else f"join the Ray cluster at {target}"
