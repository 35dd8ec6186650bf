"""Searches run for real on Ray Tune: what stops, what resumes, what is best, and what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import jobs
from cluster.connection import ROOT
from jobs import flags, search, tuning
from jobs.qrc_search import QrcSearch
from jobs.search import Journal, JournalSearcher, TrialRecord, draw, scheduler
from jobs.send import SendJob
from jobs.spaces import SearchEntry
from jobs.trial import Evaluation, changed, scored
from jobs.tuning import TuneJob, best_trial, tune_job
from library.artifact import open_artifact
from library.errors import InputError
from library.recipe import fit
from library.send.trained import load_send
from tests.jobs import toy_space
from tests.jobs.toy import ToyJob, ToyRecipe

SPACE = toy_space.space(ToyRecipe())


@pytest.fixture(autouse=True)
def toy_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.SPACES, "toy", SearchEntry("tests.jobs.toy_space", "toy"))
    monkeypatch.setitem(jobs.JOBS, "toy", jobs.JobEntry("toy", "tests.jobs.toy:ToyJob", "a toy"))


def toy_tune(storage: Path, **changes: object) -> TuneJob:
    base = {"recipe": {"steps": 18, "samples": 32}, "checkpoint_every": 6, "evaluate_every": 2}
    return TuneJob(**({"space": "toy", "base": base, "concurrent": 2, "storage": str(storage), "name": "s"} | changes))


def closed(number: int, lr: float, *losses: float, state: str = "finished", excess: float = 0.0) -> TrialRecord:
    curve = {
        step: {"validation_loss": loss, "validation_absolute": 1.0, "excess": excess, "objective": loss + 10 * excess}
        for step, loss in zip((2, 6, 18), losses, strict=False)
    }
    return TrialRecord(number=number, values={"recipe.lr": lr, "recipe.dropout": 0.0}, state=state, curve=curve)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_search_stops_the_worse_keeps_the_best_and_registers_it(tmp_path):
    report = toy_tune(tmp_path, samples=8).run()
    trials = report.tables["trials"]
    finished = trials[trials.state == "finished"]
    assert len(trials) == 8
    assert report.metrics["stopped"] == (trials.state == "stopped").sum() > 0
    assert (finished.step == 18).all()
    assert (trials[trials.state == "stopped"].step < 18).all()
    feasible = finished[finished.excess == 0]
    best = int(report.metrics["best_trial"])
    assert best == feasible.set_index("trial").validation_loss.idxmin()
    assert report.registered == "models:/toy/1"
    row = trials.set_index("trial").loc[best]
    artifact = open_artifact(report.artifact, kind="toy")
    assert artifact.recipe["lr"] == row["recipe.lr"]
    assert artifact.metrics["loss"] == pytest.approx(row.validation_loss, rel=1e-12)

    repeated = flags.from_record(ToyJob, flags.load_record(tmp_path / "s" / "best.json"), source=Path("best.json"))
    assert repeated == changed(toy_tune(tmp_path).base, {p: row[p] for p in ("recipe.lr", "recipe.dropout")})
    saved = pd.read_parquet(tmp_path / "s" / "report" / "trials.parquet")
    assert len(saved) == 8
    assert (tmp_path / "s" / "report" / "trials.png").stat().st_size > 10_000
    assert not list((tmp_path / "s").rglob("*.pkl"))


def midway(record: TrialRecord) -> bool:
    """Whether a trial of 18 steps runs, has checkpoints, and is not about to end."""
    return record.state == "running" and 6 <= max(record.curve, default=0) <= 12


@pytest.mark.ray
@pytest.mark.usefixtures("ready_registry")
def test_a_search_whose_driver_is_killed_goes_on_without_repeating(tmp_path, ray_cluster):
    script = f"""
import jobs
from cluster import connect
from jobs import spaces
from tests.jobs.test_tuning import toy_tune
spaces.SPACES["toy"] = spaces.SearchEntry("tests.jobs.toy_space", "toy")
jobs.JOBS["toy"] = jobs.JobEntry("toy", "tests.jobs.toy:ToyJob", "a toy")
connect({ray_cluster.address!r}, ship=False)
base = {{"recipe": {{"steps": 18, "samples": 32, "slow": 0.3}}, "checkpoint_every": 2, "evaluate_every": 2}}
toy_tune({str(tmp_path)!r}, samples=5, base=base).run()
"""
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    journal = Journal(str(tmp_path / "s"))
    deadline = time.monotonic() + 120
    while not (
        any(record.state != "running" for record in journal.records)
        and any(midway(record) for record in journal.records)
    ):
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline, journal.records
        time.sleep(0.05)
        journal = Journal(str(tmp_path / "s"))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {record.number: record for record in Journal(str(tmp_path / "s")).records}
    reference = (tmp_path / "s" / "reference.json").stat().st_mtime_ns
    cut = next(number for number, record in before.items() if midway(record))

    report = TuneJob(space="toy", resume="s", storage=str(tmp_path)).run()
    after = {record.number: record for record in Journal(str(tmp_path / "s")).records}
    assert sorted(after) == [0, 1, 2, 3, 4]
    assert not any(record.state == "running" for record in after.values())
    for number, record in before.items():
        assert after[number].values == record.values
        if record.state != "running":
            assert after[number] == record
    assert after[cut].curve | before[cut].curve == after[cut].curve, "it repeated or changed what it had reported"
    starts = sorted(
        int(file.name.split("-")[1]) for file in (tmp_path / "s" / "trials" / f"{cut:05d}" / "history").iterdir()
    )
    assert starts[-1] >= 2, "the trial that was cut off did not go on from its checkpoint"
    assert (tmp_path / "s" / "reference.json").stat().st_mtime_ns == reference
    assert report.artifact is not None

    again = TuneJob(space="toy", resume="s", storage=str(tmp_path)).run()
    assert again.metrics["best_trial"] == report.metrics["best_trial"]
    assert Journal(str(tmp_path / "s")).records == list(after.values())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_trial_of_several_workers_gives_the_numbers_of_one(tmp_path):
    base = {"recipe": {"steps": 4, "samples": 32}, "checkpoint_every": 2, "scaling": {"workers": 2}}
    job = toy_tune(tmp_path, samples=1, base=base, concurrent=1)
    report = job.run()
    best = report.tables["trials"].iloc[0]
    alone = fit(changed(job.base, {path: best[path] for path in SPACE.varies}).recipe, path=tmp_path / "alone")
    assert report.metrics["best_validation_loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_base_job_that_diverges_is_refused_before_any_trial(tmp_path):
    base = {"recipe": {"steps": 18, "samples": 32, "poison_at": 9}, "checkpoint_every": 6}
    with pytest.raises(InputError, match=r"not finite|nan"):
        toy_tune(tmp_path, samples=2, base=base).run()
    assert not (tmp_path / "s" / "trials").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_send_is_searched_and_its_best_trial_is_a_detector_that_loads(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "lm")
    words = ["a river in the north", "the oldest town of the county", "it was built of stone in 1850 by two masons"]
    pd.DataFrame({"text": [f"{words[i % 3]}, number {i * i}, {words[i % 2]}." for i in range(60)]}).to_csv(
        tmp_path / "corpus.csv", index=False
    )
    recipe = {
        "lm": str(tmp_path / "lm"),
        "corpus": str(tmp_path / "corpus.csv"),
        "tokenizer": "bytes",
        "context": 32,
        "batch_size": 4,
        "steps": 12,
        "epoch_steps": 2,
        "tracking_texts": 4,
        "prompts": 2,
        "answers": {"samples": 3, "max_new_tokens": 4},
    }
    base = {"recipe": recipe, "checkpoint_every": 6, "evaluate_every": 2}
    job = TuneJob(space="send", base=base, samples=3, concurrent=2, storage=str(tmp_path), name="s")
    report = job.run()
    trials = report.tables["trials"]
    assert trials["recipe.lr"].between(1e-5, 1e-3).all()
    assert trials["recipe.drop_fraction"].between(0.05, 0.4).all()
    assert (trials["recipe.freeze_blocks"] == 0).all()
    model, _, found = load_send(open_artifact(report.artifact, kind="send"))
    assert found.lr == trials.set_index("trial").loc[int(report.metrics["best_trial"]), "recipe.lr"]
    assert model.lm.config.hidden_size == 32
    curve = json.loads((tmp_path / "s" / "reference.json").read_text())
    assert list(curve) == ["2", "4", "6", "8", "10", "12"]


def test_what_a_trial_tries_depends_on_its_number_and_the_past_alone():
    past = [closed(n, 10.0 ** -(1 + n % 5), 3.0, 2.0, 1.0 + n) for n in range(12)]
    for kind in ("tpe", "random"):
        assert draw(SPACE, past, 12, kind, 7) == draw(SPACE, past[::-1], 12, kind, 7)
        assert draw(SPACE, past, 12, kind, 7) != draw(SPACE, past, 13, kind, 7)
        assert draw(SPACE, past, 12, kind, 7) != draw(SPACE, past, 12, kind, 8)
    assert draw(SPACE, past, 12, "random", 7) == draw(SPACE, past[:3], 12, "random", 7)


def test_tpe_goes_where_trials_were_good():
    past = [closed(n, 10.0 ** (-5 + n / 10), 5.0, 5.0, abs(-5 + n / 10 + 2)) for n in range(40)]
    lrs = pd.Series([draw(SPACE, past, 40 + n, "tpe", 0)["recipe.lr"] for n in range(20)])
    assert lrs.between(10**-2.7, 10**-1.3).mean() > 0.7
    at_random = pd.Series([draw(SPACE, past, 40 + n, "random", 0)["recipe.lr"] for n in range(20)])
    assert at_random.between(10**-2.7, 10**-1.3).mean() < 0.6


def test_the_objective_is_worsened_by_what_exceeds_the_limit():
    reference = {2: 4.0, 6: 2.0}
    near = scored(SPACE, Evaluation(7, {"validation_loss": 1.0, "validation_absolute": 2.0625}), reference)
    assert near == {"step": 7, "validation_loss": 1.0, "validation_absolute": 2.0625, "excess": 0.0, "objective": 1.0}
    far = scored(SPACE, Evaluation(5, {"validation_loss": 1.0, "validation_absolute": 5.0}), reference)
    assert far["excess"] == pytest.approx(0.25 - 0.05)
    assert far["objective"] == pytest.approx(1.0 + 10 * 0.2)
    assert scored(SPACE, Evaluation(6, {"validation_absolute": 2.0}), reference) is None
    assert scored(SPACE, Evaluation(1, {"validation_loss": 1.0, "validation_absolute": 2.0}), reference) is None


@pytest.mark.parametrize("broken", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_reported(broken):
    good = {"validation_loss": 1.0, "validation_absolute": 2.0}
    for name in good:
        assert scored(SPACE, Evaluation(6, good | {name: broken}), {2: 4.0}) is None
    two = replace(SPACE, others={"validation_absolute": "min"}, limit=None)
    assert scored(two, Evaluation(6, good | {"validation_absolute": broken}), {}) is None


@pytest.mark.usefixtures("group")
def test_a_trial_that_ends_in_infinity_is_written_down_as_failed_and_read_again(tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    recipe = ToyRecipe(steps=6, samples=32, explode_at=6)
    base = ToyJob(recipe=recipe, checkpoint_every=2)
    journal = Journal(str(tmp_path))
    searcher = JournalSearcher(SPACE, journal, samples=1, kind="random", seed=0, steps=6)
    config = searcher.suggest("a")
    tuning._run_trial(SPACE, base, search.trial_folder(journal.root, 0), config["values"], {0: 9.0})
    for report in reports:
        searcher.on_trial_result("a", report)
    searcher.on_trial_complete("a", reports[-1])
    [record] = Journal(str(tmp_path)).records
    assert record.state == "failed"
    assert record.fault == "the training ended without a finite 'validation_loss'"
    assert sorted(record.curve) == [2, 4]
    assert all(map(math.isfinite, (value for report in record.curve.values() for value in report.values())))


def test_best_is_feasible_first_and_finished():
    cheap = closed(0, 0.1, 3.0, 2.0, 0.5, excess=0.01)
    slow, good = closed(1, 0.1, 3.0, 2.0, 1.0), closed(2, 0.1, 3.0, 2.0, 0.9)
    stopped = closed(3, 0.1, 0.1, state="stopped")
    assert best_trial(SPACE, [cheap, slow, good, stopped]) is good
    assert best_trial(SPACE, [cheap, stopped]) is cheap
    assert best_trial(SPACE, [stopped]) is None


def test_the_scheduler_of_a_resumed_search_knows_the_rungs():
    past = [closed(n, 0.1, 1.0 + n, 1.0 + n, 1.0 + n) for n in range(3)]
    fresh, resumed = scheduler(SPACE, [], 18), scheduler(SPACE, past, 18)
    trial = search._Replayed(trial_id="new")
    decisions = []
    for halving in (fresh, resumed):
        halving.on_trial_add(None, trial)
        decisions.append(halving.on_trial_result(None, trial, {"step": 2, "objective": 2.5}))
    assert decisions == ["CONTINUE", "STOP"]


def test_interrupted_trials_are_given_again_and_closed_ones_are_written_down(tmp_path):
    journal = Journal(str(tmp_path))
    searcher = JournalSearcher(SPACE, journal, samples=2, kind="random", seed=0, steps=18)
    first = searcher.suggest("a")
    report = {"step": 2, "validation_loss": 1.0, "validation_absolute": 1.0, "excess": 0.0, "objective": 1.0}
    searcher.on_trial_result("a", report)
    again = JournalSearcher(SPACE, Journal(str(tmp_path)), samples=2, kind="random", seed=0, steps=18)
    assert again.suggest("b") == first
    assert again.suggest("c")["number"] == 1
    assert again.suggest("d") == "FINISHED"
    again.on_trial_complete("c", {"step": 0, "reason": "non-finite", "fault": "loss is nan"})
    again.on_trial_complete("b", report | {"reason": "finished"})
    records = {record.number: record for record in Journal(str(tmp_path)).records}
    assert (records[1].state, records[1].fault) == ("failed", "loss is nan")
    assert (records[0].state, list(records[0].curve)) == ("finished", [2])


def test_bad_searches_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValidationError, match="unknown space 'nope'; there are send"):
        TuneJob(space="nope")
    with pytest.raises(ValidationError, match="samples"):
        toy_tune(tmp_path, samples=0)
    with pytest.raises(InputError, match="unknown space 'nope'"):
        tune_job("nope")
    with pytest.raises(InputError, match=r"there is no search 'gone' .* it has no searches"):
        TuneJob(space="toy", resume="gone", storage=str(tmp_path)).run()
    with pytest.raises(InputError, match="a toy job has no such field"):
        changed(ToyJob(), {"recipe.momentum": 0.9})
    with pytest.raises(InputError, match="drop_fraction"):
        changed(SendJob(), {"recipe.drop_fraction": 1.5})
    with pytest.raises(InputError, match="EigenScore is not measured with prompts=0"):
        TuneJob(space="send", base={"recipe": {"prompts": 0}}, storage=str(tmp_path)).run()
    with pytest.raises(ValidationError, match="base"):
        TuneJob(space="send", base=5)
    with pytest.raises(InputError, match=r"record: base: .* not 5"):
        flags.from_record(tune_job("send"), {"space": "send", "base": 5}, source="record")
    assert not list(tmp_path.iterdir())


def test_a_search_of_another_kind_is_not_gone_on_with(tmp_path):
    QrcSearch(name="mine", storage=str(tmp_path))._open()
    with pytest.raises(InputError, match="search 'mine' is over space 'qrc', not 'send'"):
        TuneJob(space="send", resume="mine", storage=str(tmp_path))._open()


def test_a_resumed_search_keeps_what_it_searches(tmp_path):
    job = toy_tune(tmp_path, samples=4)
    _, folder = job._open()
    with pytest.raises(InputError, match="a search 's' exists"):
        job._open()
    resumed, same = TuneJob(space="toy", resume="s", storage=str(tmp_path), samples=9)._open()
    assert (same, resumed.base, resumed.samples, resumed.concurrent) == (folder, job.base, 9, 2)
    other = {"recipe": {"steps": 20}}
    with pytest.raises(InputError, match="started with another base job"):
        TuneJob(space="toy", base=other, resume="s", storage=str(tmp_path))._open()
    with pytest.raises(InputError, match="is over space 'toy', not 'send'"):
        TuneJob(space="send", resume="s", storage=str(tmp_path))._open()


def test_a_named_search_has_the_flags_of_its_job():
    made = tune_job("send")
    assert made.model_fields["base"].annotation is SendJob
    assert made().base == SendJob()
    assert made.model_validate(made().model_dump()) == made()
