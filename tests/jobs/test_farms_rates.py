"""Rates from the spectra are the same on any number of workers, with any engine that has whole weights, and resumed."""

import pytest
import torch

from jobs.training import TrainingJob
from library.farms.analysis import Settings
from library.farms.balance import Balance, Balanced
from tests.jobs.toy import ToyRecipe, run_stopped, run_workers


class BalancedToy(Balanced, ToyRecipe, frozen=True, extra="forbid"):
    """The toy recipe with a rate for every layer."""

    balance: Balance = Balance(every=4, analysis=Settings(window=8, ops=3))


def trained(engine: str, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights and the history of a run, interrupted and resumed when asked."""
    return run_stopped(TrainingJob(recipe=BalancedToy(steps=20), engine=engine, checkpoint_every=5), stop_at)


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
