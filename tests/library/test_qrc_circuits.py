"""Every kind of reservoir against qiskit-aer: exact averages, noise, shots of one long circuit, and OpenQASM 3."""

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import Operator
from qiskit_qasm3_import import parse

from library.errors import InputError
from library.qrc.channel import superoperator
from library.qrc.circuits import append_step, exact_features, sampled_features, series_circuit, to_qasm3
from library.qrc.reservoir import QuantumReservoir
from tests.library.quantum_cases import EXPECTATION, IDEAL, NOISY, golden, golden_reservoir, reservoir, series

ALL = IDEAL | NOISY


@pytest.mark.parametrize("name", ALL)
def test_aers_exact_averages_are_ours(name):
    made = reservoir(ALL[name])
    inputs = series(12, 2)
    features, _ = made.drive(inputs[None])
    assert (features[0] - exact_features(made, inputs)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["su2", "ising"])
def test_qiskits_operator_is_our_unitary(kind):
    made = QuantumReservoir(kind=kind, seed=1)
    circuit = QuantumCircuit(4)
    append_step(circuit, made.model_copy(update={"scale": 0.0, "bias": 0.0}), torch.zeros(1))
    assert np.abs(Operator(circuit).data - made.fixed_unitary().numpy()).max() < 1e-13


def test_an_own_unitary_runs_on_aer():
    unitary = QuantumReservoir(qubits=2, seed=4).fixed_unitary()
    made = QuantumReservoir(qubits=2, unitary=tuple(torch.view_as_real(unitary).flatten().tolist()))
    inputs = series(6, 1)
    assert (made.drive(inputs[None])[0][0] - exact_features(made, inputs)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["one measured qubit not reset", "both with outcomes", "noise", "every third step"])
def test_shots_of_the_long_circuit_scatter_about_the_exact_features(name):
    made = reservoir(ALL[name], observed="measured")
    inputs, shots = series(12, 1), 2000
    features, _ = made.drive(inputs[None])
    exact = features[0, made.period - 1 :: made.period]
    estimate = sampled_features(made, inputs, shots=shots, seed=7)
    error = (estimate - exact) / ((1 - exact**2) / shots).sqrt()
    assert error.abs().max() < 5
    assert 0.4 < error.square().mean() < 2.5  # neither biased nor too good


def test_golden_shots():
    case = golden("shots")
    made = golden_reservoir(case, observed="measured")
    features, _ = made.drive(torch.from_numpy(case["inputs"])[None])
    assert np.abs(features[0].numpy() - case["exact"]).max() < 1e-10
    error = np.abs(case["estimate"] - features[0].numpy())
    assert (error < 5 * np.sqrt((1 - case["exact"] ** 2) / int(case["shots"]))).all()


@pytest.mark.parametrize("name", ["pairs on a ring", "every third step", "both with outcomes", "outcomes", "noise"])
def test_openqasm_read_back_is_the_circuit(name):
    made = reservoir(ALL[name])
    inputs = series(6, 1)
    again = parse(to_qasm3(made, inputs))
    ideal = made.model_copy(update={"noise": None})
    assert again == series_circuit(ideal, inputs)
    measured = made.measured_qubits * (6 // made.period)
    assert again.count_ops()["measure"] == again.num_clbits == measured
    assert again.count_ops()["reset"] == made.reset_qubits * (6 // made.period)


def test_openqasm_of_fed_back_expectations_needs_them():
    made = reservoir(EXPECTATION["both"])
    inputs = series(4, 1)
    with pytest.raises(InputError, match="give expectations"):
        to_qasm3(made, inputs)
    features, _ = made.drive(inputs[None])
    before = torch.cat([torch.full((1, 2), 0.5, dtype=torch.float64), (1 - features[0, :-1, :2]) / 2])
    again = parse(to_qasm3(made, inputs, expectations=before))
    assert again.count_ops()["cx"] == 4 * made.cx_per_step
    with pytest.raises(InputError, match="at least 1"):
        sampled_features(made, inputs, shots=0, seed=0)


def test_a_dephased_step_is_not_what_the_density_matrix_method_measures():
    """The trap: with `measure` in place of the dephasing channel one shot follows one outcome, not their average."""
    made = QuantumReservoir(qubits=2, sigma=0.9, scale=1.0, measured=1, reset=0)
    inputs = series(3, 1)
    from qiskit_aer import AerSimulator

    circuit = series_circuit(made, inputs[:2])
    append_step(circuit, made, inputs[2])
    circuit.save_probabilities(label="p")
    single = AerSimulator(method="density_matrix").run(circuit, shots=1, seed_simulator=1).result().data(0)["p"]
    exact = exact_features(made, inputs)[-1]
    assert abs(single[0] + single[2] - single[1] - single[3] - float(exact[0])) > 1e-3


def test_the_superoperator_is_qiskits():
    from qiskit.quantum_info import Kraus, SuperOp

    unitary = QuantumReservoir(qubits=2, seed=2).fixed_unitary()
    keep = [np.kron(np.eye(2), np.diag(row)) for row in ([1, 0], [0, 1])]
    reset = [keep[0], np.kron(np.eye(2), np.array([[0, 1], [0, 0]]))]
    for kraus, resets in ((keep, 0), (reset, 1)):
        expected = SuperOp(Kraus([k @ unitary.numpy() for k in kraus])).data
        assert np.abs(superoperator(unitary, 1, resets).numpy() - expected).max() < 1e-14
