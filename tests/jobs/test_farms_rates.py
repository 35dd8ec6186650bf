"""Rates from the spectra are the same on any number of workers, with any engine that has whole weights, and resumed."""

import tempfile
from pathlib import Path

import pytest
import torch

from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.history import read_history
from jobs.training import TrainingJob, train
from library.farms.analysis import Settings
from library.farms.balance import Balance, Balanced
from tests.jobs.toy import ToyRecipe, run_workers


class BalancedToy(Balanced, ToyRecipe, frozen=True, extra="forbid"):
    """The toy recipe with a rate for every layer."""

    balance: Balance = Balance(every=4, analysis=Settings(window=8, ops=3))


class StopAt(Poster):
    """Asks the loop to stop at a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(None)
        self.step = step

    def post(self, **event: object) -> None:
        self.stop_requested = event.get("step", 0) == self.step


def trained(engine: str, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights and the history of a run, interrupted and resumed when asked."""
    import torch.distributed as dist

    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    job = TrainingJob(recipe=BalancedToy(steps=20), engine=engine, checkpoint_every=5)
    for step in [stop_at, None] if stop_at else [None]:
        outcome = train(job, box[0], torch.device("cpu"), StopAt(step))
    assert outcome.reason == "finished", outcome.message
    found = checkpoints.Checkpoint(checkpoints.complete(Path(box[0]) / "checkpoints")[0])
    tensors = {key: found.tensor(key) for key in found.index.tensors if key.startswith("model/")}
    return tensors, read_history(box[0])


def each(*runs: tuple[str, int | None]) -> list[tuple[dict[str, torch.Tensor], dict]]:
    return [trained(*run) for run in runs]


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, torch.Tensor], dict]]:
    """A run on one worker, and one that was stopped and resumed."""
    return run_workers(1, each, ("ddp", None), ("ddp", 9))


def test_two_workers_equal_one_with_any_engine(alone):
    weights = alone[0][0]
    assert weights["model/rate_factors"].unique().numel() > 2
    for tensors, history in run_workers(2, each, ("ddp", None), ("fsdp", None), ("zero2", None)):
        for name, value in weights.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-4, atol=1e-6)
        assert len({value for _, value in history["alpha_mean"]}) == 5


def test_a_stopped_and_resumed_run_has_the_same_rates_and_weights(alone):
    (weights, history), (resumed, after) = alone
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert after["lr"] == history["lr"]
