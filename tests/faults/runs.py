"""Short runs of the toy recipe for tests that disturb them, and what such tests look at."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jobs.checkpoint import Checkpoint, complete
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


SCRIPT = """
import sys
from pathlib import Path
from cluster import connect
from jobs.launch import launch
from tests.faults.runs import job
connect("local", cpus=2)
report = launch(job(Path(sys.argv[1]), sys.argv[2], 1, sys.argv[3] == "resume", slow=0.05))
print("NOTES", report.notes)
"""


def driver(folder: Path, name: str, how: str) -> subprocess.Popen[str]:
    """A process that runs one job on a Ray of its own."""
    command = [sys.executable, "-c", SCRIPT, str(folder), name, how]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
