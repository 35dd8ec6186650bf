"""What a person sees of a report on a terminal."""

import io

import pandas as pd
import pytest
from rich.console import Console

from jobs.display import Display
from jobs.report import Report


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_wide_table_is_legible_and_says_what_it_leaves_out(width: int) -> None:
    names = [f"layers.{i}.attention.query_key_value" for i in range(3)]
    table = pd.DataFrame({"layer": names} | {f"measure_{i}": [1.5, 2.5, 3.5] for i in range(30)})
    text = io.StringIO()
    Report(job="toy", config={}, tables={"layers": table}).show(Console(file=text, width=width))
    shown = text.getvalue()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "layer " in line and "measure_0" in line)
    left_out = " ".join(lines[lines.index(header) :]).split("in the report:")[1]
    for column in table.columns[1:]:
        assert (f" {column} " in header) != (column in left_out.replace(",", " ").split()), column
    assert all(name in shown.replace("\n", "") or width < 80 for name in names)


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said = "evaluation failed: [INST] why? [/INST] [bold]"
    text = io.StringIO()
    table = pd.DataFrame({"[/prompt]": [said], "score": [0.25]})
    Report(job="toy", config={}, metrics={"[/m]": 1.0}, tables={"answers": table}, notes=[said]).show(
        Console(file=text, width=200)
    )
    assert text.getvalue().count(said) == 2
    assert "[/prompt]" in text.getvalue()
    Display("run", 10, "samples").show({"note": said})
    assert f"run: {said}" in capsys.readouterr().err


def test_a_long_text_is_folded_and_loses_nothing() -> None:
    words = " ".join(f"word{i}" for i in range(40))
    text = io.StringIO()
    Report(job="toy", config={}, tables={"answers": pd.DataFrame({"prompt": [words], "score": [0.25]})}).show(
        Console(file=text, width=80)
    )
    assert all(word in text.getvalue() for word in words.split())
    assert "0.25" in text.getvalue()
