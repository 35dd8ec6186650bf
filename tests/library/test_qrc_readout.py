"""The ridge read-out against closed forms: primal and dual, left-out samples, shards, duplicates, greedy choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.qrc.readout import ALPHAS, Moments, ridge_path
from library.qrc.selection import forward_selection


def problem(rows: int = 60, width: int = 7, outputs: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, width, dtype=torch.float64) + 5
    weights = torch.randn(width, outputs, generator=generator, dtype=torch.float64)
    return x, x @ weights + torch.randn(rows, outputs, generator=generator, dtype=torch.float64)


def plain_ridge(x: torch.Tensor, y: torch.Tensor, alpha: float, *, standardize: bool) -> torch.Tensor:
    """Predictions on x by the normal equations."""
    scale = x.std(0, correction=0) if standardize else torch.ones(x.shape[1], dtype=x.dtype)
    z = (x - x.mean(0)) / scale
    penalty = alpha * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return z @ torch.linalg.solve(z.T @ z + penalty, z.T @ (y - y.mean(0))) + y.mean(0)


@pytest.mark.parametrize("standardize", [True, False])
def test_all_alphas_of_one_decomposition_are_the_normal_equations(standardize):
    x, y = problem()
    for path in (
        ridge_path(x, y, standardize=standardize),
        Moments.of(x, y).path(standardize=standardize),
    ):
        for alpha, found in zip(ALPHAS, path.predictions(x), strict=True):
            assert torch.allclose(found, plain_ridge(x, y, alpha, standardize=standardize), atol=1e-8)


def test_more_features_than_samples_are_solved_as_the_dual_is():
    x, y = problem(rows=12, width=30)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    gram = z @ z.T
    for alpha, found in zip((1e-6, 1e-2), ridge_path(x, y, (1e-6, 1e-2)).predictions(x), strict=True):
        dual = torch.linalg.solve(gram + 12 * alpha * torch.eye(12, dtype=x.dtype), y - y.mean(0))
        assert torch.allclose(found, gram @ dual + y.mean(0), atol=1e-7)


def test_errors_of_left_out_samples_are_those_of_refitting_without_them():
    x, y = problem(rows=25, width=4)
    path = ridge_path(x, y, [0.0], standardize=False)
    errors = []
    for out in range(25):
        keep = torch.arange(25) != out
        again = ridge_path(x[keep], y[keep], [0.0], standardize=False)
        errors.append((y[out] - again.predictions(x[out : out + 1])[0, 0]) ** 2)
    assert torch.allclose(path.loo[0], torch.stack(errors).mean(0), rtol=1e-8)
    assert torch.allclose(path.gcv, Moments.of(x, y).path([0.0], standardize=False).gcv, rtol=1e-6)
    assert float(path.freedom) == pytest.approx(5)


def test_fits_through_every_sample_tell_no_error():
    x, y = problem(rows=40, width=60)
    path = ridge_path(x, y, [0.0, 1e-10, 1e-2])
    for errors in (path.loo, path.gcv, Moments.of(x, y).path([0.0, 1e-10, 1e-2]).gcv):
        assert torch.isinf(errors[0]).all()
        assert torch.isfinite(errors[2]).all()
    assert torch.isfinite(path.loo[1]).all()
    assert float(path.least(path.loo).alpha.min()) > 0


def test_a_huge_alpha_gives_the_mean_and_shifted_features_change_nothing():
    x, y = problem()
    far = ridge_path(x, y, [1e12]).predictions(x)[0]
    assert torch.allclose(far, y.mean(0).expand_as(far), atol=1e-6)
    moved = ridge_path(x + 100, y, [1e-3])
    assert torch.allclose(moved.weights, ridge_path(x, y, [1e-3]).weights, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.floats(-1e4, 1e4))
def test_moments_of_shards_add_up_to_those_of_all(sizes, offset):
    x, y = problem(rows=sum(sizes))
    x = x + offset
    whole = Moments.of(x, y)
    parts = Moments.total(Moments.of(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True))
    assert parts.count == whole.count
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(parts.scatter, whole.scatter, rtol=1e-7, atol=1e-7 * float(whole.scatter.abs().max()))


def test_moments_know_a_read_outs_error():
    x, y = problem()
    readout = ridge_path(x, y, [1e-2]).at(torch.tensor([0, 0]))
    other_x, other_y = problem(rows=33, seed=5)
    expected = (readout(other_x) - other_y).square().mean(0)
    assert torch.allclose(Moments.of(other_x, other_y).error(readout), expected, rtol=1e-9)


def test_copies_of_a_reservoir_predict_like_one_with_less_regularisation():
    """Duplicate columns, unstandardised: K copies at alpha are one copy at alpha / K."""
    x, y = problem()
    many = ridge_path(x.repeat(1, 3), y, [3e-2], standardize=False).predictions(x.repeat(1, 3))
    one = ridge_path(x, y, [1e-2], standardize=False).predictions(x)
    assert torch.allclose(many, one, atol=1e-9)


def test_more_features_never_fit_worse_and_constant_ones_get_no_weight():
    x, y = problem()
    more = torch.cat([x, torch.sin(x), torch.ones(60, 1, dtype=x.dtype)], 1)
    small, large = (ridge_path(part, y, [0.0]) for part in (x, more))
    assert ((large.predictions(more)[0] - y).square().sum(0) <= (small.predictions(x)[0] - y).square().sum(0)).all()
    assert not large.weights[0, -1].any()


def test_alpha_is_chosen_per_output_and_never_below_the_floor():
    x, y = problem()
    path = ridge_path(x, y)
    errors = torch.ones(len(ALPHAS), 2, dtype=torch.float64)
    errors[2, 0] = errors[5, 1] = 0
    assert path.least(errors).alpha.tolist() == [ALPHAS[2], ALPHAS[5]]
    assert path.least(errors, floor=ALPHAS[4]).alpha.tolist() == [ALPHAS[4], ALPHAS[5]]
    assert path.least(errors, floor=50.0).alpha.tolist() == [1.0, 1.0]


def test_greedy_choice_from_moments_is_the_one_by_refitting():
    whole = [part.split([200, 80, 80]) for part in problem(rows=360, width=12, outputs=1, seed=2)]
    (x, y), *tests = zip(*whole, strict=True)
    blocks = [[0, 1], [2, 3], [4, 5, 6], [7, 8], [9, 10, 11]]
    steps = forward_selection(
        Moments.of(x, y), [Moments.of(*part) for part in tests], blocks, most=4, alphas=(1e-4, 1e-2)
    )

    def error(chosen: list[int], alpha: float) -> float:
        columns = [column for number in chosen for column in blocks[number]]
        readout = ridge_path(x[:, columns], y, [alpha]).at(torch.tensor([0]))
        found = [(readout(a[:, columns]) - b).square().mean().sqrt() / b.std(correction=0) for a, b in tests]
        return float(sum(found) / len(found))

    chosen: list[int] = []
    for step in steps:
        tried = {
            (number, alpha): error([*chosen, number], alpha)
            for number in range(len(blocks))
            if number not in chosen
            for alpha in (1e-4, 1e-2)
        }
        best = min(tried, key=tried.get)
        assert (step.candidate, step.alpha) == best
        assert step.error == pytest.approx(tried[best], rel=1e-9)
        chosen.append(step.candidate)
    frugal = forward_selection(
        Moments.of(x, y), [Moments.of(*part) for part in tests], blocks, most=4, costs=[[2]] * 5, limits=[5]
    )
    assert [step.candidate for step in frugal] == [step.candidate for step in steps[:2]]
    assert len(steps) > 2
    assert [step.error for step in steps] == sorted((step.error for step in steps), reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ridge_path(x, y[:-1]), "all axes but the last must agree"),
        (lambda x, y: ridge_path(x * torch.nan, y), "features: 420 values are not finite"),
        (lambda x, y: ridge_path(x, y, [-1.0]), "at least 0"),
        (lambda x, y: ridge_path(x, y, []), "one or more"),
        (lambda x, y: ridge_path(x[:1], y[:1]), "at least 2"),
        (lambda x, y: Moments.total([]), "shards: none given"),
        (lambda x, y: forward_selection(Moments.of(x, y), [], [[0]], most=1), "at least one candidate"),
        (
            lambda x, y: forward_selection(Moments.of(x, y), [Moments.of(x, y * 0)], [[0]], most=1),
            "validation target is constant",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(*problem())
