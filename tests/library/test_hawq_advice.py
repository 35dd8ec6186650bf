from pathlib import Path

import numpy as np
import pytest

from library.errors import InputError
from library.hawq.advice import advise, described
from library.hawq.plan import Budget, frontier

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"


def golden(**changes):
    case = np.load(GOLDEN / "pareto_small.npz")
    content = {
        "traces": case["avg_trace"].tolist(),
        "n_params": case["n_params"].tolist(),
        "perturbation": case["perturbation"].tolist(),
        "bits": case["bits"].tolist(),
        "macs": case["macs"].tolist(),
    }
    return case, described(**(content | changes))


def test_golden_advice():
    case, found = golden()
    for fraction in (0.3, 0.4, 0.55):
        advice = advise(found, Budget(fraction=fraction))
        assert list(advice.bits) == case[f"size_{fraction}_bits"].tolist()
        assert advice.omega == pytest.approx(float(case[f"size_{fraction}_omega"]), rel=1e-9)
        assert advice.lower_bound <= advice.omega
        assert advice.slack == pytest.approx(float(case[f"size_{fraction}_limit"]) - advice.cost)
        assert advice.stability is None
    points = np.array(advice.frontier)
    np.testing.assert_allclose(points[:, 0], case["frontier_size_bits"])
    np.testing.assert_allclose(points[:, 1], case["frontier_omega"])


def test_errors_of_the_traces_tell_how_stable_the_bits_are():
    case, sure = golden(errors=[0.0] * 6)
    assert advise(sure, Budget(fraction=0.4)).stability == 1
    _, vague = golden(errors=case["avg_trace"].tolist())
    advice = advise(vague, Budget(fraction=0.4))
    assert advice.stability < 0.95
    assert "take more probes" in advice.warnings[0]
    assert advice == advise(vague, Budget(fraction=0.4))


def test_a_dominating_layer_at_two_bits_is_warned_of():
    found = described([1e-3, 1e-6], [100, 9000], [[5.0, 0.1, 0.01], [40.0, 1.0, 0.1]], [2, 4, 8])
    advice = advise(found, Budget(fraction=0.27))
    assert advice.bits[1] == 2
    assert "99% of the weights, and 2 bits" in advice.warnings[0]


def test_numbers_that_do_not_describe_a_network_are_refused():
    for changes, match in [
        ({"n_params": [1, 2]}, "n_params: 2 entries for 6 traces"),
        ({"perturbation": [[1.0]] * 6}, "6 rows of 4 entries"),
        ({"traces": [float("inf")] * 6}, "must be finite"),
        ({"errors": [0.1]}, "errors: 1 entries"),
        ({"n_params": [0] * 6}, "n_params must be whole numbers of at least 1, got 0"),
        ({"n_params": [float("nan")] * 6}, "n_params must be whole numbers of at least 1, got nan"),
        ({"n_params": [10.5] * 6}, r"n_params must be whole numbers of at least 1, got 10\.5"),
        ({"macs": [-1] * 6}, "macs must be whole numbers of at least 0, got -1"),
        ({"traces": ["a"] * 6}, "traces: a table of numbers"),
        ({"perturbation": [["a", "b", "c", "d"]] * 6}, "perturbation: a table of numbers"),
        ({"bits": [0, 2, 4, 8]}, "from 2 to 16, got"),
    ]:
        with pytest.raises(InputError, match=match):
            golden(**changes)
    _, found = golden(macs=None)
    with pytest.raises(InputError, match="bit operations need the multiply-accumulates"):
        advise(found, Budget(kind="bops"))
    with pytest.raises(InputError, match="there is no layer 9; layers are 0 to 5"):
        advise(found, Budget(), ties=[[0, 9]])
    with pytest.raises(InputError, match="latency: a table of numbers in rows of equal length"):
        advise(found, Budget(kind="latency", latency=((1, 2, 3, 4), (1, 2))))
    with pytest.raises(ValueError, match="finite number"):
        Budget(kind="latency", latency=((1.0, float("nan")),))
    with pytest.raises(InputError, match="budget fraction must be a number, got nan"):
        frontier(found).plan(float("nan"))
    with pytest.raises(InputError, match=r"the least is 0\.25"):
        advise(found, Budget(fraction=0.1))
    _, negative = golden(traces=[-1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert "layers 0: a trace that is not positive" in advise(negative, Budget()).warnings[0]
