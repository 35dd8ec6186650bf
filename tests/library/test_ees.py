"""Efficient EigenScore: golden numbers, closed-form coefficients, probes against exact traces, the rule, refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from library.errors import InputError
from library.send.ees import choose_method, ees, paper_coefficients, regularised_coefficients, regularised_degree
from library.spectral.density import chebyshev_coefficients, chebyshev_moments
from library.spectral.trace import random_probes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "send" / "eigenscore_ees.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def answers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=tolerance, atol=tolerance)


def spectrum(z: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of A by their definition."""
    x = (z - z.mean(0)) / z.std(0, correction=0)
    s = torch.linalg.svdvals(x)
    return torch.nn.functional.pad((s / s[0]) ** 2, (0, len(z) - len(s)))


def test_golden_values():
    z = golden("Z")
    close(paper_coefficients(20), golden("c_m_exact"))
    close(ees(z, method="exact").value, golden("ees_kpm_exact_trace"))
    close(ees(z, method="kpm", probes=golden("probes")).value, golden("ees_kpm_given_probes"))


@pytest.mark.parametrize(("shape", "moments"), [((100, 300), 10), ((100, 300), 100), ((200, 300), 20)])
def test_given_probes_see_the_definition_of_many_answers(shape, moments):
    z, probes = answers(*shape), answers(shape[0], 20, seed=1)
    x = (z - z.mean(0)) / z.std(0, correction=0)
    x = x / torch.linalg.matrix_norm(x, 2)
    expected = chebyshev_moments(x @ x.mT, probes, moments).mean(0) @ paper_coefficients(moments)
    close(ees(z, method="kpm", moments=moments, probes=probes).value, expected)


def test_no_score_depends_on_its_batch():
    """Lanczos converges later for the first prompt, which no direction stands out of, than for the second."""
    z = answers(2, 128, 300)
    z[1] += 0.4 * answers(128, 1, seed=1) * answers(300, seed=2)
    close(ees(z, method="kpm").value, torch.stack([ees(one, method="kpm").value for one in z]), 1e-11)


def test_published_code_integrates_another_function():
    """Its coefficients are those of cos(m x), and its sum leaves out m = 0; with our moments that gives its number."""
    published = [
        quad(lambda x, m=m: np.log(x) * np.cos(m * x) * 2 / (np.pi * np.sqrt(1 - x * x)), 0, 1, limit=200)[0]
        for m in range(1, 21)
    ]
    published = torch.tensor(published, dtype=torch.float64)
    close(published, golden("c_m_official_cos_mx")[1:], 1e-6)
    moments = chebyshev_moments(golden("A").mT @ golden("A"), golden("probes"), 20).mean(0)
    close(moments[1:] @ published, golden("ees_official_given_probes"), 1e-6)
    assert (paper_coefficients(20)[1:] - published).abs().max() > 0.5


def test_paper_coefficients_equal_quadrature():
    """With x = cos t the weight disappears: c_m = (2 - [m = 0]) / pi int_0^{pi/2} log(cos t) cos(m t) dt."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    edges = np.concatenate([[0.0], 0.25 ** np.arange(40, -1, -1.0)]) * np.pi / 2  # u = pi/2 - t, graded to the log at 0
    u = (edges[1:, None] - edges[:-1, None]) / 2 * nodes + (edges[1:, None] + edges[:-1, None]) / 2
    w = (edges[1:, None] - edges[:-1, None]) / 2 * weights
    for m, c in enumerate(paper_coefficients(40).tolist()):
        integral = (w * np.log(np.sin(u)) * np.cos(m * (np.pi / 2 - u))).sum()
        assert c == pytest.approx((2 - (m == 0)) / np.pi * integral, abs=1e-12)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 3.0])
def test_regularised_coefficients_equal_the_interpolation_and_its_error_is_the_bound(alpha):
    degree = regularised_degree(alpha)
    coefficients = regularised_coefficients(degree, alpha)
    fine = chebyshev_coefficients(lambda x: (x + alpha).log(), 1500, 0.0, 1.0)
    close(coefficients, fine[: degree + 1], 1e-12)
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    t = torch.arccos(2 * x - 1)
    errors = (torch.cos(t[:, None] * torch.arange(degree + 1)) @ coefficients - (x + alpha).log()).abs()
    assert errors.argmax() == 0
    assert errors.max() <= 1e-4
    shorter = torch.cos(t[:, None] * torch.arange(degree // 2 + 1)) @ coefficients[: degree // 2 + 1]
    assert (shorter - (x + alpha).log()).abs().max() > 1e-4


@given(k=st.integers(2, 9), d=st.integers(2, 12), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_exact_values_are_the_means_over_the_spectrum(k, d, seed):
    z = answers(k, d, seed=seed)
    lam = spectrum(z).clamp(0, 1)
    series = torch.cos(torch.arccos(lam)[:, None] * torch.arange(21)) @ paper_coefficients(20)
    close(ees(z, method="exact").value, series.mean(), 1e-8)
    close(ees(z, kind="regularised", method="exact").value, (lam + 1e-3).log().mean(), 1e-8)


def test_basis_probes_are_exact_and_probes_unbiased():
    z = answers(16, 40)
    basis = 4 * torch.eye(16, dtype=torch.float64)
    for kind in ("paper", "regularised"):
        truth = ees(z, kind=kind, method="exact")
        assert truth.standard_error == 0
        close(ees(z, kind=kind, method="kpm", moments=300 if kind != "paper" else 20, probes=basis).value, truth.value)
        many = ees(z, kind=kind, method="kpm", probes=4000)
        assert 0 < many.standard_error < 0.02
        assert (many.value - truth.value).abs() < 4 * many.standard_error + 1e-4


def test_error_falls_as_the_square_root_of_the_probes():
    z = answers(12, 30)
    truth = ees(z, method="exact").value

    def rms(count: int) -> float:
        values = [ees(z, method="kpm", probes=count, seed=seed).value - truth for seed in range(200)]
        return float(torch.stack(values).square().mean().sqrt())

    assert rms(4) / rms(64) == pytest.approx(4, rel=0.2)


def test_slq_agrees_with_kpm_probe_by_probe_and_with_exact_within_its_error():
    z = answers(150, 300)
    exact, kpm, slq = (ees(z, kind="regularised", method=m, alpha=0.05) for m in ("exact", "kpm", "slq"))
    close(slq.value, kpm.value, 2e-4)
    close(slq.standard_error, kpm.standard_error, 1e-3)
    assert (slq.value - exact.value).abs() < 4 * slq.standard_error


@pytest.mark.parametrize(("kind", "method"), [("paper", "exact"), ("paper", "kpm"), ("regularised", "slq")])
def test_batches_equal_single_prompts_and_identical_answers_get_the_floor(kind, method):
    z = answers(2, 2, 130, 20)
    z[0, 1] = 0.1 * torch.arange(20)  # the rounded mean of 130 equal numbers differs from them
    scores = ees(z, kind=kind, method=method, alpha=0.2)
    assert scores.identical.tolist() == [[False, True], [False, False]]
    single = ees(z[1, 0], kind=kind, method=method, alpha=0.2)
    close(scores.value[1, 0], single.value)
    close(scores.standard_error[1, 0], single.standard_error, 1e-7)
    floor = math.log(0.2) if kind == "regularised" else -math.log(2) / 2 - sum(1 / (2 * k) for k in range(1, 11))
    close(scores.value[0, 1], floor)
    assert scores.standard_error[0, 1] == 0


def test_constant_features_change_nothing():
    z = answers(8, 12)
    padded = torch.cat([z, torch.full((8, 3), 0.1).double()], -1)
    for method in ("exact", "kpm"):
        close(ees(padded, method=method).value, ees(z, method=method).value)


@pytest.mark.parametrize("magnitude", [1e-300, 1e200])
def test_features_of_any_magnitude_keep_their_square(magnitude):
    z = answers(8, 12)
    for kind in ("paper", "regularised"):
        close(ees(z * magnitude, kind=kind).value, ees(z, kind=kind).value)


def test_scale_and_shift_of_a_feature_change_nothing():
    z = answers(8, 12)
    close(ees(z * (1 + answers(12).abs()) + answers(12)).value, ees(z).value)


def test_seed_decides_the_probes():
    z = answers(20, 30)
    one, again, other = (ees(z, method="kpm", seed=s).value for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert one != other
    assert torch.equal(ees(z, method="kpm", seed=1, probes=np.int64(20)).value, one)


def test_the_rule():
    assert choose_method(10, 4096).method == "exact"
    assert choose_method(800, 4096).method == "exact"
    assert choose_method(801, 4096).method == "kpm"
    assert choose_method(5000, 128).method == "exact"
    assert choose_method(5000, 4096, kind="regularised").method == "slq"
    assert "2 N_z M = 800" in choose_method(801, 4096).reason
    z = answers(30, 40)
    assert ees(z).method == "exact"
    assert ees(z, moments=6, probes=2).method == "kpm"
    assert ees(z, kind="regularised", moments=6, probes=2).method == "slq"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ees(answers(1, 5)), "K = 2 answers"),
        (lambda: ees(answers(4, 5), alpha=-1.0), "alpha must be"),
        (lambda: ees(answers(4, 5), kind="official"), "allowed: 'paper', 'regularised'"),
        (lambda: ees(answers(4, 5), method="slq"), "allowed: 'auto', 'exact', 'kpm'"),
        (lambda: ees(answers(4, 5), method="svd"), "cannot be computed by 'svd'"),
        (lambda: ees(answers(4, 5), moments=0), "at least one moment"),
        (lambda: ees(answers(4, 5), probes=0), "at least one moment and one probe"),
        (
            lambda: ees(answers(4, 5), method="kpm", probes=random_probes(5, 2, generator=torch.Generator())),
            "K = 4",
        ),
        (lambda: ees(answers(4, 5), method="exact", probes=torch.zeros(7, 3)), "K = 4"),
        (lambda: ees(answers(4, 5), probes=5.0), "must be a number or have shape"),
        (lambda: ees(answers(4, 5), moments=20.5), "at least one moment"),
        (lambda: paper_coefficients(-1), "at least 0, got -1"),
        (lambda: regularised_coefficients(-1, 1.0), "at least 0, got -1"),
        (lambda: regularised_coefficients(4, 0.0), "alpha must be"),
        (lambda: ees(torch.full((3, 4, 5), float("nan"))), "prompt 0, 1, 2 hold NaN"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
