import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.pareto import costs, crowding, front, front_ranks, hypervolume, kept_of_front
from jobs.search import Journal, JournalSearcher, ParetoHalving, TrialRecord, draw, scheduler
from jobs.search_report import front_figure
from tune_spaces.space import Real, Space

SPACE = Space(
    "two",
    {"recipe.lr": Real(0.0, 1.0)},
    metric="accuracy",
    mode="max",
    others={"kib": "min"},
    baselines={"plain": [{"recipe.lr": 0.0}, {"recipe.lr": 1.0}]},
)
points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=24)


def report(step, accuracy, kib):
    return {"step": step, "accuracy": accuracy, "kib": kib, "excess": 0.0, "objective": accuracy}


def record(number, accuracy, kib, state="finished", group=None, lr=0.5):
    content = {k: v for k, v in report(0, accuracy, kib).items() if k != "step"}
    return TrialRecord(number=number, values={"recipe.lr": lr}, state=state, group=group, curve={90: content})


@given(points)
@settings(max_examples=60, deadline=None)
def test_ranks_are_those_of_peeling_fronts_one_by_one(rows):
    ranks = front_ranks(rows)
    left = set(range(len(rows)))
    for rank in range(int(ranks.max()) + 1):
        beaten = {
            j for i, j in itertools.permutations(left, 2)
            if all(a <= b for a, b in zip(rows[i], rows[j], strict=True)) and rows[i] != rows[j]
        }  # fmt: skip
        assert {i for i in left if ranks[i] == rank} == left - beaten
        left &= beaten
    assert not left


@given(points)
@settings(max_examples=60, deadline=None)
def test_the_area_is_that_of_counted_cells(rows):
    cells = sum(any(a <= x and b <= y for a, b in rows) for x in range(8) for y in range(8))
    assert hypervolume(rows, (8, 8)) == cells


def test_crowding_is_largest_at_the_ends_and_in_gaps():
    found = crowding([(0, 9), (1, 8), (2, 7), (8, 1), (9, 0)])
    assert np.isinf(found[[0, 4]]).all()
    assert found[2] > found[1]


def test_the_front_is_of_the_search_alone():
    records = [record(0, 0.9, 30), record(1, 0.8, 20), record(2, 0.85, 40), record(3, 0.7, 10)]
    records += [record(4, 0.95, 5, group="plain"), record(5, 0.99, 1, state="stopped")]
    assert [found.number for found in front(SPACE, records)] == [0, 1, 3]
    assert costs(SPACE, records[1].last) == (-0.8, 20)
    assert [found.number for found in kept_of_front(SPACE, records)] == [1, 0, 3]
    assert kept_of_front(SPACE, []) == []


@pytest.mark.parametrize("group", [None, "plain"])
def test_a_search_without_a_finished_trial_has_its_figure(tmp_path, group):
    ended = [record(0, 0.9, 30, group=group), record(1, 0.8, 20, group=group)] if group else []
    drawn = front_figure(SPACE, [record(2, 0.5, 9, state="failed"), record(3, 0.4, 8, state="running"), *ended])
    drawn.savefig(tmp_path / "front.png")
    assert front(SPACE, ended) == []
    assert front_ranks([]).shape == (0,)
    [line] = [line for line in drawn.axes[0].lines if line.get_label() == "front of the search"]
    assert len(line.get_xdata()) == 0


def test_trials_that_others_beat_at_a_rung_stop_and_baselines_do_not():
    halving = scheduler(SPACE, [], 90)
    assert isinstance(halving, ParetoHalving)

    class Trial:
        def __init__(self, name, group=None):
            self.trial_id, self.config = name, {"group": group}

    given_rows = {"a": (0.9, 30), "b": (0.8, 20), "c": (0.7, 10), "d": (0.6, 35), "e": (0.5, 34)}
    decisions = {name: halving.on_trial_result(None, Trial(name), report(10, *row)) for name, row in given_rows.items()}
    assert decisions["a"] == decisions["b"] == "CONTINUE", "too few to compare"
    assert decisions["d"] == decisions["e"] == "STOP"
    assert halving.on_trial_result(None, Trial("base", "plain"), report(10, 0.0, 99)) == "CONTINUE"
    assert halving.on_trial_result(None, Trial("a"), report(11, 0.0, 99)) == "CONTINUE", "one look per rung"
    past = [record(n, *row) for n, row in enumerate(given_rows.values())]
    resumed = scheduler(SPACE, past, 90)
    assert resumed.on_trial_result(None, Trial("new"), report(10, 0.55, 36)) == "STOP"


def test_baselines_run_first_once_each_and_are_not_counted(tmp_path):
    searcher = JournalSearcher(SPACE, Journal(str(tmp_path)), samples=2, kind="tpe", seed=0, steps=90)
    given_trials = [searcher.suggest(name) for name in "abcd"]
    assert [trial["group"] for trial in given_trials] == ["plain", "plain", None, None]
    assert [trial["values"]["recipe.lr"] for trial in given_trials[:2]] == [0.0, 1.0]
    assert searcher.suggest("e") == "FINISHED"
    searcher.on_trial_complete("a", report(90, 0.5, 9.0) | {"reason": "finished"})
    again = JournalSearcher(SPACE, Journal(str(tmp_path)), samples=3, kind="tpe", seed=0, steps=90)
    assert [again.suggest(name)["number"] for name in "bcd"] == [1, 2, 3]
    assert again.suggest("e")["number"] == 4
    assert again.suggest("f") == "FINISHED"


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "random"])
def test_draws_over_several_objectives_depend_on_number_and_past_alone(kind):
    generator = np.random.default_rng(0)
    past = [record(n, *generator.random(2), lr=float(generator.random())) for n in range(40)]
    past.append(record(40, 0.1, 0.9, state="stopped", lr=0.1))
    past.append(record(41, 0.1, 0.9, group="plain", lr=7.0))  # outside the space, so it must not be told
    assert draw(SPACE, past, 42, kind, 3) == draw(SPACE, past[::-1], 42, kind, 3)
    assert draw(SPACE, past, 42, kind, 3) != draw(SPACE, past, 43, kind, 3)


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_both_samplers_go_where_the_front_is(kind):
    wide = Space(
        "wide", {name: Real(0.0, 1.0) for name in "abcd"}, metric="accuracy", mode="max", others={"kib": "min"}
    )
    generator = np.random.default_rng(0)
    past = []
    for n in range(64):
        values = dict(zip("abcd", generator.random(4).tolist(), strict=True))
        away = abs(values["a"] - 0.8)
        past.append(record(n, 1 - away, 10 * away).model_copy(update={"values": values}))
    drawn = np.array([draw(wide, past, 64 + n, kind, 1)["a"] for n in range(20)])
    assert (abs(drawn - 0.8) < 0.2).mean() > 0.55  # 0.4 of uniform draws
