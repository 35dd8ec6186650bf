"""`prism tune qrc` for real: both stages, its limits, and a driver that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load

from cluster.connection import ROOT
from jobs import flags
from jobs.qrc import QrcJob
from jobs.qrc_evaluation import Plan, evaluate, halved, hybrid
from jobs.qrc_search import QrcSearch
from jobs.qrc_trials import Batch, Evaluated, Ledger, draw
from jobs.tuning import TuneJob, tune_job
from library.artifact import open_artifact
from library.errors import InputError, PrismError
from library.qrc.nowcast import Nowcast
from library.qrc.pool import fit_pool, parts_of
from library.qrc.recipe import QrcRecipe
from tune_spaces.qrc import PoolRanges, reservoir, unrefined

TASK = Nowcast(hours=360)
POOL = PoolRanges()
PLAN = Plan(nowcast=TASK, halving="hours", rungs=(150,), whole=360, reduction=2, washout=40)


def search(storage: Path, **changes: object) -> QrcSearch:
    small = {
        "samples": 2,
        "batch": 5,
        "rungs": (150,),
        "candidates": 4,
        "members": 2,
        "refinements": 4,
        "refine_batch": 2,
        "most_qubits": 8,
        "nowcast": TASK,
        "washout": 40,
        "fresh_seeds": 1,
        "storage": str(storage),
        "name": "s",
    }
    return QrcSearch(**(small | changes))


def ledger(storage: Path, stage: str) -> Ledger:
    return Ledger(str(storage / "s" / stage))


def small_guesses() -> list[dict]:
    """The first guesses with three qubits, which are quick, and one more."""
    values = [{**guess, "size": "3:1"} for guess in POOL.first_guesses()]
    return [*values, {**values[0], "scale": 1.2}]


def test_a_batch_is_halved_and_its_survivors_features_are_kept(tmp_path):
    values = small_guesses()
    batch = Batch(number=0, trials=[Evaluated(values=each) for each in values])
    place = str(tmp_path / "features")
    done = evaluate(batch, PLAN, {150: [0.0]}, place)
    assert done.state == "finished"
    ended = [k for k, trial in enumerate(done.trials) if 360 in trial.errors]
    early = [trial.errors[150] for trial in done.trials]
    assert len(ended) == 1 == sum(early[k] == min(early) for k in ended)
    parts = parts_of(TASK, ("train", "validation"))
    member = reservoir(values[ended[0]])
    sides = [member.drive(part.inputs)[0] for part in parts.values()]
    expected = fit_pool([sides[0]], [sides[1]], tuple(part.targets for part in parts.values()), washout=40)
    assert done.trials[ended[0]].errors[360] == pytest.approx(float(expected.errors), rel=1e-12)
    cut = [part.first(150) for part in parts.values()]
    first = fit_pool(*([member.drive(part.inputs)[0]] for part in cut), tuple(part.targets for part in cut), washout=40)
    assert early[ended[0]] == pytest.approx(float(first.errors), rel=1e-2)  # in single precision
    kept = load((tmp_path / "features").read_bytes())
    assert set(kept) == {f"{ended[0]}.train", f"{ended[0]}.validation"}
    assert (kept[f"{ended[0]}.train"] - sides[0]).abs().max() < 1e-6
    assert done.trials[ended[0]].about.keys() >= {"tau", "memory_capacity", "mean_delay"}


def test_who_goes_on_is_good_in_the_batch_and_among_all():
    errors = [0.9, 0.2, 0.5, 0.4, 0.3, 0.8]
    assert halved(errors, [], 3) == {1, 4}
    assert halved(errors, [2.0] * 30, 3) == {1, 4}  # a batch that is better than all before does not go on as a whole
    assert halved(errors, [0.25] * 30, 3) == {1}
    assert halved(errors, [0.0] * 30, 3) == {1}
    assert halved([0.7], [0.1], 3) == {0}


def test_halving_over_seeds_averages_the_errors_of_fresh_circuits():
    plan = PLAN.model_copy(update={"halving": "seeds", "rungs": (1,), "whole": 3})
    batch = Batch(number=0, trials=[Evaluated(values=each) for each in small_guesses()])
    done = evaluate(batch, plan, {})
    alone = PLAN.model_copy(update={"rungs": ()})
    [best] = [trial for trial in done.trials if 3 in trial.errors][:1]
    errors = []
    for seed in range(3):
        again = {**best.values, "seed": best.values["seed"] + 100 * seed}
        [same] = evaluate(Batch(number=1, trials=[Evaluated(values=again)]), alone, {}).trials
        errors.append(same.errors[360])
    assert best.errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert best.errors[3] == pytest.approx(sum(errors) / 3, rel=1e-12)
    assert len({round(error, 6) for error in errors}) == 3


def test_variants_of_an_onion_are_halved_but_the_first_are_spared():
    members = tuple(reservoir(values) for values in small_guesses()[:2])
    plan = PLAN.model_copy(update={"members": members, "spared": 2})
    start = unrefined(2)
    trials = [*start, {**start[0], "0.scale": 2.0}, {**start[1], "wiring": "stacked"}]
    done = evaluate(Batch(number=0, trials=[Evaluated(values=values) for values in trials]), plan, {150: [0.0]})
    assert all(360 in trial.errors for trial in done.trials[:2])
    sampled = plan.model_copy(update={"shots": 512, "rungs": ()})
    noisy = evaluate(Batch(number=0, trials=[Evaluated(values=start[0])]), sampled, {})
    assert noisy.trials[0].errors[360] != done.trials[0].errors[360]
    assert [member.shots for member in sampled.built(start[0]).members] == [512, 512]


def test_draws_repeat_share_their_structure_and_keep_to_limits(tmp_path):
    known = Ledger(str(tmp_path))
    options = {"searcher": "tpe", "seed": 3, "whole": 360, "shared": ("mode", "size", "encoding")}
    first = draw(POOL.domains(), known, 0, 6, first=POOL.first_guesses(), **options)
    assert first[:3] == POOL.first_guesses()
    trials = [Evaluated(values=values, errors={360: abs(values["scale"] - 1)}) for values in first]
    known.add(Batch(number=0, state="finished", trials=trials))
    again = Ledger(str(tmp_path))
    assert again.batches == known.batches
    second = draw(POOL.domains(), known, 1, 6, **options)
    assert second == draw(POOL.domains(), again, 1, 6, **options)
    assert second != draw(POOL.domains(), again, 2, 6, **options)
    assert len({(v["mode"], v["size"], v["encoding"]) for v in second}) == 1
    frugal = draw(
        POOL.domains(), known, 1, 6, fits=lambda v: reservoir(v).cx_per_step <= 14, **options | {"shared": ()}
    )
    assert all(reservoir(values).cx_per_step <= 14 for values in frugal)
    with pytest.raises(PrismError, match="next to no configuration"):
        draw(POOL.domains(), known, 1, 1, fits=lambda v: False, **options | {"searcher": "random"})


@pytest.mark.ray
@pytest.mark.usefixtures("ready_registry")
def test_a_search_whose_driver_is_killed_goes_on_and_registers_the_best(tmp_path, ray_cluster):
    script = f"""
from pathlib import Path
from cluster import connect
from tests.jobs.test_qrc_search import search
connect({ray_cluster.address!r}, ship=False)
search(Path({str(tmp_path)!r}), samples=4, concurrent=1).run()
"""
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        states = [batch.state for batch in ledger(tmp_path, "pool").batches]
        if "finished" in states and "running" in states:
            break
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline, states
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {batch.number: batch for batch in ledger(tmp_path, "pool").batches}
    assert any(batch.state == "running" for batch in before.values())

    report = QrcSearch(resume="s", storage=str(tmp_path), samples=3).run()
    after = {batch.number: batch for batch in ledger(tmp_path, "pool").batches}
    assert len(after) == max(3, len(before))
    for number, batch in before.items():
        assert [t.values for t in after[number].trials] == [t.values for t in batch.trials]
        if batch.state == "finished":
            assert after[number] == batch
    variants = ledger(tmp_path, "onion").trials
    assert len(variants) == 4
    assert variants[0].values["units"] == 0
    assert variants[0].errors[360] == pytest.approx(report.metrics["greedy_validation_nrmse"], rel=0.05)
    best = min((trial for trial in variants if 360 in trial.errors), key=lambda trial: trial.errors[360])
    assert report.metrics["refined_validation_nrmse"] == best.errors[360]
    seeds = report.tables["seeds"].set_index("seed")
    # the fit leaves out the last hour, whose next inputs nobody knows
    assert seeds.loc[0, "validation_nrmse"] == pytest.approx(best.errors[360], rel=0.01)
    assert report.metrics["test_nrmse"] == seeds.loc[0, "test_nrmse"]
    assert report.registered == "models:/qrc/1"
    assert set(report.figures) == {"pool", "test", "spectrum"}

    content = json.loads((tmp_path / "s" / "best.json").read_text())
    job = flags.from_record(QrcJob, content, source="best.json")
    assert sum(member.qubits for member in job.recipe.reservoir().members) <= 8
    assert job.recipe.reservoir() == hybrid(job.recipe.reservoir().members, same(len(job.recipe.qubits), best.values))
    assert open_artifact(report.artifact, kind="qrc").recipe["time_scales"]
    assert not list(tmp_path.rglob("*.pkl"))

    again = QrcSearch(resume="s", storage=str(tmp_path), samples=3).run()
    assert {batch.number: batch for batch in ledger(tmp_path, "pool").batches} == after
    assert again.metrics["refined_validation_nrmse"] == report.metrics["refined_validation_nrmse"]


def same(members: int, values: dict) -> dict:
    """The layer of a variant with members that are left as they are."""
    changes = {f"{number}.{name}": 1.0 for number in range(members) for name in ("sigma", "feedback", "scale")}
    return values | changes | {f"{number}.bias": 0.0 for number in range(members)}


def test_what_does_not_fit_is_refused_before_any_work(tmp_path):
    assert tune_job("qrc") is QrcSearch
    with pytest.raises(ValidationError, match="a job of its own"):
        TuneJob(space="qrc")
    for changes, message in (
        ({"rungs": (400,)}, "below the 360 hours"),
        ({"most_qubits": 2}, "at least 3"),
        ({"pool": {"qubits": (4, 9)}}, "qubits 9: allowed are 2 to 8"),
        ({"pool": {"sigma": (0.5, 0.1)}}, "range 0.5 to 0.1"),
        ({"halving": "seeds", "rungs": (2, 5)}, "below the 5 seeds"),
        ({"shots": 1024, "most_shots": 1000}, "one member alone takes 1024 shots"),
        ({"most_shots": 1000}, "give shots too"),
        ({"washout": 200}, "below half"),
    ):
        with pytest.raises(ValidationError, match=message):
            search(tmp_path, **changes)
    with pytest.raises(InputError, match=r"there is no search 'x' at .* it has no searches"):
        search(tmp_path, resume="x").run()
    search(tmp_path)._open()
    with pytest.raises(InputError, match="a search 's' exists"):
        search(tmp_path)._open()
    with pytest.raises(InputError, match="was started with other settings"):
        search(tmp_path, resume="s", batch=9)._open()
    assert QrcSearch(resume="s", storage=str(tmp_path), samples=7)._open()[0].samples == 7


def test_a_recipe_says_what_a_search_finds():
    members = [reservoir({**guess, "mode": "both", "seed": 5}) for guess in POOL.first_guesses()]
    assert QrcRecipe.of(members, units=0).reservoir().members == tuple(members)
    sampled = QrcRecipe.of(members, units=0, shots=4096).reservoir().members
    assert [(each.reservoir, each.shots) for each in sampled] == [(member, 4096) for member in members]
