"""Real faults in a distributed training: what is killed comes back, and the result is as if nothing had happened."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.local import LocalCluster
from jobs.checkpoint import Checkpoint, complete
from jobs.history import read_history
from jobs.launch import launch
from tests.faults.runs import at_step, driver, job, same, state


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_resumes_to_bitwise_the_same_weights(tmp_path: Path) -> None:
    launch(job(tmp_path, "calm"))
    mark = tmp_path / "mark"
    launch(job(tmp_path, "killed", die_at=37, mark=str(mark)))
    assert mark.exists(), "no worker died"
    same(state(tmp_path, "calm"), state(tmp_path, "killed"))
    curves = [read_history(str(tmp_path / name))["loss"] for name in ("calm", "killed")]
    assert curves[0] == curves[1]


def test_a_killed_node_is_replaced_and_the_run_ends_bitwise_the_same(
    tmp_path: Path, local_cluster: Callable[..., LocalCluster]
) -> None:
    cluster = local_cluster(nodes=3, cpus_per_node=1)
    launch(job(tmp_path, "calm"))

    def kill() -> None:
        busy = _nodes_with_workers()
        victim = next(node.index for node in cluster.nodes() if node.index and node.node_id in busy)
        cluster.kill_node(victim)

    watcher = at_step(tmp_path / "killed", 20, kill)
    launch(job(tmp_path, "killed", slow=0.05))
    watcher.join()
    assert sum(node.alive for node in cluster.nodes()) == 2, "no node died"
    same(state(tmp_path, "calm"), state(tmp_path, "killed"))


def test_an_elastic_run_goes_on_with_the_workers_that_are_left_and_takes_new_ones(
    tmp_path: Path, local_cluster: Callable[..., LocalCluster]
) -> None:
    cluster = local_cluster(nodes=2, cpus_per_node=1)
    launch(job(tmp_path, "calm", 1))
    watcher = at_step(tmp_path / "elastic", 20, lambda: cluster.kill_node(1))
    launch(job(tmp_path, "elastic", (1, 2), slow=0.05))
    watcher.join()
    assert sum(node.alive for node in cluster.nodes()) == 1, "no node died"
    curves = [torch.tensor(read_history(str(tmp_path / name))["steps_seen"]) for name in ("calm", "elastic")]
    assert torch.equal(curves[0], curves[1]), "every step was done exactly once in the end"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_says_how_to_resume_and_resumes_exactly(
    tmp_path: Path, undisturbed: Path, kind: signal.Signals
) -> None:
    process = driver(tmp_path, "run", "start")
    watcher = at_step(tmp_path / "run", 20, lambda: process.send_signal(kind))
    out, err = process.communicate(timeout=200)
    watcher.join()
    assert process.returncode == 0, err
    assert "stopped at step" in out
    assert "prism run toy --name run --resume" in out
    assert "stopping after this step and saving" in err
    assert 20 <= Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).step < 60
    again = driver(tmp_path, "run", "resume")
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    same(state(undisturbed, "run"), state(tmp_path, "run"))


def _nodes_with_workers() -> set[str]:
    from ray._private.state import actors

    alive = (actor for actor in actors().values() if actor["State"] == "ALIVE")
    return {actor["Address"]["NodeID"] for actor in alive if "RayTrainWorker" in actor["ActorClassName"]}
