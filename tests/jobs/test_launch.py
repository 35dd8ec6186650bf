"""A training job on a real Ray: the same result as without it, registered, and refused with one clear line."""

import json
from pathlib import Path

import pytest
import torch

from cluster import Connection, registry
from cluster.registry_session import session
from jobs.checkpoint import Checkpoint, complete
from jobs.history import read_history
from jobs.launch import launch
from jobs.send import SendJob
from jobs.training import Scaling
from library.artifact import open_artifact
from library.errors import ArtifactError, InputError, NonFiniteError, PrismError
from library.send.recipe import SendRecipe
from library.send.trained import load_send
from tests.jobs.toy import ToyJob, ToyRecipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_folder(job: ToyJob) -> Path:
    return Path(job.storage) / job.name


def toy_job(tmp_path: Path, name: str = "run", workers: int | tuple[int, int] = 2, **changes: object) -> ToyJob:
    fields = {"checkpoint_every": 20, "max_failures": 0, "storage": str(tmp_path)} | {
        key: changes.pop(key) for key in list(changes) if key in ToyJob.model_fields
    }
    return ToyJob(name=name, scaling=Scaling(workers=workers), recipe=ToyRecipe(**changes), **fields)


def test_two_workers_on_ray_equal_one_and_the_report_is_whole(tmp_path: Path) -> None:
    one = launch(toy_job(tmp_path, "one", 1))
    two = launch(toy_job(tmp_path, "two", 2, engine="zero2"))
    curves = [read_history(str(tmp_path / name))["loss"] for name in ("one", "two")]
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-5, atol=0)
    assert two.metrics["steps"] == 50
    assert two.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=1e-4)
    saved = json.loads((tmp_path / "two" / "report" / "report.json").read_text())
    assert saved["config"]["engine"] == "zero2"
    assert (tmp_path / "two" / "report" / "curves.png").stat().st_size > 5000
    artifact = open_artifact(two.artifact, kind="toy")
    assert artifact.metrics["loss"] == pytest.approx(two.metrics["validation_loss"])
    assert registry.resolve("models:/toy@champion") == registry.resolve("models:/toy/1"), "the first stays champion"
    assert two.registered == "models:/toy/2"


def test_send_trains_on_two_workers_and_its_artifact_loads(tmp_path: Path) -> None:
    recipe = SendRecipe(
        steps=12,
        batch_size=4,
        context=32,
        tokenizer="bytes",
        corpus="truthfulqa",
        epoch_steps=3,
        window=2,
        tracking_texts=6,
        prompts=0,
        calibration_cases=0,
    )
    job = SendJob(
        recipe=recipe, scaling=Scaling(workers=2), engine="zero3", checkpoint_every=100, storage=str(tmp_path)
    )
    report = launch(job)
    model, tokenizer, loaded = load_send(open_artifact(report.artifact))
    assert loaded == recipe
    assert len(model.dropped) == 25
    assert model(torch.tensor([tokenizer.encode(["What is it?"])[0]])).isfinite().all()


def test_a_broken_step_ends_the_run_at_once_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"loss is nan.* at step 31 of 50 \(training samples"):
        launch(toy_job(tmp_path, poison_at=30, max_failures=3))
    assert Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).step == 20


def test_a_registry_that_is_down_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    report = launch(toy_job(tmp_path, workers=1))
    assert report.registered is None
    assert any("prism registry push" in note for note in report.notes)
    assert open_artifact(report.artifact).kind == "toy"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert registry.register(report.artifact, "toy") == 1


def test_more_workers_than_the_cluster_has_are_refused_with_what_is_there(
    tmp_path: Path, ray_cluster: Connection
) -> None:
    with pytest.raises(InputError, match=r"9 workers of 1 CPU do not fit: the cluster has 4 CPU, enough for 4"):
        launch(toy_job(tmp_path, workers=9))
    assert not (tmp_path / "run").exists()


def test_names_and_resumption_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run 'run' .* it has no runs"):
        launch(toy_job(tmp_path, resume=True))
    with pytest.raises(InputError, match="resume needs the name"):
        launch(ToyJob(resume=True, storage=str(tmp_path)))
    launch(toy_job(tmp_path, workers=1, steps=5))
    with pytest.raises(InputError, match="a run 'run' exists"):
        launch(toy_job(tmp_path, workers=1, steps=5))
    with pytest.raises(InputError, match=r"another recipe \(lr differ"):
        launch(toy_job(tmp_path, workers=1, steps=5, lr=1.0, resume=True))
    again = launch(toy_job(tmp_path, workers=2, steps=5, resume=True, engine="fsdp"))
    assert again.metrics["steps"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm": "pythia-huge"}, "unknown model 'pythia-huge'"),
        ({"corpus": "no-such.csv"}, "no-such.csv"),
        ({"context": 300}, "positions"),
    ],
)
def test_bad_recipes_are_refused_by_the_workers_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    recipe = SendRecipe(steps=5, tokenizer="bytes", corpus="truthfulqa").model_copy(update=changes)
    with pytest.raises(InputError, match=message) as caught:
        launch(SendJob(recipe=recipe, name="bad", storage=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_a_run_that_is_refused_when_it_is_resumed_keeps_its_checkpoints(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.touch()
    settings = {"workers": 1, "steps": 5, "corpus": str(corpus)}
    launch(toy_job(tmp_path, **settings))
    corpus.unlink()
    with pytest.raises(
        InputError, match=r"corpus .* is not there; the checkpoint of step 5 is safe; go on with: "
    ) as no:
        launch(toy_job(tmp_path, resume=True, **settings))
    assert f"prism run toy --name run --resume --storage {tmp_path}" in str(no.value)
    assert Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).fault() is None
    corpus.touch()
    assert launch(toy_job(tmp_path, resume=True, **settings)).metrics["steps"] == 5


def test_a_run_whose_data_are_gone_when_a_worker_restarts_keeps_its_checkpoints(tmp_path: Path) -> None:
    corpus, mark = tmp_path / "corpus", tmp_path / "mark"
    corpus.touch()
    fault = {"corpus": str(corpus), "mark": str(mark), "die_at": 25}
    job = toy_job(tmp_path, workers=1, checkpoint_every=10, max_failures=1, **fault)
    with pytest.raises(
        InputError, match=r"corpus .* is not there; the checkpoint of step [12]0 is safe; go on with: prism"
    ):
        launch(job)
    assert mark.exists(), "no worker died"
    assert Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).fault() is None


def test_an_artifact_that_cannot_be_written_ends_in_one_line_and_the_run_goes_on(
    tmp_path: Path, ready_registry: Path
) -> None:
    theirs = tmp_path / "run" / "artifact" / "notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with pytest.raises(
        InputError, match=r"artifact exists and is not an artifact; choose .*; the checkpoint of "
    ) as no:
        launch(toy_job(tmp_path, workers=1, steps=5))
    assert str(no.value).endswith(f"step 5 is safe; go on with: prism run toy --name run --resume --storage {tmp_path}")
    assert "\n" not in str(no.value)
    assert "Traceback" not in str(no.value)
    with session(f"sqlite:///{ready_registry}") as client:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        assert [run.info.status for run in client.search_runs(experiments)] == ["FAILED"]
    theirs.unlink()
    report = launch(toy_job(tmp_path, workers=1, steps=5, resume=True))
    assert open_artifact(report.artifact).kind == "toy"


def test_a_metric_that_is_not_finite_leaves_an_artifact_that_opens(tmp_path: Path) -> None:
    report = launch(toy_job(tmp_path, workers=1, steps=5, explode_at=0))
    assert open_artifact(report.artifact, kind="toy").metrics.keys() == {"absolute"}
    assert report.registered == "models:/toy/1"


def test_an_elastic_run_does_not_grow_beyond_its_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size 3 is less than the 4 workers; each needs a sample"):
        launch(toy_job(tmp_path, workers=(1, 4), batch_size=3))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PrismError, match=r"cannot write .*file"):
        launch(toy_job(tmp_path / "file", workers=1))


def test_a_corrupt_artifact_is_not_registered(tmp_path: Path) -> None:
    report = launch(toy_job(tmp_path, workers=1, steps=5))
    weights = Path(report.artifact) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        registry.register(report.artifact, "toy")
