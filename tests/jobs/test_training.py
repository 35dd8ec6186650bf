"""The loop on one worker: resuming is exact, nothing non-finite is learned, an evaluation may fail."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.connection import ROOT
from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.history import read_history
from jobs.training import TrainingJob, train
from library.errors import InputError
from library.recipe import fit, unwrap
from tests.jobs.toy import ToyRecipe

pytestmark = pytest.mark.usefixtures("group")


class Notes(Poster):
    """Keeps what the loop posts; asks it to stop at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(None)
        self.events: list[dict] = []
        self.stop_at = stop_at

    def post(self, **event: object) -> None:
        self.events.append(event)
        self.stop_requested = event.get("step", 0) == self.stop_at


def run(folder: Path, notes: Notes | None = None, **changes: object) -> object:
    job_fields = {key: changes.pop(key) for key in ("checkpoint_every", "evaluate_every") if key in changes}
    job = TrainingJob(recipe=ToyRecipe(**changes), **({"checkpoint_every": 20} | job_fields))
    return train(job, str(folder), torch.device("cpu"), notes or Notes())


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.Checkpoint(checkpoints.complete(folder / "checkpoints")[0])
    assert found.step == 50
    return {key: found.tensor(key) for key in found.index.tensors}


@pytest.mark.parametrize("stop_at", [1, 19, 20, 33])
def test_a_stopped_and_resumed_run_ends_with_bitwise_the_same_state(tmp_path: Path, stop_at: int) -> None:
    outcome = run(tmp_path / "once", dropout=0.2)
    assert outcome.reason == "finished"
    stopped = run(tmp_path / "twice", Notes(stop_at), dropout=0.2)
    assert stopped.reason == "stopped"
    assert stopped.step == stop_at + 1, "the step after the wish is finished and saved"
    assert run(tmp_path / "twice", dropout=0.2).step == 50
    once, twice = final_state(tmp_path / "once"), final_state(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for key in once:
        assert torch.equal(once[key], twice[key]), key
    assert read_history(str(tmp_path / "once")) == read_history(str(tmp_path / "twice"))


def test_the_loop_equals_fit(tmp_path: Path) -> None:
    artifact = fit(ToyRecipe(), path=tmp_path / "artifact")
    run(tmp_path / "run")
    state = final_state(tmp_path / "run")
    for name, value in artifact.weights().items():
        torch.testing.assert_close(state[f"model/{name}"], value, rtol=1e-5, atol=1e-7)
    places = checkpoints.complete(tmp_path / "run" / "checkpoints")
    assert checkpoints.Checkpoint(places[0]).metrics["loss"] == pytest.approx(artifact.metrics["loss"], rel=1e-5)


def test_non_finite_gradients_stop_before_the_step_and_name_it(tmp_path: Path) -> None:
    outcome = run(tmp_path, poison_at=30, checkpoint_every=10)
    assert outcome.reason == "non-finite"
    assert outcome.step == 30
    assert "loss is nan" in outcome.message
    assert "step 31 of 50" in outcome.message
    assert "training samples" in outcome.message


def test_a_failed_evaluation_is_noted_and_the_training_ends(tmp_path: Path) -> None:
    notes = Notes()
    assert run(tmp_path, notes, break_evaluation=True).reason == "finished"
    said = [event["note"] for event in notes.events if "note" in event]
    assert len(said) == 3
    assert all("broken on purpose" in note and "training goes on" in note for note in said)


class BestAtTwenty(ToyRecipe, frozen=True, extra="forbid"):
    """Its validation loss is the distance to step 20."""

    def evaluate(self, model: nn.Module, batches: Iterable[object]) -> dict[str, float]:
        return super().evaluate(model, batches) | {"loss": abs(float(unwrap(model).counter) - 20)}


def test_the_newest_two_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    job = TrainingJob(recipe=BestAtTwenty(), checkpoint_every=5)
    train(job, str(tmp_path), torch.device("cpu"), Notes())
    root = tmp_path / "checkpoints"
    places = checkpoints.complete(root)
    steps = [checkpoints.Checkpoint(place).step for place in places]
    evaluations = dict(read_history(str(tmp_path))["validation_loss"])
    assert min(evaluations, key=evaluations.get) == 20
    assert steps == [50, 45, 20]
    assert checkpoints.best_checkpoint(root, "loss", "min") == places[-1]


def test_a_damaged_checkpoint_is_found_by_its_hash_and_the_one_before_is_used(tmp_path: Path) -> None:
    run(tmp_path, Notes(stop_at=44), checkpoint_every=20)
    newest = Path(checkpoints.complete(tmp_path / "checkpoints")[0])
    file = newest / "worker-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    notes = Notes()
    assert run(tmp_path, notes).reason == "finished"
    said = [event["note"] for event in notes.events if "note" in event]
    assert len(said) == 1
    assert "worker-00000.safetensors is corrupt" in said[0]
    first = next(event["step"] for event in notes.events if "step" in event)
    assert first == 41


@pytest.mark.parametrize("fault", ["truncated", "missing", "no index", "foreign index"])
def test_every_damage_is_seen(tmp_path: Path, fault: str) -> None:
    run(tmp_path, Notes(stop_at=29), checkpoint_every=20)
    newest = Path(checkpoints.complete(tmp_path / "checkpoints")[0])
    file = newest / "worker-00000.safetensors"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif fault == "missing":
        file.unlink()
    elif fault == "no index":
        (newest / "index.json").unlink()
    else:
        (newest / "index.json").write_text('{"format": "something else"}')
    found, faults = checkpoints.latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 20
    assert len(faults) == (0 if fault == "no index" else 1)


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path: Path) -> None:
    from library.errors import ArtifactError
    from library.weights import load_tensors

    run(tmp_path, Notes(stop_at=20))
    found = checkpoints.Checkpoint(checkpoints.complete(tmp_path / "checkpoints")[0])
    other = torch.nn.Linear(3, 3)
    before = other.weight.clone()
    with pytest.raises(ArtifactError, match="of another model: missing bias, weight"):
        load_tensors(other, dict(checkpoints.model_weights(found)), source="checkpoint")
    assert torch.equal(other.weight, before)


def test_checkpoints_live_on_any_storage() -> None:
    folder = "memory://bucket/run"
    job = TrainingJob(recipe=ToyRecipe(steps=25), checkpoint_every=10)
    train(job, folder, torch.device("cpu"), Notes())
    places = checkpoints.complete(f"{folder}/checkpoints")
    assert [checkpoints.Checkpoint(place).step for place in places] == [25, 20]
    found, faults = checkpoints.latest(f"{folder}/checkpoints")
    assert not faults
    assert found.tensor("model/inp.weight").shape == (33, 7)
    assert len(read_history(folder)["loss"]) == 25


def test_a_piece_of_any_stretch_is_read_exactly(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(12, 5)
    writer = checkpoints.CheckpointWriter(tmp_path, kind="toy", recipe={}, metric="loss", mode="min")
    cuts = [0, 7, 8, 33, 60]
    pieces = [checkpoints.Piece("model/w", a, whole.flatten()[a:b], (12, 5)) for a, b in itertools.pairwise(cuts)]
    writer.save(1, reversed(pieces), {})
    writer.wait()
    found = checkpoints.Checkpoint(checkpoints.complete(tmp_path)[0])
    assert torch.equal(found.tensor("model/w"), whole)
    for start in range(0, 60, 7):
        for length in (0, 1, 13, 60 - start):
            stretch = found.read("model/w", start, min(length, 60 - start))
            assert torch.equal(stretch, whole.flatten()[start : start + length])


def test_a_write_that_fails_is_raised_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    from library.errors import PrismError

    root = tmp_path / "file"
    root.write_text("in the way")
    writer = checkpoints.CheckpointWriter(root, kind="toy", recipe={}, metric="loss", mode="min")
    writer.save(1, [checkpoints.Piece("model/w", 0, torch.ones(3), (3,))], {})
    with pytest.raises(PrismError, match="a parent of it is a file"):
        writer.wait()


def test_tensors_are_on_the_disk_before_the_checkpoint_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    flush = os.fsync

    def watched(descriptor: int) -> None:
        flush(descriptor)
        if not list(tmp_path.rglob("index.json")):
            flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    writer = checkpoints.CheckpointWriter(tmp_path, kind="toy", recipe={}, metric="loss", mode="min")
    writer.save(1, [checkpoints.Piece("model/w", 0, torch.ones(3), (3,))], {})
    writer.wait()
    [tensors] = tmp_path.rglob("*.safetensors")
    assert {tensors.stat().st_ino, tensors.parent.stat().st_ino} <= flushed, "the content, and the name"


WRITE_AND_DIE = """
import os, signal, sys
from jobs.history import History
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
history = History(sys.argv[1], start=20, enabled=True)
history.add(21, {"loss": 1.0})
history.write()
"""


def test_a_history_whose_writer_was_killed_is_read(tmp_path: Path) -> None:
    run(tmp_path, Notes(stop_at=20))
    before = read_history(str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "history").iterdir())) == 2, "nothing was left behind"
    assert read_history(str(tmp_path)) == before


def test_an_infinite_evaluation_is_never_the_best(tmp_path: Path) -> None:
    writer = checkpoints.CheckpointWriter(tmp_path, kind="toy", recipe={}, metric="score", mode="max", keep=9)
    for step, score in ((1, 0.5), (2, float("inf")), (3, float("nan"))):
        writer.save(step, [checkpoints.Piece("model/w", 0, torch.ones(3), (3,))], {})
        writer.wait()
        writer.annotate(step, {"score": score})
    assert checkpoints.best_checkpoint(tmp_path, "score", "max") == writer.place(1)


def test_empty_data_and_a_batch_smaller_than_the_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training data is empty"):
        run(tmp_path, samples=0)


def test_early_stopping_saves_what_it_stops_at(tmp_path: Path) -> None:
    class Easy(ToyRecipe, frozen=True):
        def finished(self, step: int, metrics: dict[str, float]) -> bool:
            return step >= 15 and "loss" in metrics

    job = TrainingJob(recipe=Easy(), checkpoint_every=100, evaluate_every=5)
    outcome = train(job, str(tmp_path), torch.device("cpu"), Notes())
    assert (outcome.reason, outcome.step) == ("early", 15)
    found = checkpoints.Checkpoint(checkpoints.complete(tmp_path / "checkpoints")[0])
    assert found.step == 15
    assert found.metrics.keys() == {"loss", "absolute"}
