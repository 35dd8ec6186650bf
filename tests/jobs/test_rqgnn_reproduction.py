"""The reproduction runs through on Ray and writes what its rows say."""

import pandas as pd
import pytest
from pydantic import ValidationError

from jobs.rqgnn_reproduction import (
    BANK,
    COUNTS,
    DEFAULT,
    FROZEN,
    RQGNN,
    SIZES,
    RqgnnReproduction,
    controls_claim,
    default_claim,
    filters_claim,
    gain,
    quotients_claim,
)
from library.rqgnn.study import ARMS, REGRESSIONS


@pytest.mark.ray
def test_a_quick_run_writes_the_document_and_its_figures(ray_cluster, tmp_path) -> None:
    report = RqgnnReproduction.quick(out=tmp_path).run()
    text = (tmp_path / "rqgnn.md").read_text()
    for name in report.figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert name == "rqgnn" or f"({name}.png)" in text
    results = report.tables["results"]
    assert set(results["arm"]) == {*ARMS, *REGRESSIONS}
    first = results[(results["set"] == "tox21:SR-p53") & (results["arm"] == RQGNN)]["auc"].iloc[0]
    assert f"{first:.3f}" in text
    assert "prism reproduce rqgnn" in text


def test_some_set_has_all_networks() -> None:
    study = RqgnnReproduction.quick().study
    with pytest.raises(ValidationError, match=r"study.large: it names all sets; leave one out"):
        RqgnnReproduction.quick(study=study.model_copy(update={"large": study.sets}))


def rows(**auc: float) -> pd.DataFrame:
    """Results on two sets and two seeds; the areas of named arms, 0.7 of all others."""
    names = {"rqgnn": RQGNN, "frozen": FROZEN, "counts": COUNTS, "bank": BANK, "sizes": SIZES}
    given = {names[name]: value for name, value in auc.items()}
    rest = {
        "auprc": 0.2,
        "macro_f1": 0.6,
        "argmax_f1": 0.5,
        "ece": 0.01,
        "raw_ece": 0.1,
        "auc_error": 0.03,
        "validation_auc": 0.7,
    }
    return pd.DataFrame(
        {"set": name, "arm": arm, "seed": seed, "auc": given.get(arm, 0.7) + 0.01 * seed * (arm == RQGNN), **rest}
        for name in ("a", "b")
        for arm in (*ARMS, *REGRESSIONS)
        for seed in ((0,) if arm in REGRESSIONS else (0, 1))
    )


def test_outcomes_follow_from_the_numbers() -> None:
    found = rows(rqgnn=0.8, bank=0.7, counts=0.805, sizes=0.9, frozen=0.8)
    assert gain(found, RQGNN, BANK).tolist() == pytest.approx([0.1, 0.11, 0.1, 0.11])
    assert gain(found, RQGNN, SIZES).tolist() == pytest.approx([-0.1, -0.09, -0.1, -0.09])
    assert quotients_claim(found).verdict == "holds in all 4 sets and seeds"
    assert controls_claim(found).verdict == (
        "above the network with counts: holds in 2 of 4 sets and seeds; "
        "above nodes and edges alone: does not hold in any of 4 sets and seeds"
    )
    assert filters_claim(found).verdict == (
        "learned above frozen: holds in 2 of 4 sets and seeds with the released network, "
        "does not hold in any of 4 sets and seeds with the default"
    )
    chosen = found.copy()
    chosen.loc[chosen["arm"] == DEFAULT, "validation_auc"] = [0.72, 0.71, 0.72, 0.69]
    chosen.loc[chosen["arm"] == FROZEN, "auc"] = 0.99  # test graphs have no say
    claim = default_claim(chosen)
    assert claim.verdict.startswith(f"above {FROZEN}: holds in 3 of 4 sets and seeds; above RQGNN as in the paper")
    assert f"{DEFAULT} minus {FROZEN}: 1.0 ± 0.7 points" in claim.findings[2]
    assert claim.tables["Validation AUC"]["mean"].tolist() == ["0.710", *["0.700"] * 4]
    assert "10.5 ± 0.7" in quotients_claim(found).findings[0]
