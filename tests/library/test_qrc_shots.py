"""Sampling: the law of the counts, its scaling with shots, one long circuit, and feedback of estimates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from library.errors import InputError
from library.qrc import gates
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir
from library.qrc.reservoir import QuantumReservoir
from library.qrc.shots import (
    SampledReservoir,
    drive_sampled,
    outcome_probabilities,
    sample_counts,
    shot_covariance,
)
from tests.library.quantum_cases import ALL_SAMPLED, NOISY, golden, golden_reservoir, reservoir, series


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalized(estimate: torch.Tensor, exact: torch.Tensor, shots: int) -> torch.Tensor:
    return (estimate - exact) / ((1 - exact**2) / shots).sqrt().clamp(min=1e-9)


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0, 1), min_size=2, max_size=8), shots=st.integers(1, 10**6), seed=st.integers(0, 99))
def test_counts_are_counts(weights, shots, seed):
    probabilities = torch.tensor(weights, dtype=torch.float64) + torch.eye(len(weights))[0] * 1e-3
    probabilities = (probabilities / probabilities.sum()).expand(5, -1)
    counts = sample_counts(probabilities, shots, generator(seed))
    assert torch.equal(counts.sum(-1), torch.full((5,), float(shots)).double())
    assert torch.equal(counts, counts.round())
    assert (counts >= 0).all()
    assert (counts[probabilities == 0] == 0).all()


def test_counts_have_the_covariance_of_the_multinomial_law():
    probabilities = torch.tensor([0.5, 0.2, 0.05, 0.25], dtype=torch.float64)
    shots, draws = 100, 40000
    parities = gates.parity_matrix(2, range(2))
    estimates = sample_counts(probabilities.expand(draws, -1), shots, generator()) @ parities / shots
    expected = shot_covariance(probabilities, parities, shots)
    assert torch.allclose(expected.diagonal(), (1 - (probabilities @ parities) ** 2) / shots, atol=1e-15)
    assert (estimates.mean(0) - probabilities @ parities).abs().max() < 5 * (expected.diagonal().max() / draws).sqrt()
    assert torch.allclose(estimates.T.cov(), expected, atol=5 * float(expected.max()) * (2 / draws) ** 0.5)


@pytest.mark.parametrize("sampling", ["independent", "trajectory"])
@pytest.mark.parametrize("name", ALL_SAMPLED)
def test_estimates_scatter_about_the_exact_features(name, sampling):
    made = reservoir(ALL_SAMPLED[name], observed="measured")
    inputs, shots = series(2, 25, 1), 3000
    exact, _ = made.drive(inputs)
    sampled = SampledReservoir(reservoir=made, shots=shots, sampling=sampling, seed=3)
    estimate, _ = sampled.drive(inputs)
    error = normalized(estimate, exact, shots)
    assert estimate.shape == (2, 25, sampled.width)
    assert error.abs().max() < 5
    assert 0.5 < error.square().mean() < 2
    assert torch.equal(sampled.drive(inputs)[0], estimate)
    other, _ = sampled.model_copy(update={"seed": 4}).drive(inputs)
    assert not torch.equal(other, estimate)


@pytest.mark.parametrize("sampling", ["independent", "trajectory"])
@pytest.mark.parametrize("mode", ["feedback", "both"])
def test_fed_back_estimates_approach_the_exact_features(mode, sampling):
    made = QuantumReservoir(qubits=3, mode=mode, feedback=0.8, observed="measured", seed=1)
    inputs = series(1, 30, 1)
    exact, _ = made.drive(inputs)
    errors = []
    for shots in (400, 40000):
        sampled = SampledReservoir(reservoir=made, shots=shots, sampling=sampling)
        errors.append(float((sampled.drive(inputs)[0] - exact).square().mean().sqrt()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.5)


def test_the_error_falls_with_the_root_of_the_shots():
    made = QuantumReservoir(qubits=3)
    inputs = series(1, 200, 1)
    exact, _ = made.drive(inputs)
    for shots in (100, 10000):
        estimate, _ = SampledReservoir(reservoir=made, shots=shots).drive(inputs)
        assert normalized(estimate, exact, shots).square().mean() == pytest.approx(1, abs=0.15)


def test_outcomes_of_one_long_circuit_hang_together():
    """A qubit that is measured and never turned: every shot repeats its first outcome, fresh experiments do not."""
    unit = tuple(torch.view_as_real(torch.eye(4, dtype=torch.complex128)).flatten().tolist())
    made = QuantumReservoir(
        qubits=2, reset=0, encoding="rx_anc", unitary=unit, scale=torch.pi / 2, bias=0.0, observed="measured"
    )
    inputs = torch.zeros(1, 6, 1, dtype=torch.float64)
    inputs[0, 0] = 1.0
    long, _ = SampledReservoir(reservoir=made, shots=500, sampling="trajectory").drive(inputs)
    assert torch.equal(long[0], long[0, :1].expand(6, -1))
    fresh, _ = SampledReservoir(reservoir=made, shots=500).drive(inputs)
    assert len(fresh[0, :, 0].unique()) > 3
    assert (fresh.abs() < 5 / 500**0.5).all()


def test_pieces_continue_the_shots():
    made = reservoir(ALL_SAMPLED["both with outcomes"], observed="measured")
    inputs = series(2, 20, 1)
    exact, _ = made.drive(inputs)
    for sampling in ("independent", "trajectory"):
        sampled = SampledReservoir(reservoir=made, shots=4000, sampling=sampling)
        first, state = sampled.drive(inputs[:, :9])
        second, end = sampled.drive(inputs[:, 9:], state)
        assert normalized(torch.cat([first, second], 1), exact, 4000).abs().max() < 5
        assert end.shape == sampled.start(2).shape
        assert end[:, -1].tolist() == [20, 20]
        with pytest.raises(InputError, match="this reservoir and input take"):
            sampled.drive(inputs, state[:1])
        with pytest.raises(InputError, match="not finite"):
            sampled.drive(inputs, state * torch.nan)


def test_golden_probabilities_give_the_golden_features():
    case = golden("persistent_3")
    made = golden_reservoir(case)
    probabilities = outcome_probabilities(made, torch.from_numpy(case["inputs"])[None])
    assert torch.allclose(probabilities.sum(-1), torch.ones(1, 24).double(), atol=1e-12)
    found = probabilities[0] @ gates.parity_matrix(4, range(4))
    assert torch.allclose(found, torch.from_numpy(case["features"]), atol=1e-10)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValidationError, match="only measured qubits"):
        SampledReservoir(reservoir=QuantumReservoir(), sampling="trajectory")
    noisy = reservoir(NOISY["noise"], observed="measured")
    with pytest.raises(ValidationError, match="takes no noise"):
        SampledReservoir(reservoir=noisy, sampling="trajectory")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SampledReservoir(reservoir=QuantumReservoir(), shots=0)
    assert SampledReservoir(reservoir=noisy).describe()["shots"] == 16384


def test_many_draw_what_each_would_draw_alone():
    inners = [reservoir({"qubits": 3}, seed=k) for k in range(3)] + [reservoir({"qubits": 3, "mode": "feedback"})]
    members = [SampledReservoir(reservoir=inner, shots=64 + k, seed=k) for k, inner in enumerate(inners)]
    inputs = series(2, 12, 1)
    first, states = drive_sampled(members, inputs[:, :7])
    last, ends = drive_sampled(members, inputs[:, 7:], states)
    for member, *parts in zip(members, first, last, ends, strict=True):
        begun, state = member.drive(inputs[:, :7])
        going, end = member.drive(inputs[:, 7:], state)
        assert all(torch.equal(a, b) for a, b in zip(parts, (begun, going, end), strict=True))
    with pytest.raises(InputError, match="this reservoir and input take"):
        drive_sampled(members[:1], inputs, [states[0][:, 1:]])


def autoregressive(series: int, rows: int, seed: int) -> Tensor:
    """A damped oscillation that is driven by noise, (series, rows, 1)."""
    noise = 0.3 * torch.randn(series, rows + 100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.zeros_like(noise)
    for step in range(2, rows + 100):
        values[:, step] = 1.5 * values[:, step - 1] - 0.8 * values[:, step - 2] + noise[:, step]
    return values[:, 100:, None]


def test_intervals_of_a_closed_loop_hold_what_they_should_with_few_shots_too():
    """Every path draws its shots anew at each step; intervals of exact features would be too narrow."""
    train, tests = autoregressive(8, 600, seed=0), autoregressive(150, 66, seed=1)
    shown, after = tests[:, :60].numpy(), tests[:, 60:, 0].numpy()
    exact = QuantumReservoir(qubits=3, sigma=0.5, scale=1.0, seed=1)
    found = {}
    for shots in (None, 512):
        member = SampledReservoir(reservoir=exact, shots=shots) if shots else exact
        model = Forecaster(HybridReservoir(members=(member,)), washout=30, skip=True).fit(train.numpy())
        found[shots] = model.forecast(shown, 6, paths=150, level=0.8)
    held = {}
    for shots, forecast in found.items():
        inside = (forecast.lower[..., 0] <= after) & (after <= forecast.upper[..., 0])
        held[shots] = inside.mean()
        assert held[shots] == pytest.approx(0.8, abs=0.05)
    half = (found[None].upper - found[None].lower)[..., 0] / 2
    narrow = np.abs(found[512].mean[..., 0] - after) <= half
    assert narrow[:, 0].mean() < 0.65
