"""The reproduction runs through on Ray, and its outcomes follow from the numbers."""

import pandas as pd
import pytest

from jobs.diffspectra_figures import closed_set_figure, curves_figure, losses_figure, overview, shown_figure
from jobs.diffspectra_reproduction import (
    DiffSpectraReproduction,
    answers_claim,
    candidates_claim,
    conditioning_claim,
    headlines,
    networks_claim,
    spectra_claim,
    training_claim,
)
from library.diffspectra.closed_set import ASKED, MEASURES, OWN, UNSEEN, ClosedSet
from library.diffspectra.study import ARMS, SPECTRA, Study

RIGHT = {"paper_smiles": 0.6, "paper_inchikey": 0.8, "constitution": 1.0, "stereo": 1.0}
RIGHT |= {"rmsd_released": 1.4, "rmsd": 0.0}


def arms(**better: float) -> pd.DataFrame:
    rows = []
    for seed in (0, 1):
        for arm in ARMS:
            row = {"seed": seed, "arm": arm, "loss": 2.0, "position": 1.0, "atom": 0.3, "bond": 1.5, "count": 1.2}
            rows.append(row | {"atoms_right": 0.5} | {key: value for key, value in better.items() if arm == "all"})
    return pd.DataFrame(rows)


def answers(**better: float) -> pd.DataFrame:
    rows = []
    for seed in (0, 1):
        for asked in ASKED:
            row = {"seed": seed, "asked": asked, "found": 0.0, **dict.fromkeys(MEASURES, 0.0)}
            rows.append(row | (better if asked in (OWN, UNSEEN) else {}))
    return pd.DataFrame(rows)


def bars(raman: float) -> pd.DataFrame:
    values = dict(zip(SPECTRA, (0.2, 0.4, raman, 0.6), strict=True))
    return pd.DataFrame([{"spectra": name, "auc": v, "composition": v, "atoms": v} for name, v in values.items()])


def test_outcomes_follow_from_the_numbers():
    assert answers_claim(RIGHT).verdict == "holds in all 2 released metrics"
    assert answers_claim(RIGHT | {"paper_smiles": 1.0}).verdict == "holds in 1 of 2 released metrics"
    assert spectra_claim(bars(0.5)).verdict == "holds in all 3 quantities"
    assert spectra_claim(bars(0.3)).verdict == "does not hold in any of 3 quantities"
    worse, better = (networks_claim(arms(**told), Study()).verdict for told in ({}, {"position": 0.9, "count": 1.1}))
    assert worse.count("does not hold in any of 2 seeds") == 2
    assert better.count("holds in all 2 seeds") == 2
    assert "weighted sum better: holds in all 2 seeds" in training_claim(arms(loss=2.1), Study()).verdict
    assert candidates_claim(answers(), ClosedSet()).verdict == "any sample right: does not hold in any of 2 seeds"
    assert candidates_claim(answers(found=0.1), ClosedSet()).verdict == "any sample right: holds in all 2 seeds"
    followed = conditioning_claim(answers(formula=0.2), ClosedSet()).verdict
    assert followed.startswith("formula right more often: holds in all 2 seeds")
    assert followed.endswith("more molecules found: does not hold in any of 2 seeds")
    found = headlines(RIGHT, bars(0.5), arms(), answers(found=0.1))
    assert found["found, own spectra"] == 0.1
    assert found["ridge_auc_Raman"] == 0.5
    assert found["position_all"] == 1.0


def test_figures_can_be_drawn():
    curves = pd.DataFrame([{"arm": arm, "step": step, "seed": 0, "loss": 1.0} for arm in ARMS for step in (1, 2)])
    shown = {"number": 0, "spectra": {"uv": [0.1] * 701}, "candidates": [("C#C", 1, 0.5)], "truth": "C#C"}
    for figure in (
        overview(bars(0.5), arms()),
        losses_figure(arms()),
        curves_figure(curves),
        closed_set_figure(answers(found=0.1)),
        shown_figure(shown),
        shown_figure(shown | {"candidates": []}),
    ):
        figure.canvas.draw()
        assert figure.get_figwidth() > 5


@pytest.mark.ray
def test_a_quick_run_writes_the_document_and_its_figures(ray_cluster, tmp_path):
    report = DiffSpectraReproduction.quick(seeds=(0,), out=tmp_path).run()
    text = (tmp_path / "diffspectra.md").read_text()
    for name in report.figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert name == "diffspectra" or f"({name}.png)" in text
    assert set(report.tables["networks"]["arm"]) == set(ARMS)
    assert set(report.tables["candidates"]["asked"]) == set(ASKED)
    assert "prism reproduce diffspectra" in text
