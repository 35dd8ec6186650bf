"""Exact properties of the encodings: what does not change them, closed forms, and how stable they are."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.errors import InputError
from library.spe import data
from library.spe.batch import GraphSample, collate_graphs
from library.spe.columns import Chunk, ColumnGin, GinLayer, factored_product, propagate
from library.spe.encode import bare_samples, encode
from library.spe.network import GraphNetwork, Spe, make_encoder, make_phi
from library.spe.norms import BatchNorm
from library.spe.perceptron import Perceptron
from library.spe.phi import SplinePhi, spline_basis
from library.spe.plain import plain_encodings
from library.spe.settings import Backbone, Encoding, Schema
from library.spe.stability import (
    cycle,
    laplacian_distance,
    log_slope,
    noisy_cycles,
    relative_changes,
    stability_bound,
    without_one_edge,
)
from library.spectral.graph_laplacians import dense_laplacians
from library.spectral.graph_spectra import GraphSpectra, eigenpairs
from library.spectral.graphs import Graphs

PHIS = ("mlp", "deepsets", "transformer", "spline", "one")
RHOS = ("gin", "mlp", "gin_deepsets")
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graphs() -> Graphs:
    """A cycle, a star, a complete graph, a path, a single node, two parts with an isolated node, a random graph."""
    star = [(0, i) for i in range(1, 7)]
    complete = [(i, j) for i in range(5) for j in range(i)]
    path = [(i, i + 1) for i in range(6)]
    parts = [(0, 1), (1, 2), (0, 2), (3, 4)]
    pairs = torch.triu_indices(9, 9, 1).T[torch.rand(36, generator=generator()) < 0.4].tolist()
    edges = [cycle(6).edges.T.tolist(), star, complete, path, [], parts, pairs]
    sizes = [6, 7, 5, 7, 1, 6, 9]
    flat = torch.tensor([pair for own in edges for pair in own]).T
    return Graphs.from_edges(sizes, flat, edge_counts=[len(own) for own in edges])


def encoder_of(encoding: Encoding, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return make_encoder(encoding).double().eval()


def rotated(spectra: GraphSpectra, *, signs: bool = False) -> GraphSpectra:
    """Another orthonormal basis of every eigenspace, or only other signs."""
    parts, random = [], generator(1)
    for place in range(len(spectra)):
        vectors, first = spectra.graph(place)[1].clone(), 0
        for size in spectra.multiplicities(place):
            turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
            block = -torch.eye(size, dtype=torch.float64) if signs else turn
            vectors[:, first : first + size] = vectors[:, first : first + size] @ block
            first += size
        parts.append(vectors.flatten())
    return GraphSpectra(spectra.sizes, spectra.counts, spectra.values, torch.cat(parts), spectra.gaps)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("pairs", [4, 12])
def test_neither_bases_nor_signs_of_eigenspaces_matter(phi, rho, pairs):
    encoding = Encoding(phi=phi, rho=rho, eigenpairs=pairs, split="shrink" if pairs > 9 else "keep")
    own = graphs().select([0, 2, 6]) if pairs > 9 else graphs().select([6])
    spectra = eigenpairs(own, count=pairs, split=encoding.split)
    encoder = encoder_of(encoding)
    expected = encode(encoder, own, encoding, spectra)
    torch.testing.assert_close(encode(encoder, own, encoding, rotated(spectra)), expected, **EXACT)
    assert expected.std(0).max() > 1e-3


def test_baselines_depend_on_what_they_depend_on():
    own = graphs().select([0, 1, 2])
    spectra = eigenpairs(own)
    changed = {}
    for method in ("peg", "signnet", "basisnet"):
        encoding = Encoding(method=method, eigenpairs=7)
        encoder = encoder_of(encoding)
        before = encode(encoder, own, encoding, spectra)
        for name, other in (("bases", rotated(spectra)), ("signs", rotated(spectra, signs=True))):
            changed[method, name] = float((encode(encoder, own, encoding, other) - before).norm() / before.norm())
    assert changed["peg", "signs"] > 0.5
    assert changed["peg", "bases"] > 0.5
    assert changed["signnet", "signs"] < 1e-10
    assert changed["signnet", "bases"] > 1e-4
    assert changed["basisnet", "signs"] < 1e-10
    assert changed["basisnet", "bases"] < 1e-10


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("method", ["spe", "signnet", "basisnet", "peg"])
def test_a_permutation_of_the_nodes_permutes_the_encodings(method, rho):
    encoding = Encoding(method=method, rho=rho, eigenpairs=9)
    own = graphs().select([6])
    order = torch.randperm(9, generator=generator(2))
    place = order.argsort()
    moved = Graphs.from_edges([9], place[own.edges])
    encoder = encoder_of(encoding) if method != "peg" else make_encoder(encoding)
    spectra = eigenpairs(own)
    vectors = spectra.graph(0)[1][order].flatten()
    there = GraphSpectra(spectra.sizes, spectra.counts, spectra.values, vectors, spectra.gaps)
    expected = encode(encoder, own, encoding, spectra)[order]
    torch.testing.assert_close(encode(encoder, moved, encoding, there), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rho", RHOS)
def test_the_mean_over_nodes_is_the_sum_over_their_number(rho):
    encoding = Encoding(rho=rho, eigenpairs=9, width=4)
    mean = encoding.model_copy(update={"over_nodes": "mean"})
    own, encoder = graphs(), encoder_of(encoding)
    other = encoder_of(mean)
    other.load_state_dict(encoder.state_dict())
    number = own.sizes.repeat_interleave(own.sizes)[:, None]
    torch.testing.assert_close(number * encode(other, own, mean), encode(encoder, own, encoding), **EXACT)


@pytest.mark.parametrize("size_step", [1, 4, 16])
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("phi", PHIS)
def test_neither_other_graphs_nor_padding_matter(phi, rho, size_step):
    """Each graph alone, all together, in padded buckets, and with more slots than any graph has nodes."""
    encoding = Encoding(phi=phi, rho=rho, eigenpairs=9, width=4)
    encoder, own = encoder_of(encoding), graphs()
    samples = bare_samples(own, encoding, dtype=torch.float64)
    together = encoder(collate_graphs(samples, eigenpairs=9, size_step=size_step))
    alone = torch.cat([encoder(collate_graphs([sample], eigenpairs=9)) for sample in samples])
    torch.testing.assert_close(together, alone, **EXACT)
    padded = encoder(collate_graphs(samples, eigenpairs=20, size_step=size_step))
    torch.testing.assert_close(padded, alone, **EXACT)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_the_fast_form_is_the_plain_one_in_training_too(norm):
    encoding = Encoding(phi="mlp", eigenpairs=9, norm=norm, between=norm == "batch", masked=False)
    batch = collate_graphs(bare_samples(graphs(), encoding, dtype=torch.float64), eigenpairs=9, size_step=3)
    found = []
    for run in (lambda encoder: encoder(batch), lambda encoder: plain_encodings(encoder, batch)):
        encoder = encoder_of(encoding).train()
        encodings = run(encoder)
        encodings.square().sum().backward()
        found.append((encodings.detach(), [p.grad for p in encoder.parameters()], list(encoder.buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-8)


def q_of(function: Tensor, vectors: Tensor) -> Tensor:
    """V diag(f) V^T of one graph, as the first layer forms it with an identity for its linear map."""
    identity = torch.nn.Linear(1, 1).double()
    torch.nn.init.ones_(identity.weight)
    torch.nn.init.zeros_(identity.bias)
    chunk = Chunk(torch.zeros(1, len(vectors), len(vectors)).double(), vectors[None], function[None, :, None])
    return factored_product(vectors[None], chunk, identity)[0, :, :, 0].detach()


def test_q_is_the_function_of_the_laplacian():
    own = graphs()
    laplacians, spectra = dense_laplacians(own), eigenpairs(own)
    for place in (0, 1, 2, 3, 6):
        values, vectors = spectra.graph(place)
        size = len(values)
        laplacian = laplacians[place, :size, :size]
        identity = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(q_of(torch.ones_like(values), vectors), identity, **EXACT)
        torch.testing.assert_close(q_of(values, vectors), laplacian, **EXACT)
        torch.testing.assert_close(q_of(1 - values, vectors), identity - laplacian, **EXACT)
        torch.testing.assert_close(q_of((-0.7 * values).exp(), vectors), torch.matrix_exp(-0.7 * laplacian), **EXACT)
        chebyshev = 2 * (laplacian - identity) @ (laplacian - identity) - identity
        torch.testing.assert_close(q_of(2 * (values - 1) ** 2 - 1, vectors), chebyshev, **EXACT)
        root = own.degrees[own.offsets[place] : own.offsets[place + 1]].sqrt()
        ground = root[:, None] * root / (root @ root)
        torch.testing.assert_close(q_of((values < 1e-9).double(), vectors), ground, **EXACT)


def test_spectra_of_known_graphs_and_an_isolated_node_has_eigenvalue_zero():
    spectra = eigenpairs(graphs())
    expected = {
        0: [0, 0.5, 0.5, 1.5, 1.5, 2],
        1: [0, 1, 1, 1, 1, 1, 2],
        2: [0, 1.25, 1.25, 1.25, 1.25],
        3: [1 - math.cos(math.pi * k / 6) for k in range(7)],
        4: [0],
        5: [0, 0, 0, 1.5, 1.5, 2],
    }
    for place, values in expected.items():
        torch.testing.assert_close(spectra.graph(place)[0], torch.tensor(values).double(), rtol=0, atol=1e-7)


def test_one_layer_without_a_perceptron_multiplies_by_the_adjacency():
    layer = GinLayer(Perceptron(2, 2, 2, layers=2, norm="none")).double()
    torch.nn.init.constant_(layer.eps, -1.0)
    adjacency = torch.rand(3, 5, 5, generator=generator()).round().double()
    x = torch.randn(3, 5, 4, 2, generator=generator()).double()
    found = propagate(layer, adjacency, x, torch.zeros(2).double())
    torch.testing.assert_close(found, torch.einsum("bij,bjch->bich", adjacency, x), **EXACT)


def test_weights_of_rows_are_repetitions_in_batch_statistics():
    rows = torch.randn(6, 3, generator=generator()).double()
    counts = torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0, 1.0]).double()
    weighted, repeated = BatchNorm(3).double(), torch.nn.BatchNorm1d(3).double()
    found = weighted([rows[:2], rows[2:]], [counts[:2], counts[2:]])
    expected = repeated(rows.repeat_interleave(counts.long(), 0))
    torch.testing.assert_close(torch.cat(found)[[0, 2, 3, 4, 5]], expected[[0, 1, 4, 5, 7]], **EXACT)
    torch.testing.assert_close(weighted.running_var, repeated.running_var, **EXACT)
    torch.testing.assert_close(weighted.running_mean, repeated.running_mean, **EXACT)


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives_pass_through_batch_statistics(relu):
    rows = [torch.randn(n, 3, generator=generator(n)).double().requires_grad_() for n in (4, 1, 5)]
    counts = [torch.tensor([1.0, 0.0, 3.0, 1.0]).double(), torch.tensor([2.0]).double(), torch.arange(5).double()]
    norm, factors = BatchNorm(3).double(), torch.randn(2, 3, generator=generator()).double().unbind()
    norm.weight.data, norm.bias.data = factors

    def normalized(weight, bias, *rows):
        found = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (rows, counts), {"relu": relu})
        return tuple(found)

    inputs = [factor.clone().requires_grad_() for factor in factors] + rows
    assert torch.autograd.gradcheck(normalized, inputs)
    assert torch.autograd.gradgradcheck(normalized, inputs)  # curvature of the loss


def test_batch_norm_refuses_a_single_row():
    with pytest.raises(InputError, match="at least two rows"):
        BatchNorm(3)([torch.ones(1, 3)])


def test_splines_are_smooth_and_bounded_as_stated():
    t = torch.linspace(0, 2, 4001, dtype=torch.float64)
    basis = spline_basis(t, 7)
    torch.testing.assert_close(basis.sum(1), torch.ones_like(t), **EXACT)
    jumps = [basis.diff(n=order, dim=0).abs().max() * 2000**order for order in (1, 2)]
    assert jumps[0] < 7 / 2
    assert jumps[1] < 4 * (7 / 2) ** 2
    torch.manual_seed(0)
    spline = SplinePhi(5, 7).double()
    slopes = spline(t[None], torch.tensor([len(t)]))[0].diff(dim=0).abs().amax(0) * 2000
    assert (slopes <= spline.lipschitz_bound(1) + 1e-9).all()
    assert (slopes > 0.3 * spline.lipschitz_bound(1)).all()


@pytest.mark.parametrize("phi", ["mlp", "deepsets", "spline"])
def test_lipschitz_bounds_hold(phi):
    encoding = Encoding(phi=phi, eigenpairs=6, channels=3)
    torch.manual_seed(3)
    network = make_phi(encoding).double().eval()
    random = generator()
    a = torch.rand(400, 6, generator=random).double() * 2
    b = (a + 0.05 * torch.randn(400, 6, generator=random).double()).clamp(0, 2)
    kept = torch.full((400,), 6)
    change = (network(a, kept) - network(b, kept)).norm(dim=1) / (a - b).norm(dim=1)[:, None]
    assert (change <= network.lipschitz_bound(6)).all()
    assert float(network.lipschitz_bound(6).sum().detach()) > 0


FUNCTIONS = {
    "heat": (lambda t: (-1.3 * t).exp(), 1.3),
    "sine": (lambda t: (5 * t).sin(), 5.0),
    "identity": (lambda t: t, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_all_eigenvalues_change_by_no_more_than_their_lipschitz_constant(name):
    function, constant = FUNCTIONS[name]
    before = graphs()
    after = without_one_edge(before, generator(5))
    distances = laplacian_distance(before, after)
    old, new = eigenpairs(before), eigenpairs(after)
    for place, distance in enumerate(distances.tolist()):
        first, second = (q_of(function(v), u) for v, u in (old.graph(place), new.graph(place)))
        assert float((first - second).norm()) <= constant * distance + 1e-12


def test_the_theorems_bound_holds_with_measured_constants():
    """rho is the identity, of constant 1; K and M are those of splines on a fine grid."""
    torch.manual_seed(1)
    spline, t = SplinePhi(4, 6).double(), torch.linspace(0, 2, 2001).double()
    curve = spline(t[None], torch.tensor([len(t)]))[0].detach()
    lipschitz = float((curve.diff(dim=0).abs().amax(0) * 1000).sum())
    for pairs in (3, 9):
        before, after = noisy_cycles(12, torch.logspace(-6, -0.7, 12), generator())
        largest = float(curve.abs().amax(0).sum()) * math.sqrt(pairs)
        distances = laplacian_distance(before, after)
        old, new = eigenpairs(before, count=pairs, split="error"), eigenpairs(after, count=pairs, split="keep")
        for place, distance in enumerate(distances.tolist()):
            change = 0.0
            for channel in range(4):
                first, second = (
                    q_of(spline(v[None], torch.tensor([pairs]))[0, :, channel].detach(), u)
                    for v, u in (old.graph(place), new.graph(place))
                )
                change += float((first - second).square().sum())
            gap = max(float(old.gaps[place]), float(new.gaps[place]))
            bound = stability_bound(distance, gap, pairs, lipschitz=lipschitz, largest=largest)
            assert 0 < math.sqrt(change) <= bound


def test_spe_follows_small_changes_linearly_and_the_baselines_jump():
    before, after = noisy_cycles(12, torch.logspace(-6, -1.5, 8), generator())
    distances = laplacian_distance(before, after)
    slopes = {}
    for method in ("spe", "signnet", "basisnet", "peg"):
        encoding = Encoding(method=method, eigenpairs=9, width=16)
        encoder = encoder_of(encoding) if method != "peg" else make_encoder(encoding)
        changes = relative_changes(encoder, before, after, encoding)
        slopes[method] = log_slope(distances, changes)[0]
        if method == "basisnet":
            assert float(changes.max() / changes.min()) > 1e4  # nothing until rounding parts an eigenspace
        elif method != "spe":
            assert changes[0] > 1e-4
    assert slopes["spe"] == pytest.approx(1, abs=0.05)
    assert abs(slopes["signnet"]) < 0.1
    assert abs(slopes["peg"]) < 0.2


def test_a_cut_inside_an_eigenspace_moves_or_is_refused():
    own = cycle(12)
    for pairs, kept in ((9, 9), (8, 7), (2, 1)):
        encoding = Encoding(eigenpairs=pairs)
        assert len(bare_samples(own, encoding)[0].values) == kept
    with pytest.raises(InputError, match="splits the eigenspace"):
        bare_samples(own, Encoding(eigenpairs=8, split="error"))


def test_graphs_that_are_too_large_are_refused_by_what_grows_with_their_square():
    own = Graphs.concatenate([cycle(6), cycle(12)])
    with pytest.raises(InputError, match="graph 1 has 12 nodes, and memory grows with their square; at most 10"):
        bare_samples(own, Encoding(most_nodes=10))
    assert len(bare_samples(own, Encoding(method="signnet", most_nodes=10))) == 2


@pytest.mark.parametrize("value", [-1e-4, 2.001])
def test_eigenvalues_that_no_normalised_laplacian_has_are_refused(monkeypatch, value):
    def found(graphs: Graphs, **options: object) -> GraphSpectra:
        spectra = eigenpairs(graphs)
        return replace(spectra, values=torch.full_like(spectra.values, value))

    monkeypatch.setattr(data, "eigenpairs", found)
    with pytest.raises(InputError, match="none outside 0 to 2"):
        bare_samples(cycle(5), Encoding())


def test_basisnet_refuses_more_dimensions_than_it_has_networks_for():
    encoding = Encoding(method="basisnet", eigenpairs=7, multiplicities=3)
    with pytest.raises(InputError, match="5 dimensions, BasisNet has networks for up to 3"):
        encode(encoder_of(encoding), graphs(), encoding)


def features(samples: list[GraphSample]) -> list[GraphSample]:
    random = generator(4)
    return [
        sample._replace(
            nodes=torch.randint(3, sample.nodes.shape, generator=random),
            attributes=torch.randint(2, sample.attributes.shape, generator=random),
        )
        for sample in samples
    ]


@pytest.mark.parametrize("edge_types", [0, 2])
@pytest.mark.parametrize("method", ["spe", "peg", "signnet", "basisnet"])
def test_predictions_depend_on_the_eigenvectors_and_all_weights_are_used(method, edge_types):
    encoding = Encoding(method=method, eigenpairs=9, multiplicities=1, norm="layer")
    samples = features(bare_samples(graphs().select([3, 6]), encoding, dtype=torch.float64))
    torch.manual_seed(0)
    schema = Schema(node_types=3, edge_types=edge_types)
    network = GraphNetwork(encoding, Backbone(layers=2, hidden=8, norm="layer"), schema).double().eval()
    before = network(collate_graphs(samples, eigenpairs=9))
    noisy = [s._replace(vectors=torch.randn(s.vectors.shape, generator=generator()).to(s.vectors)) for s in samples]
    after = network(collate_graphs(noisy, eigenpairs=9))
    assert (after - before).abs().max() > 1e-6
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("inject", ["input", "every_layer"])
@pytest.mark.parametrize("join", ["add", "concat"])
@pytest.mark.parametrize("method", ["spe", "none", "peg", "signnet", "basisnet"])
def test_predictions_are_of_each_graph_alone_and_every_weight_learns(method, join, inject):
    encoding = Encoding(method=method, eigenpairs=9, multiplicities=9, channels=3)
    samples = features(bare_samples(graphs(), encoding, dtype=torch.float64))
    torch.manual_seed(0)
    schema = Schema(node_types=3, edge_types=2, targets=("a", "b"))
    network = GraphNetwork(encoding, Backbone(layers=2, hidden=8, join=join, inject=inject), schema).double()
    together = network.eval()(collate_graphs(samples, eigenpairs=9))
    alone = torch.cat([network(collate_graphs([sample], eigenpairs=9)) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=1e-8)
    network.train()(collate_graphs(samples, eigenpairs=9)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    idle = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0]
    assert not [name for name in idle if ".nets." not in name]  # networks of multiplicities that are not there


def test_parts_that_do_not_fit_together_are_refused():
    for settings, message in (
        ({"phi": "transformer", "phi_hidden": 6, "heads": 4}, "no multiple"),
        ({"rho": "mlp", "rho_layers": 1}, "at least 2"),
        ({"mlp_layers": 1}, "greater than or equal to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoding(**settings)
    with pytest.raises(ValueError, match="types or features"):
        Schema(node_types=3, node_features=2)


def test_a_gin_of_columns_trains_with_dropout_and_keeps_its_width():
    gin = ColumnGin(1, 4, 3, layers=2, mlp_layers=2, mlp_hidden=5, norm="layer", dropout=0.5)
    assert gin.last.out_features == 3
    assert gin.last.in_features == 5
    encoding = Encoding(eigenpairs=6)
    spe = Spe(encoding, dropout=0.5)
    batch = collate_graphs(bare_samples(cycle(6), encoding), eigenpairs=6)
    torch.manual_seed(0)
    assert not torch.equal(spe(batch), spe(batch))
    assert torch.equal(spe.eval()(batch), spe(batch))
