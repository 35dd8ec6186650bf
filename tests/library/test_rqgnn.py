"""RQGNN: the official numbers, equal formulations, invariances, the loss, the metrics."""

import doctest

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from library import calibration
from library.calibration import PlattScaling
from library.errors import InputError
from library.rqgnn import loss, metrics
from library.rqgnn.baselines import GCN, GIN
from library.rqgnn.batches import PreparedGraphs, prepare
from library.rqgnn.loss import class_weights, focal_loss
from library.rqgnn.metrics import average_precision, best_threshold, detection_metrics, macro_f1
from library.rqgnn.model import RQGNN
from library.spectral import Graphs, chebyshev_terms, propagation_matrix
from tests.library.graph_cases import golden, golden_graphs, path, permuted, random_graphs

LINEAR = {
    "node_first": "linear",
    "node_second": "linear2",
    "mix_first": "linear3",
    "mix_second": "linear4",
    "branch_first": "linear5",
    "branch_second": "linear6",
    "head": "linear7",
    "query_first": "linear8",
    "query_second": "linear9",
}


@torch.no_grad()
def official(stored: dict[str, torch.Tensor]) -> RQGNN:
    """The network with the golden weights."""
    features, width, depth = stored["x"].shape[1], int(stored["width"]), int(stored["depth"])
    net = RQGNN(features, hidden=int(stored["hidden"]), width=width, depth=depth, dropout=0.0)
    for ours, theirs in LINEAR.items():
        net.get_parameter(f"{ours}.weight").copy_(stored[f"w.{theirs}.weight"])
        net.get_parameter(f"{ours}.bias").copy_(stored[f"w.{theirs}.bias"])
    net.norm.weight.copy_(stored["w.bn.weight"])
    net.norm.bias.copy_(stored["w.bn.bias"])
    net.norm.running_mean.copy_(stored["w.bn.running_mean"])
    net.norm.running_var.copy_(stored["w.bn.running_var"])
    for i in range(width):
        own = slice(i * features, (i + 1) * features)
        net.theta_bias[own] = stored[f"conv.{i}.bias"]
        for k in range(depth):
            net.theta[k, :, own] = stored[f"conv.{i}.lins.{k}.weight"].mT
    return net


def golden_batch(stored: dict[str, torch.Tensor], *, kinds: bool = False) -> PreparedGraphs:
    x = stored["x"]
    nodes = {"kinds": x.argmax(1), "count": x.shape[1]} if kinds else {"features": x}
    return prepare(golden_graphs(stored), **nodes, labels=stored["label"], depth=int(stored["depth"]))


@pytest.mark.parametrize(("name", "kinds"), [("model_a", False), ("model_b", False), ("model_b", True)])
def test_golden_network_loss_and_gradients(name: str, kinds: bool) -> None:
    stored = golden("rqgnn", name)
    net, batch = official(stored), golden_batch(stored, kinds=kinds).whole()
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(net.eval()(batch), stored["logits_eval"], **close)
    logits = net.train()(batch)
    assert torch.allclose(logits, stored["logits_train"], **close)
    weights = class_weights(stored["samples_per_class"], float(stored["beta"]))
    value = focal_loss(logits, stored["label"], weights, float(stored["gamma"]))
    assert float(value.detach()) == pytest.approx(float(stored["loss_train"]), rel=1e-4)
    value.backward()
    close = {"rtol": 1e-3, "atol": 1e-5}
    for ours, theirs in LINEAR.items():
        for part in ("weight", "bias"):
            assert torch.allclose(net.get_parameter(f"{ours}.{part}").grad, stored[f"g.{theirs}.{part}"], **close)
    features = stored["x"].shape[1]
    for i in range(int(stored["width"])):
        own = slice(i * features, (i + 1) * features)
        assert torch.allclose(net.theta_bias.grad[own], stored[f"gconv.{i}.bias"], **close)
        for k in range(int(stored["depth"])):
            assert torch.allclose(net.theta.grad[k, :, own], stored[f"gconv.{i}.lins.{k}.weight"].mT, **close)


@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_golden_filter_bank(name: str) -> None:
    stored = golden("rqgnn", name)
    net = official(stored)
    terms = chebyshev_terms(propagation_matrix(golden_graphs(stored)), stored["cheb_in"], int(stored["depth"]), sign=-1)
    found = sum(term @ theta for term, theta in zip(terms, net.theta, strict=True)) + net.theta_bias
    assert torch.allclose(found, stored["cheb_out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", range(5))
def test_golden_losses_and_metrics(case: int) -> None:
    stored = {k.split(".")[1]: v for k, v in golden("rqgnn", "loss_metrics_a").items() if k.startswith(f"{case}.")}
    logits = stored["logits"].clone().requires_grad_()
    weights = class_weights(stored["samples_per_class"], float(stored["beta"]))
    value = focal_loss(logits, stored["label"], weights, float(stored["gamma"]))
    value.backward()
    assert float(value.detach()) == pytest.approx(float(stored["loss"]), rel=1e-5)
    assert torch.allclose(logits.grad, stored["grad"], rtol=1e-5, atol=1e-7)
    if "auc" in stored:
        found = detection_metrics(stored["logits"].softmax(1)[:, 1], stored["label"])
        assert found["auc"] == pytest.approx(float(stored["auc"]), abs=1e-9)
        assert macro_f1(stored["logits"].argmax(1) == 1, stored["label"]) == pytest.approx(float(stored["macro_f1"]))
        assert found["macro_f1"] == pytest.approx(float(stored["macro_f1"]))


OPTIONS = [
    {},
    {"filters": "frozen"},
    {"rq_on": "latent", "normalise_rq": True, "shared_query": True},
    {"rq_on": "counts", "normalise_rq": False},
    {"pooling": "rq-mean"},
    {"pooling": "attention"},
    {"pooling": "mean", "branch": False},
    {"pooling": "sum"},
    {"pooling": "max", "normalise_rq": True},
]


def networks() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [
        *(RQGNN(5, hidden=8, width=3, depth=4, **options).double() for options in OPTIONS),
        GIN(5, hidden=8).double(),
        GCN(5, hidden=8).double(),
    ]


def doubled(prepared: PreparedGraphs, chosen: list[int]):
    """A batch in float64, to compare orders of summation to rounding."""

    def wide(part):
        return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part

    batch = prepared.batch(torch.tensor(chosen))
    return type(batch)(*map(wide, batch))


GRAPHS = random_graphs([6, 1, 9, 4, 7], chance=0.4, seed=1)
KINDS = torch.randint(0, 5, (GRAPHS.num_nodes,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("net", networks(), ids=lambda net: type(net).__name__)
def test_both_formulations_and_all_orders_give_the_same(net: torch.nn.Module) -> None:
    net.eval()
    by_kind = prepare(GRAPHS, kinds=KINDS, count=5, depth=4)
    by_feature = prepare(GRAPHS, features=torch.nn.functional.one_hot(KINDS, 5).float(), depth=4)
    whole = net(doubled(by_kind, [0, 1, 2, 3, 4]))
    close = {"rtol": 1e-5, "atol": 1e-6}  # what is prepared is kept in float32
    assert torch.allclose(whole, net(doubled(by_feature, [0, 1, 2, 3, 4])), **close)
    assert torch.allclose(whole[[3, 0, 4]], net(doubled(by_kind, [3, 0, 4])), atol=1e-12)
    assert torch.allclose(whole[2:3], net(doubled(by_kind, [2])), atol=1e-12)
    one, own = GRAPHS.select([2]), KINDS[GRAPHS.nodes_of(torch.tensor([2]))]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    turned = prepare(permuted(one, order), kinds=own[order], count=5, depth=4)
    assert torch.allclose(whole[2:3], net(doubled(turned, [0])), **close)


@pytest.mark.parametrize("net", networks(), ids=lambda net: type(net).__name__)
def test_half_precision_is_near_and_learns(net: torch.nn.Module) -> None:
    net = net.float().eval()
    for nodes in ({"kinds": KINDS, "count": 5}, {"features": torch.nn.functional.one_hot(KINDS, 5).float()}):
        batch = prepare(GRAPHS, **nodes, depth=4).whole()
        exact = net(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(batch).float()
        assert float((found - exact).detach().abs().max()) < 0.05 * float(exact.detach().abs().max())
        found.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_a_node_sees_depth_minus_one_steps_far() -> None:
    graph, kinds = path(12), torch.zeros(12, dtype=torch.int64)
    net = RQGNN(3, hidden=8, width=2, depth=4)
    other = kinds.clone()
    other[2] = 1
    channels = []
    for own in (kinds, other):
        batch = prepare(graph, kinds=own, count=3, depth=4).whole()
        channels.append(net.node_channels(batch, net._node_layers(None), None))
    changed = (channels[0] != channels[1]).any(1).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 3, 4, 5]


def test_frozen_filters_are_kept_but_do_not_learn() -> None:
    net = RQGNN(5, hidden=8, width=3, depth=4, filters="frozen")
    assert "theta" in net.state_dict()
    assert not {"theta", "theta_bias"} & dict(net.named_parameters()).keys()
    official_size = sum(p.numel() for p in RQGNN(55, filters="frozen").parameters())
    assert official_size == 40_466
    assert RQGNN(55).theta.numel() + RQGNN(55).theta_bias.numel() == 72_820


def test_prepared_terms_need_kinds_or_features() -> None:
    with pytest.raises(InputError, match="either kinds or features"):
        prepare(GRAPHS, depth=3)
    with pytest.raises(InputError, match="from 0 to 2"):
        prepare(GRAPHS, kinds=KINDS, count=3, depth=3)
    for bad, message in ((float("nan"), "of node 0, channel 0, is NaN"), (1e20, "feature 0 of graph 0 is too large")):
        with pytest.raises(InputError, match=message):
            prepare(path(2), features=torch.tensor([[bad], [0.0]]), depth=3)
    alone = prepare(Graphs.from_edges([3], []), kinds=torch.tensor([0, 1, 1]), count=2, depth=3).whole()
    assert float(alone.energies.abs().sum()) == 0
    assert alone.squares.tolist() == [[1, 2]]
    assert torch.isfinite(RQGNN(2, hidden=4, depth=3, normalise_rq=True).eval()(alone)).all()


def test_class_weights_between_their_limits() -> None:
    counts = torch.tensor([900, 100])
    assert class_weights(counts, 0.0).tolist() == [1, 1]
    assert class_weights(counts, 1 - 1e-9).tolist() == pytest.approx([0.2, 1.8], rel=1e-5)
    assert class_weights(torch.tensor([50, 50]), 0.99).tolist() == pytest.approx([1, 1])
    assert class_weights(torch.tensor([0, 5]), 0.99).tolist() == [0, 2]
    assert class_weights(torch.tensor([17_833, 1_605]), 0.999).tolist() == pytest.approx([0.889, 1.111], abs=1e-3)
    for beta in (1.0, -0.1):
        with pytest.raises(InputError, match="beta"):
            class_weights(counts, beta)
    with pytest.raises(InputError, match="no class"):
        class_weights(torch.tensor([0, 0]), 0.9)


def test_the_loss_has_its_limits_its_gradient_and_no_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    plain = focal_loss(logits, labels, torch.ones(2), 0.0)
    target = torch.nn.functional.one_hot(labels, 2).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 6
    assert float((plain - expected).detach()) == pytest.approx(0, abs=1e-12)
    weights = torch.tensor([0.3, 1.7])
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, weights, 1.5), logits)
    for bad in (torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(InputError, match="labels must be int64 from 0 to 1"):
            focal_loss(torch.zeros(2, 2), bad, weights, 1.5)
    for size in (89.0, 1e4):
        extreme = torch.tensor([[size, -size], [-size, size]], requires_grad=True)
        value = focal_loss(extreme, torch.tensor([0, 0]), torch.ones(2), 1.5)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(extreme.grad).all()
        assert float(value.detach()) == pytest.approx(size, rel=1e-5)  # the second graph's, two logits over two graphs


def test_metrics_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(300, generator=generator) < 0.15
    scores = ((torch.randn(300, generator=generator) + labels) / 8).sigmoid().mul(40).round() / 40
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    threshold, best = best_threshold(scores, labels)
    by_hand = {t: f1_score(labels, scores >= t, average="macro", zero_division=0) for t in scores.unique().tolist()}
    assert best == pytest.approx(max(by_hand.values()), abs=1e-12)
    assert macro_f1(scores >= threshold, labels) == pytest.approx(best, abs=1e-12)
    found = detection_metrics(scores, labels, threshold=threshold)
    assert found["macro_f1"] == found["best_macro_f1"]
    for call in (best_threshold, detection_metrics):
        with pytest.raises(InputError):
            call(scores, torch.zeros(300, dtype=torch.bool))
    with pytest.raises(InputError, match="positive"):
        average_precision(scores, torch.zeros(300))


def test_equally_likely_classes_are_called_normal_unless_a_threshold_says_otherwise() -> None:
    probabilities, labels = torch.tensor([0.5, 0.5, 0.9, 0.1]), torch.tensor([0, 0, 1, 1])
    published = f1_score(labels, [0, 0, 1, 0], average="macro")
    reached = f1_score(labels, [1, 1, 1, 0], average="macro")
    assert detection_metrics(probabilities, labels)["macro_f1"] == pytest.approx(published)
    assert detection_metrics(probabilities, labels, threshold=0.5)["macro_f1"] == pytest.approx(reached)


def test_platt_scaling_keeps_ranks_and_matches_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = 3 * torch.randn(4000, dtype=torch.float64, generator=generator)
    labels = torch.rand(4000, generator=generator) < torch.sigmoid(0.5 * margins - 2)
    scaling = PlattScaling.fit(margins, labels)
    assert scaling.slope == pytest.approx(0.5, abs=0.05)
    assert scaling.offset == pytest.approx(-2, abs=0.15)
    found = scaling.probability(margins)
    assert float(found.mean()) == pytest.approx(float(labels.double().mean()), abs=2e-3)
    assert torch.equal(found.argsort(), margins.argsort())
    against = PlattScaling.fit(-margins, labels)
    assert against.slope * float(margins.std(correction=0)) == pytest.approx(1e-3)
    apart = PlattScaling.fit(torch.tensor([-1.0, 1.0]), torch.tensor([False, True]))
    assert 0.5 < float(apart.probability(1.0)) < 1
    with pytest.raises(InputError, match="both labels"):
        PlattScaling.fit(margins, torch.ones(4000))


@pytest.mark.parametrize(("centre", "spread", "slope"), [(1000, 1, 0.0), (1e4, 5e3, 3e-4), (50, 2, -1.0), (7, 0, 0.0)])
def test_platt_scaling_keeps_the_share_of_positives_wherever_the_margins_lie(centre, spread, slope) -> None:
    generator = torch.Generator().manual_seed(1)
    margins = centre + spread * torch.randn(4000, dtype=torch.float64, generator=generator)
    labels = torch.rand(4000, generator=generator) < torch.sigmoid(slope * (margins - centre) - 1)
    scaling = PlattScaling.fit(margins, labels)
    assert scaling.slope > 0
    found = scaling.probability(margins)
    assert float(found.mean()) == pytest.approx(float(labels.double().mean()), abs=2e-3)
    if slope > 0:
        assert scaling.slope == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize("module", [loss, metrics, calibration])
def test_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
