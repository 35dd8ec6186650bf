import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.hawq.activations import ActivationQuantizer, ActivationSettings, activation_errors
from library.hawq.quantizers import WeightQuantizer

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"
ALL = [
    WeightQuantizer(granularity=granularity, symmetric=symmetric, clipping=clipping, percentile=95)
    for granularity in ("channel", "tensor")
    for symmetric in (True, False)
    for clipping in ("minmax", "percentile", "mse")
]
WEIGHT = (
    torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 6)[:, None, None, None]
)


@pytest.mark.parametrize("name", ["conv", "linear"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_golden_weights(name, granularity):
    case = np.load(GOLDEN / f"weight_quant_{name}.npz")
    weight = torch.from_numpy(case["w"]).requires_grad_()
    quantizer = WeightQuantizer(granularity=granularity)
    errors = quantizer.squared_errors(weight.detach(), case["bits"].tolist())
    for bits, error in zip(case["bits"].tolist(), errors.tolist(), strict=True):
        found = quantizer.quantize(weight, bits)
        assert torch.equal(found.integers, torch.from_numpy(case[f"{granularity}_int_b{bits}"]).int())
        np.testing.assert_allclose(found.scale, case[f"{granularity}_scale_b{bits}"], rtol=1e-6)
        np.testing.assert_allclose(found.values(), case[f"{granularity}_deq_b{bits}"], rtol=1e-6)
        assert error == pytest.approx(float(case[f"{granularity}_sqerr_b{bits}"]), rel=1e-6)
        fake = quantizer.fake(weight, bits)
        assert torch.equal(fake, found.values())
        [gradient] = torch.autograd.grad(fake, weight, torch.from_numpy(case["grad_out"]))
        np.testing.assert_allclose(gradient, case[f"{granularity}_grad_b{bits}"], rtol=1e-6)


@pytest.mark.parametrize("name", ["sym8_minmax", "asym4_ema_pct"])
def test_golden_activations(name):
    case = np.load(GOLDEN / f"act_quant_{name}.npz")
    mode = {"symmetric": "symmetric", "asymmetric": "unsigned"}[str(case["mode"])]
    momentum, percentile = float(case["momentum"]), float(case["percentile"])
    made = ActivationSettings(
        mode=mode, momentum=None if momentum == -1 else momentum, percentile=percentile if percentile else None
    )
    quantizer = ActivationQuantizer(int(case["bits"]), made)
    quantizer.calibrating = True
    for t, x in enumerate(torch.from_numpy(case["x"])):
        y = quantizer(x)
        assert float(quantizer.low) == pytest.approx(float(case["x_min"][t]), rel=1e-6)
        assert float(quantizer.high) == pytest.approx(float(case["x_max"][t]), rel=1e-6)
        assert float(quantizer.scale()) == pytest.approx(float(case["scale"][t]), rel=1e-6)
        np.testing.assert_allclose(y, case["y"][t], rtol=1e-6, atol=1e-7)
    quantizer.calibrating = False
    frozen = torch.from_numpy(case["x_frozen"])
    np.testing.assert_allclose(quantizer(frozen), case["y_frozen"], rtol=1e-6, atol=1e-7)
    assert float(quantizer.high) == pytest.approx(float(case["x_max"][-1]), rel=1e-6), "the range moved when frozen"


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_all_bits_at_once_are_each_bit_alone(quantizer):
    bits = [2, 3, 4, 5, 6, 8, 16]
    errors = quantizer.squared_errors(WEIGHT, bits)
    for b, error in zip(bits, errors.tolist(), strict=True):
        made = quantizer.quantize(WEIGHT, b)
        assert error == pytest.approx(float((made.values() - WEIGHT).double().square().sum()), rel=1e-6)
        low, high = (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if quantizer.symmetric else (0, 2**b - 1)
        assert low <= int(made.integers.min())
        assert int(made.integers.max()) <= high
    if quantizer.clipping != "percentile":  # what is cut off does not shrink with more bits
        assert (errors.diff() < 0).all()


@pytest.mark.parametrize("quantizer", [q for q in ALL if q.clipping == "minmax"], ids=str)
@given(bits=st.integers(2, 8), factor=st.floats(0.01, 100), seed=st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_quantisers_are_idempotent_equivariant_and_err_by_half_a_step(quantizer, bits, factor, seed):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[2] = 0
    made = quantizer.quantize(weight, bits)
    values = made.values()
    step = made.scale.expand(4)[:, None]
    assert ((values - weight).abs() <= step / 2 * (1 + 1e-9)).all() or not quantizer.symmetric
    assert ((values - weight).abs() <= step * (1 + 1e-9)).all()
    assert (values[2] == 0).all()
    if quantizer.symmetric:  # a symmetric range keeps its extreme, so the grid is found again
        torch.testing.assert_close(quantizer.quantize(values, bits).values(), values, rtol=1e-12, atol=0)
    scaled = quantizer.quantize(factor * weight, bits).values()
    torch.testing.assert_close(scaled, factor * values, rtol=1e-9, atol=1e-12)
    finer = quantizer.quantize(weight, bits + 1).scale
    assert (finer < made.scale).all()


def test_clipping_by_mse_is_never_worse_and_much_better_for_outliers_at_two_bits():
    weight = torch.randn(8, 400, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = 6.0
    plain, clipped = (WeightQuantizer(clipping=c).squared_errors(weight, [2, 3, 4, 8]) for c in ("minmax", "mse"))
    assert (clipped <= plain).all()
    assert clipped[0] < 0.8 * plain[0]


def test_percentiles_cut_the_stated_number_of_entries():
    weight = torch.arange(1.0, 101.0)[None] * torch.tensor([[1.0], [-1.0]])
    made = WeightQuantizer(clipping="percentile", percentile=95).quantize(weight, 8)
    np.testing.assert_allclose(made.scale * 127, [95, 96])  # the 95th smallest; minus the 5th of the negative row


def test_shared_scales_are_coarser_than_those_of_channels():
    per_channel, whole = (WeightQuantizer(granularity=g).squared_errors(WEIGHT, [4])[0] for g in ("channel", "tensor"))
    assert per_channel < 0.5 * whole


@pytest.mark.parametrize("mode", ["auto", "symmetric", "unsigned"])
def test_activation_errors_are_those_of_the_quantizer(mode):
    x = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(2)).relu()
    made = ActivationSettings(mode=mode)
    errors = activation_errors(x, x.min(), x.max(), (2, 4, 8), made)
    for bits, error in zip((2, 4, 8), errors.tolist(), strict=True):
        quantizer = ActivationQuantizer(bits, made)
        quantizer.observe(x)
        assert error == pytest.approx(float((quantizer(x) - x).double().square().sum()) / 7, rel=1e-6)


def test_auto_is_unsigned_after_a_relu_and_signed_elsewhere():
    x = torch.linspace(-1, 1, 100)
    for values, steps in ((x.relu(), 15), (x, 7)):
        quantizer = ActivationQuantizer(4)
        quantizer.observe(values)
        assert float(quantizer.scale()) == pytest.approx(1 / steps)
        value = values.clone().requires_grad_()
        assert torch.autograd.grad(quantizer(3 * value).sum(), value)[0].eq(3).all()


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(InputError, match="whole numbers from 2 to 16, got 1"):
        WeightQuantizer().quantize(WEIGHT, 1)
    with pytest.raises(InputError, match="no entries"):
        WeightQuantizer().quantize(torch.zeros(3, 0), 4)
    with pytest.raises(InputError, match="not finite"):
        WeightQuantizer().squared_errors(torch.tensor([[1.0, float("nan")]]), [4])
    with pytest.raises(InputError, match="not finite"):
        WeightQuantizer().quantize(torch.tensor([[1.0, float("inf")]]), 4)
    assert WeightQuantizer().quantize(WEIGHT, np.int64(4)).bits == 4
    with pytest.raises(InputError, match="calibrate the network first"):
        ActivationQuantizer(8).scale()
    with pytest.raises(InputError, match="calibrate the network first"):
        ActivationQuantizer(8)(torch.ones(3))
    with pytest.raises(InputError, match="from 2 to 16, got 1"):
        ActivationQuantizer(1)
    with pytest.raises(InputError, match="not finite"):
        ActivationQuantizer(8).observe(torch.tensor([1.0, float("inf")]))
    for mode, wrong in itertools.product(("auto", "symmetric", "unsigned"), ("nan", "inf", "-inf")):
        clipped = ActivationQuantizer(8, ActivationSettings(mode=mode, percentile=99))
        with pytest.raises(InputError, match="not finite"):
            clipped.observe(torch.cat([torch.rand(500), torch.tensor([float(wrong)])]))
    for settings_of_range in (ActivationSettings(), ActivationSettings(percentile=99)):
        with pytest.raises(InputError, match="no entries"):
            ActivationQuantizer(8, settings_of_range).observe(torch.empty(0, 3))


def test_halves_round_as_in_the_published_code():
    weight = torch.tensor([[0.7, 0.1, 0.05, -0.35, 0.15, 0.25]])
    scale = weight.abs().max() / 3
    made = WeightQuantizer().quantize(weight, 3)
    assert torch.equal(made.integers, torch.round(1.0 / scale * weight).int())
    assert made.integers[0, 3] == -1, "-0.35 is half of the way, and rounds by the reciprocal"
    quantizer = ActivationQuantizer(3, ActivationSettings(mode="symmetric"))
    quantizer.observe(weight)
    torch.testing.assert_close(quantizer(weight), torch.round(1.0 / scale * weight) * scale)
    error = activation_errors(weight, weight.min(), weight.max(), (3,), ActivationSettings(mode="symmetric"))
    assert float(error) == pytest.approx(float((quantizer(weight) - weight).square().sum()), rel=1e-6)


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_half_precision_has_the_grid_of_float32(quantizer):
    weight = WEIGHT.half()
    weight[2] = 0
    for bits in (2, 8):
        assert torch.equal(quantizer.quantize(weight, bits).values(), quantizer.quantize(weight.float(), bits).values())
    assert quantizer.fake(weight, 4).dtype == torch.float16
    assert quantizer.fake(weight, 4).isfinite().all()
