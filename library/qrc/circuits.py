"""The same reservoirs as qiskit circuits: for qiskit-aer, exact, sampled or noisy, and for hardware.

Importing this module imports qiskit; nothing else of the room does. Gates are RX, RY, RZ and CX, in the order of
`library.qrc.gates`; qubit 0 is qiskit's qubit 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister, qasm3
from qiskit.quantum_info import Kraus
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel, ReadoutError, depolarizing_error
from torch import Tensor

from library.errors import InputError
from library.qrc import gates
from library.qrc.drive import checked_inputs
from library.qrc.noise import Noise
from library.qrc.reservoir import QuantumReservoir


def series_circuit(
    reservoir: QuantumReservoir, inputs: Tensor, *, expectations: Tensor | None = None
) -> QuantumCircuit:
    """One long circuit of all steps, with mid-circuit measurements and resets: what runs on hardware.

    `inputs` (time, channels). The bit of measured qubit q in the k-th measured step is classical bit k m + q. Outcome
    feedback becomes conditioned gates (a dynamic circuit). Feedback of expectations needs them, `expectations` (time,
    measured) being z before each step; raises InputError without.
    """
    inputs = checked_inputs(inputs[None])[0]
    measured = reservoir.measured_qubits
    fed = reservoir.mode != "persistent"
    by_outcome = fed and reservoir.feedback_by == "outcome"
    if fed and not by_outcome and expectations is None:
        raise InputError("feedback of expectations needs all shots of a step before the next: give expectations")
    steps = len(inputs) // reservoir.period
    circuit = QuantumCircuit(QuantumRegister(reservoir.qubits, "q"), ClassicalRegister(measured * steps, "c"))
    for step, values in enumerate(inputs):
        if by_outcome and step:
            _conditioned(circuit, reservoir, (step - 1) * measured)
        append_step(circuit, reservoir, values, expectations[step] if fed and not by_outcome else None)
        if (step + 1) % reservoir.period == 0:
            number = (step + 1) // reservoir.period - 1
            circuit.measure(range(measured), range(number * measured, (number + 1) * measured))
            if reservoir.reset_qubits:
                circuit.reset(range(reservoir.reset_qubits))
    return circuit


def append_step(
    circuit: QuantumCircuit, reservoir: QuantumReservoir, values: Tensor, expectation: Tensor | None = None
) -> None:
    """The gates of a step: feedback of `expectation` (measured,), inputs (channels,), fixed unitary, decay."""
    values = values.double().cpu()
    if expectation is not None:
        for pair, z in zip(reservoir.feedback_pairs, expectation, strict=True):
            _append(circuit, gates.pair_gates(pair, reservoir.feedback * z))
    angles = reservoir.scale * values + reservoir.bias
    if reservoir.encoding == "rx_anc":
        for channel, angle in enumerate(angles):
            circuit.rx(float(angle), channel % reservoir.measured_qubits)
    else:
        for place, pair in enumerate(reservoir.input_pairs):
            _append(circuit, gates.pair_gates(pair, angles[place % len(angles)]))
    if reservoir.unitary:
        circuit.unitary(reservoir.fixed_unitary().numpy(), range(reservoir.qubits))
    else:
        _append(circuit, reservoir.fixed_gates())
    if reservoir.noise is not None and reservoir.noise.damping:
        decay = _decay(reservoir.noise.damping).to_instruction()
        for qubit in range(reservoir.qubits):
            circuit.append(decay, [qubit])


def exact_features(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """Features float64 (time, width) from Aer's density matrices, for inputs (time, channels).

    A `measure` in that method collapses the state shot by shot, so the average over outcomes is the dephasing channel
    in its place. Feedback of expectations runs step by step; outcomes that are fed back are held coherently by
    additional qubits, whose dephasing is the measurement. Slow: it is here to be compared with.
    """
    inputs = checked_inputs(inputs[None])[0]
    if reservoir.mode != "persistent" and reservoir.feedback_by == "expectation":
        return _exact_with_expectations(reservoir, inputs)
    circuit = density_circuit(reservoir, inputs)
    return probability_features(reservoir, _density_simulator(reservoir).run(circuit, shots=1).result().data(0))


def density_circuit(reservoir: QuantumReservoir, inputs: Tensor) -> QuantumCircuit:
    """The circuit of `exact_features` for Aer's density-matrix method: saves the probabilities of step t as "t"."""
    by_outcome = reservoir.mode != "persistent"
    held = reservoir.measured_qubits if by_outcome else 0
    circuit = QuantumCircuit(reservoir.qubits + held)
    for step, values in enumerate(inputs):
        if by_outcome:
            for number, pair in enumerate(reservoir.feedback_pairs):
                _controlled(circuit, pair, reservoir.feedback, reservoir.qubits + number)
            circuit.reset(range(reservoir.qubits, reservoir.qubits + held))
        append_step(circuit, reservoir, values)
        circuit.save_probabilities(list(range(reservoir.qubits)), label=f"{step}")
        if (step + 1) % reservoir.period == 0:
            _average_measurement(circuit, reservoir, held)
    return circuit


def probability_features(reservoir: QuantumReservoir, data: dict[str, np.ndarray]) -> Tensor:
    """Features float64 (time, width) of what `density_circuit` saved."""
    return _features(reservoir, np.stack([data[f"{step}"] for step in range(len(data))]))


def sampled_features(
    reservoir: QuantumReservoir, inputs: Tensor, *, shots: int, seed: int, method: str = "statevector"
) -> Tensor:
    """Features of the measured qubits from shots of the long circuit: float64 (measured steps, m (m + 1) / 2).

    Feedback of expectations is not sampled here (see `library.qrc.shots`): each of its steps needs a job of its own.
    Raises InputError for that, and for fewer than 1 shot.
    """
    if shots < 1:
        raise InputError(f"shots must be at least 1, got {shots}")
    circuit = series_circuit(reservoir, inputs)
    simulator = AerSimulator(method=method, noise_model=reservoir.noise and noise_model(reservoir.noise))
    memory = simulator.run(circuit, shots=shots, seed_simulator=seed, memory=True).result().get_memory()
    bits = np.array([[character == "1" for character in shot[::-1]] for shot in memory], dtype=np.int64)
    bits = torch.from_numpy(bits.reshape(shots, -1, reservoir.measured_qubits))
    outcomes = (bits << torch.arange(reservoir.measured_qubits)).sum(-1)
    parities = gates.parity_matrix(reservoir.measured_qubits, range(reservoir.measured_qubits))
    return parities[outcomes].mean(0)


def noise_model(noise: Noise) -> NoiseModel:
    """Depolarising errors after RX, RY, RZ and CX, and flipped read-out; damping is in the circuit, once per step."""
    model = NoiseModel()
    if noise.depolarizing_1:
        model.add_all_qubit_quantum_error(depolarizing_error(noise.depolarizing_1, 1), ["rx", "ry", "rz"])
    if noise.depolarizing_2:
        model.add_all_qubit_quantum_error(depolarizing_error(noise.depolarizing_2, 2), ["cx"])
    if noise.readout:
        flip = noise.readout
        model.add_all_qubit_readout_error(ReadoutError([[1 - flip, flip], [flip, 1 - flip]]))
    return model


def to_qasm3(reservoir: QuantumReservoir, inputs: Tensor, *, expectations: Tensor | None = None) -> str:
    """OpenQASM 3 of `series_circuit`, for hardware and other tools; noise is left out."""
    ideal = reservoir.model_copy(update={"noise": None})
    return qasm3.dumps(series_circuit(ideal, inputs, expectations=expectations))


def _decay(probability: float) -> Kraus:
    """|1> -> |0> with `probability`. As a channel of the circuit: one of Aer's noise module takes an eigendecomposition
    when it is sampled, and the OpenBLAS that Aer 0.18 brings gets that wrong on Intel's Sapphire Rapids."""
    return Kraus([np.diag([1.0, np.sqrt(1 - probability)]), np.array([[0.0, np.sqrt(probability)], [0.0, 0.0]])])


def _append(circuit: QuantumCircuit, sequence: Sequence[gates.Gate]) -> None:
    for gate in gates.elementary(sequence):
        if gate.name == "cx":
            circuit.cx(*gate.qubits)
        else:
            getattr(circuit, gate.name)(float(gate.angle), *gate.qubits)


def _conditioned(circuit: QuantumCircuit, reservoir: QuantumReservoir, first_bit: int) -> None:
    """R(feedback) of each pair whose qubit measured 1 in the last step."""
    angle = torch.tensor(reservoir.feedback, dtype=torch.float64)
    for number, pair in enumerate(reservoir.feedback_pairs):
        with circuit.if_test((circuit.clbits[first_bit + number], 1)):
            _append(circuit, gates.pair_gates(pair, angle))


def _controlled(circuit: QuantumCircuit, pair: tuple[int, int], angle: float, control: int) -> None:
    """The same, conditioned on a qubit that holds the outcome."""
    matrix = torch.eye(8, dtype=torch.complex128)
    matrix[4:, 4:] = gates.pair_matrices(torch.tensor(angle, dtype=torch.float64))
    circuit.unitary(matrix.numpy(), [*pair, control])


def _average_measurement(circuit: QuantumCircuit, reservoir: QuantumReservoir, held: int) -> None:
    """Measurement and reset averaged over outcomes; with `held` qubits these keep the outcomes."""
    dephasing = Kraus([np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]).to_instruction()
    for qubit in range(reservoir.measured_qubits):
        if held:
            circuit.cx(qubit, reservoir.qubits + qubit)
        circuit.append(dephasing, [qubit])
    if reservoir.reset_qubits:
        circuit.reset(range(reservoir.reset_qubits))


def _exact_with_expectations(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    simulator = _density_simulator(reservoir)
    size = 2**reservoir.qubits
    density = np.zeros((size, size), dtype=complex)
    density[0, 0] = 1
    expectation = torch.full((reservoir.measured_qubits,), 0.5, dtype=torch.float64)
    rows = []
    for values in inputs:
        circuit = QuantumCircuit(reservoir.qubits)
        circuit.set_density_matrix(density)
        append_step(circuit, reservoir, values, expectation)
        circuit.save_probabilities(list(range(reservoir.qubits)), label="probabilities")
        _average_measurement(circuit, reservoir, 0)
        circuit.save_density_matrix(label="density")
        data = simulator.run(circuit, shots=1).result().data(0)
        density = np.asarray(data["density"])
        rows.append(_features(reservoir, data["probabilities"]))
        expectation = (1 - rows[-1][: reservoir.measured_qubits]) / 2  # the measured qubits are observed, and first
    return torch.stack(rows)


def _density_simulator(reservoir: QuantumReservoir) -> AerSimulator:
    return AerSimulator(method="density_matrix", noise_model=reservoir.noise and noise_model(reservoir.noise))


def _features(reservoir: QuantumReservoir, probabilities: np.ndarray) -> Tensor:
    """Features of probabilities (..., 2^n), read through flipped bits."""
    parities = gates.parity_matrix(reservoir.qubits, range(reservoir.observed_qubits))
    keep = 1 - 2 * (reservoir.noise.readout if reservoir.noise else 0.0)
    singles = reservoir.observed_qubits
    factors = torch.tensor([keep] * singles + [keep**2] * (reservoir.width - singles), dtype=torch.float64)
    return torch.from_numpy(np.ascontiguousarray(probabilities)) @ parities * factors
