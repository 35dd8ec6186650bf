"""The reproduction goes through all its claims, and its controls are what they say."""

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from jobs import qrc_claims, qrc_figures
from jobs.qrc_reproduction import QrcReproduction
from library.errors import InputError
from library.qrc.scores import coverage, paired_gain, scores
from library.qrc.study import Bench, Part, Study, closed_loop, nowcast


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_document_has_every_claim_table_and_figure(tmp_path):
    report = QrcReproduction.quick(out=tmp_path).run()
    text = (tmp_path / "qrc.md").read_text()
    assert text.count("\n## ") == 6
    assert "simulated" in text
    assert "nan" not in text
    for name in report.figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    nowcast = report.tables["nowcast"]
    features = nowcast.groupby("model")["features"].first()
    assert features[qrc_claims.CONTROL] == features[qrc_claims.TRIPLES] == features[qrc_claims.GREEDY] == 3 * 6
    assert features[qrc_claims.HYBRID] == features[qrc_claims.GREEDY] + 30
    assert (nowcast["budget"] >= 1).all()
    single = nowcast[nowcast["model"] == qrc_claims.SIMPLE]
    assert (single["budget"] == 2 * 2 * 2 * 3 * 2).all()
    assert report.metrics["nowcast_onion"] == pytest.approx(
        nowcast[nowcast["model"] == qrc_claims.GREEDY]["nrmse"].mean()
    )


def test_controls_have_the_sizes_of_the_study():
    study = QrcReproduction.quick().study.model_copy(update={"qubits": 5, "random_triples": 1})
    for qubits in (3, 5):
        study = study.model_copy(update={"qubits": qubits})
        tables = {
            name: pd.DataFrame([{"seed": 0, **row} for row in part(study, 0).rows])
            for name, part in (("nowcast", nowcast), ("courses", closed_loop))
        }
        features = tables["nowcast"].set_index("model")["features"]
        single, equal = features[qrc_claims.SIMPLE], features[qrc_claims.GREEDY]
        assert single == features[qrc_claims.single_network(study)] == qubits * (qubits + 1) // 2
        assert equal == features[qrc_claims.equal_network(study)] == 3 * single
        assert features[qrc_claims.HYBRID] == features[qrc_claims.hybrid_network(study)]
        claim = qrc_claims.courses(tables["courses"], study)
        loop = tables["courses"].set_index("model")["features"]
        [size] = {loop[name] for name in loop.index if name.startswith("hybrid")}
        assert loop[f"ESN {size}"] == size
        assert f"Hybrid of {size} features" in claim.findings[1]
        assert f"the first {study.curves.primed} of {study.curves.points} points" in claim.measured
    assert Study().networks == (10, 30, 60)
    for wrong in ({"qubits": 2}, {"shots": ()}, {"scales": ()}):
        with pytest.raises(ValidationError):
            Study(**wrong)


def test_the_figure_of_the_knobs_shows_the_numbers_of_its_table():
    table = qrc_claims.sweep(3, (7, 2, 5))
    drawn = qrc_figures.spectra_figure(3, (7, 2, 5))
    median = table[table["kind"] == "su2"].groupby(["measured", "sigma"])["tau"].median()
    for measured, line in enumerate(drawn.axes[-1].lines, 1):
        shown = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for sigma in set(shown) & set(qrc_claims.SIGMAS):
            assert shown[sigma] == pytest.approx(max(median[measured, sigma], 0.1))
    assert "3 seeds" in drawn.axes[-1].get_title(loc="left")


def test_choices_are_by_validation_and_the_test_takes_no_part():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = {name: Part(rand(1, 80, 2), rand(1, 80, 1)) for name in ("train", "validation", "test")}
    bench = Bench(parts, 5)
    good = {name: part.targets + 0.1 * rand(1, 80, 1) for name, part in parts.items()}
    lucky = {name: (part.targets if name == "test" else rand(1, 80, 1)) for name, part in parts.items()}
    first, second = bench.add_features(lucky), bench.add_features(good)
    assert bench.best("row", [[first], [second]]) == [second]
    assert bench.rows[0]["budget"] == 2
    assert bench.best("lucky", [[first]]) == [first]
    lucky_row, row = bench.rows[1], bench.rows[0]
    assert row["validation"] < 0.3 < lucky_row["validation"]
    assert row["median"] == pytest.approx(min(row["nrmse"], lucky_row["nrmse"]), rel=1e-6)  # of two candidates
    assert bench.squares["row"].shape == (75,)


def test_paired_gains_and_scores():
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(2, 400, generator=generator, dtype=torch.float64) * 10
    gain, low, high = paired_gain(0.81 * noise, noise, block=20)
    assert gain == pytest.approx(0.1)
    assert low == pytest.approx(0.1)  # what both share cancels
    assert high == pytest.approx(0.1)
    other = torch.rand(2, 400, generator=generator, dtype=torch.float64) * 10
    gain, low, high = paired_gain(noise, other, block=20)
    assert low < 0 < high
    target = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = scores(target.flip(0), target)
    assert (found["mse"], found["mae"]) == (5.0, 2.0)
    assert found["r2"] == pytest.approx(1 - found["nrmse"] ** 2)
    assert coverage(target - 1, target + torch.tensor([1.0, -1, 1, 1]), target) == 0.75
    with pytest.raises(InputError, match="at least 2"):
        paired_gain(noise, other, block=300)
    with pytest.raises(InputError, match="constant"):
        scores(target, torch.ones(4))
