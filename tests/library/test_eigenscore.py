"""EigenScore: golden numbers, invariances, closed forms, the determinant lemma, refusals."""

import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.send import eigenscore as module
from library.send.eigenscore import eigenscore, eigenscore_after_drop, eigenvalues, leave_one_out

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "send" / "eigenscore_ees.npz")
CONVENTIONS = ["inside", "inside-code", "svd"]


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def answers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=tolerance, atol=tolerance)


def dense(z: torch.Tensor, convention: str, alpha: float = 1e-3) -> torch.Tensor:
    """The definitions, written out."""
    k, d = z.shape
    if convention == "svd":
        s = np.linalg.svd(z.numpy() - z.numpy().mean(0), compute_uv=False)
        return torch.tensor(np.log(s**2 / (k - 1) + alpha).sum() / k)
    centring = np.eye(d) - np.ones((d, d)) / d
    sigma = z.numpy() @ centring @ z.numpy().T
    if convention == "inside-code":
        return torch.tensor(np.log10(np.linalg.eigvalsh(sigma / (d - 1) + alpha * np.eye(k))).mean())
    return torch.tensor(np.log(np.linalg.eigvalsh(sigma + alpha * np.eye(k))).mean())


def test_docstring_example_runs():
    assert doctest.testmod(module, extraglobs={"torch": torch}) == (0, 2)


def test_golden_scores():
    z, same = golden("Z"), golden("Z_identical")
    close(eigenscore(z), golden("inside_eigenscore_alpha1e-3"))
    close(eigenvalues(z), golden("inside_eigvals"))
    close(eigenscore(z, alpha=1e-5), golden("official_regular_eigenscore_alpha1e-5"))
    close(eigenscore(z, alpha=1e-3), golden("official_regular_eigenscore_alpha1e-3"))
    close(eigenscore(z, convention="svd"), golden("official_svd_eigenscore_alpha1e-3"))
    close(eigenscore(same), golden("inside_identical"))
    close(eigenscore(same, convention="svd"), golden("official_svd_identical"))


def test_golden_scores_after_drop():
    z, dropped = golden("Z"), golden("drop_idx")
    close(eigenscore_after_drop(z, dropped), golden("inside_after_drop"))
    before = eigenscore(z, convention="svd")
    close(before, golden("official_svd_eigenscore_before_drop"))
    close(eigenscore_after_drop(z, dropped, convention="svd") - before, golden("official_change_after_drop"))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(2, 2), (5, 9), (9, 5), (6, 6)])
def test_each_convention_is_its_definition_on_either_side(convention, shape):
    z = answers(*shape)
    close(eigenscore(z, convention=convention), dense(z, convention))
    logs = eigenvalues(z, convention=convention).log() / (math.log(10) if convention == "inside-code" else 1)
    close(logs.sum() / shape[0], dense(z, convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_batch_of_prompts_equals_its_prompts(convention):
    z = answers(2, 3, 5, 8)
    z[0, 1] *= 1e6  # takes the way of the ill-conditioned
    for function in (eigenscore, eigenvalues, leave_one_out):
        batched = function(z, convention=convention)
        singles = torch.stack([function(p, convention=convention) for p in z.flatten(0, 1)])
        close(batched.flatten(0, 1), singles)


@given(seed=st.integers(0, 2**31), k=st.integers(2, 7), d=st.integers(3, 9))
@settings(max_examples=40, deadline=None)
def test_invariances(seed, k, d):
    z = answers(k, d, seed=seed)
    score = eigenscore(z)
    generator = torch.Generator().manual_seed(seed)
    close(eigenscore(z[torch.randperm(k, generator=generator)]), score)
    close(eigenscore(z + answers(k, 1, seed=seed + 1)), score)
    fixed = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.randn(d, d - 1, generator=generator)], 1).double()).Q
    rotation = torch.linalg.qr(torch.randn(d - 1, d - 1, generator=generator, dtype=torch.float64)).Q
    rotation = fixed[:, :1] @ fixed[:, :1].mT + fixed[:, 1:] @ rotation @ fixed[:, 1:].mT
    close(eigenscore(z @ rotation), score)
    close(eigenscore(3 * z, alpha=9e-3), score + 2 * math.log(3))


@given(log_scale=st.floats(-3, 7), k=st.integers(2, 12), d=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_identical_answers_have_the_closed_form_at_any_scale(log_scale, k, d):
    z = 10**log_scale * answers(d)
    energy = k * (z - z.mean()).square().sum()
    expected = (torch.log(energy + 1e-3) + (k - 1) * math.log(1e-3)) / k
    close(eigenscore(z.expand(k, d)), expected, 1e-8)


def test_orthogonal_answers_of_equal_norm():
    directions = torch.linalg.qr(torch.cat([torch.ones(12, 1).double(), answers(12, 5)], 1)).Q[:, 1:].mT
    close(eigenscore(7 * directions), math.log(49 + 1e-3))


def test_score_from_the_feature_side():
    z, d, k = answers(6, 11), 11, 6
    centred = z - z.mean(-1, keepdim=True)
    feature_side = torch.linalg.slogdet(centred.mT @ centred + 1e-3 * torch.eye(d).double()).logabsdet / k
    close(eigenscore(z), feature_side - (d - k) * math.log(1e-3) / k)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3)])
def test_leave_one_out_equals_zeroing_each_feature(convention, shape):
    z = answers(*shape)
    singles = [eigenscore_after_drop(z, torch.tensor([i]), convention=convention) for i in range(shape[1])]
    close(leave_one_out(z, convention=convention), torch.stack(singles))


@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
@pytest.mark.parametrize(("shape", "scale"), [((10, 5), 30), ((5, 5), 100), ((40, 40), 10)])
def test_leave_one_out_is_right_where_answers_leave_the_range_of_the_centred_ones(shape, scale, alpha):
    z = scale * answers(*shape)
    singles = [eigenscore_after_drop(z, [i], alpha=alpha) for i in range(shape[1])]
    close(leave_one_out(z, alpha=alpha), torch.stack(singles), 1e-8)


def test_leave_one_out_of_answers_that_differ_by_constants():
    z = 5 * answers(40) + 20 * torch.arange(10).double()[:, None]
    close(leave_one_out(z), torch.stack([eigenscore_after_drop(z, [i]) for i in range(40)]), 1e-8)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_leave_one_out_survives_a_feature_that_dwarfs_the_others(convention):
    z = answers(2, 4, 10)
    z[0, :, 3] *= 1e7
    singles = [eigenscore_after_drop(z, torch.tensor([i]), convention=convention) for i in range(10)]
    close(leave_one_out(z, convention=convention), torch.stack(singles, -1), 1e-8)
    close(leave_one_out(z[0], convention=convention), leave_one_out(z, convention=convention)[0], 1e-8)


def test_sixteen_bit_embeddings_are_scored_in_float64():
    z = answers(4, 16).bfloat16()
    assert eigenscore(z).dtype == torch.float64
    close(eigenscore(z), eigenscore(z.double()), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eigenscore(answers(1, 5)), "K = 2 answers"),
        (lambda: eigenscore(answers(5, 1)), "d = 2 features"),
        (lambda: eigenscore(answers(5)), "shape"),
        (lambda: eigenscore(answers(4, 5), alpha=0.0), "alpha must be a positive"),
        (lambda: eigenscore(answers(4, 5), alpha=float("nan")), "alpha must be a positive"),
        (lambda: eigenscore(answers(4, 5), convention="outside"), "allowed: inside, inside-code, svd"),
        (lambda: eigenscore_after_drop(answers(4, 5), torch.tensor([5])), "from 0 to 4"),
        (lambda: eigenscore_after_drop(answers(4, 5), torch.tensor([-1])), "from 0 to 4"),
        (lambda: eigenscore_after_drop(answers(4, 5), torch.tensor([1.0])), "whole numbers"),
        (lambda: eigenscore_after_drop(answers(4, 5), torch.ones(5, dtype=torch.bool)), "whole numbers"),
        (lambda: eigenscore(answers(4, 5).numpy()), "tensor of real numbers, got ndarray"),
        (lambda: eigenscore(answers(4, 5) + 1j), "tensor of real numbers, got torch.complex128"),
        (lambda: eigenscore(1e155 * answers(4, 5)), "overflow float64"),
        (lambda: eigenvalues(1e155 * answers(4, 5)), "overflow float64"),
        (lambda: leave_one_out(1e155 * answers(4, 5)), "overflow float64"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_prompts_are_named(value):
    z = answers(6, 4, 5)
    z[2, 1, 3] = z[4, 0, 0] = value
    with pytest.raises(InputError, match=r"prompt 2, 4 hold NaN or infinity"):
        eigenscore(z)
    with pytest.raises(InputError, match=r"prompt \(1, 0\), \(2, 0\) hold"):
        eigenscore(z.reshape(3, 2, 4, 5))
