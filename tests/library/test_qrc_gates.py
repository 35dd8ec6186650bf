"""Gates: closed forms, the pair rotation, and what a reservoir is at special angles."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.steps import Steps, channel_degrees, rotate_inputs
from tests.library.quantum_cases import LINEAR, reservoir, series

X = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
Y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
Z = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)
ONE = torch.eye(2, dtype=torch.complex128)
PAULI = {"rx": X, "ry": Y, "rz": Z}


def on(matrix: torch.Tensor, qubit: int, qubits: int) -> torch.Tensor:
    """A matrix of one qubit on all: the last factor is qubit 0."""
    result = torch.ones(1, 1, dtype=torch.complex128)
    for q in reversed(range(qubits)):
        result = torch.kron(result, matrix if q == qubit else ONE)
    return result


def angle(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", PAULI)
@pytest.mark.parametrize("qubit", range(3))
def test_rotations_are_exponentials(name, qubit):
    found = gates.apply_gates(gates.identity(3, angle(0.7)), [gates.Gate(name, (qubit,), angle(0.7))])
    assert torch.allclose(found, torch.linalg.matrix_exp(-0.35j * on(PAULI[name], qubit, 3)), atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(first=st.floats(-7, 7), second=st.floats(-7, 7), pair=st.permutations(range(3)))
def test_the_pair_rotation(first, second, pair):
    pair = (pair[0], pair[1])
    start = gates.identity(3, angle(0))
    found = gates.pair_rotations(start, [pair], angle(first)[None])
    zz = on(Z, pair[0], 3) @ on(Z, pair[1], 3)
    xx = on(X, pair[0], 3) + on(X, pair[1], 3)
    expected = torch.linalg.matrix_exp(-0.5j * first * zz) @ torch.linalg.matrix_exp(-0.5j * first * xx)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found, gates.pair_rotations(start, [pair[::-1]], angle(first)[None]), atol=1e-14)
    by_gates = gates.apply_gates(start, gates.elementary(gates.pair_gates(pair, angle(first))))
    assert torch.allclose(found, by_gates, atol=1e-14)
    twice = gates.pair_rotations(start, [pair, pair], torch.tensor([first, second], dtype=torch.float64))
    assert torch.allclose(twice, gates.pair_rotations(found, [pair], angle(second)[None]), atol=1e-14)


def test_two_pair_rotations_do_not_merge():
    start = gates.identity(2, angle(0))
    apart = gates.pair_rotations(start, [(0, 1)] * 2, torch.tensor([0.4, 0.9], dtype=torch.float64))
    merged = gates.pair_rotations(start, [(0, 1)], angle(1.3)[None])
    assert (apart - merged).abs().max() > 0.05


@pytest.mark.parametrize("name", LINEAR)
def test_an_input_at_angle_zero_does_nothing(name):
    made = reservoir(LINEAR[name])
    columns = rotate_inputs(made, torch.zeros(2, dtype=torch.float64), 2**made.qubits, torch.complex128)
    assert torch.equal(columns, torch.eye(2**made.qubits).to(columns))


@pytest.mark.parametrize("reset", [0, 1, 2])
def test_sigma_zero_is_the_identity_for_ising_and_a_permutation_for_su2(reset):
    ising = QuantumReservoir(kind="ising", sigma=0.0, measured=2, reset=reset).fixed_unitary()
    assert torch.equal(ising, torch.eye(16).to(ising))
    su2 = QuantumReservoir(sigma=0.0, measured=2, reset=reset).fixed_unitary()
    assert torch.equal(su2.abs().sum(0), torch.ones(16).double())
    assert torch.equal(su2, su2.real.round().to(su2))


def test_parities_are_expectations_of_every_pair_in_a_product_state():
    """Each of them: a mask that is wrong for one pair only would pass a test of the sum."""
    tilt = torch.tensor([0.3, 0.9, 1.7, 2.6], dtype=torch.float64)
    state = gates.identity(4, tilt)[:, :1]
    for qubit in range(4):
        state = gates.rotate_x(state, qubit, tilt[qubit])
    found = state.abs().square()[:, 0] @ gates.parity_matrix(4, range(4))
    singles = tilt.cos()
    pairs = [singles[p] * singles[q] for p, q in itertools.combinations(range(4), 2)]
    assert torch.allclose(found, torch.cat([singles, torch.stack(pairs)]), atol=1e-14)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", LINEAR)
def test_the_unitary_is_a_trigonometric_polynomial_of_the_stated_degree(name, channels):
    made = reservoir(LINEAR[name])
    options = {"device": torch.device("cpu"), "dtype": torch.complex128}
    steps = Steps([made], 2**made.memory_qubits, channels, **options, fourier=True)
    terms = 1
    for degree in channel_degrees(made, channels):
        terms *= degree + 1
    assert steps.coefficients.shape[1] == terms
    inputs = series(2, 7, channels)
    by_gates = Steps([made], 2**made.memory_qubits, channels, **options, fourier=False)
    assert torch.allclose(steps.block(inputs), by_gates.block(inputs), atol=1e-13)
    highest = steps.coefficients[:, [0, -1]].abs().amax((0, 2))
    assert highest.min() > 1e-6  # one term less would not do


def test_relabelled_qubits_give_relabelled_features():
    """A ring of two qubits with their fixed angles exchanged: <Z0> and <Z1> change places, nothing measured."""
    made = QuantumReservoir(qubits=2, measured=0, kind="ising", sigma=0.8, angles=(0.6,))
    features, _ = made.drive(series(1, 20, 1))
    assert torch.allclose(features[..., 0], features[..., 1], atol=1e-13)
    swap = torch.eye(4, dtype=torch.complex128)[[0, 2, 1, 3]]
    unitary = reservoir({"qubits": 2}).fixed_unitary()
    pair = [
        QuantumReservoir(qubits=2, measured=0, unitary=tuple(torch.view_as_real(each).flatten().tolist()))
        for each in (unitary, swap @ unitary @ swap)
    ]
    one, other = (each.drive(series(1, 20, 1))[0] for each in pair)
    assert torch.allclose(one[..., [1, 0, 2]], other, atol=1e-13)
    turned = QuantumReservoir(qubits=2, measured=0, unitary=tuple(torch.view_as_real(unitary * 1j).flatten().tolist()))
    assert torch.allclose(turned.drive(series(1, 20, 1))[0], one, atol=1e-13)


def test_a_reset_qubit_alone_follows_the_cosine_of_its_angle():
    unit = tuple(torch.view_as_real(torch.eye(4, dtype=torch.complex128)).flatten().tolist())
    made = QuantumReservoir(qubits=2, encoding="rx_anc", unitary=unit, scale=2.0, bias=0.3)
    inputs = series(1, 30, 1)
    features, _ = made.drive(inputs)
    assert torch.allclose(features[0, :, 0], (2.0 * inputs[0, :, 0] + 0.3).cos(), atol=1e-14)
    with pytest.raises(InputError, match="no gates"):
        made.fixed_gates()
