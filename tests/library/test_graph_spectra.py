"""Laplacians and their spectra: closed forms, golden numbers, Rayleigh identities, bounds, cuts, Lanczos, cache."""

import doctest
import math

import pytest
import torch

from library.errors import InputError, PrismError
from library.spectral import (
    Graphs,
    accumulated_energy,
    chebyshev,
    chebyshev_filter,
    chebyshev_terms,
    dense_laplacians,
    eigenpairs,
    graph_laplacians,
    graph_spectra,
    laplacian_filter,
    laplacian_matrix,
    one_hot_rayleigh_terms,
    propagation_matrix,
    rayleigh_quotients,
    rayleigh_terms,
    spectral_energies,
    symmetric_product,
)
from library.spectral import graphs as graphs_module
from tests.library.graph_cases import (
    CLOSED,
    complete,
    cycle,
    golden,
    golden_graphs,
    hypercube,
    path,
    random_graphs,
    star,
)

SIZES = [1, 2, 9, 5, 9, 14]


def signals_of(graphs: Graphs, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(graphs.num_nodes, channels, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_spectra(name: str) -> None:
    graph, expected = CLOSED[name]
    spectra = eigenpairs(graph)
    assert spectra.values.tolist() == pytest.approx(sorted(expected), abs=1e-12)
    values, vectors = spectra.graph(0)
    dense = dense_laplacians(graph)[0]
    assert torch.allclose(dense @ vectors, vectors * values, atol=1e-12)
    steps = [round(value, 6) for value in sorted(expected)]
    assert spectra.multiplicities(0) == [steps.count(value) for value in dict.fromkeys(steps)]


def test_multiplicities_stand_small_noise() -> None:
    assert eigenpairs(hypercube(4)).multiplicities(0) == [math.comb(4, k) for k in range(5)]
    graph = complete(6)
    weights = 1 + 1e-8 * torch.randn(graph.num_edges, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = Graphs.from_edges(graph.sizes, graph.edges, weights)
    assert eigenpairs(noisy).multiplicities(0) == [1, 5]


def test_bipartite_spectra_are_symmetric_about_one() -> None:
    for graph in (path(7), star(6), hypercube(3), cycle(8)):
        values = eigenpairs(graph).values
        assert torch.allclose(values, 2 - values.flip(0), atol=1e-12)


def test_zero_eigenvalues_count_the_components() -> None:
    graphs = random_graphs([8, 12, 15, 3], chance=0.12, seed=3)
    spectra = eigenpairs(graphs)
    for place in range(len(graphs)):
        own = graphs.components[graphs.graph_of_node == place]
        assert int((spectra.graph(place)[0].abs() < 1e-9).sum()) == len(own.unique())
    unlike = eigenpairs(graphs, isolated=1)
    alone = torch.bincount(graphs.graph_of_node[graphs.degrees == 0], minlength=4)
    assert int(alone.sum()) > 0
    zeros = [int((eigenpairs_of.abs() < 1e-9).sum()) for eigenpairs_of, _ in map(unlike.graph, range(4))]
    assert zeros == [int((spectra.graph(i)[0].abs() < 1e-9).sum()) - int(alone[i]) for i in range(4)]


@pytest.mark.parametrize("kind", ["normalised", "combinatorial"])
def test_sparse_and_dense_laplacians_are_one_block_diagonal_matrix(kind) -> None:
    graphs = random_graphs(SIZES, weighted=True)
    whole = laplacian_matrix(graphs, kind, isolated=1).to_dense()
    dense = dense_laplacians(graphs, kind, isolated=1)
    blocks = [dense[i, :size, :size] for i, size in enumerate(SIZES)]
    assert torch.equal(whole, torch.block_diag(*blocks))
    assert torch.equal(whole, whole.mT)
    with pytest.raises(InputError, match="no Laplacian"):
        dense_laplacians(graphs, "random-walk")


@pytest.mark.parametrize("name", ["rayleigh_a", "rayleigh_b"])
def test_golden_rayleigh_terms_and_energies(name: str) -> None:
    stored = golden("rqgnn", name)
    graphs, x = golden_graphs(stored), stored["x"].double()
    energies, squares = rayleigh_terms(graphs, x)
    close = {"rtol": 1e-9, "atol": 1e-10}
    assert torch.allclose(energies, stored["xLx"], **close)
    assert torch.allclose(squares, stored["xx"], **close)
    assert torch.allclose(rayleigh_quotients(graphs, x), stored["rq"], **close)
    assert torch.allclose(rayleigh_terms(graphs, x.float())[0], stored["xLx_reference"], atol=1e-5)
    spectra = eigenpairs(graphs)
    assert torch.allclose(spectra.values, stored["eigenvalues"], **close)
    found = spectral_energies(graphs, spectra, x)
    offsets = graphs.offsets.tolist()
    for place, size in enumerate(graphs.sizes.tolist()):
        own = slice(offsets[place], offsets[place] + size)
        values = stored["eigenvalues"][own]
        curve = accumulated_energy(spectra.graph(place)[0], found[own], values)
        ends = torch.cat([values.diff() > 1e-6, torch.tensor([True])])
        assert torch.allclose(curve[ends], stored["accumulated"][own][ends], **close)


def test_golden_kinds_give_the_terms_of_their_indicator_signals() -> None:
    stored = golden("rqgnn", "rayleigh_b")
    graphs, x = golden_graphs(stored), stored["x"].double()
    assert bool((x.sum(1) == 1).all())
    found = one_hot_rayleigh_terms(graphs, x.argmax(1), x.shape[1])
    assert torch.allclose(found[0], stored["xLx"], atol=1e-12)
    assert torch.equal(found[1], stored["xx"])
    with pytest.raises(InputError, match="from 0 to 1"):
        one_hot_rayleigh_terms(graphs, x.argmax(1), 2)


def test_the_rayleigh_quotient_has_three_forms() -> None:
    graphs = random_graphs(SIZES, weighted=True, chance=0.5)
    x = signals_of(graphs)
    spectra = eigenpairs(graphs)
    energies = spectral_energies(graphs, spectra, x)
    edge_form = rayleigh_quotients(graphs, x)
    matrix = laplacian_matrix(graphs)
    for place in range(len(graphs)):
        nodes = graphs.graph_of_node == place
        values, _ = spectra.graph(place)
        own = energies[nodes]
        assert torch.allclose(own.sum(0), torch.ones(3, dtype=torch.float64), atol=1e-12)
        assert torch.allclose((values[:, None] * own).sum(0), edge_form[place], atol=1e-12)
        curve = accumulated_energy(values, own, values)
        area = values[-1] - (values.diff()[:, None] * curve[:-1]).sum(0)
        assert torch.allclose(area, edge_form[place], atol=1e-10)
        assert bool((edge_form[place] <= values[-1] + 1e-12).all())
        quadratic = (x * (matrix @ x))[nodes].sum(0) / x[nodes].square().sum(0)
        assert torch.allclose(quadratic, edge_form[place], atol=1e-12)


def test_special_rayleigh_quotients() -> None:
    graphs = random_graphs(SIZES, chance=0.5)
    still = graphs.degrees.sqrt()[:, None]
    assert float(rayleigh_quotients(graphs, still).abs().max()) < 1e-12
    x = signals_of(graphs)
    assert torch.allclose(rayleigh_quotients(graphs, -7 * x), rayleigh_quotients(graphs, x), atol=1e-12)
    values, vectors = eigenpairs(graphs).graph(5)
    assert torch.allclose(rayleigh_quotients(graphs.select([5]), vectors)[0], values, atol=1e-12)
    alternating = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)[:, None]
    assert float(rayleigh_quotients(cycle(8), alternating)) == pytest.approx(2, abs=1e-12)
    assert float(rayleigh_quotients(hypercube(3), torch.ones(8, 1))) == pytest.approx(0, abs=1e-12)
    assert rayleigh_quotients(path(3), torch.zeros(3, 2)).tolist() == [[0, 0]]
    with pytest.raises(InputError, match="3 nodes"):
        rayleigh_quotients(path(3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 200.0),
        (torch.float16, 1e-6),
        (torch.float32, 1e-25),
        (torch.float32, 1e25),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
    ],
)
def test_a_signals_size_changes_no_quotient_and_no_energy(dtype, size) -> None:
    graphs = Graphs.concatenate([cycle(8), path(3)])
    alternating = torch.tensor([1.0, -1.0]).repeat(6)[:11, None]
    signals = (size * torch.cat([alternating, torch.ones(11, 1), torch.zeros(11, 1)], 1).double()).to(dtype)
    found = rayleigh_quotients(graphs, signals)
    assert found.dtype == dtype
    expected = rayleigh_quotients(graphs, (signals != 0) * signals.double().sign())
    assert torch.allclose(found.double(), expected, atol=1e-3)
    assert found[0].tolist() == pytest.approx([2, 0, 0], abs=1e-12)
    energies = spectral_energies(graphs, eigenpairs(graphs), signals)
    sums = torch.tensor([1.0, 1.0, 0.0]).double()
    assert torch.allclose(energies[:8].sum(0), sums)
    assert torch.allclose(energies[8:].sum(0), sums)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_signals_that_are_no_numbers_are_refused(bad) -> None:
    signals = torch.tensor([[bad], [1.0], [1.0]])
    spectra = eigenpairs(path(3))
    for call in (rayleigh_terms, rayleigh_quotients, lambda graphs, x: spectral_energies(graphs, spectra, x)):
        with pytest.raises(InputError, match="the signal of node 0, channel 0, is NaN or infinite"):
            call(path(3), signals)
        with pytest.raises(InputError, match="with 3 nodes, got"):
            call(path(3), torch.ones(4, 1))
    found = graph_laplacians.quotients(torch.tensor([math.nan, 1.0, 0.0]), torch.tensor([math.nan, 2.0, 0.0]))
    assert math.isnan(found[0])
    assert found[1:].tolist() == [0.5, 0]
    with pytest.raises(InputError, match=r"int64 from 0 to 2 for each of the 3 nodes, got torch\.float32"):
        one_hot_rayleigh_terms(path(3), torch.tensor([0.0, 1.0, 2.0]), 3)


def test_a_quotients_derivative_knows_its_scale() -> None:
    x = signals_of(cycle(5), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rayleigh_quotients(cycle(5), x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulated_energy_is_whole_at_repeated_eigenvalues_whatever_the_points_dtype(dtype) -> None:
    graph = cycle(8)
    spectra = eigenpairs(graph)
    values, energies = spectra.values, spectral_energies(graph, spectra, signals_of(graph))
    found = accumulated_energy(values, energies, torch.tensor([0.0, 1.0, 2.0], dtype=dtype))
    expected = torch.stack([energies[values < limit].sum(0) for limit in (0.1, 1.1, 2.1)])
    assert torch.allclose(found, expected, atol=1e-12)


def test_perturbations_move_a_quotient_within_the_papers_bounds() -> None:
    graph = random_graphs([12], chance=0.5, seed=2)
    matrix, x = dense_laplacians(graph)[0], signals_of(graph, 1)[:, 0]

    def quotient(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ matrix @ x / (x @ x)

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        delta = torch.randn(12, 12, dtype=torch.float64, generator=generator)
        delta = delta + delta.mT
        moved = (quotient(matrix + delta, x) - quotient(matrix, x)).abs()
        assert moved <= torch.linalg.matrix_norm(delta, 2) + 1e-12
    rayleigh = float(rayleigh_quotients(graph, x[:, None]))
    direction = torch.randn(12, dtype=torch.float64, generator=generator)
    errors = []
    for size in (1e-3, 5e-4):
        delta = size * direction
        first = 2 * (matrix @ x - rayleigh * x) @ delta / (x @ x)
        errors.append(abs(float(rayleigh_quotients(graph, (x + delta)[:, None])) - rayleigh - float(first)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_chebyshev_terms_are_cosines_of_the_spectrum() -> None:
    graphs = random_graphs(SIZES, chance=0.4)
    x = signals_of(graphs)
    spread = propagation_matrix(graphs, torch.float64)
    spectra = eigenpairs(graphs, isolated=1)  # S is zero at isolated nodes, so L~ = -S is I - S - I there
    terms = chebyshev_terms(spread, x, 6, sign=-1)
    for place in range(len(graphs)):
        nodes = graphs.graph_of_node == place
        values, vectors = spectra.graph(place)
        for k, term in enumerate(terms):
            scale = torch.cos(k * torch.arccos((values - 1).clamp(-1, 1)))
            assert torch.allclose(term[nodes], vectors @ (scale[:, None] * (vectors.mT @ x[nodes])), atol=1e-12)
    dense = chebyshev_terms(spread.to_dense(), x, 6, sign=-1)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(terms, dense, strict=True))
    with pytest.raises(InputError, match="at least one"):
        chebyshev_terms(spread, x, 0)


def test_a_polynomial_filter_equals_the_function_of_the_laplacian() -> None:
    graphs = random_graphs([10], chance=0.5, seed=1)
    x = signals_of(graphs)
    spread = propagation_matrix(graphs, torch.float64)
    values, vectors = eigenpairs(graphs, isolated=1).graph(0)
    rows = torch.stack([laplacian_filter(lambda t, s=s: torch.exp(-s * t), 30) for s in (0.5, 3.0)])
    found = chebyshev_filter(spread, x, rows, sign=-1)
    for s, image in zip((0.5, 3.0), found, strict=True):
        assert torch.allclose(image, vectors @ (torch.exp(-s * values)[:, None] * (vectors.mT @ x)), atol=1e-12)


def test_terms_reach_no_further_than_their_degree() -> None:
    graph = path(12)
    spread = propagation_matrix(graph)
    x = signals_of(graph).float()
    other = x.clone()
    other[6] += 1
    for k, (a, b) in enumerate(zip(chebyshev_terms(spread, x, 5), chebyshev_terms(spread, other, 5), strict=True)):
        changed = (a != b).any(1).nonzero().flatten()
        assert bool(((changed - 6).abs() <= k).all())
        assert len(changed) > 0


def test_the_product_is_differentiated_by_itself() -> None:
    spread = propagation_matrix(random_graphs([5, 4], chance=0.6), torch.float64)
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda block: symmetric_product(spread, block), x)
    assert torch.autograd.gradgradcheck(lambda block: symmetric_product(spread, block), x)


def test_cuts_keep_eigenspaces_whole() -> None:
    graphs = Graphs.concatenate([cycle(12), path(5)])  # the cycle's inner eigenvalues are double
    assert eigenpairs(graphs, count=4).counts.tolist() == [3, 4]
    assert eigenpairs(graphs, count=4, split="extend").counts.tolist() == [5, 4]
    kept = eigenpairs(graphs, count=4, split="keep")
    assert kept.counts.tolist() == [4, 4]
    assert float(kept.gaps[0]) < 1e-12
    assert float(eigenpairs(graphs, count=5).gaps[0]) == pytest.approx(math.cos(math.pi / 3) - 0, abs=1e-12)
    assert eigenpairs(graphs, count=20).gaps.tolist() == [math.inf, math.inf]
    with pytest.raises(InputError, match="after 4 eigenpairs of graph 0 splits the eigenspace of"):
        eigenpairs(graphs, count=4, split="error")
    with pytest.raises(InputError, match="which is its first"):
        eigenpairs(Graphs.from_edges([5], []), count=2)
    for count in (4, 5):  # whether the cut splits an eigenspace or not
        with pytest.raises(InputError, match="no split 'cut'; there are shrink, extend, keep, error"):
            eigenpairs(graphs, count=count, split="cut")
    with pytest.raises(InputError, match="isolated must be 0 or 1, got 5"):
        eigenpairs(graphs, isolated=5)
    for count in (0, 2.5, True):
        with pytest.raises(InputError, match="an integer and at least 1"):
            eigenpairs(graphs, count=count)


def test_spectra_are_picked_and_padded_by_graph() -> None:
    graphs = random_graphs(SIZES, chance=0.6, seed=4)
    spectra = eigenpairs(graphs, count=4, split="keep")
    chosen = torch.tensor([4, 0, 2])
    picked = spectra.select(chosen)
    for place, original in enumerate(chosen.tolist()):
        for a, b in zip(picked.graph(place), spectra.graph(original), strict=True):
            assert torch.equal(a, b)
    values, vectors = picked.padded(6)
    assert values.shape == (3, 6)
    assert vectors.shape == (19, 6)
    nodes = slice(int(picked.sizes[:2].sum()), 19)
    assert torch.equal(vectors[nodes, :4], picked.graph(2)[1])
    assert float(vectors[:, 4:].abs().sum()) == float(values[:, 4:].abs().sum()) == 0
    with pytest.raises(InputError, match="width 3"):
        picked.padded(3)


@pytest.mark.parametrize("kind", ["normalised", "combinatorial"])
def test_lanczos_finds_what_the_dense_solver_finds(kind) -> None:
    graphs = Graphs.concatenate([random_graphs([150], chance=0.01, seed=5), hypercube(7)])
    dense = eigenpairs(graphs, count=12, laplacian=kind, split="extend")
    sparse = eigenpairs(graphs, count=12, laplacian=kind, split="extend", dense_nodes=100)
    assert sparse.counts.tolist() == dense.counts.tolist()
    assert torch.allclose(sparse.values, dense.values, atol=1e-7)
    assert torch.allclose(sparse.gaps, dense.gaps, atol=1e-7)
    for place in range(2):
        (_, a), (_, b) = dense.graph(place), sparse.graph(place)
        assert torch.allclose(a @ a.mT, b @ b.mT, atol=1e-6)


def test_results_are_kept_by_content(tmp_path) -> None:
    graphs = random_graphs(SIZES)
    first = eigenpairs(graphs, cache=tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    again = eigenpairs(graphs, cache=tmp_path)
    assert all(
        torch.equal(getattr(first, name), getattr(again, name)) for name in ("counts", "values", "vectors", "gaps")
    )
    eigenpairs(graphs.select([0, 1, 2]), cache=tmp_path)
    eigenpairs(graphs, count=2, split="keep", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    files[0].write_bytes(b"broken")
    with pytest.raises(PrismError, match="cannot be read"):
        eigenpairs(graphs, cache=tmp_path)


@pytest.mark.parametrize("module", [graphs_module, graph_laplacians, graph_spectra, chebyshev])
def test_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
