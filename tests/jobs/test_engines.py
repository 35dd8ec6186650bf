"""The result does not depend on the engine, the number of workers, or the accumulation; nor does a resumed run."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.history import read_history
from jobs.training import TrainingJob, train
from library import collective
from library.errors import InputError
from tests.jobs.toy import ToyRecipe, run_workers

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
TOLERANCE = 1e-5  # relative, float32, over 50 steps


def train_all(folder: str, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Run several jobs one after another in this process group."""
    for name, changes in runs:
        job = TrainingJob(recipe=ToyRecipe(), checkpoint_every=20, **changes)
        train(job, str(Path(folder) / name), torch.device("cpu"), Poster(None))


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([value for _, value in read_history(str(folder))["loss"]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.Checkpoint(checkpoints.complete(folder / "checkpoints")[0])
    return {key: found.tensor(key) for key in found.index.tensors}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 steps of one DDP worker."""
    folder = tmp_path_factory.mktemp("reference")
    run_workers(1, train_all, str(folder), [("one", {})])
    return folder / "one"


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 steps of two workers with every engine, micro-batches of 3; torch would build extensions in `extensions`."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        run_workers(2, train_all, str(folder), [(engine, {"engine": engine, "micro_batch": 3}) for engine in ENGINES])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_curve_and_state(reference: Path, by_engine: Path, engine: str) -> None:
    one, many = losses(reference), losses(by_engine / engine)
    assert len(many) == 50
    torch.testing.assert_close(many, one, rtol=TOLERANCE, atol=0)
    expected, found = weights(reference), weights(by_engine / engine)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_training_on_cpus_compiles_nothing(by_engine: Path) -> None:
    """A machine needs no compiler, and the lock that a killed build leaves stops no later run."""
    assert not (by_engine / "extensions").exists()


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_and_accumulation_change_nothing(tmp_path: Path, reference: Path, workers: int) -> None:
    runs = [("whole", {}), ("ones", {"micro_batch": 1}), ("threes", {"micro_batch": 3})]
    run_workers(workers, train_all, str(tmp_path), runs)
    for name, _ in runs:
        torch.testing.assert_close(losses(tmp_path / name), losses(reference), rtol=TOLERANCE, atol=0)


def resume(folder: str, by_engine: str, pairs: list[tuple[str, str]]) -> None:
    """Resume, for each (saved, engine), the checkpoint of step 40 that `saved` wrote, under `engine`."""
    for saved, engine in pairs:
        places = checkpoints.complete(Path(by_engine) / saved / "checkpoints")
        at_40 = next(Path(place) for place in places if "step-00000040" in place)
        target = Path(folder) / f"{saved}-{engine}"
        if torch.distributed.get_rank() == 0:
            shutil.copytree(at_40, target / "checkpoints" / at_40.name)
        torch.distributed.barrier()
        job = TrainingJob(recipe=ToyRecipe(), engine=engine, checkpoint_every=20)
        train(job, str(target), torch.device("cpu"), Poster(None))


@pytest.fixture(scope="module")
def resumed(by_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last ten steps of two workers, for every pair of an engine that saved and one that resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    run_workers(2, resume, str(folder), str(by_engine), list(itertools.product(ENGINES, ENGINES)))
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("saved", ENGINES)
def test_a_run_saved_by_one_engine_is_resumed_by_every_other(
    reference: Path, resumed: Path, saved: str, engine: str
) -> None:
    rest = losses(resumed / f"{saved}-{engine}")
    assert len(rest) == 10
    torch.testing.assert_close(rest, losses(reference)[40:], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(
    ("workers", "pairs"),
    [
        (1, [("zero3", "zero3"), ("fsdp", "ddp"), ("zero2", "ddp")]),
        (3, [("zero3", "fsdp"), ("ddp", "zero3"), ("fsdp", "zero1")]),
    ],
)
def test_a_run_changes_engine_and_number_of_workers_together(
    tmp_path: Path, reference: Path, by_engine: Path, workers: int, pairs: list[tuple[str, str]]
) -> None:
    run_workers(workers, resume, str(tmp_path), str(by_engine), pairs)
    for saved, engine in pairs:
        rest = losses(tmp_path / f"{saved}-{engine}")
        torch.testing.assert_close(rest, losses(reference)[40:], rtol=TOLERANCE, atol=0)


def bf16_curves(folder: str) -> None:
    train_all(folder, [(engine, {"engine": engine, "precision": "bf16"}) for engine in ENGINES])


def test_bf16_keeps_full_precision_weights_in_its_checkpoints(tmp_path: Path, reference: Path) -> None:
    run_workers(2, bf16_curves, str(tmp_path))
    for engine in ENGINES:
        state = weights(tmp_path / engine)
        learned = state["model/inp.weight"]
        assert learned.dtype == torch.float32
        assert not torch.equal(learned, learned.bfloat16().float()), "masters were rounded to bf16"
        assert state["model/counter"].dtype == torch.float64
        assert state["model/counter"] == 50
        difference = (losses(tmp_path / engine) - losses(reference)).abs().max()
        assert difference < 0.05, f"{engine}: {difference}"


def test_checkpointed_activations_change_nothing(tmp_path: Path, reference: Path) -> None:
    run_workers(2, train_all, str(tmp_path), [("recomputed", {"activation_checkpointing": True})])
    torch.testing.assert_close(losses(tmp_path / "recomputed"), losses(reference), rtol=TOLERANCE, atol=0)


def train_onto_a_disk_that_fills_up(folder: str) -> tuple[str, int, str]:
    """The outcome when the last worker, and no other, may write one checkpoint only."""
    store, written = checkpoints._store, []

    def limited(*arguments: Any) -> Any:
        written.append(arguments)
        if collective.rank() == collective.world_size() - 1 and len(written) > 1:
            raise InputError("cannot write there: the disk is full")
        return store(*arguments)

    checkpoints._store = limited
    job = TrainingJob(recipe=ToyRecipe(), checkpoint_every=10)
    outcome = train(job, folder, torch.device("cpu"), Poster(None))
    return outcome.reason, outcome.step, outcome.message


def test_a_disk_that_fills_up_ends_all_workers_at_once_and_keeps_what_was_saved(tmp_path: Path) -> None:
    reason, step, message = run_workers(2, train_onto_a_disk_that_fills_up, str(tmp_path))
    assert (reason, step) == ("unsaved", 30), "known when the checkpoint after the failed one is due"
    assert message == "cannot write there: the disk is full"
    found, faults = checkpoints.latest(tmp_path / "checkpoints")
    assert found.step == 10
    assert not faults
    run_workers(2, train_all, str(tmp_path.parent), [(tmp_path.name, {})])
    assert checkpoints.latest(tmp_path / "checkpoints")[0].step == 50
