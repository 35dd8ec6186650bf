import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from library import hawq
from library.errors import InputError
from library.hawq.activations import ActivationSettings
from library.hawq.analysis import selection_stability
from library.hawq.costs import BitChoice
from library.hawq.network import all_active, converted, quantized_layers, set_active
from library.hawq.packing import load_packed, packed_state
from library.images import PlainNet

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"


def small_network(seed=0):
    torch.manual_seed(seed)
    model = PlainNet(1, 3, widths=(4, 6, 8), strides=(2, 1, 2))
    for _ in range(20):
        model(torch.randn(32, 1, 12, 12))
    hawq.fold_batch_norm(model.eval(), torch.randn(2, 1, 12, 12))
    return model


def batches(count=4, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 12, 12, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def network():
    return small_network()


def test_omega_is_mean_trace_times_perturbation(network):
    data = batches()
    found = hawq.sensitivity(network, F.cross_entropy, data, metric="ggn", probes=40)
    assert found.layers.names == ("blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "head")
    assert (found.curvature > 0).all()
    torch.testing.assert_close(found.omega, found.curvature[:, None] * found.perturbation)
    weight = network.blocks[1].conv.weight
    exact = hawq.WeightQuantizer().squared_errors(weight, found.bits)
    torch.testing.assert_close(found.perturbation[1], exact)
    np.testing.assert_array_equal(found.table([BitChoice(4), BitChoice(2)]), found.omega[:, [2, 0]])
    again = hawq.sensitivity(network, F.cross_entropy, data, metric="ggn", probes=40)
    assert torch.equal(found.omega, again.omega)
    assert found.probes == again.probes


def test_selection_ignores_the_scale_of_the_loss_and_repeated_data(network):
    data = batches()
    plans = [
        hawq.frontier(hawq.sensitivity(network, loss, given, metric="hessian", probes=20)).plan(0.4)
        for loss, given in (
            (F.cross_entropy, data),
            (lambda s, t: 7 * F.cross_entropy(s, t), data),
            (F.cross_entropy, data + data),
        )
    ]
    assert plans[0].bits == plans[1].bits == plans[2].bits
    assert plans[1].omega == pytest.approx(7 * plans[0].omega, rel=1e-4)
    assert plans[0].size <= 0.4 * 8 * sum(plans[0].layers.n_params)


def test_omega_is_invariant_to_rescaling_relu_layers():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = [(torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,)))]
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight.mul_(4)
        rescaled[0].bias.mul_(4)
        rescaled[2].weight.div_(4)
    torch.testing.assert_close(model(data[0][0]), rescaled(data[0][0]))
    options = {"metric": "ggn", "probes": 20, "bits": (2, 4, 8)}
    first, second = (hawq.sensitivity(each, F.cross_entropy, data, **options) for each in (model, rescaled))
    torch.testing.assert_close(second.curvature * torch.tensor([16.0, 1 / 16]).double(), first.curvature)
    torch.testing.assert_close(second.omega, first.omega)
    exact = [hawq.sensitivity(each, F.cross_entropy, data, metric="second-order", bits=(2, 4, 8)).omega
             for each in (model, rescaled)]  # fmt: skip
    torch.testing.assert_close(*exact, rtol=1e-8, atol=1e-14)


def test_the_trace_formula_is_exact_where_a_change_spreads_evenly_over_eigenvectors():
    """The paper's lemma: dW = alpha sum_j v_j gives dW' H dW = Tr(H) / n ||dW||^2."""
    from library.hawq.curvature import second_order_terms
    from library.spectral import Hessian, dense_matrix

    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    data = [(torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64))]
    matrix = dense_matrix(Hessian(model, F.mse_loss, data))
    change = 0.3 * torch.linalg.eigh(matrix).eigenvectors.sum(1)
    exact = second_order_terms(model, F.mse_loss, data, {"weight": change.reshape(1, 1, 5)})
    assert float(exact) == pytest.approx(float(matrix.trace()) / 5 * float(change.square().sum()))
    before = F.mse_loss(model(data[0][0]), data[0][1])
    with torch.no_grad():
        slope = float(torch.autograd.functional.jacobian(
            lambda w: F.mse_loss(data[0][0] @ w.T, data[0][1]), model.weight).flatten() @ change)  # fmt: skip
        model.weight += change
        after = F.mse_loss(model(data[0][0]), data[0][1])
    assert (after - before).item() == pytest.approx(slope + float(exact) / 2)


def test_probes_stop_when_the_selection_is_stable(network):
    data = batches()
    budget = hawq.Budget(fraction=0.4)
    coarse = hawq.sensitivity(network, F.cross_entropy, data, probes=300, bits=(2, 8), budget=budget, metric="ggn")
    assert coarse.stability >= 0.95 or coarse.probes == 300
    alone = hawq.sensitivity(network, F.cross_entropy, data, probes=300, bits=(2, 8), metric="ggn")
    assert alone.stability is None
    again = selection_stability(coarse, budget)
    assert 0.8 <= again <= 1
    assert selection_stability(coarse, hawq.Budget(fraction=1.0)) == 1, "all bits are the most"
    assert selection_stability(replace(coarse, forms=None), budget) is None
    assert alone.probes == 300 or (alone.probe_error <= 0.05 * alone.curvature).all()
    assert (alone.data_error > 0).all()
    assert hawq.sensitivity(network, F.cross_entropy, data[:1], probes=5).data_error.isnan().all()


def test_every_metric_gives_a_plan(network):
    data = batches(2)
    for metric in ("hessian", "ggn", "fisher", "top-eigenvalue", "second-order", "unweighted"):
        found = hawq.sensitivity(network, F.cross_entropy, data, metric=metric, probes=10, bits=(2, 4, 8))
        plan = hawq.frontier(found).plan(0.5)
        assert plan.mean_bits <= 4
        assert (found.omega >= 0).all()
    assert torch.equal(found.omega, found.perturbation)


def test_a_curvature_that_is_not_positive_is_reported_and_the_perturbation_decides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(6, 4), torch.randint(0, 2, (6,)))]
    found = hawq.sensitivity(model, lambda s, t: -F.cross_entropy(s, t), data, probes=200, bits=(2, 8))
    assert "is not positive" in found.notes[0]
    assert torch.equal(found.omega, found.perturbation)


def test_activations_enter_the_plan_and_bit_operations(network):
    data = batches(2)
    found = hawq.sensitivity(network, F.cross_entropy, data, metric="ggn", probes=20, activation_bits=(4, 8))
    assert found.activation_omega.shape == (4, 2)
    assert (found.activation_omega[:, 0] >= found.activation_omega[:, 1]).all()
    choices = [BitChoice(w, a) for w in (2, 4, 8) for a in (4, 8)]
    front = hawq.frontier(found, hawq.Budget(kind="bops", fraction=0.3), choices=choices)
    plan = front.plan()
    assert plan.bops <= 0.3 * 64 * sum(plan.layers.macs)
    assert plan.omega == pytest.approx(hawq.explicit_plan(found, plan.choices).omega)
    both = hawq.plan_within(
        found, [hawq.Budget(kind="size", fraction=0.4), hawq.Budget(kind="bops", fraction=0.3)], choices=choices
    )
    assert both.size <= 0.4 * 8 * sum(plan.layers.n_params)
    assert both.bops <= 0.3 * 64 * sum(plan.layers.macs)
    assert both.omega >= plan.omega
    with pytest.raises(InputError, match="inputs of 2 bits were not measured"):
        found.table([BitChoice(4, 2)])


def test_ties_fixed_layers_and_latency(network):
    found = hawq.sensitivity(network, F.cross_entropy, batches(1), metric="unweighted")
    plan = hawq.frontier(found, ties=[("blocks.0.conv", "head")], fixed={"blocks.1.conv": 8}).plan(0.6)
    assert plan.bits["blocks.0.conv"] == plan.bits["head"]
    assert plan.bits["blocks.1.conv"] == 8
    table = tuple(tuple(0.1 * b * (i + 1) for b in found.bits) for i in range(4))
    plan = hawq.frontier(found, hawq.Budget(kind="latency", fraction=0.5, latency=table)).plan()
    assert plan.selection.cost <= 0.5 * 8
    with pytest.raises(InputError, match="4 layers x 6 choices is needed"):
        hawq.frontier(found, hawq.Budget(kind="latency", latency=table[:2]))
    with pytest.raises(InputError, match=r"budget fraction 0\.1 cannot be met; the least is 0\.25, the most 1"):
        hawq.frontier(found).plan(0.1)
    with pytest.raises(InputError, match="there is no layer 'tail'"):
        hawq.frontier(found, fixed={"tail": 8})
    with pytest.raises(InputError, match="cannot have 7 bits"):
        hawq.frontier(found, fixed={"head": 7})
    with pytest.raises(InputError, match="budgets must be of different kinds"):
        hawq.plan_within(found, [hawq.Budget(), hawq.Budget()])


def test_a_quantised_network_computes_with_few_values_and_leaves_the_original_alone(network):
    before = copy.deepcopy(network.state_dict())
    made = hawq.quantize(network, {"blocks.1.conv": 3, "head": 8})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    weight = made.blocks[1].conv.quantized(torch.zeros(1, 4, 6, 6))[1]
    assert max(len(row.unique()) for row in weight) <= 8
    assert list(quantized_layers(made)) == ["blocks.1.conv", "head"]
    x = batches(1)[0][0]
    assert not torch.equal(made(x), network(x))
    set_active(made, lambda name: False)
    assert torch.equal(made(x), network(x))
    with all_active(made):
        assert not torch.equal(made(x), network(x))
    assert torch.equal(made(x), network(x))
    fine = hawq.quantize(network, dict.fromkeys(hawq.quantizable_layers(network), 16))
    torch.testing.assert_close(fine(x), network(x), rtol=1e-3, atol=1e-3)


def test_gradients_pass_straight_through_weights_inputs_and_biases(network):
    made = hawq.quantize(
        network, {"head": BitChoice(2, 4)}, activations=ActivationSettings(), calibration=[x for x, _ in batches()]
    )
    x = torch.rand(5, 8, requires_grad=True)
    gradients = torch.autograd.grad(made.head(x).sum(), (x, made.head.weight, made.head.bias))
    inside, weight, _ = made.head.quantized(x)
    torch.testing.assert_close(gradients[0], weight.sum(0).expand(5, 8))
    torch.testing.assert_close(gradients[1], inside.sum(0).expand(3, 8))
    assert gradients[2].eq(5).all()


def test_golden_folded_convolution():
    case = np.load(GOLDEN / "folded_bn_conv_w4.npz")
    tensors = {name: torch.from_numpy(case[name]) for name in case.files if case[name].ndim}
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, eps=float(case["bn_eps"]))
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(tensors["weight"])
        for name, own in (("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            getattr(model[1], own).copy_(tensors[f"bn_{name}"])
    hawq.fold_batch_norm(model, tensors["x"])
    made = hawq.quantize(
        model, {"0": BitChoice(4, 8)}, activations=ActivationSettings(mode="symmetric"), calibration=[tensors["x"]]
    )
    integer = made[0].quantizer.quantize(made[0].weight, 4)
    assert torch.equal(integer.integers, tensors["weight_int"].int())
    np.testing.assert_allclose(integer.scale, case["weight_scale"], rtol=1e-5)
    assert float(made[0].input.scale()) == pytest.approx(float(case["act_scale"][0]), rel=1e-6)
    x, _, bias = made[0].quantized(tensors["x"])
    np.testing.assert_allclose(x.detach(), case["x_quant"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        torch.round(bias.detach() / (made[0].input.scale() * integer.scale)), case["bias_int"]
    )
    y = made(tensors["x"]).detach()
    np.testing.assert_allclose(y, case["y"], rtol=1e-5, atol=1e-5 * np.abs(case["y"]).max())


def test_validity_reports_the_exact_terms_and_warns(network):
    data = batches()
    found = hawq.sensitivity(network, F.cross_entropy, data, metric="ggn", probes=40)
    fine = hawq.explicit_plan(found, [8, 8, 8, 8])
    checked = hawq.check_validity(network, hawq.quantize(network, fine), F.cross_entropy, data, fine)
    assert checked.predicted == pytest.approx(fine.omega / 2)
    assert checked.true == pytest.approx(checked.linear + checked.quadratic, rel=0.2, abs=2e-5)
    wrong = hawq.BitPlan(fine.layers, fine.choices, 1e6)
    assert (
        "was predicted"
        in hawq.check_validity(network, hawq.quantize(network, wrong), F.cross_entropy, data, wrong).warning
    )


def test_linear_layers_of_a_language_model_are_measured():
    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    inner = GPTNeoXForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = inner

        def forward(self, tokens):
            return self.lm(tokens, use_cache=False).logits

    tokens = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))

    def loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    found = hawq.sensitivity(Logits(), loss, [(tokens[:, :-1], tokens[:, 1:])], probes=10, bits=(4, 8))
    assert len(found.layers.names) == 2 * 4 + 1
    assert found.layers.macs[0] == 8 * 16 * 48
    plan = hawq.frontier(found, fixed={"lm.lm_head": 8}).plan(0.75)
    made = hawq.quantize(Logits(), plan)
    assert made(tokens).shape == (4, 9, 40)


def test_bad_input_is_refused_in_one_line(network):
    data = batches(1)
    with pytest.raises(InputError, match="there are no batches"):
        hawq.sensitivity(network, F.cross_entropy, [])
    with pytest.raises(InputError, match="unknown metric 'magic'"):
        hawq.sensitivity(network, F.cross_entropy, data, metric="magic")
    with pytest.raises(InputError, match="is no layer that can be quantised"):
        hawq.quantize(network, {"nothing": 4})
    with pytest.raises(InputError, match="saw no input to calibrate"):
        hawq.quantize(network, {"head": 4}, activations=ActivationSettings())
    found = hawq.sensitivity(network, F.cross_entropy, data, metric="unweighted")
    with pytest.raises(InputError, match=r"whole numbers, got 4\.9"):
        hawq.explicit_plan(found, [4.9, 8, 8, 8])
    (x, y), wrong = data[0], "a batch does not fit the model or the loss"
    for given, match in [
        ([(x, y + 9)], wrong),
        ([(x[..., :2, :2].repeat(1, 2, 1, 1), y)], wrong),
        ([(x.double(), y)], wrong),
        ([(x, y[:3])], wrong),
        ([x, y], "must be a pair"),
        ([(x, y), (x[:0], y[:0])], "batch 1 has no samples"),
    ]:
        with pytest.raises(InputError, match=match):
            hawq.sensitivity(network, F.cross_entropy, given, metric="unweighted")
    pair = hawq.sensitivity(network, F.cross_entropy, (x, y), metric="unweighted")
    assert torch.equal(pair.omega, found.omega)
    with pytest.raises(InputError, match="activation_bits must be whole numbers from 2 to 16"):
        hawq.sensitivity(network, F.cross_entropy, data, metric="unweighted", activation_bits=(4.5,))
    with pytest.raises(InputError, match="3 bit numbers for 4 layers"):
        hawq.explicit_plan(hawq.sensitivity(network, F.cross_entropy, data, metric="unweighted"), [4, 4, 4])
    frozen = copy.deepcopy(network)
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(InputError, match="layer 'head' is frozen"):
        hawq.sensitivity(frozen, F.cross_entropy, data)


def test_layers_that_share_a_weight_are_refused_and_a_layer_used_twice_is_not():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4))
    tied[2].weight, tied[3].weight = tied[0].weight, tied[4].weight
    with pytest.raises(InputError, match="'0' and '2' share one weight"):
        hawq.quantize(tied, {"0": 4})
    assert list(quantized_layers(hawq.quantize(tied, {"4": 4}))) == ["4"], "an embedding may share its head's weight"
    layer = nn.Linear(4, 4)
    assert list(quantized_layers(hawq.quantize(nn.Sequential(layer, nn.Tanh(), layer), {"0": 4}))) == ["0"]


def test_a_network_without_biases_packs():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    made, again = (hawq.quantize(model, {"0": 3, "2": 5}) for _ in range(2))
    load_packed(again, packed_state(made), source="here")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), made(x))


def test_ranges_are_where_the_weights_are_and_as_precise():
    meta = converted(
        nn.Sequential(nn.Linear(3, 2)).to("meta"), {"0": BitChoice(4)}, quantizer=None, activations=ActivationSettings()
    )
    assert meta[0].active.is_meta
    assert meta[0].input.low.is_meta
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = hawq.quantize(nn.Linear(5, 4).double(), {"": 8}, activations=ActivationSettings(), calibration=[x])
    assert made.input.low == x.min()
    bare = converted(nn.Linear(5, 4, bias=False), {"": BitChoice(4)}, quantizer=None, activations=ActivationSettings())
    with pytest.raises(InputError, match="calibrate the network first"):
        bare(x.float())
