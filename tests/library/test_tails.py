"""Tail exponents against published numbers, the loops that they replace, and laws with known exponents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from library.errors import InputError
from library.spectral import tails
from library.spectral.marchenko_pastur import MarchenkoPastur
from library.spectral.tails import RULES, fit_tail, hill_scan, log_histogram, squared_singular_values

GOLDEN = Path(__file__).parents[1] / "golden" / "farms"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "alphas.npz"))


def matrices(golden) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"W{i}"]) for i in range(5)]


def scan_by_loop(spectrum: list[float]) -> tuple[list[float], list[float]]:
    """alpha and D of every threshold but the last, straight from the formulas."""
    values = np.sort(np.asarray(spectrum, dtype=np.float64))
    alphas, distances = [], []
    for i in range(len(values) - 1):
        n = len(values) - i
        alpha = 1 + n / sum(math.log(v / values[i]) for v in values[i:])
        fitted = [1 - (v / values[i]) ** (1 - alpha) for v in values[i:]]
        alphas.append(alpha)
        distances.append(max(abs(f - j / n) for j, f in enumerate(fitted)))
    return alphas, distances


@pytest.mark.parametrize("rule", RULES)
def test_published_exponents_of_plain_spectra(golden, rule):
    for i, matrix in enumerate(matrices(golden)):
        fit = fit_tail(squared_singular_values(matrix), rule)
        tolerance = 2e-4 if rule == "median" else 1e-3
        if rule == "median" or golden[f"plain_{rule}_stable"][i]:
            assert float(fit.alpha) == pytest.approx(golden[f"plain_{rule}_alpha"][i], abs=tolerance)
            assert float(fit.ks_distance) == pytest.approx(golden[f"plain_{rule}_D"][i], abs=5e-4)


def test_the_ks_rule_is_weightwatchers_default_fit(golden):
    peer = np.load(GOLDEN / "weightwatcher.npz")
    for i, matrix in enumerate(matrices(golden)):
        spectrum = squared_singular_values(matrix)
        fit = fit_tail(spectrum, "ks")
        assert float(fit.alpha) == pytest.approx(peer["alpha"][i], abs=1e-4)
        assert float(fit.ks_distance) == pytest.approx(peer["D"][i], abs=1e-4)
        assert float(spectrum.sum() / spectrum.max()) == pytest.approx(peer["stable_rank"][i], rel=1e-4)


def test_gram_eigenvalues_are_squared_singular_values(golden):
    for matrix in matrices(golden):
        exact = torch.linalg.svdvals(matrix.double()).square().flip(0)
        assert (squared_singular_values(matrix) - exact).abs().max() < 1e-13 * exact.max()
    deficient = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    assert (squared_singular_values(deficient @ deficient.mT) > 0).sum() == 3


SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=40, unique=True)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SPECTRA)
def test_the_suffix_sums_are_the_loop(spectrum):
    found = hill_scan(torch.tensor(spectrum, dtype=torch.float64))
    alphas, _ = scan_by_loop(spectrum)
    mean_logs = [1 / (alpha - 1) for alpha in alphas]  # alpha itself is ill-conditioned where these are small
    assert (1 / (found[:-1] - 1)).tolist() == pytest.approx(mean_logs, rel=1e-10, abs=1e-13)
    assert found[-1] == torch.inf


@pytest.mark.parametrize("size", [3, 31, 32, 33, 700])
def test_the_pruned_search_finds_the_threshold_of_the_full_one(size):
    generator = torch.Generator().manual_seed(size)
    spectra = torch.rand(4, size, generator=generator, dtype=torch.float64).pow(-0.7)
    spectra[1] = torch.randn(size, generator=generator, dtype=torch.float64).square()
    fit = fit_tail(spectra, "ks")
    for row in range(4):
        alphas, distances = scan_by_loop(spectra[row].tolist())
        best = int(np.argmin(distances))
        assert int(fit.tail[row]) == size - best
        assert float(fit.alpha[row]) == pytest.approx(alphas[best], rel=1e-10)
        assert float(fit.ks_distance[row]) == pytest.approx(distances[best], abs=1e-12)


def numbers_looked_at(monkeypatch, spectrum: torch.Tensor) -> tuple[tails.TailFit, int]:
    """The ks fit, and how many pairs of a threshold and a place the search compares for it."""
    looked = []

    def counted(logs, alphas, rows, starts, places):
        looked.append(len(rows) * len(places))
        return bounds(logs, alphas, rows, starts, places)

    bounds = tails._bounds
    with monkeypatch.context() as patched:
        patched.setattr(tails, "_bounds", counted)
        return fit_tail(spectrum, "ks"), sum(looked)


def test_the_search_finds_what_a_loop_over_all_thresholds_of_a_power_law_finds():
    logs = (1 / torch.arange(1, 3001).double()).log().sort().values
    least = math.inf
    for i in range(len(logs) - 1):
        steps = logs[i:] - logs[i]
        fitted = -torch.expm1(-len(steps) / steps.sum() * steps)
        least = min(least, float((fitted - torch.arange(len(steps)).double() / len(steps)).abs().max()))
    assert float(fit_tail(logs.exp(), "ks").ks_distance) == pytest.approx(least, abs=1e-12)


def test_of_a_long_spectrum_thresholds_are_left_out_within_the_stated_error(monkeypatch):
    size = 3000
    spectrum = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(-0.7)
    full, _ = numbers_looked_at(monkeypatch, spectrum)
    monkeypatch.setattr(tails, "ALL_THRESHOLDS", 500)
    thinned, looked = numbers_looked_at(monkeypatch, torch.stack([spectrum, spectrum.flip(0)]))
    assert looked < 2 * (size * tails.FIRST_POINTS + 2.1 * 500**2)
    assert torch.equal(thinned.tail[:1], thinned.tail[1:])
    excess = float(thinned.ks_distance[0] - full.ks_distance)
    assert 0 <= excess <= 1.2 * size / (tails.FIRST_POINTS * float(full.tail))


@pytest.mark.parametrize("lower_bound", ["log", "linear"])
def test_fixfinger_looks_near_the_peak_only(lower_bound):
    spectrum = torch.randn(90, 160, generator=torch.Generator().manual_seed(3)).double()
    values = squared_singular_values(spectrum)
    counts, edges = np.histogram(values.log10().numpy(), bins=100)
    peak = 10 ** edges[counts.argmax()]
    low = 0.95 * peak if lower_bound == "linear" else math.log10(0.95 * peak)
    alphas, distances = scan_by_loop(values.tolist())
    allowed = [i for i in range(len(alphas)) if low <= values[i] <= 1.5 * peak]
    best = min(allowed, key=lambda i: distances[i])
    assert 0 < len(allowed) < len(alphas)
    fit = fit_tail(values, "fixfinger", lower_bound=lower_bound)
    assert float(fit.alpha) == pytest.approx(alphas[best], rel=1e-9)
    assert int(fit.tail) == len(values) - best


@settings(deadline=None, max_examples=40, derandomize=True)
@given(SPECTRA, st.floats(1e-8, 1e8), st.sampled_from(["median", "ks"]))
def test_the_scale_drops_out_and_batches_change_nothing(spectrum, scale, rule):
    values = torch.tensor(spectrum, dtype=torch.float64)
    alone, scaled = fit_tail(values, rule), fit_tail(values * scale, rule)
    if rule == "median":
        assert float(scaled.alpha) == pytest.approx(float(alone.alpha), rel=1e-9)
    assert float(scaled.ks_distance) == pytest.approx(float(alone.ks_distance), abs=1e-9)
    both = fit_tail(torch.stack([values.flip(0), values.square()]), rule)
    assert float(both.alpha[0]) == float(alone.alpha)


def test_pareto_quantiles_and_samples_give_back_their_exponent():
    for exponent in (1.8, 2.5, 4.0):
        errors = []
        for n in (100, 1000, 10_000):
            quantiles = (1 - (torch.arange(1, n + 1).double() - 0.5) / n) ** (-1 / (exponent - 1))
            errors.append(abs(float(hill_scan(quantiles)[0]) - exponent) * n)
        assert max(errors) < 2 * exponent + 2  # O(1 / N)
        draws = torch.rand(400, 500, generator=torch.Generator().manual_seed(1)).double() ** (-1 / (exponent - 1))
        fit = fit_tail(draws, "median")
        assert float(fit.alpha.std()) == pytest.approx(float(fit.sampling_error.mean()), rel=0.12)


def test_marchenko_pastur_limits():
    reference = np.load(GOLDEN / "mp_limit.npz")
    for q, alpha, median in zip(*(reference[name] for name in reference.files), strict=True):
        law = MarchenkoPastur(float(q))
        assert law.hill_alpha() == pytest.approx(alpha, abs=1e-7)
        assert law.quantile(0.5) == pytest.approx(median, abs=1e-7)
        assert law.quantile(0.0) == pytest.approx(law.support[0], abs=1e-6)
        mass, _ = integrate.quad(
            lambda x, law=law: float(law.density(torch.tensor(x))), law.quantile(0.3), law.support[1]
        )
        assert mass == pytest.approx(0.7, abs=1e-4)
        gaussian = torch.randn(4, 512, int(512 * q), generator=torch.Generator().manual_seed(0))
        if q >= 0.125:  # 32 eigenvalues or fewer are far from the limit
            found = float(fit_tail(squared_singular_values(gaussian)).alpha.mean())
            assert found == pytest.approx(alpha, abs=0.05 if q >= 0.25 else 0.15)
    assert MarchenkoPastur.of_shape(20, 80) == MarchenkoPastur(0.25)


def test_what_is_at_or_below_the_floor_takes_no_part():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() + 0.1
    padded = torch.cat([torch.zeros(7).double(), torch.full((5,), 1e-6).double(), values])
    for rule in RULES:
        kept, filtered = fit_tail(values, rule), fit_tail(padded, rule, floor=1e-5)
        assert float(filtered.alpha) == pytest.approx(float(kept.alpha), rel=1e-12)
        assert (int(filtered.positive), int(filtered.tail)) == (50, int(kept.tail))
    assert hill_scan(padded)[:7].isnan().all()
    assert log_histogram(padded, 10, floor=1e-5).counts.sum() == 50


def test_the_histogram_is_a_density():
    values = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)).double() + 0.01
    histogram = log_histogram(values, 20)
    for row in range(3):
        counts, edges = np.histogram(values[row].log10().numpy(), bins=20)
        assert histogram.counts[row].tolist() == counts.tolist()
        assert histogram.edges[row].tolist() == pytest.approx(edges.tolist())
    assert (histogram.density * histogram.edges.diff()).sum(-1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_tail(torch.tensor([1.0, 2.0]), "hill"), "threshold rule 'hill' is unknown; allowed: median"),
        (lambda: fit_tail(torch.tensor([1.0, 2.0]), position=1.0), "position of the median rule must be above 1"),
        (lambda: fit_tail(torch.tensor([0.0, 0.0, 2.0])), "1 eigenvalues above 0; at least 2"),
        (lambda: fit_tail(torch.ones(6)), "holds 3 equal eigenvalues"),
        (lambda: fit_tail(torch.ones(6), "ks"), "no threshold that the rule allows"),
        (lambda: fit_tail(torch.ones(6), "fixfinger"), "without two different"),
        (lambda: fit_tail(torch.tensor([1.0, torch.nan])), "not finite"),
        (lambda: fit_tail(torch.tensor([1.0, -2.0])), "negative eigenvalue -2"),
        (lambda: fit_tail(torch.empty(0)), "without eigenvalues"),
        (lambda: squared_singular_values(torch.tensor([[1.0, torch.inf]])), "1 x 2 has entries that are not finite"),
        (lambda: MarchenkoPastur(1.5), r"shape ratio must lie in \(0, 1\]"),
        (lambda: log_histogram(torch.tensor([1.0, 2.0]), 0), "at least 1 bin"),
        (lambda: log_histogram(torch.tensor([1.0, 2.0]), floor=math.nan), "floor of a spectrum must be a number"),
        (lambda: fit_tail(torch.tensor([1.0, 2.0]), "fixfinger", bins=0), "at least 1 bin"),
        (lambda: fit_tail(torch.tensor([1.0, 2.0]), lower_bound="x"), "lower_bound 'x' is unknown"),
        (lambda: fit_tail(torch.tensor([1.0, 2.0]) + 1j), "real numbers, got torch.complex64"),
        (lambda: fit_tail(torch.zeros(0, 10)), "without eigenvalues"),
        (lambda: hill_scan(torch.zeros(0, 10)), "without eigenvalues"),
        (lambda: squared_singular_values(torch.ones(3, 3) + 1j), "real numbers, got torch.complex64"),
        (lambda: squared_singular_values(torch.ones(3)), r"shape \(..., m, n\), got \(3,\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
