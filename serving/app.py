"""Which endpoints there are, the application that serves one of them, and deploying several at once."""

import contextlib
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from library.errors import ArtifactError, InputError, PrismError
from serving.corrosion import Corrosion
from serving.endpoint import Endpoint
from serving.hawq import Advise, Classify
from serving.ingress import ENVIRONMENT, Ingress, prepare
from serving.molecule import MoleculeSearch
from serving.rqgnn import GraphAnomaly
from serving.send import Hallucination, Score
from serving.settings import EndpointArgs, token_digest
from serving.spe import GraphEncoding, GraphProperty
from serving.spectrum import Spectrum

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview

    from cluster import Connection

ENDPOINTS: dict[str, type[Endpoint]] = {
    endpoint.name: endpoint
    for endpoint in (
        Hallucination,
        Score,
        Spectrum,
        Classify,
        Advise,
        Corrosion,
        GraphAnomaly,
        GraphProperty,
        GraphEncoding,
        MoleculeSearch,
    )
}
LOG = logging.getLogger(__name__)
REGISTRY_VARIABLES = ("PRISM_HOME", "MLFLOW_TRACKING_URI")
READY_SECONDS = 600.0
POLL_SECONDS = 0.5
PORT_SECONDS = 30.0  # that a stopped Serve has to let go of its port
OWN_ERROR = re.compile(r"library\.errors\.\w+: (.+)")


def build(args: EndpointArgs) -> "Application":
    """The Serve application of one endpoint: the `import_path` of `serving/prism.yaml`.

    Replicas use the registry that this process uses. Raises InputError for an unknown endpoint or reference,
    ArtifactError for an artifact that is corrupt or of another kind: nothing is deployed then.
    """
    return _application(args)


def _application(args: EndpointArgs, replicas: int = 1, cpus: float = 1.0) -> "Application":
    from ray import serve

    from cluster.registry import resolve
    from serving.replica import Replica

    endpoint = named(args.endpoint)
    args = args.model_copy(update={"artifact": args.artifact or champion(endpoint)})
    resolve(args.artifact, kind=endpoint.kind)
    variables = {name: os.environ[name] for name in REGISTRY_VARIABLES if name in os.environ}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=endpoint.name,
        num_replicas=replicas,
        max_ongoing_requests=args.max_pending + 16,  # health checks and refusals get through to a full replica
        max_queued_requests=4 * args.max_pending,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=args.timeout_s + 5,
        health_check_period_s=5,
        max_constructor_retry_count=2,  # a registry may be busy once; what is wrong with an artifact stays wrong
        ray_actor_options={"num_cpus": cpus} | ({"runtime_env": {"env_vars": variables}} if variables else {}),
    )
    return deployment.bind(args, token_digest(args.token_file))


def named(name: str) -> type[Endpoint]:
    """The endpoint of that name. Raises InputError that lists those that exist."""
    if name not in ENDPOINTS:
        raise InputError(f"there is no endpoint {name!r}; there are {', '.join(ENDPOINTS)}")
    return ENDPOINTS[name]


def champion(endpoint: type[Endpoint]) -> str:
    """The reference that an endpoint serves when nothing else is asked for."""
    return f"models:/{endpoint.model}@champion"


@dataclass
class Served:
    """Deployed endpoints. `stop` them, or use this as a context manager; `wait` stays while they run.

    url         of the HTTP server; an endpoint answers at `<url>/<name>/predict`, its page is `<url>/<name>/docs`
    endpoints   name -> the artifact reference that it serves
    left_out    name -> why it is not served, of those that nobody asked for by name
    """

    url: str
    endpoints: dict[str, str]
    left_out: dict[str, str]
    _connection: "Connection"
    _started_serve: bool
    _stopped: bool = field(default=False, init=False)

    def metrics(self) -> list[str]:
        """Where each node of the cluster shows its metrics to Prometheus."""
        return self._connection.metrics()

    def stop(self) -> None:
        """Let requests in flight finish, and take away what was deployed: also Serve and Ray if started for it.

        In a cluster that ran before, Serve stays while it has applications of others. Nothing is left to take away
        when the cluster is gone already.
        """
        import ray
        from ray.exceptions import RayError

        from cluster.connection import ClusterGone

        if self._stopped or not ray.is_initialized():
            return
        self._stopped = True
        try:
            self._connection.unless_gone(self._take_away)
        except (RayError, ClusterGone):
            LOG.warning("the Ray cluster behind %s went away before its endpoints were stopped", self.url)
        finally:
            if self._connection.started:
                self._connection.disconnect()

    def _take_away(self) -> None:
        from ray import serve

        for name in self.endpoints:
            serve.delete(name, _blocking=False)
        deadline = time.monotonic() + READY_SECONDS
        while self.endpoints.keys() & serve.status().applications.keys() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if not self._started_serve:
            return
        others = serve.status().applications.keys() - self.endpoints.keys()
        if others and not self._connection.started:
            LOG.warning("Serve at %s goes on: others have deployed %s since", self.url, ", ".join(sorted(others)))
        else:
            serve.shutdown()
            self._wait_for_the_port()

    def _wait_for_the_port(self) -> None:
        """Serve's proxy may still end after its shutdown has returned; until then nobody else can have the port."""
        address = urlsplit(self.url)
        deadline = time.monotonic() + PORT_SECONDS
        while time.monotonic() < deadline:
            try:
                socket.create_connection((address.hostname, address.port), timeout=1).close()
            except OSError:
                return
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Stay until interrupted. Raises PrismError when the cluster or its endpoints go away."""
        from ray import serve
        from ray.exceptions import RayError

        while True:
            try:
                gone = self.endpoints.keys() - self._connection.unless_gone(serve.status).applications.keys()
            except (RayError, ConnectionError, RuntimeError) as error:
                raise PrismError(f"the Ray cluster behind {self.url} is gone") from error
            if gone:
                raise PrismError(f"no longer deployed: {', '.join(sorted(gone))}; somebody else took them away")
            time.sleep(2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve_endpoints(
    names: Sequence[str] | None = None,
    artifacts: Mapping[str, str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    ingress: Ingress = "auto",
    replicas: int = 1,
) -> Served:
    """Deploy endpoints on Ray Serve and return when all of them are ready.

    `names` None means those in `artifacts`, and without any, every endpoint whose model has a `champion` in the
    registry that can be served. `artifacts` gives an endpoint another artifact than its champion: a registry
    reference, a folder, a storage URI. `address` is that of `cluster.connect`. Clients need the token in PRISM_TOKEN
    when there is one. A Serve that runs in the cluster already is used when it has this host and port. `ingress` says
    who takes the requests in, see `serving.ingress`; `replicas` is how many processes serve each endpoint.

    Raises, before anything is deployed: InputError for an unknown endpoint, model or alias, or a token that no header
    could hold, ArtifactError for a bad artifact, InputError for a port in use, PrismError for a Ray that cannot be
    reached. When an endpoint does not start, PrismError says why, and nothing that this call added stays; endpoints
    that were deployed before it are not taken away, but one of the same name is as Serve's failed update left it.

    Example:
        >>> with serve_endpoints(["hallucination"], {"hallucination": "outputs/send"}) as served:  # doctest: +SKIP
        ...     served.url
        'http://127.0.0.1:8000'
    """
    from cluster import connect
    from cluster.registry import resolve

    if replicas < 1:
        raise InputError(f"{replicas} replicas: at least 1 is needed")
    chosen, left_out = _chosen(names, artifacts or {})
    for name, reference in chosen.items():
        resolve(reference, kind=ENDPOINTS[name].kind)
    token_digest(None)  # refused here, before there is anything to take away again
    prepare(ingress, address)
    connection = connect(address)
    try:
        started_serve = _start_serve(host, port, remote=connection.address.startswith("ray://"))
    except BaseException:
        if connection.started:
            connection.disconnect()
        raise
    served = Served(f"http://{_visible(host)}:{port}", chosen, left_out, connection, started_serve)
    wanted = replicas * len(chosen)
    share = min(1.0, connection.cpus / wanted) if connection.started else 1.0  # few cores serve many endpoints
    added: dict[str, str] = {}
    try:
        before = _applications(connection)
        added = {name: reference for name, reference in chosen.items() if name not in before}
        _deploy(chosen, connection, replicas=replicas, cpus=share)
    except BaseException:
        replace(served, endpoints=added).stop()
        raise
    return served


def open_host() -> str | None:
    """The host that Serve listens on, when more than this machine can reach it; None without a Serve that runs."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    host = client.http_config.host if client is not None else None
    if host in (None, "localhost"):
        return None
    try:
        return None if ip_address(host).is_loopback else host
    except ValueError:  # a name, of whatever address
        return host


def _applications(connection: "Connection") -> "dict[str, ApplicationStatusOverview]":
    """What Serve runs now, by name."""
    from ray import serve

    return connection.unless_gone(serve.status).applications


def _chosen(names: Sequence[str] | None, artifacts: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Endpoint -> artifact reference, and endpoint -> why it is left out."""
    for name in [*(names or ()), *artifacts]:
        named(name)
    if names is None and not artifacts:
        return _with_champion()
    names = list(artifacts) if names is None else names
    if foreign := artifacts.keys() - set(names):
        raise InputError(f"artifact given for {', '.join(sorted(foreign))}, which is not among the endpoints to serve")
    if not names:
        raise InputError(f"no endpoint named; there are {', '.join(ENDPOINTS)}")
    return {name: artifacts.get(name) or champion(ENDPOINTS[name]) for name in dict.fromkeys(names)}, {}


def _with_champion() -> tuple[dict[str, str], dict[str, str]]:
    """Every endpoint whose champion can be served, and why the others are left out."""
    from cluster.registry import list_models, list_versions, resolve

    models = set(list_models()) & {endpoint.model for endpoint in ENDPOINTS.values()}
    crowned = {name for name in models if any("champion" in version.aliases for version in list_versions(name))}
    chosen, left_out = {}, {}
    for name, endpoint in ENDPOINTS.items():
        if endpoint.model not in models:
            left_out[name] = f"no model {endpoint.model} is registered"
        elif endpoint.model not in crowned:
            left_out[name] = f"model {endpoint.model} has no champion; see prism registry promote"
        else:
            try:
                resolve(champion(endpoint), kind=endpoint.kind)
                chosen[name] = champion(endpoint)
            except ArtifactError as error:
                left_out[name] = str(error)
    if not chosen:
        corrupt = "; ".join(dict.fromkeys(left_out[name] for name in ENDPOINTS if ENDPOINTS[name].model in crowned))
        raise InputError(
            f"no champion can be served: {corrupt}"
            if corrupt
            else "no model has a champion yet: train and register one, or name an endpoint and an artifact"
        )
    return chosen, left_out


def _start_serve(host: str, port: int, *, remote: bool) -> bool:
    """Make sure that Serve runs with this host and port; True when it was started here."""
    from ray import serve
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the caller says what happened
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        there = running.http_config
        if (there.host, there.port) != (host, port):
            raise PrismError(
                f"Serve runs in this cluster at {there.host}:{there.port}, not {host}:{port}; use that address"
            )
        return False
    if not remote:
        _check_port(host, port)
    serve.start(
        http_options={"host": host, "port": port, "request_timeout_s": 120.0},
        proxy_location="EveryNode",
        controller_options={"runtime_env": {"env_vars": ENVIRONMENT}},
    )
    return True


def _check_port(host: str, port: int) -> None:
    """Raise InputError when the port cannot be had: Serve itself would share it with whoever has it."""
    with _socket(host) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror or error})"
            raise InputError(f"port {port} of {host} {reason}; choose another with --port") from error
        except OverflowError as error:
            raise InputError(f"port {port}: allowed are 1 to 65535") from error


@contextlib.contextmanager
def _socket(host: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not hold a port
        yield probe


def _deploy(chosen: Mapping[str, str], connection: "Connection", *, replicas: int, cpus: float) -> None:
    from ray import serve

    targets = [
        serve.RunTarget(
            _application(EndpointArgs(endpoint=name, artifact=reference), replicas, cpus),
            name=name,
            route_prefix=f"/{name}",
        )
        for name, reference in chosen.items()
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    deadline = time.monotonic() + READY_SECONDS
    while True:
        applications = _applications(connection)
        waiting = {name: applications[name] for name in chosen if name in applications}
        for name, application in waiting.items():
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                reports = [application.message, *(found.message for found in application.deployments.values())]
                raise PrismError(f"endpoint {name} does not start: {_reason(reports)}")
        if len(waiting) == len(chosen) and all(found.status == "RUNNING" for found in waiting.values()):
            break
        if time.monotonic() > deadline:
            raise PrismError(f"endpoints {', '.join(chosen)} are not ready after {READY_SECONDS:g} seconds")
        time.sleep(POLL_SECONDS)


def _reason(reports: Sequence[str]) -> str:
    """The line of a failed deployment's reports that says why: our own error, or else how the last one ends."""
    own = OWN_ERROR.findall("\n".join(reports))
    return own[-1] if own else next(iter(reports[-1].strip().splitlines()[-1:]), "no reason is given")


def _visible(host: str) -> str:
    """What a client on this machine can call."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name
