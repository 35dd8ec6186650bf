"""The experiments of SeND's claims against what they are made of, and the times' forms against each other."""

import pytest
import torch

from library.language.material import tracking_texts
from library.recipe import fit
from library.send import study as module
from library.send.detection import DetectionSettings
from library.send.dropout import embed_texts
from library.send.eigenscore import eigenscore, eigenscore_after_drop
from library.send.recipe import SendRecipe
from library.send.sensitivity import random_indices, sensitivity, top_indices
from library.send.study import ArmRun, Study
from library.send.timing import EES, EXACT, OFFICIAL, published_eigenscore, score_times
from library.send.trained import load_send

RECIPE = SendRecipe(
    steps=6,
    batch_size=4,
    context=32,
    corpus="truthfulqa",
    tokenizer="bytes",
    window=2,
    epoch_steps=2,
    tracking_texts=4,
    prompts=3,
    prompt_tokens=8,
    answers=DetectionSettings(samples=4, max_new_tokens=5),
    calibration_cases=0,
)
STUDY = Study(
    checkpoints=3,
    checkpoint_steps=2,
    drop_fractions=(0.1, 0.3),
    random_sets=5,
    resampled_sets=2,
    epochs=4,
    last_epochs=2,
    held_out_blocks=6,
    cases=10,
)


@pytest.fixture(scope="module")
def snapshot():
    return module.pretrain(RECIPE, STUDY)


def test_a_snapshot_is_plain_training_and_its_late_checkpoints(snapshot, tmp_path):
    alone = fit(SendRecipe(**(RECIPE.model_dump() | {"selection": "none", "prompts": 0})), path=tmp_path / "a")
    with snapshot.opened() as artifact:
        weights = artifact.weights()
        for name, value in alone.weights().items():
            assert torch.equal(value, weights[name])
        model, _, _ = load_send(artifact)
    assert snapshot.tracked.shape == (3, 4, 128)
    last = embed_texts(model, *tracking_texts(RECIPE.material().validation, 4, 32), form="slt")
    assert torch.equal(snapshot.tracked[-1], last)
    assert not torch.equal(snapshot.tracked[-1], snapshot.tracked[-2])


def test_effects_are_differences_of_scores_of_the_same_answers(snapshot):
    rows = module.drop_effects(snapshot, RECIPE, STUDY)
    with snapshot.opened() as artifact:
        model, _, _ = load_send(artifact)
    answers = module._answers(RECIPE, model)
    before = eigenscore(answers).mean()
    generator = torch.Generator().manual_seed(RECIPE.seed)
    found = {(row["fraction"], row["choice"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 5 + 2
    for fraction in (0.1, 0.2, 0.3):
        count = int(fraction * 128)
        sets = [random_indices(128, count, generator=generator) for _ in range(5)]
        chance = torch.stack([eigenscore_after_drop(answers, index).mean() - before for index in sets])
        assert found[fraction, "random"]["change"] == pytest.approx(float(chance.mean()), abs=1e-9)
        assert found[fraction, "random"]["deviation"] == pytest.approx(float(chance.std()), abs=1e-9)
        chosen = top_indices(sensitivity(snapshot.tracked), count)
        row = found[fraction, "sensitive"]
        assert row["dropped"] == count
        assert row["change"] == pytest.approx(float(eigenscore_after_drop(answers, chosen).mean() - before), abs=1e-6)
        assert row["beats"] == float((row["change"] < chance).double().mean())
        oracle = found[fraction, "largest variance over answers"]["change"]
        assert oracle < found[fraction, "random"]["change"], "the oracle knows the answers"
    model.masking = True
    model.drop(top_indices(sensitivity(snapshot.tracked), 25))
    masked = eigenscore(module._answers(RECIPE, model)).mean() - before
    assert found[0.2, "sensitive, sampled under the mask"]["change"] == pytest.approx(float(masked), abs=1e-6)


def test_arms_are_one_run_until_something_is_dropped(snapshot):
    runs = {arm: module.train_arm(snapshot, RECIPE, STUDY, arm) for arm in module.ARMS}
    for run in runs.values():
        assert [row["epoch"] for row in run.epochs] == [1, 2, 3, 4]
        assert run.epochs[:2] == runs["plain"].epochs[:2]
        assert run.embeddings.shape == (4, 3, 4, 128)
        assert 0 <= run.accuracy <= 1
    assert [len(index) for index in runs["plain"].dropped] == [0, 0, 0, 0]
    for arm in ("SeND", "random"):
        assert [len(index) for index in runs[arm].dropped] == [0, 0, 25, 25], "the mask in force, not the next choice"
        assert runs[arm].epochs[2]["loss"] != runs["plain"].epochs[2]["loss"]
        for row in runs[arm].epochs[2:]:
            assert row["loss_masked"] != row["loss"]
            assert row["eigenscore_masked"] != row["eigenscore"]
    assert not torch.equal(runs["SeND"].dropped[2], runs["random"].dropped[2])
    same = module.on_same_coordinates(runs, RECIPE)
    for arm, run in runs.items():
        assert same[arm][1] == pytest.approx(run.epochs[1]["eigenscore"], abs=1e-9)
        expected = eigenscore_after_drop(run.embeddings[3], runs["SeND"].dropped[3]).mean()
        assert same[arm][3] == pytest.approx(float(expected), abs=1e-12)


def test_the_same_training_differs_by_nothing_on_the_same_coordinates():
    """Two arms with equal answers and different masks: their masked scores differ, those on one mask do not."""
    answers = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    runs = {arm: ArmRun([], answers, [torch.arange(k)], 0.0) for arm, k in (("plain", 0), ("SeND", 4), ("random", 8))}
    same = module.on_same_coordinates(runs, RECIPE)
    assert same["plain"] == same["SeND"] == same["random"]
    assert same["plain"][0] == pytest.approx(float(eigenscore_after_drop(answers[0], torch.arange(4)).mean()))


def test_detection_judges_the_test_documents(snapshot):
    found = module.detect(snapshot, RECIPE, STUDY)
    assert found.cases == len(RECIPE.entity_cases("test", 10)) > 0
    assert set(found.scores) == {"eigenscore", "length_normalised_entropy", "perplexity"}


@pytest.mark.parametrize(("features", "answers"), [(8, 3), (40, 12), (5, 9)])
def test_the_published_form_is_the_exact_score(features, answers):
    z = torch.randn(answers, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(published_eigenscore(z)) == pytest.approx(float(eigenscore(z)), abs=1e-10)


def test_times_are_of_every_form_at_every_size():
    threads = torch.get_num_threads()
    rows = score_times([(8, 3), (16, 900)], seconds=1e-4)
    assert [(row["d"], row["K"]) for row in rows] == [(8, 3), (16, 900)]
    assert all(row[form] > 0 for row in rows for form in (OFFICIAL, EXACT, EES))
    assert all(abs(row["difference"]) < 1e-9 for row in rows)
    assert torch.get_num_threads() == threads
