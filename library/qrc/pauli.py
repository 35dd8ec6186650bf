"""Reservoirs as real transfer matrices between Pauli strings of all qubits: the evolution that takes noise.

A state is r_P = tr(P rho) for the 4^n Pauli strings, index = sum_q p_q 4^q with p = 0, 1, 2, 3 for I, X, Y, Z. A gate
is the real matrix R_PQ = tr(P U Q U^H) / d on its qubits, noise after a gate multiplies it: depolarising keeps I and
shrinks the rest by 1 - p; damping shrinks X and Y by sqrt(1 - g), Z by 1 - g, and adds g I to Z.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.direct import Estimate, block_bytes
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import State, density_matrix, packed_matrix
from library.qrc.steps import alike_gates

SINGLE = torch.tensor(
    [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], dtype=torch.complex128
)


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
    estimate: Estimate | None = None,
) -> tuple[Tensor, State]:
    """As `direct.evolve`, with the reservoirs' noise."""
    first, real = reservoirs[0], dtype.to_real()
    series, time, channels = inputs.shape
    count, qubits = len(reservoirs), first.qubits
    noise = NoiseFactors(reservoirs, inputs.device, real)
    fixed = fixed_transfer(reservoirs, noise)
    vector = _embedded(first, state.density.to(real)).reshape(series, count, -1)
    expectation, counter = state.feedback.to(real), state.counter
    strengths = inputs.new_tensor([[r.scale, r.bias, r.feedback] for r in reservoirs], dtype=real)
    bits = (
        torch.stack([(1 - gates.parity_signs(qubits, (q,), vector)) / 2 for q in range(expectation.shape[-1])], 1)
        if expectation.shape[-1]
        else None
    )
    reset_from, kept = (part.to(inputs.device) for part in _measurement(first))
    readout = readout.to(vector)
    places = [place % channels for place in range(len(first.input_pairs))]
    result = inputs.new_empty(series, count, time, readout.shape[1], dtype=real)
    block = max(1, block_bytes(inputs.device) // (series * count * qubits * 256 * real.itemsize))
    for begin in range(0, time, block):
        piece = inputs[:, begin : begin + block].transpose(0, 1)[:, :, None].to(real)
        angles = strengths[:, :1] * piece + strengths[:, 1:2]  # (time, series, reservoirs, channels)
        turns = pair_transfer(angles[..., places], noise) if first.encoding == "pair" else None
        for step in range(len(angles)):
            if bits is not None:
                fed = pair_transfer(strengths[:, 2:] * expectation, noise)
                vector = _rotated(vector, first.feedback_pairs, fed, qubits)
            if turns is not None:
                vector = _rotated(vector, first.input_pairs, turns[step], qubits)
            else:
                for channel in range(channels):
                    turn = noise.after_one(rotation_transfer("x", angles[step, ..., channel]))
                    vector = on_one(vector[..., None], channel % first.measured_qubits, turn)[..., 0]
            vector = torch.einsum("cij,scj->sci", fixed, vector)
            probabilities = noise.read(vector)
            if estimate:
                probabilities = estimate(probabilities.flatten(0, 1)).reshape(probabilities.shape)
            if bits is not None:
                expectation = probabilities @ bits
            result[:, :, begin + step] = probabilities @ readout
            counter = (counter + 1) % first.period
            vector = torch.where((counter == 0)[..., None], vector[..., reset_from] * kept, vector)
    density = _reduced(first, vector).reshape(state.density.shape)
    return result, State(density, expectation, counter if first.period > 1 else state.counter)


class NoiseFactors:
    """The noise of each reservoir, and what it does to transfer matrices (..., reservoirs, rows, columns)."""

    def __init__(self, reservoirs: Sequence[QuantumReservoir], device: torch.device, real: torch.dtype) -> None:
        names = ("depolarizing_1", "depolarizing_2", "damping", "readout")
        table = [[getattr(r.noise, name) if r.noise else 0.0 for name in names] for r in reservoirs]
        self.one, self.two, self.damping, self.readout = torch.tensor(table, dtype=real, device=device).T
        self.qubits = reservoirs[0].qubits
        index = torch.arange(2**self.qubits, device=device)
        weight = sum((index >> q) & 1 for q in range(self.qubits))
        self.strings = sum(3 * 4**q * ((index >> q) & 1) for q in range(self.qubits))
        self.flips = (1 - 2 * self.readout[:, None]) ** weight
        parities = sum(((index >> q) & 1)[:, None] * ((index >> q) & 1) for q in range(self.qubits))
        self.transform = (1.0 - 2.0 * (parities % 2)).to(real) / len(index)

    def after_one(self, matrix: Tensor) -> Tensor:
        """After a gate of one qubit (..., reservoirs, 4, 4)."""
        return self._shrunk(matrix, self.one)

    def after_two(self, matrix: Tensor) -> Tensor:
        """After a gate of two qubits (..., reservoirs, 16, 16)."""
        return self._shrunk(matrix, self.two)

    def decay(self) -> Tensor:
        """The damping of one qubit: (reservoirs, 4, 4)."""
        coherence, ground = (1 - self.damping).sqrt(), self.damping
        matrix = torch.diag_embed(torch.stack([torch.ones_like(ground), coherence, coherence, 1 - ground], -1))
        matrix[:, 3, 0] = ground
        return matrix

    def read(self, vector: Tensor) -> Tensor:
        """Probabilities of the reported bits, (series, reservoirs, 2^n)."""
        return (vector[..., self.strings] * self.flips) @ self.transform

    def _shrunk(self, matrix: Tensor, rate: Tensor) -> Tensor:
        factors = (1 - rate)[:, None, None].repeat(1, matrix.shape[-2], 1)
        factors[:, 0] = 1
        return matrix * factors


def transfer(unitary: Tensor) -> Tensor:
    """R_PQ = tr(P U Q U^H) / d of unitaries of one or two qubits: real (..., d^2, d^2)."""
    basis = SINGLE.to(unitary)
    if unitary.shape[-1] == 4:
        basis = torch.einsum("aij,bkl->abikjl", basis, basis).reshape(16, 4, 4)
    moved = unitary[..., None, :, :] @ basis @ unitary[..., None, :, :].mH
    return torch.einsum("pij,...qji->...pq", basis, moved).real / unitary.shape[-1]


def rotation_transfer(axis: str, angle: Tensor) -> Tensor:
    """The transfer matrix of RX, RY or RZ: real (..., 4, 4)."""
    turned = gates.apply_gates(gates.identity(1, angle), [gates.Gate(f"r{axis}", (0,), angle)])
    return transfer(turned)


def pair_transfer(angles: Tensor, noise: NoiseFactors) -> Tensor:
    """R_ij(angle) as RX, RX, CX, RZ, CX with noise after each: (..., reservoirs, pairs, 16, 16), i the slower digit."""
    angles = angles.movedim(-1, 0)  # pairs first, so that noise of each reservoir broadcasts
    turn = noise.after_one(rotation_transfer("x", angles))
    phase = noise.after_one(rotation_transfer("z", angles))
    flip = noise.after_two(_flip().to(turn).expand(*noise.one.shape, 16, 16))
    unit = torch.eye(4, dtype=turn.dtype, device=turn.device).expand_as(turn)
    return (flip @ _kron(unit, phase) @ flip @ _kron(turn, turn)).movedim(0, -3)


def fixed_transfer(reservoirs: Sequence[QuantumReservoir], noise: NoiseFactors) -> Tensor:
    """The gates without inputs and the damping of the step: real (reservoirs, 4^n, 4^n)."""
    qubits = reservoirs[0].qubits
    size = 4**qubits
    result = torch.eye(size, dtype=noise.one.dtype, device=noise.one.device).repeat(len(reservoirs), 1, 1)
    for places, sequence in alike_gates(reservoirs):
        columns, chosen = result[places], NoiseFactors([reservoirs[k] for k in places], result.device, result.dtype)
        for gate in gates.elementary(sequence):
            if gate.name == "cx":
                flip = chosen.after_two(_flip().to(columns).expand(len(places), 16, 16))
                columns = on_two(columns, gate.qubits, flip)
            else:
                turn = rotation_transfer(gate.name[1], gate.angle.to(columns))
                columns = on_one(columns, gate.qubits[0], chosen.after_one(turn))
        for qubit in range(qubits):
            columns = on_one(columns, qubit, chosen.decay())
        result[places] = columns
    return result


def on_one(columns: Tensor, qubit: int, matrix: Tensor) -> Tensor:
    """A matrix (..., 4, 4) on one qubit of columns (..., 4^n, columns)."""
    split = columns.unflatten(-2, (columns.shape[-2] // 4 ** (qubit + 1), 4, 4**qubit))
    return torch.einsum("...pq,...aqbk->...apbk", matrix, split).reshape(columns.shape)


def on_two(columns: Tensor, pair: tuple[int, int], matrix: Tensor) -> Tensor:
    """A matrix (..., 16, 16) on two qubits, the first of which is the slower digit."""
    there, back = (part.to(columns.device) for part in _route(columns.shape[-2].bit_length() // 2, pair))
    front = columns.index_select(-2, there)
    moved = matrix @ front.reshape(*front.shape[:-2], 16, -1)
    return moved.reshape(front.shape).index_select(-2, back)


def to_pauli(density: Tensor) -> Tensor:
    """r_P = tr(P rho): real (..., 4^n) of Hermitian (..., 2^n, 2^n)."""
    return _per_qubit(_interleaved(density), SINGLE.mT.reshape(4, 4).to(density)).real


def from_pauli(vector: Tensor) -> Tensor:
    """rho = sum_P r_P P / 2^n: complex (..., 2^n, 2^n)."""
    qubits = vector.shape[-1].bit_length() // 2
    basis = SINGLE.reshape(4, 4).T.to(vector.dtype.to_complex()) / 2
    pairs = _per_qubit(vector.to(basis.dtype), basis.to(vector.device))
    pairs = pairs.reshape(*vector.shape[:-1], *[2] * (2 * qubits))
    lead = vector.ndim - 1
    rows, columns = range(lead, lead + 2 * qubits, 2), range(lead + 1, lead + 2 * qubits, 2)
    return pairs.permute(*range(lead), *rows, *columns).reshape(*vector.shape[:-1], 2**qubits, 2**qubits)


def _rotated(vector: Tensor, pairs: Sequence[tuple[int, int]], matrices: Tensor, qubits: int) -> Tensor:
    columns = vector[..., None]
    for number, pair in enumerate(pairs):
        columns = on_two(columns, pair, matrices[..., number, :, :])
    return columns[..., 0]


def _embedded(reservoir: QuantumReservoir, packed: Tensor) -> Tensor:
    """The Pauli vector of the memory with reset qubits |0>: (..., 4^n) of real (..., 1, d, d)."""
    density = density_matrix(packed)[..., 0, :, :]
    full = 2**reservoir.qubits
    stride = full // density.shape[-1]
    whole = density.new_zeros(*density.shape[:-2], full, full)
    whole[..., ::stride, ::stride] = density
    return to_pauli(whole)


def _reduced(reservoir: QuantumReservoir, vector: Tensor) -> Tensor:
    """The memory's packed density matrix, other qubits traced out."""
    stride = 1 if reservoir.period > 1 else 4**reservoir.reset_qubits
    return packed_matrix(from_pauli(vector[..., ::stride]))


def _measurement(reservoir: QuantumReservoir) -> tuple[Tensor, Tensor]:
    """Where each Pauli string's value comes from, and whether it is kept, in a step that measures and resets."""
    source = torch.arange(4**reservoir.qubits)
    kept = torch.ones_like(source, dtype=torch.bool)
    for qubit in range(reservoir.measured_qubits):
        digit = (source >> (2 * qubit)) & 3
        kept &= (torch.arange(len(source)) >> (2 * qubit) & 3) % 3 == 0
        if qubit < reservoir.reset_qubits:
            source = source - (digit << (2 * qubit))
    return source, kept


def _kron(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("...ij,...kl->...ikjl", left, right).reshape(*left.shape[:-2], 16, 16)


@lru_cache(maxsize=1)
def _flip() -> Tensor:
    """CX, the control being the slower digit."""
    return transfer(gates.controlled_x(torch.eye(4, dtype=torch.complex128), 1, 0))


@lru_cache(maxsize=256)
def _route(qubits: int, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Index permutations of Pauli strings that bring a pair to the front, its first qubit slowest, and back."""
    index = torch.arange(4**qubits)
    wanted = torch.zeros_like(index)
    rest = [qubit for qubit in range(qubits) if qubit not in pair]
    for digit, qubit in enumerate([*rest, pair[1], pair[0]]):
        wanted |= ((index >> (2 * digit)) & 3) << (2 * qubit)
    return wanted, wanted.argsort()


def _interleaved(density: Tensor) -> Tensor:
    """(..., 4^n) with the digit of qubit q = 2 row bit + column bit."""
    qubits, lead = density.shape[-1].bit_length() - 1, density.ndim - 2
    split = density.reshape(*density.shape[:-2], *[2] * (2 * qubits))
    order = [axis for q in range(qubits) for axis in (lead + q, lead + qubits + q)]
    return split.permute(*range(lead), *order).reshape(*density.shape[:-2], 4**qubits)


def _per_qubit(vector: Tensor, matrix: Tensor) -> Tensor:
    columns = vector[..., None]
    for qubit in range(vector.shape[-1].bit_length() // 2):
        columns = on_one(columns, qubit, matrix)
    return columns[..., 0]
