"""Spectra of channels: golden eigenvalues, what theory demands of them, time scales, onions, and the echo state."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from library.errors import InputError
from library.qrc import channel, echo, parallel
from library.qrc.arnoldi import largest_modulus
from library.qrc.channel import (
    channel_spectrum,
    fixed_point,
    second_moduli,
    slowest_time_scale,
    smooth_step,
    step_matrices,
    superoperator,
    transfer_matrices,
)
from library.qrc.figures import knobs_figure, onion_figure
from library.qrc.hybrid import HybridReservoir
from library.qrc.onion import annulus_overlap, design_onion, onion, time_scale_sweep
from library.qrc.reservoir import QuantumReservoir
from library.qrc.spectra import time_scales
from library.qrc.steps import Steps
from library.qrc.tasks import memory_capacity
from tests.library.quantum_cases import (
    EXPECTATION,
    IDEAL,
    LINEAR,
    NOISE,
    NOISY,
    OUTCOME,
    PERIODIC,
    golden,
    golden_reservoir,
    reservoir,
    series,
)

HALF = torch.full((1, 1), 0.5, dtype=torch.float64)
STILL = {"scale": 0.2, "bias": -0.1}  # the input 0.5 rotates nothing


def furthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance of the best matching of two multisets, the shorter one filled with zeros."""
    found = np.concatenate([found, np.zeros(len(expected) - len(found))])
    distance = np.abs(found[:, None] - expected[None])
    rows, columns = linear_sum_assignment(distance)
    small = np.abs(expected[columns]) < 1e-4  # defective zeros: their eigenvalues carry the root of the rounding error
    return float(np.where(small, distance[rows, columns] * 1e-3, distance[rows, columns]).max())


def unitary_of(made: QuantumReservoir, inputs: torch.Tensor) -> torch.Tensor:
    options = {"device": torch.device("cpu"), "dtype": torch.complex128}
    return Steps([made], 2**made.qubits, inputs.shape[-1], **options).block(inputs[None])[:, 0]


@pytest.mark.parametrize("number", range(4))
def test_golden_superoperators_and_eigenvalues(number):
    case = golden(f"persistent_{number}")
    made = golden_reservoir(case)
    first = torch.from_numpy(case["inputs"][:1])
    assert np.abs(unitary_of(made, first)[0].numpy() - case["unitary_step0"]).max() < 1e-10
    whole = superoperator(torch.from_numpy(case["unitary_step0"]), len(case["measured"]), len(case["reset"]))
    if "superop_step0" in case:
        assert np.abs(whole.numpy() - case["superop_step0"]).max() < 1e-10
    assert furthest(np.linalg.eigvals(whole.numpy()), case["channel_eigs_step0"]) < 1e-8
    reduced = np.linalg.eigvals(transfer_matrices(made, first)[0].numpy())
    assert furthest(reduced, case["channel_eigs_step0"]) < 1e-8


@pytest.mark.parametrize("kind", ["su2", "ising"])
@pytest.mark.parametrize("measured", [1, 2, 3])
def test_golden_eigenvalues_over_sigma(kind, measured):
    case = golden("spectrum_sweep")
    drawn = case["phi"].ravel() if kind == "su2" else case["J"][np.triu_indices(4, 1)]
    for place, sigma in enumerate(case["sigma"]):
        made = QuantumReservoir(
            kind=kind, measured=measured, sigma=float(sigma), angles=tuple(drawn.tolist()), pairs="line", **STILL
        )
        expected = case["eigs"][["su2", "ising"].index(kind), measured - 1, place]
        assert furthest(np.linalg.eigvals(transfer_matrices(made, HALF)[0].numpy()), expected) < 1e-8


@settings(max_examples=20, deadline=None)
@given(
    measured=st.integers(1, 2),
    unreset=st.integers(0, 1),
    kind=st.sampled_from(["su2", "ising"]),
    sigma=st.floats(0.05, 2),
    value=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_spectrum_is_one_of_a_channel(measured, unreset, kind, sigma, value, seed):
    made = QuantumReservoir(
        qubits=3, measured=measured, reset=measured - unreset, kind=kind, sigma=sigma, scale=1.0, seed=seed
    )
    inputs = torch.full((1, 1), value, dtype=torch.float64)
    whole = superoperator(unitary_of(made, inputs)[0], measured, made.reset_qubits).numpy()
    identity = np.eye(8).ravel()
    assert np.abs(identity @ whole - identity).max() < 1e-13  # trace preserving: a left eigenvector of 1
    if not made.reset_qubits:
        assert np.abs(whole @ identity - identity).max() < 1e-13  # unital
    values = np.linalg.eigvals(transfer_matrices(made, inputs)[0].numpy())
    assert np.abs(values).max() < 1 + 1e-12
    assert np.abs(values - 1).min() < 1e-12
    assert furthest(values.conj(), values) < 1e-8
    assert furthest(values, np.linalg.eigvals(whole)) < 1e-8
    spectrum = channel_spectrum(made, inputs)
    assert spectrum.eigenvalues.shape == (1, 4**made.memory_qubits - 1)
    assert float(spectrum.eigenvalues[0, 0].abs()) == pytest.approx(np.sort(np.abs(values))[-2], abs=1e-10)


def test_the_slowest_mode_is_the_same_without_the_matrix(monkeypatch):
    cases = [{"qubits": 5, "measured": 2}, {"qubits": 3, "kind": "ising", "measured": 2, "reset": 0, "sigma": 0.2}]
    cases += [{"qubits": 3, "mode": "both", "measured": 1, "feedback": 0.8}, *PERIODIC.values(), *OUTCOME.values()]
    made = [reservoir(case, **({} if "feedback" in case else {"feedback": 1.0})) for case in cases]
    exact = [channel_spectrum(each, HALF) for each in made]
    monkeypatch.setattr(channel, "EXACT_NUMBERS", 0)
    monkeypatch.setattr(torch.linalg, "eigvals", None)  # nor are all eigenvalues sought
    for each, spectrum in zip(made, exact, strict=True):
        assert second_moduli(each, HALF) == pytest.approx(float(spectrum.eigenvalues.abs().max()), abs=1e-9)
        assert slowest_time_scale(each, HALF) == pytest.approx(float(spectrum.slowest[0]), rel=1e-7, abs=1e-9)
    nilpotent = torch.zeros(40, 40, dtype=torch.float64).diagonal_scatter(torch.ones(20).double(), 20)
    assert largest_modulus(lambda x: nilpotent @ x, torch.ones(40, dtype=torch.float64)) < 1e-4
    assert largest_modulus(torch.zeros_like, torch.ones(40, dtype=torch.float64)) == 0


def test_many_qubits_need_no_matrix_of_the_channel(monkeypatch):
    """Six qubits have 1024 numbers of memory: neither evolution nor the check before use may form 1024 x 1024."""
    monkeypatch.setattr(channel, "step_matrices", None)
    monkeypatch.setattr(channel, "transfer_matrices", None)
    made, inputs = QuantumReservoir(qubits=6), series(1, 1400, 1)
    monkeypatch.setattr(parallel, "suggested_overlap", None)  # pieces cannot pay, so that no overlap is sought
    monkeypatch.setattr(parallel.direct, "evolve", lambda *args, **options: args[1].shape)
    assert parallel.evolve_if_cheaper([made], inputs, None, None) == inputs.shape
    monkeypatch.undo()
    monkeypatch.setattr(channel, "step_matrices", None)
    assert echo.check_echo_state(made, inputs[0, :90], 90).rate < 0
    [row] = time_scales(HybridReservoir(members=(made,)), inputs[:, :9], most=1)
    assert row["tau"] == pytest.approx(-1 / math.log(row["annulus_high"]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor([[torch.nan]]), "inputs: 1 are not finite"),
        (torch.zeros(3), r"shape \(3,\); allowed: \(inputs, channels\)"),
        (torch.tensor(0.5), r"shape \(\); allowed"),
        (torch.zeros(0, 1), r"shape \(0, 1\); allowed"),
        (np.zeros((1, 1)), "a ndarray; allowed: a tensor"),
    ],
)
def test_inputs_without_a_spectrum_are_refused(monkeypatch, inputs, message):
    for made in (QuantumReservoir(qubits=2), QuantumReservoir(qubits=2, mode="feedback")):
        for ask in (channel_spectrum, second_moduli, step_matrices):
            with pytest.raises(InputError, match=message):
                ask(made, inputs)
    monkeypatch.setattr(channel, "EXACT_NUMBERS", 0)
    with pytest.raises(InputError, match=message):
        second_moduli(QuantumReservoir(qubits=2), inputs)


def test_angles_without_a_value_never_reach_the_eigenvalues(monkeypatch):
    huge = QuantumReservoir(qubits=2, scale=1e308)
    with pytest.raises(InputError, match="matrix is not finite"):
        channel_spectrum(huge, 10 * HALF)
    monkeypatch.setattr(channel, "EXACT_NUMBERS", 0)
    with pytest.raises(InputError, match="image 1 of the map is not finite"):
        second_moduli(huge, 10 * HALF)


def test_nothing_measured_is_unitary():
    made = reservoir(LINEAR["nothing measured"])
    values = np.linalg.eigvals(unitary_of(made, HALF)[0].numpy())
    assert np.abs(np.abs(values) - 1).max() < 1e-13
    found = np.linalg.eigvals(transfer_matrices(made, HALF)[0].numpy())
    assert furthest(found, np.outer(values, values.conj()).ravel()) < 1e-10


def test_the_bare_permutation_has_roots_of_unity_and_zeros_only():
    for measured in (1, 2, 3):
        made = QuantumReservoir(sigma=0.0, measured=measured, pairs="line", **STILL)
        values = np.linalg.eigvals(transfer_matrices(made, HALF)[0].numpy())
        large = values[np.abs(values) > 1e-2]
        assert np.abs(np.abs(large) - 1).max() < 1e-10
        assert np.abs(large**120 - 1).max() < 1e-6


@pytest.mark.parametrize(("kind", "power", "sigma"), [("su2", 2, 0.01), ("ising", 4, 0.05)])
def test_the_slowest_mode_slows_down_as_a_power_of_sigma(kind, power, sigma):
    template = QuantumReservoir(kind=kind, pairs="line", **STILL)
    scales = time_scale_sweep(template, [sigma, 2 * sigma], [1], range(8))
    gaps = 1 - torch.exp(-1 / scales[0])
    slope = math.log(float(gaps[1].median() / gaps[0].median())) / math.log(2)
    assert slope == pytest.approx(power, rel=0.1)


def test_more_measured_qubits_forget_faster():
    scales = time_scale_sweep(QuantumReservoir(pairs="line", **STILL), [0.1, 0.3, 1.0], [1, 2, 3], range(8))
    medians = scales.median(-1).values
    assert (medians[:-1] > medians[1:]).all()


def test_a_sweep_is_of_the_seeds_that_are_named_alone(monkeypatch):
    template, asked = QuantumReservoir(pairs="line", **STILL), []

    def noted(reservoir, inputs):
        asked.append(reservoir.seed)
        return slowest_time_scale(reservoir, inputs)

    monkeypatch.setattr("library.qrc.onion.slowest_time_scale", noted)
    scales = time_scale_sweep(template, [0.3], [1], (12, 3))
    assert asked == [12, 3]
    assert torch.equal(scales, time_scale_sweep(template, [0.3], [1], range(13))[..., [12, 3]])


def test_a_shift_register_of_one_step_holds_the_last_input_only():
    """Swap of the two qubits: what the measured qubit got goes to memory, is read once, and is reset."""
    swap = torch.eye(4, dtype=torch.complex128)[[0, 2, 1, 3]]
    made = QuantumReservoir(
        qubits=2,
        encoding="rx_anc",
        scale=1.2,
        bias=0.2,
        unitary=tuple(torch.view_as_real(swap).flatten().tolist()),
    )
    assert float(channel_spectrum(made, HALF).eigenvalues.abs().max()) < 1e-7  # nilpotent
    signal = series(4000)
    features, _ = made.drive(signal[None, :, None])
    assert torch.allclose(features[0, 1:, 0], (1.2 * signal[:-1] + 0.2).cos(), atol=1e-13)
    found = memory_capacity(features[0], signal, delays=10)
    assert found.recalled[:2].min() > 0.95
    assert found.recalled[2:].max() < 10 * found.noise_floor


def test_golden_memory_capacity():
    case = golden("memory_capacity")
    made = QuantumReservoir(
        angles=tuple(case["q_phi"].ravel().tolist()),
        sigma=float(case["q_sigma"]),
        scale=float(case["q_a"]),
        bias=float(case["q_b"]),
        pairs="line",
    )
    signal = torch.from_numpy(case["signal"])
    found = memory_capacity(made.drive(signal[None, :, None])[0][0], signal, delays=21).recalled.numpy()
    large = case["q_r2"] > 0.01
    assert np.abs(found - case["q_r2"])[large].max() < 1e-6
    assert np.abs(found - case["q_r2"]).max() < 1e-3


@pytest.mark.parametrize("name", [*EXPECTATION, "noise, feedback", "noise, both"])
def test_the_jacobian_is_the_derivative_of_the_step(name):
    made = reservoir((EXPECTATION | NOISY)[name], feedback=0.8)
    point = fixed_point(made, HALF[0])
    assert torch.allclose(smooth_step(made, point, HALF[0]), point, atol=1e-10)
    _, after = made.drive(HALF[None], point[None])
    assert torch.allclose(smooth_step(made, point, HALF[0]), after[0], atol=1e-13)
    jacobian = step_matrices(made, HALF)[0]
    direction = series(len(point), seed=5) * 1e-5
    ahead, back = (made.drive(HALF[None], (point + sign * direction)[None])[1][0] for sign in (1, -1))
    assert torch.allclose((ahead - back) / 2, jacobian @ direction, atol=1e-13)


def test_weak_feedback_remembers_in_proportion_and_none_at_all():
    def radius(strength: float) -> float:
        made = QuantumReservoir(mode="feedback", scale=1.0, feedback=strength, seed=2)
        return float(channel_spectrum(made, HALF).eigenvalues.abs().max())

    assert radius(0.0) == 0
    assert radius(0.002) / radius(0.001) == pytest.approx(2, rel=0.05)
    made = QuantumReservoir(mode="feedback", feedback=0.0)
    inputs = series(1, 20, 1)
    features, _ = made.drive(inputs)
    shuffled, _ = made.drive(inputs.flip(1))
    assert torch.allclose(features, shuffled.flip(1), atol=1e-13)


def test_strong_feedback_without_a_fixed_point_says_so():
    made = QuantumReservoir(mode="feedback", scale=1.0, feedback=3.0, seed=0)
    with pytest.raises(InputError, match="no fixed point"):
        channel_spectrum(made, HALF)


@pytest.mark.parametrize("name", OUTCOME | PERIODIC)
def test_the_other_linear_maps_carry_states_as_their_matrices_say(name):
    made = reservoir((OUTCOME | PERIODIC)[name])
    matrix = transfer_matrices(made, HALF)[0]
    before = made.drive(series(1, 6, 1))[1]
    after = made.drive(HALF.expand(1, made.period, 1), before)[1]
    size = len(matrix)
    assert torch.allclose(matrix @ before[0, :size], after[0, :size], atol=1e-13)
    assert channel_spectrum(made, HALF).eigenvalues.abs().max() < 1 + 1e-12


def test_noise_shortens_the_longest_time_scale():
    ideal = QuantumReservoir(qubits=3, sigma=0.1, pairs="line", **STILL)
    noisy = ideal.model_copy(update={"noise": NOISE})
    assert channel_spectrum(noisy, HALF).slowest < channel_spectrum(ideal, HALF).slowest


def test_feedback_of_expectations_has_no_transfer_matrix():
    with pytest.raises(InputError, match="not linear"):
        transfer_matrices(reservoir(EXPECTATION["both"]), HALF)


@pytest.mark.parametrize("name", {k: v for k, v in IDEAL.items() if k != "nothing measured"})
def test_two_starts_meet(name):
    made = reservoir(IDEAL[name], feedback=0.9)
    starts = torch.cat([made.start(1), echo.opposite_state(made)])
    distances, rows = [], starts
    for value in series(120, 1):
        _, rows = made.drive(value.expand(2, 1, 1), rows)
        distances.append(float(echo.trace_distance(made, rows[0], rows[1])))
    assert distances[-1] < 1e-6
    if made.mode == "persistent":  # a channel never drives states apart
        assert all(later <= before + 1e-12 for before, later in itertools.pairwise(distances))
    found = echo.echo_state(made, series(240, 1, seed=1))
    assert found.rate < 0
    assert found.remaining < 1e-6
    assert found.memory == -1 / found.rate


def test_the_rate_at_a_constant_input_is_that_of_the_slowest_mode():
    fed = QuantumReservoir(mode="feedback", feedback=1.5, seed=1)
    for made in (QuantumReservoir(sigma=0.3), fed, QuantumReservoir(sigma=0.3, period=3)):
        slowest = channel_spectrum(made, HALF).slowest
        assert echo.echo_state(made, HALF.expand(600, 1)).memory == pytest.approx(float(slowest[0]), rel=0.05)


def test_a_reservoir_that_remembers_its_start_is_refused():
    slow = QuantumReservoir(kind="ising", sigma=0.05, encoding="rx_anc")
    with pytest.raises(InputError, match="use a longer washout"):
        echo.check_echo_state(slow, series(300, 1), 100)
    with pytest.warns(UserWarning, match="a fifth of the washout"):
        echo.check_echo_state(QuantumReservoir(sigma=0.1), series(300, 1), 40, tolerance=1.0)
    with pytest.warns(UserWarning, match="unital"), pytest.warns(UserWarning, match="hardly vary"):
        echo.check_echo_state(QuantumReservoir(measured=2, reset=0), series(400, 1), 400)
    with pytest.warns(UserWarning, match="half a turn"):
        echo.check_echo_state(QuantumReservoir(scale=4.0), series(300, 1), 200)
    with pytest.warns(UserWarning, match="features Z0, Z1, Z2, Z3, Z0Z1, Z0Z2 ... hardly vary"):
        echo.check_echo_state(QuantumReservoir(scale=1e-4), series(300, 1), 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert echo.check_echo_state(QuantumReservoir(), series(300, 1), 200).rate < -0.05
    with pytest.raises(InputError, match="washout 500 must lie in 1 to 300"):
        echo.check_echo_state(QuantumReservoir(), series(300, 1), 500)
    with pytest.raises(InputError, match="too few"):
        echo.echo_state(QuantumReservoir(), series(10, 1))


def test_features_of_a_unital_channel_fade():
    made = QuantumReservoir(measured=2, reset=0)
    features, _ = made.drive(torch.full((1, 400, 1), 0.4, dtype=torch.float64))
    assert features[0, -1].abs().max() < 1e-6 < features[0, 0].abs().max()


def test_an_onion_has_the_time_scales_that_were_asked_for():
    design = design_onion((2.0, 8.0, 40.0))
    assert design.achieved == pytest.approx([2, 8, 40], rel=0.05)
    assert len({member.seed for member in design.reservoirs}) == 3
    assert [round(entry["time_scale"], 6) for entry in design.describe()] == [round(t, 6) for t in design.achieved]
    fed = design_onion((0.5, 2.0), QuantumReservoir(mode="feedback"))
    assert fed.achieved == pytest.approx([0.5, 2], rel=0.1)
    with pytest.raises(InputError, match="out of reach"):
        design_onion((1e7,))
    with pytest.raises(InputError, match="positive"):
        design_onion((0.0,))


def test_time_scales_of_a_period_are_in_steps():
    made = QuantumReservoir(sigma=0.3, period=3)
    design = design_onion((8.0,), made)
    found = echo.echo_state(design.reservoirs[0], HALF.expand(600, 1)).memory
    assert design.achieved == pytest.approx([8], rel=0.05)
    assert found == pytest.approx(8, rel=0.1)
    whole = torch.linalg.eigvals(transfer_matrices(made, HALF)[0]).abs().sort().values
    assert channel_spectrum(made, HALF).annulus[1] == pytest.approx(float(whole[-2]) ** (1 / 3))


def test_an_onion_from_lists():
    members = onion(sigma=0.3, measured=[1, 2, 3], seed=5)
    assert [(member.sigma, member.measured, member.seed) for member in members] == [
        (0.3, 1, 5),
        (0.3, 2, 6),
        (0.3, 3, 7),
    ]
    assert [member.sigma for member in onion()] == [0.1, 0.3, 1.0]
    assert len(onion(4, mode="feedback", feedback=[0.1, 1.0, 2.0, 3.0])) == 4
    with pytest.raises(InputError, match="measured has 2"):
        onion(sigma=[0.1, 0.3, 1.0], measured=[1, 2])
    with pytest.raises(InputError, match="sigma has 2"):
        onion(3, sigma=[0.1, 0.3])
    for none in ({"count": 0}, {"count": -1}, {"sigma": []}):
        with pytest.raises(InputError, match="at least 1"):
            onion(**none)
    assert annulus_overlap((0.0, 0.5), (0.6, 0.9)) == 0
    assert annulus_overlap((0.2, 0.4), (0.0, 0.9)) == 1


def test_pictures_show_every_reservoir_and_its_slowest_mode():
    members = onion()
    figure = onion_figure(members)
    disk, lasting = figure.axes
    assert [tick.get_text() for tick in lasting.get_yticklabels()] == [
        f"su2, sigma {sigma}, 1 measured" for sigma in ("0.1", "0.3", "1")
    ]
    slowest = [float(channel_spectrum(member, HALF).slowest) for member in members]
    assert [text.get_text() for text in lasting.texts] == [f"{steps:.3g} steps" for steps in slowest]
    assert sum(len(line.get_xdata()) for line in disk.lines if line.get_marker() == "o") == 3 * 63
    knobs = knobs_figure(QuantumReservoir(qubits=3), sigmas=(0.1, 0.3, 1.0), seeds=range(2))
    assert len(knobs.axes) == 4
    assert len(knobs.axes[-1].lines) == 2
