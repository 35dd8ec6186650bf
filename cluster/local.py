"""Many nodes on one machine: a real Ray cluster of several raylets, for tests and trials."""

import os
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cluster.connection import Connection, connect
from library.errors import InputError, PrismError

OBJECT_STORE_BYTES = 150 << 20  # per node
DEATH_IS_NOTICED = {  # a killed node is known to be dead in about two seconds; Ray's defaults take about twenty
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
DRAIN_REASON_PREEMPTION = 2  # Ray lets running work end and places no more; an idle termination it may refuse


@dataclass(frozen=True)
class LocalNode:
    """One node of a LocalCluster: its number in the order of starting, Ray's identifier, logical CPUs, and state."""

    index: int
    node_id: str
    cpus: float
    alive: bool


class LocalCluster:
    """Several Ray nodes on this machine, each with its own raylet, object store and worker processes.

    Entering starts the nodes and connects this process (which must not be connected already); leaving disconnects it
    and ends every process that was started, also when the block or the start fails. Node 0 is the head. With
    `dashboard` the head serves Ray's dashboard, which `ray job submit` needs. Several clusters may follow one another
    in one process.

    >>> with LocalCluster(nodes=2, cpus_per_node=1) as cluster:
    ...     print(len(cluster.nodes()), cluster.connection.cpus)
    2 2.0
    """

    def __init__(self, nodes: int = 2, cpus_per_node: int = 2, *, dashboard: bool = False, quiet: bool = True) -> None:
        if nodes < 1 or cpus_per_node < 1:
            raise InputError(f"nodes={nodes}, cpus_per_node={cpus_per_node}: both must be at least 1")
        self._initial, self._cpus, self._dashboard, self._quiet = nodes, cpus_per_node, dashboard, quiet
        self._cluster: Any = None
        self._started: list[Any] = []
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        import ray
        from ray.cluster_utils import Cluster

        if ray.is_initialized():
            raise PrismError("this process is connected to Ray already; disconnect before starting a local cluster")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._cluster = Cluster()
        try:
            for _ in range(self._initial):
                self.add_node()
            self._connection = connect(self.address, quiet=self._quiet, ship=False)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def address(self) -> str:
        """The "host:port" that other processes on this machine connect to."""
        return self._running().address

    @property
    def dashboard(self) -> str:
        """The address of the head's dashboard, to submit jobs to. Raises InputError when none was asked for."""
        if not self._dashboard:
            raise InputError("this cluster has no dashboard; start it with dashboard=True")
        return f"http://{self._running().head_node.webui_url}"

    @property
    def connection(self) -> Connection:
        """This process's connection, as it was when the cluster had started."""
        self._running()
        assert self._connection is not None
        return self._connection

    def add_node(self, *, cpus: int | None = None) -> int:
        """Start one more node and return its index. Raises PrismError when it does not come up."""
        options: dict[str, Any] = {
            "num_cpus": cpus or self._cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": self._dashboard,
            "dashboard_port": None,  # Ray's default or the next free one: another Ray of this machine may have that
            "dashboard_agent_listen_port": None,  # any free one, likewise
            # on one machine, a node that has no more use for a job's files would remove those of the others
            "runtime_env_dir_name": f"runtime_resources_{len(self._started)}",
        }
        if not self._started:
            options["_system_config"] = DEATH_IS_NOTICED
        try:
            self._started.append(self._running().add_node(**options))
        except Exception as error:
            raise PrismError(f"node {len(self._started)} did not start: {str(error).splitlines()[0]}") from error
        return len(self._started) - 1

    def kill_node(self, index: int) -> None:
        """Kill a node as a power cut does: SIGKILL, nothing is told to anyone. Its workers die with it."""
        self._running().remove_node(self._worker_node(index), allow_graceful=False)

    def drain_node(self, index: int, *, seconds: float = 30.0) -> None:
        """Ask Ray to place nothing more on a node that goes away in `seconds`, as a cloud's notice does.

        Running work continues; `remove_node` then stops the node. Raises PrismError when Ray refuses.
        """
        from ray._raylet import GcsClient

        node = self._worker_node(index)
        accepted, reason = GcsClient(address=self.address).drain_node(
            node.node_id, DRAIN_REASON_PREEMPTION, "drained", int((time.time() + seconds) * 1000)
        )
        if not accepted:
            raise PrismError(f"node {index} cannot be drained: {reason}")

    def remove_node(self, index: int) -> None:
        """Stop a node gracefully; Ray moves its restartable work elsewhere."""
        self._running().remove_node(self._worker_node(index), allow_graceful=True)

    def nodes(self) -> list[LocalNode]:
        """All nodes that were ever started, in that order, as Ray sees them now: a death is noticed after a moment."""
        import ray

        self._running()
        seen = {node["NodeID"]: node for node in ray.nodes()}
        return [
            LocalNode(
                index=index,
                node_id=node.node_id,
                cpus=seen[node.node_id]["Resources"].get("CPU", 0.0),
                alive=seen[node.node_id]["Alive"],
            )
            for index, node in enumerate(self._started)
        ]

    def _running(self) -> Any:
        if self._cluster is None:
            raise PrismError("the local cluster is not running; use it inside `with LocalCluster(...) as cluster:`")
        return self._cluster

    def _worker_node(self, index: int) -> Any:
        here = [i for i, node in enumerate(self._started) if i and node in self._running().worker_nodes]
        if index not in here:
            raise InputError(f"node {index} cannot be taken away; running nodes beside the head are {here or 'none'}")
        return self._started[index]

    def _stop(self) -> None:
        cluster, self._cluster = self._cluster, None
        self._started = []
        try:
            if self._connection is not None:
                self._connection.disconnect()
        finally:
            self._connection = None
            if cluster is not None:
                cluster.shutdown()
