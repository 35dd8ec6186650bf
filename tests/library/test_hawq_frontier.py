import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.hawq import pareto, programme
from library.hawq.costs import BitChoice, bops_costs, joined, size_costs
from library.hawq.pareto import frontier, lagrangian_bound
from library.hawq.programme import select

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"


def enumerated(omega, cost, ties=(), allowed=None):
    """Every setting: choices, costs, Omegas."""
    layers, options = omega.shape
    choices = np.array(list(itertools.product(range(options), repeat=layers)))
    for tie in ties:
        choices = choices[(choices[:, list(tie)] == choices[:, [tie[0]]]).all(1)]
    if allowed is not None:
        choices = choices[allowed[np.arange(layers), choices].all(1)]
    return choices, cost[np.arange(layers), choices].sum(1), omega[np.arange(layers), choices].sum(1)


def test_golden_frontier_and_budgets():
    case = np.load(GOLDEN / "pareto_small.npz")
    bits = case["bits"]
    omega = case["avg_trace"][:, None] * case["perturbation"]
    size = size_costs(case["n_params"], [BitChoice(int(b)) for b in bits])
    found = frontier(omega, size)
    assert found.exact
    np.testing.assert_array_equal(found.cost, case["frontier_size_bits"])
    np.testing.assert_allclose(found.omega, case["frontier_omega"], rtol=1e-9)
    np.testing.assert_array_equal(bits[found.choices], case["frontier_choice"])
    bops = bops_costs(case["macs"], [BitChoice(int(b), int(b)) for b in bits])
    for fraction in (0.3, 0.4, 0.55):
        for kind, cost, share in (("size", size, fraction), ("bops", bops, fraction**2)):
            limit = share * cost[:, -1].sum()
            assert limit == pytest.approx(float(case[f"{kind}_{fraction}_limit"]))
            for chosen in (frontier(omega, cost).choose(limit), select(omega, {kind: cost}, {kind: limit})):
                np.testing.assert_array_equal(bits[chosen.choice], case[f"{kind}_{fraction}_bits"])
                assert chosen.omega == pytest.approx(float(case[f"{kind}_{fraction}_omega"]), rel=1e-9)
                assert chosen.lower_bound <= chosen.omega
                assert chosen.slack >= 0


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["size", "bops", "latency"])
def test_golden_published_networks(network, kind):
    case = np.load(GOLDEN / f"ilp_{network}.npz")
    perturbation = np.stack([case["delta_weights_4bit_square"], case["delta_weights_8bit_square"]], 1)
    omega = case["hutchinson_trace"][:, None] * perturbation
    cost = {
        "size": case["parameters"][:, None] * np.array([0.5, 1.0]),
        "bops": case["bops"][:, None] / np.array([64.0, 16.0]),
        "latency": np.stack([case["latency_int4"], case["latency_int8"]], 1),
    }[kind]
    for fraction in (0.25, 0.75):
        limit = float(case[f"{kind}_{fraction}_limit"])
        found = select(omega, {kind: cost}, {kind: limit}, ties=case["ties"].tolist())
        np.testing.assert_array_equal(np.array([4, 8])[found.choice], case[f"{kind}_{fraction}_bits"])
        assert found.omega == pytest.approx(float(case[f"{kind}_{fraction}_omega"]), rel=1e-9)
        assert found.cost == pytest.approx(float(case[f"{kind}_{fraction}_cost"]), rel=1e-9)
    if kind == "size":  # the dynamic programme on whole numbers of bits gives the same
        unit = 2**20 if network == "resnet18" else 10**6
        bits = size_costs(np.rint(unit * case["parameters"]), [BitChoice(4), BitChoice(8)])
        whole = frontier(omega, bits, ties=case["ties"].tolist()).choose(limit * unit * 8)
        np.testing.assert_array_equal(whole.choice, found.choice)


tables = st.integers(1, 5).flatmap(
    lambda layers: st.tuples(
        st.lists(st.integers(1, 30), min_size=layers, max_size=layers),
        st.integers(0, 2**16),
        st.booleans(),
        st.booleans(),
    )
)


@given(tables)
@settings(max_examples=60, deadline=None)
def test_the_frontier_is_that_of_enumeration(table):
    n, seed, whole, tied = table
    generator = np.random.default_rng(seed)
    omega = np.sort(generator.exponential(size=(len(n), 4)), 1)[:, ::-1].copy()
    cost = size_costs(n, [BitChoice(b) for b in (2, 3, 4, 8)])
    cost = cost if whole else cost * generator.uniform(0.9, 1.1, (len(n), 4))
    allowed = generator.random(omega.shape) < 0.8
    allowed[:, 1] = True
    ties = [(0, len(n) - 1)] if tied and len(n) > 1 else []
    _, costs, omegas = enumerated(omega, cost, ties, allowed)
    found = frontier(omega, cost, ties=ties, allowed=allowed)
    assert found.exact
    assert (np.diff(found.cost) > 0).all()
    assert (np.diff(found.omega) < 0).all()
    np.testing.assert_allclose(found.omega, [omegas[costs <= c * (1 + 1e-12)].min() for c in found.cost], rtol=1e-12)
    np.testing.assert_allclose(found.cost[[0, -1]], [costs.min(), costs[omegas <= omegas.min() * (1 + 1e-12)].min()])
    rows = np.arange(len(n))
    np.testing.assert_allclose(omega[rows, found.choices].sum(1), found.omega, rtol=1e-12)
    np.testing.assert_allclose(cost[rows, found.choices].sum(1), found.cost, rtol=1e-12)
    assert allowed[rows, found.choices].all()
    for tie in ties:
        assert (found.choices[:, tie[0]] == found.choices[:, tie[1]]).all()
    limit = generator.uniform(costs.min(), costs.max())
    by_programme = select(omega, {"c": cost}, {"c": limit}, ties=ties, allowed=allowed)
    by_frontier = found.choose(limit)
    best = omegas[costs <= limit].min()
    for chosen in (by_frontier, by_programme):
        assert chosen.omega == pytest.approx(best, rel=1e-9)
        assert chosen.cost <= limit * (1 + 1e-9)
        assert chosen.lower_bound <= best * (1 + 1e-9)


def test_all_least_and_all_most_bits_are_on_the_frontier_and_relaxing_never_hurts():
    generator = np.random.default_rng(5)
    omega = np.sort(generator.exponential(size=(30, 6)), 1)[:, ::-1]
    cost = size_costs(generator.integers(1, 60, 30), [BitChoice(b) for b in (2, 3, 4, 5, 6, 8)])
    found = frontier(omega, cost)
    assert (found.choices[0] == 0).all()
    assert (found.choices[-1] == 5).all()
    limits = np.linspace(found.cost[0], found.cost[-1] * 1.1, 50)
    chosen = [found.choose(limit) for limit in limits]
    assert (np.diff([c.omega for c in chosen]) <= 0).all()
    bounds = np.array([c.lower_bound for c in chosen])
    gaps = np.array([c.omega for c in chosen]) - bounds
    assert (gaps >= -1e-9).all()
    assert gaps.max() < 0.05 * bounds.max()
    assert found.choose(1e9).slack == pytest.approx(1e9 - found.cost[-1])


@pytest.mark.parametrize("layers", [7, 90])  # all slopes at once, and narrowed down
def test_the_bound_is_the_linear_relaxation(layers):
    from scipy.optimize import linprog

    generator = np.random.default_rng(8)
    omega, cost = generator.exponential(size=(layers, 4)), generator.integers(1, 50, (layers, 4))
    allowed = np.ones((layers, 4), bool)
    for limit in (cost.min(1).sum(), 13.0 * layers, 18.6 * layers, 1e4):
        rows = np.kron(np.eye(layers), np.ones(4))
        solved = linprog(omega.ravel(), A_ub=cost.reshape(1, -1), b_ub=[limit], A_eq=rows, b_eq=np.ones(layers))
        assert lagrangian_bound(omega, cost, allowed, limit) == pytest.approx(solved.fun, rel=1e-9)


def test_several_budgets_hold_together():
    generator = np.random.default_rng(2)
    omega = np.sort(generator.exponential(size=(6, 3)), 1)[:, ::-1].copy()
    costs = {"size": generator.integers(1, 20, (6, 3)), "latency": generator.random((6, 3))}
    _, sizes, omegas = enumerated(omega, costs["size"])
    _, times, _ = enumerated(omega, costs["latency"])
    limits = {"size": float(np.median(sizes)), "latency": float(np.quantile(times, 0.3))}
    found = select(omega, costs, limits)
    feasible = (sizes <= limits["size"]) & (times <= limits["latency"])
    assert found.omega == pytest.approx(omegas[feasible].min(), rel=1e-9)
    assert costs["latency"][np.arange(6), found.choice].sum() <= limits["latency"]
    with pytest.raises(InputError, match=r"no setting meets the limits together: size 1 of \d+ to \d+; latency"):
        select(omega, costs, {"size": 1.0, "latency": 9.0})


def test_lists_that_grow_too_long_are_thinned_and_say_so(monkeypatch):
    generator = np.random.default_rng(1)
    omega = np.sort(generator.exponential(size=(8, 4)), 1)[:, ::-1].copy()
    cost = np.sort(generator.random((8, 4)), 1)
    exact = frontier(omega, cost)
    monkeypatch.setattr(pareto, "CELLS", 64)
    thinned = frontier(omega, cost)
    assert exact.exact
    assert not thinned.exact
    assert len(thinned) <= 65
    limit = float(np.median(exact.cost))
    best, near = exact.choose(limit), thinned.choose(limit)
    assert near.lower_bound <= best.omega <= near.omega <= 1.2 * best.omega
    assert near.cost <= limit


def test_ties_that_share_a_layer_are_one_group():
    total, group = joined(np.array([[1, 2], [10, 20], [100, 200], [5, 6]]), [(0, 2), (2, 1)])
    assert total.tolist() == [[111, 222], [5, 6]]
    assert group.tolist() == [0, 0, 0, 1]


def test_a_frontier_keeps_its_own_tables():
    omega, cost = np.array([[4.0, 1.0], [8.0, 2.0]]), np.array([[2, 4], [3, 6]])
    found = frontier(omega, cost)
    before = found.choose(8)
    omega += 1
    cost *= 2
    after = found.choose(8)
    assert (after.lower_bound, after.omega, after.cost) == (before.lower_bound, before.omega, before.cost)


def test_a_scaled_loss_chooses_the_same_bits():
    generator = np.random.default_rng(3)
    omega = generator.exponential(size=(9, 4))
    cost = generator.integers(1, 40, (9, 4))
    first, second = frontier(omega, cost), frontier(37.5 * omega, cost)
    np.testing.assert_array_equal(first.choices, second.choices)


def test_what_cannot_be_solved_is_refused():
    omega, cost = np.ones((2, 2)), np.array([[1, 2], [3, 4]])
    with pytest.raises(InputError, match="limit 3 cannot be met: settings cost from 4 to 6"):
        frontier(omega, cost).choose(3)
    with pytest.raises(InputError, match=r"\(layers, choices\), got \(2, 2\) and \(2, 3\)"):
        frontier(omega, np.ones((2, 3)))
    with pytest.raises(InputError, match="finite"):
        frontier(omega * np.nan, cost)
    with pytest.raises(InputError, match=r"layers \[0, 1\] must share bits but have no choice in common"):
        frontier(omega, cost, ties=[(0, 1)], allowed=[[True, False], [False, True]])
    with pytest.raises(InputError, match="there is no layer 2"):
        frontier(omega, cost, ties=[(0, 2)])
    with pytest.raises(InputError, match="limits are for size, costs for bops"):
        select(omega, {"bops": cost}, {"size": 1.0})


@given(st.integers(0, 2**20), st.sampled_from([2, 8, 16]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_several_budgets_are_exact_whatever_the_magnitudes(seed, decades, whole):
    generator = np.random.default_rng(seed)
    omega = np.sort(10.0 ** generator.uniform(-decades, 0, (5, 3)), 1)[:, ::-1] - generator.integers(0, 2)
    costs = {"size": generator.integers(1, 10**8, (5, 3)), "latency": generator.random((5, 3))}
    costs["latency"] = generator.integers(0, 9, (5, 3)) if whole else costs["latency"]
    _, sizes, omegas = enumerated(omega, costs["size"])
    _, times, _ = enumerated(omega, costs["latency"])
    edge = generator.integers(len(sizes))
    limits = {"size": float(sizes[edge] - generator.integers(0, 2)), "latency": float(times[edge])}
    feasible = (sizes <= limits["size"]) & (times <= limits["latency"] * (1 + 1e-12))
    if not feasible.any():
        with pytest.raises(InputError, match="no setting meets the limits together"):
            select(omega, costs, limits)
        return
    found, rows = select(omega, costs, limits), np.arange(5)
    assert found.exact
    assert found.slack >= 0
    assert costs["latency"][rows, found.choice].sum() <= limits["latency"] * (1 + 1e-12)
    assert found.omega == pytest.approx(omegas[feasible].min(), rel=1e-12)


def test_a_budget_one_bit_below_a_setting_is_kept():
    generator = np.random.default_rng(1)
    size = generator.integers(10**5, 5 * 10**6, 8)[:, None] * np.array([2, 3, 4, 5, 6, 8])
    omega = generator.random(8)[:, None] * size / 4.0 ** np.array([2, 3, 4, 5, 6, 8])
    front = frontier(omega, size)
    for limit in front.cost[:: len(front) // 12][1:] - 1:
        found, best = select(omega, {"size": size}, {"size": float(limit)}), front.choose(limit)
        assert (found.cost, found.exact) == (best.cost, True)
        assert found.omega == pytest.approx(best.omega, rel=1e-12)
    found = select([[4.0, 1.0]], {"size": [[100_000_000, 200_000_000]]}, {"size": 199_999_999})
    assert (found.choice.tolist(), found.slack, found.exact) == ([0], 99_999_999, True)


def test_a_programme_too_large_to_prove_says_so(monkeypatch):
    generator = np.random.default_rng(4)
    omega, cost = np.sort(generator.random((9, 4)), 1)[:, ::-1], np.sort(generator.random((9, 4)), 1)
    limits = {"a": cost.mean(1).sum(), "b": cost.mean(1).sum()}
    sure = select(omega, {"a": cost, "b": cost[::-1]}, limits)
    monkeypatch.setattr(programme, "CELLS", 1)
    unsure = select(omega, {"a": cost, "b": cost[::-1]}, limits)
    assert (sure.exact, unsure.exact) == (True, False)
    assert unsure.omega >= sure.omega
    assert unsure.cost <= limits["a"]


def test_limits_of_nothing_and_of_everything():
    omega, cost = [[4.0, 1.0], [8.0, 2.0]], np.array([[0, 4], [0, 6]])
    for chosen in (select(omega, {"c": cost}, {"c": 0.0}), frontier(omega, cost).choose(0.0)):
        assert chosen.choice.tolist() == [0, 0]
    for chosen in (select(omega, {"c": cost}, {"c": np.inf}), frontier(omega, cost).choose(np.inf)):
        assert (chosen.choice.tolist(), chosen.lower_bound) == ([1, 1], 3)
    for call in (lambda: frontier(omega, cost).choose(np.nan), lambda: select(omega, {"c": cost}, {"c": np.nan})):
        with pytest.raises(InputError, match="must be a number, got nan"):
            call()


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint64])
def test_narrow_costs_add_up(kind):
    most = min(np.iinfo(kind).max, 10**12)
    found = frontier([[2.0, 1.0]] * 4, np.full((4, 2), [most // 2, most], kind), ties=[(0, 1, 2)])
    assert found.cost.tolist() == [3 * a + b for a, b in itertools.product((most // 2, most), repeat=2)]
    assert frontier([[2.0, 1.0]] * 4, [[False, True]] * 4, ties=[(0, 1, 2)]).cost.tolist() == [0, 1, 3, 4]


def test_tables_that_are_no_tables_of_numbers_are_refused():
    whole = [[1, 2], [3, 4]]
    for omega, cost in (([[1, 2], [3]], whole), ([["a", "b"]] * 2, whole), (whole, [["1", "2"]] * 2)):
        with pytest.raises(InputError, match="numbers in rows of equal length"):
            frontier(omega, cost)
    with pytest.raises(InputError, match="too large to add up"):
        frontier(whole, [[2**61, 1], [2**61, 1]])
