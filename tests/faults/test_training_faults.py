"""Real faults in a distributed training: what is killed comes back, and the result is as if nothing had happened."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
