"""Quantum reservoirs: golden features, agreement of all backends, pieces of time, states, and refused settings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from library.errors import InputError
from library.qrc import drive, parallel, scan
from library.qrc.channel import transfer_matrices
from library.qrc.drive import drive_many, evolve
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, density_matrix, unpack
from tests.library.quantum_cases import (
    EXPECTATION,
    IDEAL,
    LINEAR,
    NOISY,
    OUTCOME,
    golden,
    golden_reservoir,
    reservoir,
    series,
)

ALL = IDEAL | NOISY


def largest(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("backend", ["auto", "direct", "fourier", "pauli", "parallel", "scan"])
def test_golden_features_and_memory_of_persistent_reservoirs(number, backend):
    case = golden(f"persistent_{number}")
    made = golden_reservoir(case)
    features, state = made.drive(torch.from_numpy(case["inputs"])[None], backend=backend)
    assert np.abs(features[0].numpy() - case["features"]).max() < 1e-10
    memory = density_matrix(unpack(state, Layout.of(made)).density)[0, 0].numpy()
    kept = 2 ** len(case["reset"])
    assert np.abs(memory - case["rho_after_reset_last"][::kept, ::kept]).max() < 1e-10


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("backend", ["direct", "fourier", "pauli"])
def test_golden_features_of_feedback(number, backend):
    case = golden(f"feedback_{number}")
    features, state = golden_reservoir(case).drive(torch.from_numpy(case["inputs"])[None], backend=backend)
    assert np.abs(features[0].numpy() - case["features"]).max() < 1e-10
    assert ((state >= 0) & (state <= 1)).all()


def test_golden_features_of_the_memory_task():
    case = golden("memory_capacity")
    made = QuantumReservoir(
        qubits=int(case["q_n"]),
        angles=tuple(case["q_phi"].ravel().tolist()),
        sigma=float(case["q_sigma"]),
        scale=float(case["q_a"]),
        bias=float(case["q_b"]),
        pairs="line",
    )
    signal = torch.from_numpy(case["signal"])[None, :, None]
    features, _ = made.drive(signal)
    assert np.abs(features[0, :50].numpy() - case["q_features"]).max() < 1e-10


@pytest.mark.parametrize("name", IDEAL)
def test_backends_agree_for_batches_of_configurations(name):
    made = [
        reservoir(IDEAL[name], seed=k, sigma=0.3 + 0.2 * k, scale=0.5 + k % 2, feedback=1.0 + k / 2) for k in range(3)
    ]
    inputs = series(3, 40, 2)
    features, states = drive_many(made, inputs, backend="direct")
    for backend in ("fourier", "pauli", "parallel", "scan", "auto"):
        if (backend in ("parallel", "scan") and name not in LINEAR) or (backend == "pauli" and name in OUTCOME):
            with pytest.raises(InputError, match=f"backend {backend} cannot"):
                drive_many(made, inputs, backend=backend)
            continue
        found, after = drive_many(made, inputs, backend=backend)
        assert largest(found, features) < 1e-12
        assert largest(after, states) < 1e-12
    alone = [one.drive(inputs, backend="direct") for one in made]
    assert largest([each for each, _ in alone], features) < 1e-12
    single, _ = drive_many(made, inputs, dtype=torch.complex64)
    assert single[0].dtype == torch.float32
    assert largest(single, features) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_pieces_of_time_give_the_whole(name):
    made = reservoir(ALL[name])
    inputs = series(2, 30, 1)
    features, state = made.drive(inputs)
    assert features.shape == (2, 30, made.width)
    assert made.width == len(made.feature_names)
    pieces, carried = [], made.start(2)
    for begin, end in ((0, 1), (1, 2), (2, 13), (13, 30)):
        piece, carried = made.drive(inputs[:, begin:end], carried)
        pieces.append(piece)
    assert largest([torch.cat(pieces, 1), carried], [features, state]) < 1e-12
    apart = torch.cat([made.drive(inputs[k : k + 1])[0] for k in range(2)])
    assert largest([apart], [features]) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_states_are_states_and_features_expectations(name):
    made = reservoir(ALL[name])
    features, state = made.drive(series(4, 25, 1))
    assert features.abs().max() <= 1 + 1e-12
    parts = unpack(state, Layout.of(made))
    memory = density_matrix(parts.density).sum(1)
    assert torch.allclose(memory.diagonal(dim1=-2, dim2=-1).sum(-1).real, torch.ones(4).double(), atol=1e-12)
    assert torch.linalg.eigvalsh(density_matrix(parts.density)).min() > -1e-12
    assert ((parts.feedback >= -1e-12) & (parts.feedback <= 1 + 1e-12)).all()


def test_every_piece_of_lanes_gives_the_same(monkeypatch):
    made = [reservoir(LINEAR["line, two reset"], seed=k) for k in range(9)]
    inputs = series(20, 6, 1)
    whole, after = drive_many(made, inputs)
    monkeypatch.setitem(drive.WORKING_BYTES, "cpu", 1)  # the fewest lanes at once: 16
    pieces, ends = drive_many(made, inputs)
    assert largest(whole + after, pieces + ends) < 1e-13


def test_many_with_equal_input_rotations_stay_together():
    made = [QuantumReservoir(seed=k, scale=0.5 if k % 3 else 0.1 + k) for k in range(30)]
    shared, rest = drive.grouped(made)
    assert shared == [k for k in range(30) if k % 3]
    assert rest == [k for k in range(30) if k % 3 == 0]
    features, _ = drive_many(made, series(1, 8, 2))
    alone = [one.drive(series(1, 8, 2))[0] for one in made]
    assert largest(features, alone) < 1e-13


@settings(max_examples=25, deadline=None)
@given(
    qubits=st.integers(2, 4),
    reset=st.integers(1, 3),
    kind=st.sampled_from(["su2", "ising"]),
    encoding=st.sampled_from(["pair", "rx_anc"]),
    sigma=st.floats(0.01, 2),
    scale=st.floats(0.1, 3),
    channels=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_reservoir_is_the_same_by_gates_polynomials_and_transfer_matrices(
    qubits, reset, kind, encoding, sigma, scale, channels, seed
):
    made = QuantumReservoir(
        qubits=qubits,
        measured=min(reset, qubits - 1),
        kind=kind,
        encoding=encoding,
        sigma=sigma,
        scale=scale,
        seed=seed,
    )
    inputs = series(1, 12, channels, seed=seed)
    features = [made.drive(inputs, backend=backend)[0] for backend in ("direct", "fourier", "pauli")]
    assert largest(features[:1] * 2, features[1:]) < 1e-12


def test_prefix_products_are_products():
    matrices = series(2, 11, 3, 3)
    expected = [matrices[:, 0]]
    for step in range(1, 11):
        expected.append(matrices[:, step] @ expected[-1])
    assert torch.allclose(scan.prefix_products(matrices), torch.stack(expected, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("encoding", "pairs", "degree"), [("pair", "line", 9), ("pair", "ring", 12), ("rx_anc", "line", 1)]
)
def test_a_step_is_a_trigonometric_polynomial_of_its_input(encoding, pairs, degree):
    made = QuantumReservoir(encoding=encoding, pairs=pairs, measured=2, scale=1.3)
    polynomial = scan.StepPolynomial(made, 1, torch.eye(16, dtype=torch.float64))
    assert len(polynomial.coefficients) == 2 * degree + 1
    assert polynomial.coefficients[[0, -1]].abs().amax((1, 2)).min() > 1e-8  # no lower degree would do
    inputs = series(5, 1, seed=3) * 4 - 2
    matrices, read = polynomial(inputs)
    assert torch.allclose(matrices, transfer_matrices(made, inputs), atol=1e-13)
    assert torch.allclose(read[:, :, ::5].sum(1), torch.ones(5, 4).double(), atol=1e-13)  # probabilities of a state
    value = inputs[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(polynomial(value)[0][0, 3, 6], value)
    ahead, back = (transfer_matrices(made, inputs[:1] + shift)[0, 3, 6] for shift in (1e-5, -1e-5))
    assert float(slope) == pytest.approx(float(ahead - back) / 2e-5, abs=1e-8)
    with pytest.raises(InputError, match="use the backend direct"):
        scan.StepPolynomial(made.model_copy(update={"scale": 0.0}), 1, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["parallel", "auto"])
def test_long_series_in_parallel_pieces_of_time(backend, monkeypatch):
    made = QuantumReservoir(sigma=0.3)
    inputs = series(1, 3000, 1)
    features, state = made.drive(inputs, backend="direct")
    lengths = []
    evolve_pieces = parallel.direct.evolve
    monkeypatch.setattr(
        parallel.direct,
        "evolve",
        lambda *args, **options: lengths.append(args[1].shape) or evolve_pieces(*args, **options),
    )
    found, after = made.drive(inputs, backend=backend)
    assert lengths[0][0] > 4  # pieces side by side
    assert sum(shape[1] for shape in lengths if shape[0] > 4) < 1000  # steps one after another
    assert largest([found, after], [features, state]) < 1e-12


def test_too_short_an_overlap_is_seen_and_doubled(monkeypatch):
    made = QuantumReservoir(sigma=0.3)
    inputs = series(1, 600, 1)
    tried = []
    choose = parallel.best_pieces
    monkeypatch.setattr(parallel, "best_pieces", lambda *args: tried.append(args[-1]) or choose(*args))
    rows = unpack(made.start(1)[:, None], Layout.of(made))
    readout = torch.eye(16, dtype=torch.float64)
    found, _ = parallel.evolve([made], inputs, rows, readout, overlap=4)
    assert tried[0] == 4
    assert len(tried) > 2
    exact, _ = evolve([made], inputs, [made.start(1)], readout, backend="direct")
    assert largest([found], [exact]) < 1e-12


def test_a_memory_that_does_not_fade_is_not_cut():
    made = QuantumReservoir(kind="ising", sigma=0.0, scale=0.0, bias=0.0)
    inputs = series(1, 200, 1)
    assert parallel.suggested_overlap([made], inputs) == 200
    assert largest([made.drive(inputs, backend="parallel")[0]], [made.drive(inputs, backend="direct")[0]]) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": 4}, "leaves no memory"),
        ({"measured": 2, "reset": 3}, "only 2 are measured"),
        ({"mode": "feedback", "measured": 2}, "all 4 qubits"),
        ({"mode": "both", "measured": 0}, "no measured qubit"),
        ({"feedback_by": "outcome"}, "needs mode feedback or both"),
        ({"mode": "both", "period": 2}, "needs mode persistent"),
        ({"angles": (0.1, 0.2)}, "takes 24"),
        ({"unitary": (1.0,) * 512}, "differs from the identity"),
        ({"unitary": (1.0,)}, "4 qubits take 512"),
        ({"qubits": 7, "noise": {}}, "4^n x 4^n"),
        ({"qubits": 13}, "13 qubits: each of a step's matrices takes 1 GiB; allowed: 2 to 10"),
        ({"qubits": 1}, "greater than or equal to 2"),
        ({"sigma": -1}, "greater than or equal to 0"),
        ({"depth": 3}, "Extra inputs"),
        *(
            ({name: value}, "finite number")
            for name in ("sigma", "scale", "bias", "feedback", "field")
            for value in (torch.inf, torch.nan)
        ),
        ({"angles": (torch.nan,) * 24}, "finite number"),
        ({"unitary": (torch.nan,) * 512}, "finite number"),
    ],
)
def test_settings_that_make_no_reservoir_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message.replace("^", r"\^")):
        QuantumReservoir(**changes)


def test_inputs_and_states_that_fit_not_are_refused():
    made = QuantumReservoir(qubits=2)
    with pytest.raises(InputError, match="series, time, channels"):
        made.drive(torch.zeros(3, 2))
    with pytest.raises(InputError, match="a ndarray; allowed: a tensor"):
        made.drive(np.zeros((1, 5, 1)))
    with pytest.raises(InputError, match="series, time, channels"):
        made.drive(torch.zeros(1, 0, 1))
    bad = torch.zeros(2, 5, 1)
    bad[1, 3, 0] = torch.nan
    with pytest.raises(InputError, match="series 1, step 3, channel 0"):
        made.drive(bad)
    with pytest.raises(InputError, match=r"\(2, 3\); this reservoir and input take \(1, 4\)"):
        made.drive(torch.zeros(1, 5, 1), torch.zeros(2, 3))
    with pytest.raises(InputError, match="not finite"):
        made.drive(torch.zeros(1, 5, 1), torch.full((1, 4), torch.inf))
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        reservoir(EXPECTATION["feedback"]).drive(torch.zeros(1, 5, 1), torch.full((1, 3), 2.0))
    with pytest.raises(InputError, match="1 states for 2 reservoirs"):
        drive_many([made, made], torch.zeros(1, 5, 1), [made.start(1)])
    with pytest.raises(InputError, match="backend parallel cannot evolve"):
        reservoir(EXPECTATION["both"]).drive(torch.zeros(1, 5, 1), backend="parallel")
    with pytest.raises(InputError, match="allowed: auto, pauli"):
        reservoir(NOISY["noise"]).drive(torch.zeros(1, 5, 1), backend="direct")


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_survives_json(name):
    made = reservoir(ALL[name])
    again = QuantumReservoir.model_validate_json(made.model_dump_json())
    assert again == made
    assert made.describe()["cx_per_step"] == made.cx_per_step > 0
    assert torch.equal(again.drive(series(1, 5, 1))[0], made.drive(series(1, 5, 1))[0])
