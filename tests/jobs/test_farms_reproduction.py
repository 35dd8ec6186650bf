"""The reproduction runs through on Ray and writes what its rows say."""

import pandas as pd
import pytest

from jobs.farms_reproduction import FarmsReproduction, correlations, pruning_claim, shapes_claim, spreads
from library.farms.study import Study


@pytest.mark.ray
def test_a_quick_run_writes_the_document_and_its_figures(ray_cluster, tmp_path):
    report = FarmsReproduction.quick(out=tmp_path).run()
    text = (tmp_path / "farms.md").read_text()
    for name in report.figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert name == "farms" or f"({name}.png)" in text
    assert set(report.tables) == {"shapes", "heaviness", "pruning"}
    assert f"{report.metrics['accuracy_wanda_uniform']:.3f}" in text
    assert "prism reproduce farms" in text


def shapes(farms: float) -> pd.DataFrame:
    rows = [(0, 64, 64, 2.1, 2.1, 2.12), (0, 64, 8, 4.5, 2.1 + farms, 4.47)]
    return pd.DataFrame(rows, columns=["seed", "rows", "columns", "plain", "FARMS", "law"])


def test_outcomes_follow_from_the_numbers():
    assert spreads(shapes(0.04)).loc[0].tolist() == pytest.approx([2.4, 0.04])
    assert shapes_claim(shapes(0.04)).verdict == "holds in all 1 seeds"
    assert shapes_claim(shapes(0.4)).verdict == "does not hold in any of 1 seeds"
    found = {"plain": [1, 2, 3], "FARMS": [3, 2, 1], "plain, least KS distance": [2, 3, 1]}
    heaviness = pd.DataFrame({"seed": [0, 0, 0], "heaviness": [0.1, 0.5, 0.9]} | found)
    assert correlations(heaviness.astype(float)) == {
        "plain": [1.0],
        "FARMS": [-1.0],
        "plain, least KS distance": [-0.5],
    }
    rows = [
        {"seed": 0, "pruner": pruner, "arm": arm, "accuracy": value, "dense": 0.9, "images": 100}
        for pruner in ("wanda", "magnitude")
        for arm, value in (("uniform", 0.6), ("plain", 0.4), ("FARMS", 0.5), ("FARMS, shuffled", 0.45))
    ]
    claim = pruning_claim(pd.DataFrame(rows), Study())
    assert claim.verdict == (
        "FARMS above plain: holds in all 2 cases; "
        "above the same exponents shuffled over the layers: holds in all 2 cases"
    )
    assert claim.findings[0].startswith(
        "wanda, FARMS minus uniform -10.0 points (0 of 1 above 0); minus plain 10.0 points"
    )
    assert "Of the 90.0 % before pruning the arms keep 40.0 to 60.0 %" in claim.findings[2]
    mild = pd.DataFrame([row | {"accuracy": row["accuracy"] + 0.29} for row in rows])
    assert "the arms keep 69.0 to 89.0 %" in pruning_claim(mild, Study(sparsity=0.3)).findings[2]
