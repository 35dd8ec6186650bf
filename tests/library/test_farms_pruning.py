"""Ratios and masks against the published code, and the properties that they must have."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.farms.allocation import achieved, allocate
from library.farms.pruning import (
    InputStatistics,
    magnitude_mask,
    pattern_mask,
    prune_weight,
    sparsegpt,
    wanda_mask,
    wanda_metric,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "farms"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "pruning.npz").items()}


@pytest.fixture(scope="module")
def statistics(golden) -> InputStatistics:
    found = InputStatistics.empty(golden["W"].shape[1], gram=True)
    for i in range(3):
        found.add(golden[f"X{i}"][None])
    return found


def test_published_ratios():
    golden = np.load(GOLDEN / "allocation.npz")
    parameters = golden["layer_shapes"].prod(-1)
    blocks = (np.arange(len(parameters)) // golden["layers_per_block"]).tolist()
    clipped = 0
    for i, (sparsity, epsilon) in enumerate(golden["cases_target_eps"]):
        case = {"sparsity": float(sparsity), "epsilon": float(epsilon), "blocks": blocks}
        official = allocate(golden["alphas"], parameters, **case, compatible=True)
        assert official.numpy() == pytest.approx(golden[f"ratios_{i}"], abs=1e-6)
        ours = allocate(golden["alphas"], parameters, **case)
        assert achieved(ours, parameters) == pytest.approx(sparsity, abs=1e-12)
        if golden[f"ratios_{i}"].max() < 0.998:
            assert torch.allclose(ours, official, atol=1e-12)
        else:
            clipped += 1
            assert sparsity - achieved(official, parameters) > 1e-3  # what the published rule loses
    assert clipped


LAYERS = st.lists(st.tuples(st.floats(1.1, 20), st.integers(1, 10**7)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(LAYERS, st.floats(0.01, 0.99), st.floats(0, 0.99))
def test_the_budget_is_held_in_order_and_below_the_cap(layers, sparsity, epsilon):
    alphas, parameters = map(torch.tensor, zip(*layers, strict=True))
    alphas = alphas.double()
    ratios = allocate(alphas, parameters, sparsity, epsilon=epsilon)
    assert achieved(ratios, parameters) == pytest.approx(sparsity, abs=1e-12)
    assert 0 <= float(ratios.min()) <= float(ratios.max()) <= 0.998
    ordered = ratios[alphas.argsort()]
    assert (ordered.diff() >= -1e-12).all()
    if ratios.max() < 0.998 and alphas.max() > alphas.min():
        assert float(ratios.max() / ratios.min()) == pytest.approx((1 + epsilon) / (1 - epsilon), rel=1e-9)
        moved = allocate(3 * alphas - 7, parameters, sparsity, epsilon=epsilon)
        assert torch.allclose(moved, ratios, rtol=1e-6)
    assert torch.allclose(allocate(alphas, parameters, sparsity, epsilon=0), torch.tensor(sparsity).double())


def test_equal_exponents_are_pruned_alike():
    assert allocate([3.0] * 4, [1, 2, 3, 4], 0.6, epsilon=0.5).tolist() == pytest.approx([0.6] * 4)


def test_published_statistics_and_masks(golden, statistics):
    weight = golden["W"]
    assert torch.allclose(statistics.scaler.float(), golden["scaler_row"], rtol=1e-5)
    assert (statistics.hessian.float() - golden["H"]).abs().max() < 1e-5 * golden["H"].abs().max()
    assert torch.allclose(wanda_metric(weight, golden["scaler_row"]), golden["wanda_metric"], rtol=1e-6)
    for sparsity in (0.5, 0.7, 0.83):
        assert torch.equal(wanda_mask(weight, statistics.scaler, sparsity), golden[f"wanda_mask_{sparsity}"])
        official = magnitude_mask(weight, sparsity, compatible=True)
        assert torch.equal(official, golden[f"magnitude_mask_{sparsity}"])
        exact = magnitude_mask(weight, sparsity)
        assert int(exact.sum()) == int(weight.numel() * sparsity) == int(official.sum()) - 1
    found = pattern_mask(wanda_metric(weight, statistics.scaler), 2, 4)
    assert torch.equal(found, golden["wanda_mask_2of4"])


def test_ties_hold_the_budget_unless_compatible():
    weight = (3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))).round() / 8
    for sparsity in (0.1, 0.3, 0.5):
        mask, count = magnitude_mask(weight, sparsity), int(2000 * sparsity)
        assert int(mask.sum()) == count < int(magnitude_mask(weight, sparsity, compatible=True).sum())
        assert weight[mask].abs().max() <= weight[~mask].abs().min()
    assert magnitude_mask(torch.ones(10, 10), 0.1).flatten().nonzero().flatten().tolist() == list(range(10))
    assert magnitude_mask(torch.ones(10, 10), 0.1, compatible=True).all()
    assert int((sparsegpt(torch.ones(10, 10), torch.eye(10), 0.3) == 0).sum()) == 30


def test_sixteen_bit_weights_are_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    weight, scaler = torch.randn(16, 64, generator=generator).half(), 2e5 * torch.rand(64, generator=generator)
    assert wanda_metric(weight, scaler).dtype == wanda_metric(weight.bfloat16(), scaler).dtype == torch.float32
    assert torch.equal(wanda_mask(weight, scaler, 0.5), wanda_mask(weight.float(), scaler, 0.5))


NAN_ROW = torch.ones(4, 4).index_fill(0, torch.tensor(1), float("nan"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparsegpt_W_0.5", {"sparsity": 0.5}),
        ("sparsegpt_W_0.8", {"sparsity": 0.8}),
        ("sparsegpt_W_0.5_b32", {"sparsity": 0.5, "block": 32}),
        ("sparsegpt_W_2of4", {"sparsity": 0.5, "pattern": (2, 4)}),
    ],
)
def test_published_weights_of_sparsegpt(golden, statistics, name, options):
    found = sparsegpt(golden["W"], statistics.hessian, **options, compatible=True)
    assert torch.equal(found == 0, golden[name] == 0)
    assert (found - golden[name]).abs().max() < 1e-4 * golden["W"].abs().max()


def test_without_compatibility_sparsegpt_prunes_exactly_the_share(golden, statistics):
    found = sparsegpt(golden["W"], statistics.hessian, 0.5)
    assert int((found == 0).sum()) == golden["W"].numel() // 2


def test_uncorrelated_inputs_leave_sparsegpt_nothing_to_make_up(golden):
    weight = golden["W"]
    found = sparsegpt(weight, 3 * torch.eye(160), 0.6, block=40)
    for start in range(0, 160, 40):
        part = slice(start, start + 40)
        mask = magnitude_mask(weight[:, part], 0.6)
        assert torch.allclose(found[:, part], weight[:, part].masked_fill(mask, 0), atol=1e-6)


def test_equal_input_norms_leave_wanda_the_magnitudes_of_a_row(golden):
    weight = golden["W"]
    mask = wanda_mask(weight, torch.full((160,), 7.0), 0.55)
    for row, found in zip(weight, mask, strict=True):
        assert torch.equal(found, magnitude_mask(row[None], 0.55)[0])


def test_more_knowledge_of_the_inputs_loses_less_of_the_output():
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(8):
        mixing = torch.randn(64, 64, generator=generator) * torch.rand(64, generator=generator).pow(2)
        inputs = torch.randn(2, 300, 64, generator=generator) @ mixing
        weight = torch.randn(48, 64, generator=generator)
        found = InputStatistics.empty(64, gram=True)
        found.add(inputs)
        pruned = [prune_weight(weight, name, 0.6, found) for name in ("sparsegpt", "wanda", "magnitude")]
        losses.append([float(((weight - kept) @ inputs.flatten(0, 1).mT).square().sum()) for kept in pruned])
    means = np.array(losses).mean(0)
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_holds_in_every_group(golden, statistics, pruner):
    found = prune_weight(golden["W"], pruner, 0.5, statistics, pattern=(3, 8))
    assert ((found == 0).unflatten(1, (-1, 8)).sum(-1) == 3).all()


def test_inputs_that_never_occur_are_pruned(golden, statistics):
    hessian = statistics.hessian.clone()
    hessian[5], hessian[:, 5] = 0, 0
    assert (sparsegpt(golden["W"], hessian, 0.3)[:, 5] == 0).all()


def test_half_precision_stays(golden, statistics):
    weight = golden["W"].bfloat16()
    for pruner in ("magnitude", "wanda", "sparsegpt"):
        assert prune_weight(weight, pruner, 0.5, statistics).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: allocate([2.0, 3.0], [1], 0.5), "one alpha and one number of weights per layer: got 2 and 1"),
        (lambda: allocate([2.0, float("nan")], [1, 1], 0.5), "layers 1 have no finite alpha"),
        (lambda: allocate([2.0], [0], 0.5), "has no weights"),
        (lambda: allocate([2.0], [1], 1.0), r"sparsity must lie in \(0, 0.998\)"),
        (lambda: allocate([2.0], [1], 0.5, epsilon=1.0), r"epsilon must lie in \[0, 1\)"),
        (lambda: allocate([2.0, 3.0], [1, 1], 0.5, blocks=[0]), "one block number per layer"),
        (lambda: magnitude_mask(torch.ones(2, 2), 1.5), r"\[0, 1\], got 1.5"),
        (lambda: wanda_mask(torch.ones(2, 3), torch.ones(4), 0.5), "4 input norms do not fit"),
        (lambda: pattern_mask(torch.ones(2, 6), 2, 4), "2:4 of 6"),
        (lambda: sparsegpt(torch.ones(2, 3), torch.eye(4), 0.5), "does not fit a weight of 2 x 3"),
        (lambda: sparsegpt(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5), "not positive definite"),
        (lambda: sparsegpt(torch.ones(2, 2), torch.full((2, 2), torch.nan), 0.5), "not finite"),
        (lambda: prune_weight(torch.ones(2, 2), "wanda", 0.5), "wanda needs statistics"),
        (
            lambda: prune_weight(torch.ones(2, 2), "bogus", 0.5, InputStatistics.empty(2, gram=True)),
            "pruner 'bogus' is unknown; allowed: magnitude, wanda, sparsegpt",
        ),
        (lambda: magnitude_mask(NAN_ROW, 0.5), "4 of 16 weights of a layer are not finite"),
        (lambda: wanda_mask(NAN_ROW, torch.ones(4), 0.5), "4 of 16 weights of a layer are not finite"),
        (lambda: sparsegpt(NAN_ROW, torch.eye(4), 0.5), "4 of 16 weights of a layer are not finite"),
        (lambda: sparsegpt(torch.ones(4, 4), torch.eye(4), 0.5, block=0), "block=0"),
        (lambda: InputStatistics.empty(4, gram=False).add(torch.ones(4)), r"got \(4,\)"),
        (lambda: InputStatistics.empty(4, gram=False).add(torch.ones(1, 3, 5)), r"got \(1, 3, 5\)"),
        (lambda: InputStatistics.empty(4, gram=True).hessian, "no input of the layer has been seen"),
        (lambda: InputStatistics.empty(4, gram=True).scaler, "no input of the layer has been seen"),
        (
            lambda: allocate([1.0, 2.0, 9.0], [1, 1, 1], 0.8, epsilon=0.9, cap=2.0),
            r"cap of a ratio must lie in \(0, 1\]",
        ),
        (lambda: allocate([1.0, 2.0], [1, 1], 0.5, cap=float("nan")), "cap of a ratio"),
        (lambda: allocate([1.0, 2.0], [1, float("inf")], 0.5), "not a finite number"),
    ],
)
def test_what_cannot_be_pruned_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_tokens_in_a_row_are_one_sequence():
    tokens = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    one, same = (InputStatistics.empty(4, gram=True) for _ in range(2))
    one.add(tokens)
    same.add(tokens[None])
    assert one.sequences == 1
    assert torch.equal(one.hessian, same.hessian)
    assert torch.equal(one.scaler, same.scaler)
