"""DiffSpectra on workers: every engine and number of them trains the same, resumes, and Ray leaves an artifact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster import registry
from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.diffspectra import DiffSpectraJob
from jobs.diffspectra_pretrain import DiffSpectraPretrainJob
from jobs.history import read_history
from jobs.training import Scaling, TrainingJob, train
from library.artifact import open_artifact
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.generation import Elucidator
from library.diffspectra.geometry_encoder import GeometrySettings
from library.diffspectra.pretraining_recipe import PretrainingRecipe
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling
from library.diffspectra.specformer import SpecFormerSettings
from library.recipe import fit, seeded_model
from tests.jobs.toy import run_workers

ENCODER = SpecFormerSettings(
    patch_length=(100, 500, 500), stride=(50, 250, 250), width=8, heads=2, layers=1, features=16
)
DENOISER = DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=16, dropout=0.0)
SMALL = {"encoder": ENCODER, "most_atoms": 8, "batch_size": 7}
RECIPE = DiffSpectraRecipe(
    **SMALL, denoiser=DENOISER, steps=4, warmup=0, validation_times=1, modality_dropout=0.3, largest_gradient=2.0
)
PRETRAINING = PretrainingRecipe(**SMALL, geometry=GeometrySettings(width=8, layers=1), steps=4, warmup=2)
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
Run = tuple[str, Any, dict[str, Any]]


def train_all(folder: str, runs: list[Run]) -> None:
    """Run several jobs one after another in this process group."""
    for name, recipe, changes in runs:
        kind = DiffSpectraJob if isinstance(recipe, DiffSpectraRecipe) else DiffSpectraPretrainJob
        train(
            kind(recipe=recipe, checkpoint_every=2, **changes),
            str(Path(folder) / name),
            torch.device("cpu"),
            Poster(None),
        )


def curve(folder: Path, name: str = "loss") -> torch.Tensor:
    return torch.tensor([value for _, value in read_history(str(folder))[name]])


def state(folder: Path) -> checkpoints.Checkpoint:
    return checkpoints.Checkpoint(checkpoints.complete(folder / "checkpoints")[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of one worker, and of two with every engine."""
    folder = tmp_path_factory.mktemp("runs")
    run_workers(1, train_all, str(folder), [("one", RECIPE, {}), ("pre-one", PRETRAINING, {})])
    many: list[Run] = [(engine, RECIPE, {"engine": engine}) for engine in ENGINES]
    run_workers(2, train_all, str(folder), [*many, ("pre-two", PRETRAINING, {})])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_workers_train_as_one_with_every_engine(runs: Path, engine: str) -> None:
    for name in ("loss", "gradient_norm", "count"):
        torch.testing.assert_close(curve(runs / engine, name), curve(runs / "one", name), rtol=1e-3, atol=0)
    one, many = state(runs / "one"), state(runs / engine)
    assert {key for key in one.index.tensors if key.startswith("optimizer/")} == {
        key for key in many.index.tensors if key.startswith("optimizer/")
    }
    start = seeded_model(RECIPE).state_dict()
    names = [name for name, _ in seeded_model(RECIPE).average.named_parameters()]

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(a[name] - b[name]).flatten() for name in names]).norm()

    begun = {name: start[f"average.{name}"] for name in names}
    averages = [{name: found.tensor(f"model/average.{name}") for name in names} for found in (one, many)]
    assert distance(*averages) < 0.05 * distance(averages[0], begun), "but for the signs of gradients that are zero"


def test_the_gradient_limit_is_kept_in_checkpoints(runs: Path) -> None:
    for folder in ("one", *ENGINES):
        [group] = state(runs / folder).index.state["optimizer"]["groups"]
        assert group["norms"] == pytest.approx([3000.0, *curve(runs / folder, "gradient_norm").clamp(max=2.0).tolist()])
    assert (curve(runs / "one", "gradient_norm") > 2).any(), "some were clipped"


def test_pretraining_compares_with_the_spectra_of_all_workers(runs: Path) -> None:
    for name in ("loss", "contrast", "reconstruct", "denoise", "gradient_norm"):
        torch.testing.assert_close(curve(runs / "pre-two", name), curve(runs / "pre-one", name), rtol=2e-3, atol=0)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(runs: Path, tmp_path: Path) -> None:
    early = RECIPE.model_copy(update={"steps": 2})
    run_workers(1, train_all, str(tmp_path), [("r", early, {}), ("r", RECIPE, {})])
    once, twice = state(runs / "one"), state(tmp_path / "r")
    assert once.index.tensors.keys() == twice.index.tensors.keys()
    for key in once.index.tensors:
        assert torch.equal(once.tensor(key), twice.tensor(key)), key
    assert once.index.state == twice.index.state


def test_batches_cannot_be_cut_and_averages_need_full_precision() -> None:
    for kind in (DiffSpectraJob, DiffSpectraPretrainJob):
        with pytest.raises(ValidationError, match="cannot be cut"):
            kind(micro_batch=4)
    with pytest.raises(ValidationError, match="use engine ddp or fsdp"):
        DiffSpectraJob(engine="zero2", precision="bf16")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_pretraining_and_training_on_ray_end_in_candidates(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scaling": Scaling(workers=2), "storage": str(tmp_path / "runs")}
    before = DiffSpectraPretrainJob(recipe=PRETRAINING, **settings).run()
    assert before.registered == "models:/diffspectra-pretrain/1"
    recipe = RECIPE.model_copy(update={"pretrained": before.registered})
    job: TrainingJob = DiffSpectraJob(recipe=recipe, **settings)
    report = job.run()
    assert report.registered == "models:/diffspectra/1"
    artifact = open_artifact(registry.resolve("models:/diffspectra@champion"))
    alone = fit(recipe.model_copy(update={"pretrained": before.artifact}), path=tmp_path / "alone", device="cpu")
    for name, value in alone.metrics.items():
        assert artifact.metrics[name] == pytest.approx(value, rel=2e-3)
    elucidator = Elucidator.from_artifact(artifact)
    [query] = elucidator.queries(recipe.molecules(), [3])
    [found] = elucidator.find([query], Sampling(samples=3, steps=2))
    assert len(found.samples) == 3
