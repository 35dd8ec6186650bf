"""The experiments are what they say: planted distributions, budgets, and choices that the test images do not enter."""

import pytest
import torch

from library.farms import study as experiments
from library.farms.study import Study, rank_correlation

SMALL = Study(
    window=16,
    ops=2,
    shapes=((48, 48), (96, 16)),
    matrices=5,
    rows=(24, 40),
    columns=(16, 24),
    widths=(32, 16),
    epochs=1,
)


def test_rank_correlation_is_spearmans():
    from scipy import stats

    left, right = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    expected = stats.spearmanr(left.numpy(), right.numpy()).statistic
    assert rank_correlation(left, right) == pytest.approx(expected, abs=1e-12)


def test_the_planted_entries_are_students():
    from scipy import stats

    draws = experiments._student((200, 200), torch.Generator().manual_seed(0)).flatten()
    reference = stats.t(experiments.STUDENT_FREEDOM, scale=5**-0.5)
    assert stats.kstest(draws.numpy(), reference.cdf).pvalue > 0.01


def test_shapes_bias_plain_exponents_alone():
    rows = experiments.shape_bias(SMALL, 0)
    assert [(row["rows"], row["columns"]) for row in rows] == list(SMALL.shapes)
    assert rows[1]["plain"] - rows[0]["plain"] > 1
    assert abs(rows[1]["FARMS"] - rows[0]["FARMS"]) < 0.5
    assert rows == experiments.shape_bias(SMALL, 0)
    assert rows != experiments.shape_bias(SMALL, 1)


def test_planted_matrices_have_their_sides_and_heaviness():
    rows = experiments.planted_heaviness(SMALL, 3)
    assert len(rows) == 5
    for row in rows:
        assert 24 <= row["rows"] <= 40
        assert 16 <= row["columns"] <= 24
        assert 0 <= row["heaviness"] <= 1


def test_every_arm_prunes_the_same_share_and_epsilon_is_the_validations_choice(monkeypatch):
    shares = []
    prune = experiments.pruned_network

    def counted(dense, ratios, pruner, calibration):
        network = prune(dense, ratios, pruner, calibration)
        weights = [layer.weight for layer in network if isinstance(layer, torch.nn.Linear)]
        shares.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
        return network

    monkeypatch.setattr(experiments, "pruned_network", counted)
    study = SMALL.model_copy(update={"calibration": 64, "epsilons": (0.1, 0.4), "sparsity": 0.7})
    rows = experiments.pruned_accuracy(study, 0)
    assert [(row["pruner"], row["arm"]) for row in rows] == [
        (pruner, arm) for pruner in ("wanda", "magnitude") for arm in experiments.ARMS
    ]
    assert len(shares) == 2 * (1 + 3 * 2)
    assert all(share == pytest.approx(0.7, abs=0.02) for share in shares)
    assert rows[0]["dense"] > 0.5  # the network has learned
    assert {row["epsilon"] for row in rows} <= {0.0, 0.1, 0.4}
