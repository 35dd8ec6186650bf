"""Areas under the ROC curve against oracles, and what a calibration promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from library.calibration import Auroc, Calibration, auroc, expected_calibration_error
from library.errors import ArtifactError, InputError


def draws(seed: int, count: int, *, rounded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that tell the labels apart in part, with both labels present; rounding makes ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, generator=generator) < 0.4
    labels[0], labels[1] = True, False
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + labels
    return (scores.round() if rounded else scores), labels


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 60), rounded=st.booleans())
def test_area_is_that_of_scikit_learn_and_depends_on_the_order_alone(seed, count, rounded):
    scores, labels = draws(seed, count, rounded=rounded)
    result = auroc(scores, labels)
    assert result.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert (result.positives, result.negatives) == (int(labels.sum()), int((~labels).sum()))
    assert auroc(torch.exp(scores / 2) + 5, labels).value == result.value
    assert auroc(-scores, labels).value == pytest.approx(1 - result.value, abs=1e-12)
    assert auroc(scores, ~labels).value == pytest.approx(1 - result.value, abs=1e-12)


def test_perfect_inverted_and_constant_rankings():
    labels = torch.tensor([False] * 5 + [True] * 7)
    rising = torch.arange(12.0)
    assert auroc(rising, labels) == Auroc(1.0, 0.0, 7, 5)
    assert auroc(-rising, labels) == Auroc(0.0, 0.0, 7, 5)
    assert auroc(torch.zeros(12), labels).value == 0.5


def test_standard_error_is_that_of_delong():
    scores, labels = draws(4, 50, rounded=True)
    positive, negative = scores[labels], scores[~labels]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var() / len(positive) + wins.mean(0).var() / len(negative)
    assert auroc(scores, labels).standard_error == pytest.approx(float(variance.sqrt()), rel=1e-12)


def test_standard_error_with_groups_is_that_of_resampling_groups():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(150).repeat_interleave(4)
    shared = torch.randn(150, generator=generator, dtype=torch.float64)[groups]
    labels = torch.rand(600, generator=generator) < 0.5
    scores = shared + 0.5 * torch.randn(600, generator=generator, dtype=torch.float64) + 0.7 * labels
    result = auroc(scores, labels, groups)
    areas = []
    for _ in range(500):
        weights = torch.bincount(torch.randint(150, (150,), generator=generator), minlength=150)[groups]
        areas.append(roc_auc_score(labels, scores, sample_weight=weights))
    assert result.standard_error == pytest.approx(np.std(areas), rel=0.1)
    repeated = auroc(scores.repeat(2), labels.repeat(2), groups.repeat(2))
    assert repeated.value == pytest.approx(result.value, abs=1e-12)
    assert repeated.standard_error == pytest.approx(result.standard_error, rel=1e-9), "copies add no information"
    assert auroc(scores.repeat(2), labels.repeat(2)).standard_error < 0.8 * repeated.standard_error


def test_standard_error_of_one_group_is_unknown():
    scores, labels = draws(1, 20)
    assert np.isnan(auroc(scores, labels, torch.zeros(20, dtype=torch.int64)).standard_error)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 80), rounded=st.booleans())
def test_calibration_is_monotone_within_bounds_and_right_on_its_training_data(seed, count, rounded):
    scores, labels = draws(seed, count, rounded=rounded)
    calibration = Calibration.fit(scores, labels)
    risks = calibration.risk(scores)
    assert risks.mean() == pytest.approx(float(labels.double().mean()), abs=1e-9)
    for level in risks.unique():  # each level of the fit is the share of positives at it
        assert labels[(risks - level).abs() < 1e-12].double().mean() == pytest.approx(float(level), abs=1e-9)
    assert expected_calibration_error(risks, labels) < 1e-9
    line = calibration.risk(torch.linspace(-1e3, 1e3, 4001, dtype=torch.float64))
    assert (line.diff() >= 0).all()
    assert line.min() >= 0
    assert line.max() <= 1
    assert calibration.risk(float("-inf")) == calibration.risks[0]
    assert calibration.risk(float("inf")) == calibration.risks[-1]
    middle = (calibration.scores[1:] + calibration.scores[:-1]) / 2
    torch.testing.assert_close(calibration.risk(middle), (calibration.risks[1:] + calibration.risks[:-1]) / 2)


def test_calibration_minimises_the_squared_error_among_monotone_maps():
    scores, labels = draws(7, 40)
    error = (Calibration.fit(scores, labels).risk(scores) - labels.double()).square().sum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rival = Calibration(
            scores.sort().values, torch.rand(40, generator=generator, dtype=torch.float64).sort().values
        )
        assert (rival.risk(scores) - labels.double()).square().sum() >= error


def test_calibration_survives_an_artifact_and_refuses_a_corrupt_one():
    calibration = Calibration.fit(*draws(3, 60))
    again = Calibration.from_arrays({"mask": torch.ones(3)} | calibration.arrays())
    assert torch.equal(again.scores, calibration.scores)
    assert torch.equal(again.risks, calibration.risks)
    assert Calibration.from_arrays({"mask": torch.ones(3)}) is None
    arrays = calibration.arrays()
    for name, value in [
        ("calibration.scores", arrays["calibration.scores"].flip(0)),
        ("calibration.risks", arrays["calibration.risks"] + 1),
        ("calibration.risks", arrays["calibration.risks"][1:]),
        ("calibration.risks", torch.full_like(arrays["calibration.risks"], float("nan"))),
    ]:
        with pytest.raises(ArtifactError, match="calibration is corrupt"):
            Calibration.from_arrays(arrays | {name: value})


def test_one_knot_is_a_constant():
    calibration = Calibration(torch.tensor([2.0]), torch.tensor([0.25]))
    assert calibration.risk(torch.tensor([[-1.0, 2.0, 9.0]])).tolist() == [[0.25, 0.25, 0.25]]


def test_expected_calibration_error_by_hand():
    risks = torch.tensor([0.1, 0.1, 0.9, 1.0])
    labels = torch.tensor([True, False, True, True])
    assert expected_calibration_error(risks, labels, bins=2) == pytest.approx((0.4 * 2 + 0.05 * 2) / 4)


@pytest.mark.parametrize("function", [auroc, Calibration.fit])
def test_bad_scores_and_labels(function):
    with pytest.raises(InputError, match=r"scores\[1\] is not finite"):
        function(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    with pytest.raises(InputError, match="both labels"):
        function(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    with pytest.raises(InputError, match="vectors of one length"):
        function(torch.zeros(3), torch.tensor([True, False]))
