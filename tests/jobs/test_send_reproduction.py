"""The reproduction of SeND: its document says what its report measured, and says it again when it is run again."""

import re

import pytest
from pydantic import ValidationError

from jobs import flags, reproduce
from jobs.commands import Output
from jobs.reproduce import command_line, markdown, mean_and_deviation, reproduction_class, verdict
from jobs.send_claims import milliseconds
from jobs.send_reproduction import SendReproduction
from library.errors import InputError, PrismError
from library.send.recipe import SendRecipe
from library.send.study import ARMS, Study

pytestmark = pytest.mark.ray
TIMED = ("times", "ees_over_exact_seconds")


@pytest.fixture(scope="module")
def runs(shared_ray, tmp_path_factory):
    """Two runs of the same quick reproduction: its job, its reports, and the folders of their documents."""
    shared_ray.connection()
    folders = [tmp_path_factory.mktemp("results") for _ in range(2)]
    jobs = [SendReproduction.quick(out=folder) for folder in folders]
    return jobs, [job.run() for job in jobs], folders


def section(text: str, letter: str) -> str:
    return text[text.index(f"## {letter}. ") :].partition("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a section's table by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_document_holds_every_claim_and_its_figure(runs):
    (job, _), (report, _), (folder, _) = runs
    text = (folder / "send.md").read_text()
    assert [line[3] for line in text.splitlines() if line.startswith("## ")] == ["A", "B", "C", "D"]
    assert command_line(job) in text
    assert set(re.findall(r"\]\((.*)\.png\)", text)) == set(report.figures) - {"send"}
    for name in report.figures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.notes) == 4
    for note in report.notes:
        title, _, found = note.partition(": ")
        assert f"| {title} | {found} |" in text
        assert f"**Outcome: {found}.**" in section(text, title[0])
    assert sorted(file.name for file in folder.iterdir()) == sorted(["send.md", *(f"{n}.png" for n in report.figures)])


def test_the_documents_numbers_are_those_of_the_report(runs):
    _, (report, _), (folder, _) = runs
    text = (folder / "send.md").read_text()
    effects = report.tables["dropping"].set_index(["choice", "fraction"])["change"]
    found = rows(section(text, "A"))
    for choice in ("random", "sensitive", "largest mean square", "largest variance over answers"):
        assert found[choice] == [mean_and_deviation([effects[choice, fraction]]) for fraction in (0.1, 0.2)]
    arms = report.tables["training"].set_index(["metric", "arm"])["value"]
    found = rows(section(text, "B"))
    for name, metric in {"EigenScore, mask removed": "eigenscore", "held-out loss, mask removed": "loss"}.items():
        assert found[name] == [f"{arms[metric, arm]:.3f}" for arm in ARMS]
    times = report.tables["times"]
    lines = [line.strip("| ").split(" | ") for line in section(text, "C").splitlines() if re.match(r"\| \d", line)]
    assert [[int(cells[0]), int(cells[1])] for cells in lines] == times[["d", "K"]].values.tolist()
    assert [cells[3] for cells in lines] == [milliseconds(seconds) for seconds in times["EigenScore, exact"]]
    areas = report.tables["detection"].set_index("score")
    assert rows(section(text, "D"))["0"][3] == str(areas["decided"].iloc[0])


def test_the_last_epochs_are_summed_up_and_only_masked_epochs_differ(runs):
    (job, _), (report, _), _ = runs
    epochs, arms = report.tables["epochs"], report.tables["training"].set_index(["arm", "metric"])["value"]
    for arm in ARMS:
        own = epochs[epochs["arm"] == arm].set_index("epoch")
        assert arms[arm, "eigenscore"] == pytest.approx(own["eigenscore"].loc[[3, 4]].mean())
        assert arms[arm, "eigenscore_swing"] == pytest.approx(own["eigenscore"].loc[[3, 4]].std())
        assert (own["loss"] == own["loss_masked"]).tolist() == [
            arm == "plain" or e <= job.recipe.window for e in own.index
        ]
    first = epochs[epochs["epoch"] <= job.recipe.window].drop(columns="arm").groupby("epoch")
    assert (first.nunique() == 1).all().all(), "arms must be one run until something is dropped"


def test_a_second_run_gives_the_same_numbers_but_for_the_times(runs):
    _, (first, second), folders = runs
    for name in set(first.tables) - set(TIMED):
        assert first.tables[name].equals(second.tables[name]), name
    untimed = [{k: v for k, v in r.metrics.items() if k not in TIMED and v == v} for r in (first, second)]
    assert untimed[0] == untimed[1]
    texts = [(folder / "send.md").read_text() for folder in folders]
    for letter in "ABD":
        assert section(texts[0], letter) == section(texts[1], letter)


def test_the_command_in_the_document_describes_the_job():
    job = SendReproduction.quick(seeds=(3, 5), gpu=True)
    words = command_line(job).split()
    assert words[:3] == ["prism", "reproduce", "send"]
    again, _ = flags.parse_job(SendReproduction, Output, words[3:], prog="prism reproduce send")
    assert again == job
    assert command_line(SendReproduction()) == "prism reproduce send"
    assert reproduction_class("send") is SendReproduction
    with pytest.raises(InputError, match="no reproduction of 'none'; there are send"):
        reproduction_class("none")


def test_contradictions_and_bad_places_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "connect", lambda: pytest.fail("connected before looking at the folder"))
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="a parent of it is a file"):
        SendReproduction.quick(out=tmp_path / "file" / "results").run()
    monkeypatch.setattr(reproduce, "connect", lambda: None)
    for changes, message in [
        ({"recipe": SendRecipe(steps=100)}, "steps: 100 are too few for 8 checkpoints over 280"),
        ({"study": Study(epochs=3)}, "last_epochs: 6 of 3 epochs"),
        ({"study": Study(drop_fractions=(0.1, 1.0))}, "drop_fractions: 1.0 is not strictly between 0 and 1"),
        ({"study": Study(random_sets=2)}, "resampled_sets: 3 of 2 random_sets"),
        ({"recipe": SendRecipe(steps=500, prompts=0)}, "prompts: none"),
        ({"recipe": SendRecipe(steps=500, epoch_steps=None)}, "epoch_steps: none given"),
    ]:
        with pytest.raises(InputError, match=message):
            SendReproduction(out=tmp_path, **changes).run()
    for seeds in ((), (1, 2, 1), (-1,)):
        with pytest.raises(ValidationError, match="seeds"):
            SendReproduction(seeds=seeds)


def test_the_folder_is_the_checkouts_inside_it_and_results_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.results_folder(None) == tmp_path / "results"
    assert (tmp_path / "results").is_dir()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path / "jobs")
    assert reproduce.results_folder(None) == tmp_path / "docs" / "results"
    assert list(reproduce.results_folder(None).iterdir()) == []


def test_a_failing_task_is_named_and_ends_the_others(ray_cluster):
    import ray

    @ray.remote(num_cpus=0)
    def fail(error):
        raise error

    @ray.remote(num_cpus=0)
    def sleep():
        import time

        time.sleep(600)

    with pytest.raises(InputError, match=r"^corpus: nowhere$"):
        reproduce.gather({"a": sleep.remote(), "b": fail.remote(InputError("corpus: nowhere"))}, name="x")
    with pytest.raises(PrismError, match=r"^x: b failed \(ZeroDivisionError: by nothing\)$"):
        reproduce.gather({"b": fail.remote(ZeroDivisionError("by nothing"))}, name="x")


def test_counting_and_tables():
    import pandas as pd

    assert verdict([True, True], "seeds") == "holds in all 2 seeds"
    assert verdict([True, False], "seeds") == "holds in 1 of 2 seeds"
    assert verdict([False], "seeds") == "does not hold in any of 1 seeds"
    assert mean_and_deviation([2.0]) == "2.000"
    assert [milliseconds(s) for s in (1.234e-4, 0.5, 6.2944)] == ["0.123", "500", "6294"]
    assert markdown(pd.DataFrame({"a": ["x"], "b": [1]})) == "| a | b |\n| --- | ---: |\n| x | 1 |"
