"""Several real nodes on one machine: growing, losing and draining them."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.local import LocalCluster
from library.errors import InputError, PrismError

pytestmark = pytest.mark.ray


def pinned(node_id: str, *, soft: bool) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=soft)


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ray.remote(max_retries=3, num_cpus=1)
def long_work(diary: str) -> str:
    """Writes down where it runs; hangs on its first node, ends on any other."""
    here = ray.get_runtime_context().get_node_id()
    with Path(diary).open("a") as stream:
        stream.write(here + "\n")
    first = Path(diary).read_text().split()[0]
    while here == first:
        time.sleep(0.05)
    return here


def test_work_survives_a_killed_node_and_a_new_node_takes_it(local_cluster, tmp_path, capfd):
    cluster = local_cluster(nodes=2, cpus_per_node=1)
    assert (cluster.connection.nodes, cluster.connection.cpus) == (2, 2)
    assert [node.alive for node in cluster.nodes()] == [True, True]
    diary = tmp_path / "diary"
    victim = cluster.nodes()[1].node_id
    result = long_work.options(scheduling_strategy=pinned(victim, soft=True)).remote(str(diary))
    until(lambda: diary.exists() and diary.read_text())
    cluster.kill_node(1)
    survivor = ray.get(result, timeout=60)
    assert survivor != victim
    assert diary.read_text().split()[0] == victim
    until(lambda: [node.alive for node in cluster.nodes()] == [True, False])

    index = cluster.add_node(cpus=3)
    assert index == 2
    assert (cluster.nodes()[2].cpus, cluster.nodes()[2].alive) == (3.0, True)
    wide = ray.remote(num_cpus=3)(lambda: ray.get_runtime_context().get_node_id())
    assert ray.get(wide.remote(), timeout=60) == cluster.nodes()[2].node_id

    cluster.drain_node(2)
    small = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
    head = cluster.nodes()[0].node_id
    drained = cluster.nodes()[2].node_id
    assert ray.get(small.options(scheduling_strategy=pinned(drained, soft=True)).remote(), timeout=60) == head
    cluster.remove_node(2)
    until(lambda: [node.alive for node in cluster.nodes()] == [True, False, False])

    for index in (0, 1, 2, 7):
        with pytest.raises(InputError, match=f"node {index} cannot be taken away"):
            cluster.kill_node(index)
    assert "Raylet is terminated" not in capfd.readouterr().out


def test_nothing_is_left_after_an_exception_and_another_cluster_can_follow(no_ray):
    def raylets() -> set[str]:
        listing = subprocess.run(
            ["ps", "-ww", "-eo", "ppid,pid,args"], capture_output=True, text=True, check=True
        ).stdout
        mine = (line.split(None, 2) for line in listing.splitlines()[1:])
        return {pid for parent, pid, args in mine if parent == str(os.getpid()) and "raylet" in args.split()[0]}

    def fail() -> None:
        with LocalCluster(nodes=2, cpus_per_node=1) as cluster:
            assert len(raylets()) == 2
            with pytest.raises(PrismError, match="connected to Ray already"):
                LocalCluster().__enter__()
            cluster.kill_node(1)
            raise RuntimeError("the block failed")

    with pytest.raises(RuntimeError, match="the block failed"):
        fail()
    assert not ray.is_initialized()
    until(lambda: not raylets(), 10)
    with LocalCluster(nodes=1, cpus_per_node=3) as cluster:
        assert ray.cluster_resources()["CPU"] == 3
        assert [node.index for node in cluster.nodes()] == [0]
    with pytest.raises(PrismError, match="is not running"):
        cluster.nodes()


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_an_empty_cluster_is_refused(sizes):
    with pytest.raises(InputError, match="at least 1"):
        LocalCluster(*sizes)
