"""Curvature operators against dense references, and the identities that hold for every network."""

import doctest
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from library.errors import InputError, NonFiniteError
from library.spectral import operators
from library.spectral.operators import (
    CurvatureOperator,
    GaussNewton,
    GradientCovariance,
    Hessian,
    dense_matrix,
    require_symmetric,
)
from tests.library.matrices import generator

GOLDEN = Path(__file__).parents[1] / "golden" / "hessian"


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(-1).mean()


def perceptron(sizes: list[int], activation: type[nn.Module], seed: int = 0) -> nn.Sequential:
    """A float64 network with weights that depend on the seed alone."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.6 * torch.randn(weight.shape, generator=generator(seed), dtype=torch.float64))
    return model


def classes(count: int, width: int, kinds: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = generator(seed + 100)
    x = torch.randn(count, width, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, kinds, (count,), generator=draw)


def golden(name: str) -> tuple[nn.Sequential, object, list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A golden network, its loss, its data in two batches of unequal size, and what is known about it."""
    found = np.load(GOLDEN / f"decomposition_{name}.npz")
    values = {key: torch.from_numpy(np.asarray(found[key])) for key in found.files if found[key].dtype.kind in "fi"}
    model = perceptron(found["layer_dims"].tolist(), {"tanh": nn.Tanh, "softplus": nn.Softplus}[str(found["act"])])
    nn.utils.vector_to_parameters(values["theta"], model.parameters())
    loss, target = (F.cross_entropy, values["y"]) if name.startswith("ce") else (squares, values["target"])
    x, cut = values["x"], 2 * len(values["x"]) // 3
    return model, loss, [(x[:cut], target[:cut]), (x[cut:], target[cut:])], values


NAMES = ["ce_tanh", "mse_softplus"]


def test_docstring_example():
    found = doctest.testmod(operators, extraglobs={"torch": torch, "nn": nn})
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 16])
def test_golden_products(name, chunk):
    model, loss, data, values = golden(name)
    hessian = Hessian(model, loss, data, chunk=chunk)
    value, gradient = hessian.loss_and_gradient()
    assert value == pytest.approx(float(values["loss"]), rel=1e-12)
    torch.testing.assert_close(gradient, values["grad"], rtol=1e-9, atol=1e-12)
    for kind, key in ((Hessian, "Hv"), (GaussNewton, "Gv"), (GradientCovariance, "Cv")):
        found = kind(model, loss, data, chunk=chunk) @ values["v"].mT
        torch.testing.assert_close(found.mT, values[key], rtol=1e-9, atol=1e-12 * float(values[key].abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_golden_spectra_and_blocks(name):
    model, loss, data, values = golden(name)
    h, g = (dense_matrix(kind(model, loss, data)) for kind in (Hessian, GaussNewton))
    centred = dense_matrix(GradientCovariance(model, loss, data, centred=True))
    size = float(values["eig_hessian"].abs().max())
    for matrix, key in ((h, "hessian"), (g, "ggn"), (h - g, "residual"), (centred, "grad_cov_centred")):
        torch.testing.assert_close(torch.linalg.eigvalsh(matrix), values[f"eig_{key}"], rtol=1e-9, atol=1e-9 * size)
    torch.testing.assert_close(h.diag(), values["diag_hessian"], rtol=1e-9, atol=1e-9 * size)
    assert int((torch.linalg.eigvalsh(g) > 1e-9 * size).sum()) == int(values["rank_ggn"])
    hessian = Hessian(model, loss, data)
    edges = values["block_edges"].tolist()
    assert [(part.start, part.stop) for part in hessian.layout.slices.values()] == list(itertools.pairwise(edges))
    for i, (layer, part) in enumerate(hessian.layout.slices.items()):
        block = dense_matrix(hessian.restrict(layer))
        torch.testing.assert_close(block, h[part, part], rtol=1e-9, atol=1e-10)
        assert float(block.trace()) == pytest.approx(float(values["block_trace_hessian"][i]), rel=1e-9, abs=1e-10)
        assert float(torch.linalg.eigvalsh(block)[-1]) == pytest.approx(float(values["block_top_eig"][i]), rel=1e-9)


@given(seed=st.integers(0, 2**20), samples=st.integers(1, 6), act=st.sampled_from([nn.Tanh, nn.Softplus, nn.ReLU]))
@settings(max_examples=12, deadline=None)
def test_gauss_newton_is_positive_and_of_bounded_rank(seed, samples, act):
    model = perceptron([3, 4, 3], act, seed)
    x, y = classes(samples, 3, 3, seed)
    for loss, target, rank in ((F.cross_entropy, y, 2 * samples), (squares, x, 3 * samples)):
        eigenvalues = torch.linalg.eigvalsh(dense_matrix(GaussNewton(model, loss, (x, target))))
        assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
        assert int((eigenvalues > 1e-10 * eigenvalues[-1]).sum()) <= rank


def test_a_linear_model_has_no_residual():
    x, y = classes(12, 4, 3)
    model = perceptron([4, 3], nn.ReLU)
    torch.testing.assert_close(
        dense_matrix(Hessian(model, F.cross_entropy, (x, y))), dense_matrix(GaussNewton(model, F.cross_entropy, (x, y)))
    )


def test_the_covariance_is_that_of_the_samples_gradients():
    x, y = classes(9, 4, 3)
    model = perceptron([4, 5, 3], nn.Tanh)
    gradients = torch.stack(
        [Hessian(model, F.cross_entropy, (x[i : i + 1], y[i : i + 1])).loss_and_gradient()[1] for i in range(9)]
    )
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    plain = dense_matrix(GradientCovariance(model, F.cross_entropy, data))
    torch.testing.assert_close(plain, gradients.mT @ gradients / 9)
    centred = dense_matrix(GradientCovariance(model, F.cross_entropy, data, centred=True))
    torch.testing.assert_close(centred, torch.cov(gradients.mT, correction=0))
    block = GradientCovariance(model, F.cross_entropy, data, centred=True).restrict("2.bias")
    torch.testing.assert_close(dense_matrix(block), centred[-3:, -3:])


def test_softmax_regression_at_zero_has_the_closed_form():
    found = np.load(GOLDEN / "softmax_regression_zero.npz")
    x, y, kinds = torch.from_numpy(found["X"]), torch.from_numpy(found["y"]), int(found["k"])
    model = nn.Linear(x.shape[1], kinds, bias=False).double()
    nn.init.zeros_(model.weight)
    h = dense_matrix(Hessian(model, F.cross_entropy, (x, y)))
    torch.testing.assert_close(h, torch.from_numpy(found["hessian"]), rtol=1e-12, atol=1e-14)
    gram = torch.linalg.eigvalsh(x.mT @ x / len(x))
    expected = torch.cat([gram.repeat(kinds - 1) / kinds, torch.zeros(x.shape[1]).double()]).sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(h), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_adding_one_vector_to_all_rows_of_the_last_layer_is_a_null_direction(act):
    model = perceptron([4, 5, 3], act)
    hessian = Hessian(model, F.cross_entropy, classes(20, 4, 3))
    shifts = torch.zeros(hessian.size, 6, dtype=torch.float64)
    for j in range(5):
        shifts[hessian.layout.slices["2.weight"], j] = F.one_hot(torch.tensor(j), 5).double().repeat(3)
    shifts[hessian.layout.slices["2.bias"], 5] = 1
    assert (hessian @ shifts).abs().max() < 1e-14


def test_rescaling_a_relu_unit_maps_to_the_gradient():
    """t = A w generates the symmetry (a w_in, w_out / a): t^T g = 0 and H t = -A g, at every point."""
    model = perceptron([4, 5, 3], nn.ReLU)
    hessian = Hessian(model, F.cross_entropy, classes(20, 4, 3))
    generators = torch.zeros(hessian.size, 5, dtype=torch.float64)
    for unit in range(5):
        incoming, outgoing = torch.zeros(5, 4), torch.zeros(3, 5)
        incoming[unit], outgoing[:, unit] = 1, -1
        generators[hessian.layout.slices["0.weight"], unit] = incoming.flatten().double()
        generators[hessian.layout.slices["0.bias"], unit] = F.one_hot(torch.tensor(unit), 5).double()
        generators[hessian.layout.slices["2.weight"], unit] = outgoing.flatten().double()
    _, gradient = hessian.loss_and_gradient()
    directions = generators * hessian.point()[:, None]
    assert (directions.mT @ gradient).abs().max() < 1e-14
    torch.testing.assert_close(hessian @ directions, -generators * gradient[:, None], rtol=1e-9, atol=1e-13)


def test_duplicated_and_permuted_data_change_nothing_and_the_scale_of_the_loss_scales():
    model = perceptron([4, 5, 3], nn.Tanh)
    x, y = classes(10, 4, 3)
    h = dense_matrix(Hessian(model, F.cross_entropy, (x, y)))
    order = torch.randperm(10, generator=generator())
    torch.testing.assert_close(dense_matrix(Hessian(model, F.cross_entropy, (x.repeat(2, 1), y.repeat(2)))), h)
    torch.testing.assert_close(dense_matrix(Hessian(model, F.cross_entropy, (x[order], y[order]))), h)
    tripled = Hessian(model, lambda s, t: 3 * F.cross_entropy(s, t), (x, y))
    torch.testing.assert_close(dense_matrix(tripled), 3 * h)


def test_permuting_hidden_units_leaves_the_spectrum():
    model = perceptron([4, 6, 3], nn.Tanh)
    data = classes(10, 4, 3)
    before = torch.linalg.eigvalsh(dense_matrix(Hessian(model, F.cross_entropy, data)))
    order = torch.randperm(6, generator=generator())
    with torch.no_grad():
        for value in (model[0].weight, model[0].bias):
            value.copy_(value[order].clone())
        model[2].weight.copy_(model[2].weight[:, order].clone())
    after = torch.linalg.eigvalsh(dense_matrix(Hessian(model, F.cross_entropy, data)))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """One matrix used twice, a frozen bias, a parameter that the loss does not depend on, and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def test_tied_frozen_unused_parameters_and_batch_normalisation():
    torch.manual_seed(0)
    model = Tied().double().train()
    x, y = classes(8, 3, 3)
    hessian = Hessian(model, F.cross_entropy, (x, y))
    assert hessian.layout.names == ("idle", "first.weight", "norm.weight", "norm.bias")
    assert hessian.size == 2 + 9 + 3 + 3
    h = dense_matrix(hessian)
    assert (h[:2] == 0).all()
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0

    def loss(flat: Tensor) -> Tensor:
        names = dict(zip(hessian.layout.names, hessian.layout.split(flat[:, None]), strict=True))
        values = {name: value[0] for name, value in names.items()}
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    model.eval()
    torch.testing.assert_close(h, torch.autograd.functional.hessian(loss, hessian.point()), rtol=1e-10, atol=1e-13)


def test_splitting_and_joining_are_inverse():
    layout = Hessian(perceptron([4, 5, 3], nn.Tanh), F.cross_entropy, classes(5, 4, 3)).layout
    block = torch.randn(sum(layout.sizes), 3, generator=generator())
    assert torch.equal(layout.join(layout.split(block)), block)
    assert [piece.shape[1:] for piece in layout.split(block)] == list(layout.shapes)


def _worker(rank: int, store: str, results: object) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = _products([_shard(rank)] if rank == 0 else [_shard(1)])
    results[rank] = [value.numpy() for value in found]
    torch.distributed.destroy_process_group()


def _shard(rank: int) -> tuple[Tensor, Tensor]:
    x, y = classes(13, 4, 3)
    return (x[:9], y[:9]) if rank == 0 else (x[9:], y[9:])


def _products(data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    model = perceptron([4, 5, 3], nn.Tanh)
    kinds: list[CurvatureOperator] = [kind(model, F.cross_entropy, data) for kind in (Hessian, GaussNewton)]
    kinds.append(GradientCovariance(model, F.cross_entropy, data, centred=True))
    return [kind @ kind.probes(3, generator=generator(5)) for kind in kinds]


def test_two_workers_with_unequal_shards_give_the_products_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (str(tmp_path / "store"), results), nprocs=2)
        found = [results[0], results[1]]
    for one, first, second in zip(_products([_shard(0), _shard(1)]), *found, strict=True):
        assert (first == second).all()
        torch.testing.assert_close(torch.from_numpy(first), one, rtol=1e-12, atol=1e-14)


class Shuffling:
    """A loader that drops what is left over, another part each time."""

    def __init__(self) -> None:
        self.x, self.y = classes(21, 4, 3)
        self.draw = generator()

    def __iter__(self):
        order = torch.randperm(21, generator=self.draw)
        yield from ((self.x[part], self.y[part]) for part in order[:16].split(8))


class AlwaysDropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron([4, 5, 3], nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, training=True)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (perceptron([4, 5, 3], nn.Tanh), Shuffling()),
        (AlwaysDropping(), [classes(20, 4, 3)]),
    ],
)
def test_an_operator_that_changes_between_products_is_refused_with_the_reason(model, data):
    hessian = Hessian(model, F.cross_entropy, data)
    with pytest.raises(InputError, match=r"loss changed from .* not one symmetric operator.*augmented.*dropout"):
        require_symmetric(hessian, hessian.probes(2, generator=generator()))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changing_data_are_refused_however_small_the_loss(scale, dtype):
    draw, (x, y) = generator(), classes(40, 4, 3)
    model = nn.Linear(4, 3).to(dtype)
    with torch.no_grad():
        model.weight.mul_(30)
    y = model(x.to(dtype)).argmax(1)  # fitted by a wide margin

    class Drawing:
        def __iter__(self):
            chosen = torch.randint(0, 40, (20,), generator=draw)
            yield x[chosen].to(dtype), y[chosen]

    hessian = Hessian(model, lambda s, t: scale * F.cross_entropy(s, t), Drawing())
    with pytest.raises(InputError, match="not one symmetric operator"):
        require_symmetric(hessian, hessian.probes(2, generator=generator()))


def test_shuffled_data_are_the_same_data():
    draw, (x, y) = generator(), classes(40, 4, 3)

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(40, generator=draw)
            yield from ((x[part].float(), y[part]) for part in order.split(7))

    hessian = Hessian(perceptron([4, 5, 3], nn.Tanh).float(), F.cross_entropy, Shuffled())
    require_symmetric(hessian, hessian.probes(2, generator=generator()))


def test_only_symmetric_operators_pass():
    a = torch.randn(6, 6, generator=generator(), dtype=torch.float64)
    probes = torch.randn(6, 2, generator=generator(1), dtype=torch.float64)
    require_symmetric(a + a.mT, probes)
    with pytest.raises(InputError, match="not symmetric"):
        require_symmetric(lambda v: a @ v, probes)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad):
        return grad


class OnceOnly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(super().forward(x))


MODEL, DATA = perceptron([4, 5, 3], nn.Tanh), classes(6, 4, 3)


def apply(model=MODEL, loss=F.cross_entropy, data=DATA, block=None, **options):
    hessian = Hessian(model, loss, data, **options)
    return hessian(torch.ones(hessian.size, 1, dtype=torch.float64) if block is None else block)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: apply(data=iter([DATA])), InputError, "can be read only once"),
        (lambda: apply(data=[]), InputError, "no samples"),
        (lambda: apply(parameters=["2.wait"]), InputError, r"2.wait asked; .* 0.weight, 0.bias"),
        (lambda: apply(parameters=[]), InputError, "none asked"),
        (lambda: apply(block=torch.ones(7, 1)), InputError, r"\(7, 1\) does not fit: \(43, p\)"),
        (lambda: apply(block=torch.ones(43, 0)), InputError, r"\(43, 0\) does not fit: \(43, p\)"),
        (lambda: apply(data=(DATA[0], DATA[1] + 3)), InputError, "does not fit the model or the loss: Target"),
        (lambda: apply(data=(DATA[0][:, :2], DATA[1])), InputError, "does not fit the model or the loss: mat1"),
        (lambda: apply(data=(DATA[0].float(), DATA[1])), InputError, "does not fit the model or the loss: mat1"),
        (lambda: apply(data=(DATA[0], DATA[1][:2])), InputError, "does not fit the model or the loss: Expected"),
        (lambda: apply(data=[*DATA]), InputError, "must be a pair"),
        (lambda: apply(loss=lambda s, t: s), InputError, "must return a scalar"),
        (lambda: apply(loss=lambda s, t: s.sum() * float("nan")), NonFiniteError, "the loss is nan"),
        (lambda: apply(model=OnceOnly(4, 3).double()), InputError, "differentiated twice: .* once_differentiable"),
        (lambda: apply(chunk=0), InputError, "chunk must be at least 1"),
        (lambda: dense_matrix(Hessian(nn.Linear(200, 200), squares, [])), InputError, "40200 x 40200 .* 6.0 GiB"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_gauss_newton_needs_one_tensor():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron([4, 3], nn.Tanh)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    operator = GaussNewton(Two(), lambda s, t: F.cross_entropy(s["logits"], t), DATA)
    with pytest.raises(InputError, match="must be one tensor, got dict; wrap"):
        operator @ torch.ones(operator.size, 1)
