"""The reproduction runs through on Ray and writes what its rows say."""

import pandas as pd
import pytest

from jobs.spe_reproduction import SpeReproduction, counting_claim, deletion_claim, domains_claim, noise_claim, slopes
from library.spe.study import ARMS, CUTS, DOMAIN_ARMS, ENCODERS, Study


@pytest.mark.ray
def test_a_quick_run_writes_the_document_and_its_figures(ray_cluster, tmp_path):
    report = SpeReproduction.quick(out=tmp_path).run()
    text = (tmp_path / "spe.md").read_text()
    for name in report.figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert name == "spe" or f"({name}.png)" in text
    assert set(report.tables) == {"noise", "deletion", "counting", "domains"}
    assert set(report.tables["counting"]["encoding"]) == set(ARMS)
    domains = report.tables["domains"]
    assert set(domains["encoding"]) == set(DOMAIN_ARMS)
    assert domains[["inside", "outside"]].stack().between(0, 1).all()
    assert "prism reproduce spe" in text


def noise(power: float) -> pd.DataFrame:
    rows = [
        (seed, name, 10.0**e, 10.0 ** (power * e) if name == "SPE" else 0.1)
        for seed in (0, 1)
        for name in ENCODERS
        for e in range(-6, 0)
    ]
    return pd.DataFrame(rows, columns=["seed", "encoder", "distance", "change"])


def counts(spe: float) -> pd.DataFrame:
    values = {"SPE": spe, "SignNet": 0.3, "no encoding": 0.5, "PEG-8": 0.4, "SPE, phi = 1": 0.1}
    rows = [
        {"seed": seed, "encoding": arm, "weights": 9, **{f"cycles{length}": values[arm] for length in (3, 4, 5, 6)}}
        for seed in (0, 1)
        for arm in ARMS
    ]
    return pd.DataFrame(rows)


def test_outcomes_follow_from_the_numbers():
    assert slopes(noise(1.0))["SPE"] == pytest.approx([1.0, 1.0])
    assert slopes(noise(1.0))["SignNet"] == pytest.approx([0.0, 0.0])
    assert noise_claim(noise(1.0), Study()).verdict == "holds in all 2 seeds"
    assert noise_claim(noise(0.5), Study()).verdict == "does not hold in any of 2 seeds"
    assert "SPE below SignNet: holds in all 2 seeds" in deletion_claim(noise(1.0), Study()).verdict
    good, bad = (counting_claim(counts(error), Study()).verdict for error in (0.2, 0.35))
    assert good.startswith("at most 0.6 of the error without encodings: holds in all 8 cases")
    assert "below SignNet: holds in all 8 cases" in good
    assert "below SPE, phi = 1: does not hold in any" in good
    assert bad.startswith("at most 0.6 of the error without encodings: does not hold in any of 8 cases")


def test_domains_are_compared_seed_by_seed():
    outside = {"no encoding": 0.6, "SignNet": 0.62, "SPE": 0.65, "SPE, mean": 0.61}
    rows = [
        {"seed": seed, "cut": cut, "encoding": arm, "weights": 9, "inside": 0.7 + 0.1 * (arm == "SPE"), "outside": area}
        for cut in CUTS
        for arm, area in outside.items()
        for seed in (0, 1)
    ]
    claim = domains_claim(pd.DataFrame(rows), Study())
    assert "SPE above no encoding: holds in all 4 cuts and seeds" in claim.verdict
    assert "SPE above SignNet: holds in all 4 cuts and seeds" in claim.verdict
    assert "SPE, mean above no encoding: holds in all 4 cuts and seeds" in claim.verdict
    assert "SPE, mean above SignNet: does not hold in any of 4 cuts and seeds" in claim.verdict
    assert "Outside, SPE minus no encoding: 5.0 ± 0.0 points" in claim.findings[0]
    assert "inside, minus no encoding: 10.0 ± 0.0 points" in claim.findings[0]
