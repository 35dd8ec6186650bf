"""A folder that is not the same for all workers of a run is found at its start."""

import platform
from functools import partial
from pathlib import Path

import torch

from jobs import training
from jobs.board import Poster
from jobs.folders import refusal_to_share
from jobs.training import Outcome, TrainingJob
from library import collective
from tests.jobs.toy import ToyRecipe, run_workers


def tried(root: str) -> tuple[list[Outcome], str | None, str | None]:
    """How each worker's training ends with a disk of its own; what a shared folder is refused for, and a broken one."""
    training.refusal_to_share = partial(refusal_to_share, patience_s=0.5)
    own = Path(root) / "own" / str(collective.rank())
    own.mkdir(parents=True)
    job = TrainingJob(recipe=ToyRecipe(steps=4), checkpoint_every=1)
    ends = collective.all_gather(training.train(job, str(own), torch.device("cpu"), Poster(None)))
    return ends, refusal_to_share(f"{root}/shared"), refusal_to_share(f"{root}/file")


def test_a_folder_that_the_workers_do_not_share_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ends, shared, broken = run_workers(2, tried, str(tmp_path))
    assert [end.reason for end in ends] == ["refused", "refused"]
    assert f"is another folder on {platform.node()}; give --storage a folder that all nodes share" in ends[0].message
    assert shared is None
    assert "a parent of it is a file" in broken
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"], "something stayed"
