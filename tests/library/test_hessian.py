"""The analysis against golden spectra and closed forms; outlier rules, attribution, lines and layers by their laws."""

import doctest
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from library import hessian
from library.errors import InputError, NonFiniteError
from library.hessian import analysis, interpolation, outliers
from library.hessian.attribution import attribute, class_means
from library.hessian.factors import factor_eigenvalues, gauss_newton_factor, gradient_factor
from library.hessian.interpolation import interpolate, plane
from library.hessian.layers import interaction_norms, top_eigenvalues
from library.hessian.outliers import above_the_negative_side, beyond_the_bulk, largest_gap
from library.hessian.study import Cell, measure_cell
from library.hessian.toy import Descent, blobs, circles, moons, perceptron, train_together
from library.spectral import GaussNewton, GradientCovariance, Hessian, dense_matrix
from library.spectral.density import Quadrature
from tests.library.matrices import generator

GOLDEN = Path(__file__).parents[1] / "golden" / "hessian"


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(-1).mean()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A network of 525 parameters that separates five clusters."""
    x, y = blobs(300, width=20, classes=5, generator=generator())
    model = perceptron([20, 20, 5], seed=1)
    train_together([model], x[None], y[None], Descent())
    return model, (x, y)


@pytest.mark.parametrize("module", [analysis, interpolation, outliers])
def test_docstring_examples_run(module):
    found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert found.attempted > 0
    assert found.failed == 0


def official(parameters: str) -> tuple[nn.Sequential, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The authors' network at a point, in our order: their weights are (in x out)."""
    found = np.load(GOLDEN / "official_fullconn_k3.npz")
    sizes, flat = found["layer_sizes"].tolist(), torch.from_numpy(found[parameters])
    model, at = perceptron(sizes), 0
    with torch.no_grad():
        for layer, (inner, outer) in zip(model[::2], itertools.pairwise(sizes), strict=True):
            layer.weight.copy_(flat[at : at + inner * outer].view(inner, outer).T)
            layer.bias.copy_(flat[at + inner * outer : at + inner * outer + outer])
            at += inner * outer + outer
    data = torch.from_numpy(found["x"]), torch.from_numpy(found["y"])
    return model, data, {name: torch.from_numpy(np.asarray(found[name])) for name in found.files}


@pytest.mark.parametrize("point", ["0", "1"])
def test_golden_spectra_of_the_authors_code(point):
    model, data, golden = official(f"params{point}")
    report = hessian.analyze(model, F.cross_entropy, data)
    size = float(golden[f"eigs{point}"].abs().max())
    torch.testing.assert_close(report.spectrum.nodes[0], golden[f"eigs{point}"], rtol=0, atol=1e-9 * size)
    assert report.loss == pytest.approx(float(golden[f"loss{point}"]), rel=1e-9)
    assert report.gradient_norm == pytest.approx(float(golden[f"grad{point}"].norm()), rel=1e-9)
    assert report.largest == pytest.approx(size, rel=1e-9)


def test_golden_line_between_the_two_points():
    first, data, golden = official("params0")
    last, _, _ = official("params1")
    line = interpolate(
        first,
        F.cross_entropy,
        [data],
        first.state_dict(),
        last.state_dict(),
        points=31,
        beyond=-float(golden["alpha"][0]),
    )
    torch.testing.assert_close(line.positions, golden["alpha"], rtol=0, atol=1e-12)
    torch.testing.assert_close(line.losses, golden["line_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(line.accuracies, golden["line_acc"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "loss"), [("ce_tanh", F.cross_entropy), ("mse_softplus", squares)])
def test_golden_factors_give_the_spectra_of_g_and_c(name, loss):
    found = np.load(GOLDEN / f"decomposition_{name}.npz")
    model = perceptron(found["layer_dims"].tolist(), activation=name.split("_")[1])
    nn.utils.vector_to_parameters(torch.from_numpy(found["theta"]), model.parameters())
    x, y = (torch.from_numpy(found[key]) for key in ("x", "y" if name.startswith("ce") else "target"))
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    factors = {
        "ggn": gauss_newton_factor(GaussNewton(model, loss, data)),
        "grad_cov_uncentred": gradient_factor(GradientCovariance(model, loss, data)),
        "grad_cov_centred": gradient_factor(GradientCovariance(model, loss, data, centred=True)),
    }
    for key, factor in factors.items():
        expected = torch.from_numpy(found[f"eig_{key}"])
        size = float(expected.abs().max())
        torch.testing.assert_close(factor_eigenvalues(factor), expected, rtol=0, atol=1e-9 * size)


def test_estimates_of_a_large_spectrum_agree_with_the_exact_ones(trained):
    model, data = trained
    exact = hessian.analyze(model, F.cross_entropy, data)
    found = hessian.analyze(model, F.cross_entropy, data, exact_below=0, probes=16, tolerance=1e-7)
    assert exact.spectrum.exact
    assert not found.spectrum.exact
    for ours, true in ((found.top, exact.top), (found.bottom, exact.bottom), (found.gauss_newton, exact.gauss_newton)):
        torch.testing.assert_close(ours.values, true.values, rtol=1e-5, atol=1e-7)
    for ours, true in ((found.trace, exact.trace), (found.square, exact.square)):
        assert (ours.value - true.value).abs() < 4 * ours.standard_error
    spread = (found.layers.traces.value - exact.layers.traces.value).abs() / found.layers.traces.standard_error
    assert (spread < 4).all()
    assert found.outliers.by_gap == exact.outliers.by_gap == 5
    assert found.outliers.above_negative == exact.outliers.above_negative
    assert found.residual_share == pytest.approx(exact.residual_share, rel=0.25)
    assert float(found.flat_share.value) == pytest.approx(float(exact.flat_share.value), abs=0.06)
    torch.testing.assert_close(found.attribution.pairs[:5], exact.attribution.pairs[:5], rtol=1e-4, atol=1e-4)


def test_a_long_analysis_says_where_it_is(trained):
    model, data = trained
    lines: list[str] = []
    hessian.analyze(model, F.cross_entropy, data, exact_below=0, steps=4, probes=2, top=2, notify=lines.append)
    assert lines == [
        "2 largest and 2 smallest eigenvalues",
        "traces of 2 probes",
        "density, 2 x 4 Lanczos steps",
        "Gauss-Newton eigenvalues",
    ]


def test_an_interrupted_analysis_goes_on_from_its_lanczos_steps(trained, tmp_path):
    model, data = trained
    options = {"exact_below": 0, "probes": 2, "gauss_newton": False, "checkpoint": tmp_path}
    hessian.analyze(model, F.cross_entropy, data, steps=6, **options)
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    found = hessian.analyze(model, F.cross_entropy, data, steps=10, **options)
    assert len(kept) == 6
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    once = hessian.analyze(model, F.cross_entropy, data, steps=10, **(options | {"checkpoint": None}))
    torch.testing.assert_close(found.spectrum.nodes, once.spectrum.nodes, rtol=1e-8, atol=1e-10)


def test_the_outliers_are_as_many_as_the_classes_and_lie_in_their_means(trained):
    model, data = trained
    report = hessian.analyze(model, F.cross_entropy, data)
    assert report.outliers.by_gap == 5
    assert report.outliers.gap > 2
    assert (report.attribution.pairs[:5] > 0.95).all()
    assert report.attribution.pairs[:5].min() > report.attribution.pairs[5:].max()
    assert (report.attribution.centres <= report.attribution.pairs + 1e-12).all()
    assert report.layers.traces.value.sum() == pytest.approx(float(report.trace.value), rel=1e-10)
    assert float(report.flat_share.value) > 0.5


def test_class_means_are_the_means_of_the_samples_vectors():
    x, y = blobs(30, width=4, classes=3, generator=generator())
    model = perceptron([4, 5, 3], activation="tanh", scale=0.5)
    operator = GaussNewton(model, F.cross_entropy, [(x[:11], y[:11]), (x[11:], y[11:])])
    means = class_means(operator, 3)
    vectors = torch.zeros(30, operator.size, 3, dtype=torch.float64)
    for i, label in itertools.product(range(30), range(3)):
        sample = Hessian(model, F.cross_entropy, (x[i : i + 1], torch.tensor([label])))
        p = model(x[i]).softmax(-1)[label].detach()
        vectors[i, :, label] = p.sqrt() * sample.loss_and_gradient()[1]
    expected = torch.stack([vectors[y == c].mean(0) for c in range(3)], 1)
    torch.testing.assert_close(means, expected)
    g = torch.einsum("inc,imc->nm", vectors, vectors) / 30
    torch.testing.assert_close(g, dense_matrix(operator))
    found = attribute(torch.linalg.qr(expected.flatten(1)[:, [1, 2, 3, 5, 6, 7]]).Q, means)
    torch.testing.assert_close(found.pairs, torch.ones(6).double())


def _worker(rank: int, store: str, results: object) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = _means(slice(0, 9) if rank == 0 else slice(9, 30)).numpy()
    torch.distributed.destroy_process_group()


def _means(part: slice) -> Tensor:
    x, y = blobs(30, width=4, classes=3, generator=generator())
    order = y.argsort()  # so that the first worker sees one class alone
    model = perceptron([4, 5, 3], activation="tanh", scale=0.5)
    return class_means(GaussNewton(model, F.cross_entropy, (x[order[part]], y[order[part]])), 3)


def test_class_means_of_two_workers_are_those_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (str(tmp_path / "store"), results), nprocs=2)
        found = [torch.from_numpy(results[rank]) for rank in (0, 1)]
    for each in found:
        torch.testing.assert_close(each, _means(slice(0, 30)), rtol=1e-12, atol=1e-14)


def test_all_eigenvalues_above_the_negative_side_are_counted():
    x, y = torch.randn(40, 6, generator=generator(), dtype=torch.float64), torch.arange(40) % 5
    model = nn.Linear(6, 5, bias=False).double()
    found = hessian.analyze(model, F.cross_entropy, (x, y), top=3)
    values = found.spectrum.nodes[0]
    assert found.outliers.above_negative == above_the_negative_side(values) > 20
    sparse = hessian.analyze(model, F.cross_entropy, (x, y), top=3, exact_below=0, probes=20)
    assert abs(sparse.outliers.above_negative - found.outliers.above_negative) <= 3
    cell = Cell(classes=2, width=3, samples=20, hidden=(3,), steps=5)
    [measured] = measure_cell(cell, (0,))
    counted = above_the_negative_side(torch.from_numpy(measured.eigenvalues))
    assert measured.metrics["outliers_above_negative"] == counted


class Separable(nn.Module):
    """H = G + R with G = 10 on half of the weights, where R takes it below what H has on the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(40, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        bent = self.second - torch.linspace(9, 10, 40, dtype=torch.float64) * self.second**2 / 2
        return torch.cat([self.first, bent]).expand(len(x), -1)


def test_gauss_newton_eigenvalues_that_h_does_not_show_are_found():
    def loss(output: Tensor, _: Tensor) -> Tensor:
        first, second = output.split(40, 1)
        curvature = torch.linspace(1, 2, 40, dtype=torch.float64)
        return (first.square() @ curvature / 2 + (5 * second**2 + second).sum(1)).mean()

    data = (torch.zeros(3, 1), torch.zeros(3))
    found = hessian.analyze(Separable(), loss, data, exact_below=0, top=3)
    assert not found.spectrum.exact
    torch.testing.assert_close(found.gauss_newton.values, torch.full((3,), 10.0).double(), rtol=1e-6, atol=0)


def test_tiny_networks_and_flat_losses_have_a_report():
    x = torch.randn(5, 1, generator=generator(), dtype=torch.float64)
    one = hessian.analyze(nn.Linear(1, 1, bias=False).double(), squares, (x, x))
    assert (one.parameters, one.outliers.by_gap, one.outliers.gap) == (1, 0, 1)
    assert one.largest == pytest.approx(2 * float(x.square().mean()))
    model, data = perceptron([2, 3, 2]), blobs(9, width=2, classes=2, generator=generator())
    for top in (16, 17):  # with two more for the smallest there are no more than all 17
        whole = hessian.analyze(model, F.cross_entropy, data, exact_below=0, top=top)
        assert whole.spectrum.exact
        assert len(whole.top.values) == top
    flat = hessian.analyze(nn.Linear(3, 2).double(), lambda s, _: s.sum(), (torch.ones(4, 3).double(), torch.zeros(4)))
    assert flat.outliers.by_gap == flat.effective_rank == flat.residual_share == 0


@given(seed=st.integers(0, 2**20), outlying=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_rules_count_what_stands_out(seed, outlying):
    bulk = 0.12 * torch.rand(600, generator=generator(seed), dtype=torch.float64) - 0.06  # a bulk that has edges
    top = 1 + torch.rand(outlying, generator=generator(seed + 1), dtype=torch.float64)
    spectrum = torch.cat([bulk, top]).sort().values
    rule = Quadrature(spectrum[None], torch.full_like(spectrum[None], 1 / len(spectrum)), exact=True)
    assert largest_gap(spectrum, 12)[0] == outlying
    assert above_the_negative_side(spectrum, 4.0) == outlying
    assert beyond_the_bulk(rule, len(spectrum)) == outlying


def test_a_quadratic_loss_makes_a_parabola_of_known_curvature():
    model, (x, target) = nn.Linear(4, 2).double(), (torch.randn(9, 4), torch.randn(9, 2))
    data = (x.double(), target.double())
    ends = [perceptron([4, 2], seed=s, scale=1.0)[0].state_dict() for s in (0, 1)]
    line = interpolate(model, squares, [data], *ends, points=11)
    curvature = line.losses.diff().diff() * 100
    step = torch.cat([(ends[1][name] - ends[0][name]).flatten() for name in ("weight", "bias")])
    expected = step @ (Hessian(model, squares, data) @ step[:, None])[:, 0]
    torch.testing.assert_close(curvature, expected.expand(9), rtol=1e-9, atol=0)
    assert line.barrier < 1e-12


def test_a_line_keeps_its_ends_leaves_the_model_and_finds_the_barrier():
    x, y = blobs(80, width=4, classes=3, generator=generator())
    model = perceptron([4, 12, 3], seed=0)
    train_together([model], x[None], y[None], Descent(loss=0.05))
    order = torch.randperm(12, generator=generator())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    permuted = {
        "0.weight": state["0.weight"][order],
        "0.bias": state["0.bias"][order],
        "2.weight": state["2.weight"][:, order],
        "2.bias": state["2.bias"],
    }
    line = interpolate(model, F.cross_entropy, [(x[:30], y[:30]), (x[30:], y[30:])], state, permuted, points=9)
    here = float(F.cross_entropy(model(x), y).detach())
    assert line.losses[0] == pytest.approx(here, rel=1e-12)
    assert line.losses[-1] == pytest.approx(here, rel=1e-9)
    assert line.barrier == pytest.approx(float(line.losses.max()) - here, rel=1e-9)
    assert line.barrier > 0.1
    assert not line.monotone
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batch_normalisation_is_renewed_on_the_line():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = blobs(40, width=3, classes=2, generator=generator())
    ends = [{n: v + 0.3 * s for n, v in model.state_dict().items()} for s in (0, 1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stale = interpolate(model, F.cross_entropy, [(x, y)], *ends, points=3)
    renewed = interpolate(model, F.cross_entropy, [(x, y)], *ends, points=3, normalisation_data=[(x, y)])
    model.train()
    with torch.no_grad():
        hidden = nn.functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True)
    unbiased = F.cross_entropy(model[3](hidden.relu()), y)
    assert float(renewed.losses[0]) == pytest.approx(float(unbiased.detach()), rel=0.02)
    assert (stale.losses - renewed.losses).abs().max() > 1e-3
    model.load_state_dict(before)
    interpolate(model, F.cross_entropy, [(x, y)], *ends, points=3, normalisation_data=[(x, y)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plane_holds_its_corners():
    x, y = blobs(30, width=4, classes=3, generator=generator())
    models = [perceptron([4, 6, 3], seed=s, scale=0.5) for s in range(3)]
    losses, places = plane(
        models[0], F.cross_entropy, [(x, y)], tuple(m.state_dict() for m in models), points=3, margin=0
    )
    assert places.tolist() == [0, 0.5, 1]
    for (i, j), model in zip(((0, 0), (2, 0), (0, 2)), models, strict=True):
        assert float(losses[i, j]) == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-9)


def test_layers_norms_and_top_eigenvalues(trained):
    model, data = trained
    operator = Hessian(model, F.cross_entropy, data)
    h = dense_matrix(operator)
    parts = list(operator.layout.slices.values())
    exact = torch.stack([torch.stack([h[a, b].square().sum() for b in parts]) for a in parts])
    found = interaction_norms(operator, operator.probes(60, generator=generator()))
    assert ((found.value - exact).abs() < 5 * found.standard_error + 1e-12).all()
    tops = top_eigenvalues(operator, tolerance=1e-6)
    for name, part in operator.layout.slices.items():
        assert tops[name] == pytest.approx(float(torch.linalg.eigvalsh(h[part, part])[-1]), rel=1e-5)
        assert tops[name] <= float(torch.linalg.eigvalsh(h)[-1]) * (1 + 1e-9)


def test_networks_trained_together_are_those_trained_alone():
    sets = [blobs(40, width=3, classes=3, generator=generator(s)) for s in range(3)]
    together, alone = ([perceptron([3, 8, 3], seed=s) for s in range(3)] for _ in range(2))
    x, y = (torch.stack(part) for part in zip(*sets, strict=True))
    descent = Descent(loss=0.2)
    steps = train_together(together, x, y, descent)
    for i in range(3):
        assert train_together(alone[i : i + 1], x[i : i + 1], y[i : i + 1], descent).tolist() == [int(steps[i])]
        for one, other in zip(together[i].parameters(), alone[i].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert float(F.cross_entropy(together[i](x[i]), y[i]).detach()) <= 0.2


@pytest.mark.parametrize("draw", [partial(blobs, width=5, classes=4), circles, moons])
def test_simulated_points_are_standardised_balanced_and_repeatable(draw):
    points, labels = draw(60, generator=generator())
    torch.testing.assert_close(points.mean(0), torch.zeros(points.shape[1]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(points.std(0, correction=0), torch.ones(points.shape[1]).double())
    assert set(torch.bincount(labels).tolist()) == {60 // (int(labels.max()) + 1)}
    assert torch.equal(draw(60, generator=generator())[0], points)


def test_a_report_prints_draws_and_tabulates(trained, tmp_path):
    model, data = trained
    for options in ({}, {"exact_below": 0, "steps": 12, "probes": 3}):
        report = hessian.analyze(model, F.cross_entropy, data, **options)
        assert "Hessian of 525 parameters over 300 samples" in str(report)
        assert set(report.tables()) == {"eigenvalues", "layers"}
        assert len(report.eigenvalue_table()) == 13
        report.figure().savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        assert all(value == value for value in report.metrics().values())


def test_regression_has_no_classes_and_float32_says_so():
    x, target = torch.randn(20, 3, generator=generator()), torch.randn(20, 2, generator=generator(1))
    report = hessian.analyze(perceptron([3, 4, 2]).float(), squares, (x, target))
    assert report.classes is report.attribution is None
    assert report.gauss_newton is not None
    assert "float32" in report.notes[0]


MODEL, DATA = perceptron([4, 5, 3]), blobs(12, width=4, classes=3, generator=generator())
STATE = MODEL.state_dict()


def line(data=DATA, **options):
    return interpolate(MODEL, F.cross_entropy, data, STATE, STATE, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hessian.analyze(MODEL, F.cross_entropy, []), InputError, "no samples"),
        (
            lambda: hessian.analyze(MODEL, F.cross_entropy, (DATA[0] * float("nan"), DATA[1])),
            NonFiniteError,
            "loss is nan",
        ),
        (lambda: hessian.analyze(MODEL, F.cross_entropy, DATA, top=0, gauss_newton=False), InputError, "top must be"),
        (lambda: interpolate(MODEL, F.cross_entropy, [DATA], {}, {}, points=3), InputError, r"lacks 0\.bias"),
        (lambda: interpolate(MODEL, F.cross_entropy, [DATA], {}, {}, points=1), InputError, "at least 2 points"),
        (lambda: class_means(GaussNewton(MODEL, F.cross_entropy, DATA), 2), InputError, r"labels \(N,\) in 0..1"),
        (lambda: blobs(3, width=2, classes=5, generator=generator()), InputError, "cannot form 5 classes"),
        (lambda: perceptron([3]), InputError, "at least two layer sizes"),
        (lambda: largest_gap(torch.ones(1), 3), InputError, "at least 2 eigenvalues"),
        (lambda: hessian.analyze(MODEL, F.cross_entropy, (DATA[0], DATA[1] + 3)), InputError, "does not fit the model"),
        (lambda: line(points=2, beyond=1.0).barrier, InputError, "fewer than 2 points between"),
        (lambda: line(points=3, beyond=1.0).monotone, InputError, "fewer than 2 points between"),
        (lambda: line(data=(DATA[0] * float("nan"), DATA[1])).barrier, NonFiniteError, "two states is not finite"),
        (lambda: plane(MODEL, F.cross_entropy, DATA, (STATE, STATE, {})), InputError, r"lacks 0\.bias"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
