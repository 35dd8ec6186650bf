"""Real faults in a distributed training: what is killed comes back, and the result is as if nothing had happened."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.local import LocalCluster
from jobs.checkpoint import Checkpoint, complete
from jobs.history import read_history
from jobs.launch import launch
from jobs.training import Scaling
from tests.jobs.toy import ToyJob, ToyRecipe


def job(folder: Path, name: str, workers: int | tuple[int, int] = 2, resume: bool = False, **changes: object) -> ToyJob:
    recipe = ToyRecipe(steps=60, dropout=0.1, **changes)
    scaling = Scaling(workers=workers)
    return ToyJob(
        name=name,
        scaling=scaling,
        recipe=recipe,
        checkpoint_every=10,
        storage=str(folder),
        max_failures=2,
        resume=resume,
    )


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = Checkpoint(complete(folder / name / "checkpoints")[0])
    assert found.step == 60
    return {key: found.tensor(key) for key in found.index.tensors}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def at_step(folder: Path, step: int, action: Callable[[], None], timeout_s: float = 120.0) -> threading.Thread:
    """Do `action` as soon as a checkpoint of at least `step` steps is complete."""

    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            places = complete(folder / "checkpoints")
            if places and Checkpoint(places[0]).step >= step:
                action()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


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


SCRIPT = """
import sys
from pathlib import Path
from cluster import connect
from tests.faults.test_training_faults import job, launch
connect("local", cpus=2)
report = launch(job(Path(sys.argv[1]), sys.argv[2], 1, sys.argv[3] == "resume", slow=0.05))
print("NOTES", report.notes)
"""


def driver(folder: Path, name: str, how: str) -> subprocess.Popen[str]:
    """A process that runs one job on a Ray of its own."""
    command = [sys.executable, "-c", SCRIPT, str(folder), name, how]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = driver(folder, "run", "start")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return folder


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
