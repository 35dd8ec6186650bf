import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.errors import InputError, NonFiniteError
from library.hawq.activation_traces import activation_forms, activation_products
from library.hawq.analysis import recorded_inputs
from library.hawq.curvature import quadratic_forms, second_order_terms, top_eigenvalues
from library.hawq.layers import fold_batch_norm, layer_table, quantizable_layers
from library.images import image_network
from library.spectral import Hessian, dense_matrix

GOLDEN = Path(__file__).parents[1] / "golden" / "hawq"


def golden_convolutions():
    case = np.load(GOLDEN / "layer_traces_conv.npz")
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.Softplus(),
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(36, 4, bias=False),
    ).double()
    for layer, name in zip((model[0], model[2], model[5]), ("c1", "c2", "f"), strict=True):
        layer.weight = nn.Parameter(torch.from_numpy(case[f"W_{name}_weight"]))
    return case, model, (torch.from_numpy(case["x"]), torch.from_numpy(case["y"]))


WEIGHTS = ["0.weight", "2.weight", "5.weight"]


def test_golden_probes_of_all_layers_at_once():
    case, model, batch = golden_convolutions()
    operator = Hessian(model, F.cross_entropy, [batch], parameters=WEIGHTS)
    block = torch.cat([torch.from_numpy(case[f"V_{name}_weight"]).double().flatten(1).T for name in ("c1", "c2", "f")])
    joint = torch.stack([part.sum(0) for part in (block * operator(block)).split(operator.layout.sizes)], 1)
    np.testing.assert_allclose(joint, case["hutchinson_joint"], atol=1e-8 * case["trace_exact"].max())
    for layer, (name, short) in enumerate(zip(WEIGHTS, ("c1", "c2", "f"), strict=True)):
        changes = torch.from_numpy(case[f"V_{short}_weight"]).double()
        alone = second_order_terms(model, F.cross_entropy, [batch], {name: changes})[0]
        np.testing.assert_allclose(alone, case["hutchinson_block"][:, layer], rtol=1e-8, atol=1e-10)
        changes = torch.from_numpy(case[f"PV_{short}_weight"]).double()
        alone = second_order_terms(model, F.cross_entropy, [batch], {name: changes})[0]
        np.testing.assert_allclose(alone, case["pyhessian_vhv"][:, layer], rtol=1e-8, atol=1e-10)


def test_forms_average_to_the_exact_traces_and_top_eigenvalues_are_found():
    case, model, batch = golden_convolutions()
    forms = quadratic_forms(model, F.cross_entropy, batch, WEIGHTS, curvature="hessian", seed=0, start=0, count=2000)
    error = forms.std(0) / len(forms) ** 0.5
    assert ((forms.mean(0) - torch.from_numpy(case["trace_exact"])).abs() < 4 * error).all()
    again = quadratic_forms(model, F.cross_entropy, batch, WEIGHTS, curvature="hessian", seed=0, start=7, count=3)
    torch.testing.assert_close(again, forms[7:10], rtol=1e-10, atol=1e-12)
    found = top_eigenvalues(model, F.cross_entropy, [batch], WEIGHTS)
    np.testing.assert_allclose(found, case["top_eig"], rtol=0.01)


def test_gauss_newton_and_fisher_forms_are_those_of_their_matrices():
    _, model, (x, y) = golden_convolutions()
    per_sample = []
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda w, i=i: torch.func.functional_call(model, {"2.weight": w}, x[i : i + 1])[0], model[2].weight
        ).reshape(4, -1)
        p = model(x[i : i + 1]).softmax(-1)[0].detach()
        slope = (p - F.one_hot(y[i], 4)) @ jacobian
        curved = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        per_sample.append((curved.trace(), slope.square().sum()))
    exact = torch.tensor(per_sample).mean(0)
    for kind, value in zip(("ggn", "fisher"), exact, strict=True):
        forms = quadratic_forms(model, F.cross_entropy, (x, y), WEIGHTS, curvature=kind, seed=1, start=0, count=3000)
        assert (forms >= 0).all()
        error = forms[:, 1].std() / len(forms) ** 0.5
        assert abs(forms[:, 1].mean() - value) < 4 * error
        few = quadratic_forms(model, F.cross_entropy, (x, y), WEIGHTS, curvature=kind, seed=1, start=20, count=30)
        torch.testing.assert_close(few, forms[20:50], rtol=1e-9, atol=1e-12)


def test_a_diagonal_hessian_needs_one_probe_and_all_signs_give_the_trace():
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    batch = (x, torch.zeros(3, 1, dtype=torch.float64))
    forms = quadratic_forms(model, F.mse_loss, batch, ["weight"], curvature="hessian", seed=5, start=0, count=4)
    torch.testing.assert_close(forms, torch.full((4, 1), 2 * 14 / 3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    operator = Hessian(model, F.mse_loss, [(x, torch.zeros(5, 1, dtype=torch.float64))])
    matrix = dense_matrix(operator)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64).T
    forms = (signs * operator(signs)).sum(0)
    assert float(forms.mean()) == pytest.approx(float(matrix.trace()))
    off = matrix - torch.diag(matrix.diagonal())
    assert float(forms.var(correction=0)) == pytest.approx(2 * float(off.square().sum()))


def test_traces_ignore_duplicates_and_scale_with_the_loss():
    _, model, (x, y) = golden_convolutions()
    options = {"curvature": "hessian", "seed": 0, "start": 0, "count": 2}
    once = quadratic_forms(model, F.cross_entropy, (x, y), WEIGHTS, **options)
    twice = quadratic_forms(model, F.cross_entropy, (x.repeat(2, 1, 1, 1), y.repeat(2)), WEIGHTS, **options)
    torch.testing.assert_close(once, twice)
    scaled = quadratic_forms(model, lambda s, t: 3 * F.cross_entropy(s, t), (x, y), WEIGHTS, **options)
    torch.testing.assert_close(scaled, 3 * once)


def test_golden_activation_traces():
    case = np.load(GOLDEN / "activation_traces_mlp.npz")
    parts = []
    for layer in range(3):
        rows, columns = case[f"W{layer}"].shape
        linear = nn.Linear(columns, rows).double()
        linear.weight = nn.Parameter(torch.from_numpy(case[f"W{layer}"]))
        linear.bias = nn.Parameter(torch.from_numpy(case[f"b{layer}"]))
        parts += [linear, nn.Softplus()]
    model = nn.Sequential(*parts[:-1])
    batch = (torch.from_numpy(case["x"]), torch.from_numpy(case["y"]))
    names = ("0", "2", "4")
    for probe in range(4):
        vectors = {name: torch.from_numpy(case[f"Z{i}"][probe]).double() for i, name in enumerate(names)}
        products = activation_products(model, F.cross_entropy, batch, vectors)
        for i, name in enumerate(names):
            found = (vectors[name] * products[name]).sum(1)
            np.testing.assert_allclose(found, case[f"zHz{i}"][probe], rtol=1e-8, atol=1e-12)
    for i, name in enumerate(names):  # a basis of probes gives the trace of every sample exactly
        dimension = case[f"act{i}"].shape[1]
        traces = torch.zeros(len(batch[1]), dtype=torch.float64)
        for place in range(dimension):
            unit = torch.zeros(len(batch[1]), dimension, dtype=torch.float64)
            unit[:, place] = 1
            traces += activation_products(model, F.cross_entropy, batch, {name: unit})[name][:, place]
        np.testing.assert_allclose(traces, case["trace_per_sample"][:, i], rtol=1e-8, atol=1e-12)
        assert float(traces.mean()) / dimension == pytest.approx(float(case["avg_trace"][i]), rel=1e-8)
    forms = activation_forms(model, F.cross_entropy, batch, generator=torch.Generator().manual_seed(0), probes=3000)
    for i, name in enumerate(names):
        error = forms[name].mean(1).std() / 3000**0.5
        assert abs(forms[name].mean() - case["trace_mean_over_samples"][i]) < 4 * error


def test_a_linear_head_has_its_closed_form():
    head = nn.Linear(5, 3).double()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    identity = torch.eye(5, dtype=torch.float64)
    products = [
        activation_products(head, F.cross_entropy, (x, torch.tensor([0, 1, 2, 0])), {"": e.expand(4, 5)})[""]
        for e in identity
    ]
    p = head(x).softmax(-1).detach()
    weight = head.weight.detach()
    for sample in range(4):
        exact = weight.T @ (torch.diag(p[sample]) - torch.outer(p[sample], p[sample])) @ weight
        torch.testing.assert_close(torch.stack([rows[sample] for rows in products]), exact)


class Summing(nn.Module):
    """A network of two inputs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, both):
        return self.head(both[0] + both[1])


def test_multiply_accumulates_and_shared_weights():
    model = image_network("cnn8", 1, 10)
    table = layer_table(model, torch.zeros(2, 1, 28, 28))
    assert table.n_params == (144, 2304, 4608, 9216, 13824, 20736, 27648, 640)
    assert table.macs == tuple(
        side * side * n for side, n in zip((14, 14, 7, 7, 4, 4, 4, 1), table.n_params, strict=True)
    )
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert list(quantizable_layers(tied)) == ["0"]
    assert layer_table(nn.Conv1d(2, 3, 3, padding=1), torch.zeros(5, 2, 7)).macs == (7 * 18,)
    assert layer_table(Summing(), (torch.zeros(5, 3), torch.zeros(5, 3))).macs == (6,)
    with pytest.raises(InputError, match="at least one sample"):
        layer_table(model, torch.zeros(0, 1, 28, 28))
    with pytest.raises(InputError, match="no convolution and no linear layer"):
        quantizable_layers(nn.ReLU())
    with pytest.raises(InputError, match="'9' is no layer that can be quantised; those are 0"):
        quantizable_layers(tied, ["9"])


@pytest.mark.parametrize("name", ["cnn8", "resnet20"])
def test_folded_networks_agree(name):
    torch.manual_seed(0)
    model = image_network(name, 1, 10)
    for _ in range(3):
        model(torch.randn(16, 1, 28, 28))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    x = torch.randn(8, 1, 28, 28)
    before = model.eval()(x)
    folded = fold_batch_norm(model, x[:2])
    assert len(folded) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + 3 * y


def test_what_has_no_curvature_is_refused():
    model = Branching().eval()
    with torch.no_grad():
        model.norm.running_var.fill_(9)
    x = torch.randn(2, 1, 5, 5)
    before = model(x)
    with pytest.raises(InputError, match="used beside its batch norm"):
        fold_batch_norm(model, x)
    assert torch.equal(model(x), before), "a network that cannot be folded was changed"
    _, model, (x, y) = golden_convolutions()
    options = {"seed": 0, "start": 0, "count": 1}
    with pytest.raises(NonFiniteError):
        quadratic_forms(model, F.cross_entropy, (x * float("nan"), y), WEIGHTS, curvature="hessian", **options)
    with pytest.raises(NonFiniteError):
        quadratic_forms(model, F.cross_entropy, (x * float("nan"), y), WEIGHTS, curvature="fisher", **options)
    spread = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(InputError, match=r"needs outputs \(batch, classes\)"):
        quadratic_forms(
            spread,
            lambda s, t: s.square().mean(),
            (torch.ones(2, 1, 4, 4), y[:2]),
            ["0.weight"],
            curvature="ggn",
            **options,
        )
    with pytest.raises(InputError, match="convex in the outputs"):
        quadratic_forms(model, lambda s, t: -s.square().mean(), (x, y), WEIGHTS, curvature="ggn", **options)
    twice = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    twice[1] = twice[0]
    with pytest.raises(InputError, match="used twice in one pass"):
        activation_forms(twice, F.cross_entropy, (torch.ones(2, 2), torch.tensor([0, 1])), generator=torch.Generator())


class Diagonal(nn.Module):
    """Outputs are the weights, so that a weighted sum of squares has a diagonal Hessian."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


def test_top_eigenvalues_are_known_to_a_hundredth_of_themselves():
    curvature = torch.cat([torch.linspace(0, 1, 199), torch.tensor([-300.0])]).double()
    batch = (torch.zeros(2, 1), torch.zeros(2))
    found = top_eigenvalues(Diagonal(200), lambda o, _: (o.square() @ curvature).mean() / 2, [batch], ["weight"])
    assert float(found) == pytest.approx(1, rel=0.01)
    for seed in (12, 23, 33):  # where a residual of 1 % was that of another eigenvalue
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 10)).double()
        batch = (torch.randn(60, 12).double(), torch.randint(10, (60,)))
        names = ["0.weight", "2.weight"]
        exact = [
            float(torch.linalg.eigvalsh(dense_matrix(Hessian(model, F.cross_entropy, [batch], parameters=[n])))[-1])
            for n in names
        ]
        found = top_eigenvalues(model, F.cross_entropy, [batch], names, seed=seed)
        np.testing.assert_allclose(found, exact, rtol=0.01)


def test_inputs_are_moved_to_the_network():
    model = nn.Sequential(nn.Linear(3, 2)).to("meta")  # stands for any other device
    assert layer_table(model, torch.zeros(4, 3)).macs == (6,)
    assert recorded_inputs(model, torch.zeros(4, 3), ["0"])["0"].is_meta
