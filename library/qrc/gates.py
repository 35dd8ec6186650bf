"""The unitaries of one step: pair rotations of the inputs, and the fixed reservoir gates that sigma scales.

Qubit 0 is the least significant bit of a basis index (the convention of qiskit); matrices act on column vectors.
RX(t) = exp(-i t X / 2), RY and RZ likewise, RZZ(t) = exp(-i t Z x Z / 2), and the pair rotation of the literature

    R_ij(t) = CX_ij RZ_j(t) CX_ij (RX_i(t) x RX_j(t)) = RZZ_ij(t) (RX_i(t) x RX_j(t)).

Functions act on stacks of columns, complex (..., 2^n, columns), with angles (...).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """One gate of a circuit; `angle` holds one value per configuration, and is None for cx."""

    name: Literal["rx", "ry", "rz", "rzz", "cx"]
    qubits: tuple[int, ...]
    angle: Tensor | None = None


def ring_pairs(qubits: int) -> list[tuple[int, int]]:
    """The pairs (i, i + 1 mod n) in order; for two qubits (0, 1) and (1, 0)."""
    return [(i, (i + 1) % qubits) for i in range(qubits)]


def line_pairs(qubits: int) -> list[tuple[int, int]]:
    """The pairs (i, i + 1) in order."""
    return [(i, i + 1) for i in range(qubits - 1)]


def rotate_x(columns: Tensor, qubit: int, angle: Tensor) -> Tensor:
    """RX(angle) on one qubit."""
    blocks = _split(columns, qubit)
    half = angle[..., None, None, None, None] / 2
    return (blocks * half.cos() - 1j * half.sin() * blocks.flip(-3)).flatten(-4, -2)


def rotate_y(columns: Tensor, qubit: int, angle: Tensor) -> Tensor:
    """RY(angle) on one qubit."""
    blocks = _split(columns, qubit)
    half = angle[..., None, None, None, None] / 2
    sign = torch.tensor([-1.0, 1.0], dtype=angle.dtype, device=columns.device)[:, None, None]
    return (blocks * half.cos() + half.sin() * sign * blocks.flip(-3)).flatten(-4, -2)


def rotate_z(columns: Tensor, subset: tuple[int, ...], angle: Tensor) -> Tensor:
    """RZ(angle) on one qubit, or RZZ(angle) on two."""
    half = angle[..., None] * parity_signs(_count(columns), subset, angle) / 2
    return columns * torch.complex(half.cos(), -half.sin())[..., None]


def controlled_x(columns: Tensor, control: int, target: int) -> Tensor:
    """CX: flips `target` where `control` is 1."""
    index = torch.arange(columns.shape[-2], device=columns.device)
    return columns[..., index ^ (((index >> control) & 1) << target), :]


def pair_rotations(columns: Tensor, pairs: Sequence[tuple[int, int]], angles: Tensor) -> Tensor:
    """R_pairs[-1](angles[..., -1]) ... R_pairs[0](angles[..., 0]): the first pair acts first; angles (..., pairs)."""
    return apply_pairs(columns, pairs, pair_matrices(angles)) if pairs else columns


def apply_pairs(columns: Tensor, pairs: Sequence[tuple[int, int]], matrices: Tensor) -> Tensor:
    """Matrices (..., pairs, 4, 4) on at least one pair of qubits, the first pair first.

    Each is applied with its two qubits brought to the front of the index.
    """
    qubits, shape = _count(columns), columns.shape
    lead = torch.broadcast_shapes(shape[:-2], matrices.shape[:-3])
    columns = columns.expand(*lead, *shape[-2:])
    places = _routes(qubits, tuple(pairs)).to(columns.device)
    for number in range(len(pairs)):
        blocks = columns.index_select(-2, places[number]).reshape(*lead, 4, -1)
        columns = (matrices[..., number, :, :] @ blocks).reshape(*lead, *shape[-2:])
    return columns.index_select(-2, places[-1])


def pair_matrices(angles: Tensor) -> Tensor:
    """R(angle) on its two qubits: complex (..., 4, 4); it is the same for both orders of the qubits."""
    half = angles[..., None] * parity_signs(2, (0, 1), angles) / 2
    return torch.complex(half.cos(), -half.sin())[..., None] * both_turned(angles, angles)


def both_turned(first: Tensor, second: Tensor) -> Tensor:
    """RX(second) x RX(first) on a pair of qubits, the second being the slower bit: complex (..., 4, 4)."""
    cos, sin = (first / 2).cos(), (first / 2).sin()
    high_cos, high_sin = (second / 2).cos(), (second / 2).sin()
    zero = torch.zeros_like(cos)
    parts = [
        torch.complex(cos * high_cos, zero),
        torch.complex(zero, -sin * high_cos),
        torch.complex(zero, -cos * high_sin),
        torch.complex(-sin * high_sin, zero),
    ]
    return torch.stack(parts, -1)[..., _FLIPS.to(first.device)]


def apply_gates(columns: Tensor, sequence: Sequence[Gate]) -> Tensor:
    """The gates in order on columns (..., 2^n, columns)."""
    for gate in sequence:
        if gate.name == "cx":
            columns = controlled_x(columns, *gate.qubits)
        elif gate.name == "rx":
            columns = rotate_x(columns, *gate.qubits, gate.angle)
        elif gate.name == "ry":
            columns = rotate_y(columns, *gate.qubits, gate.angle)
        else:
            columns = rotate_z(columns, gate.qubits, gate.angle)
    return columns


def elementary(sequence: Sequence[Gate]) -> list[Gate]:
    """The same circuit in rx, ry, rz and cx: each rzz becomes CX, RZ on its second qubit, CX."""
    result = []
    for gate in sequence:
        if gate.name == "rzz":
            flip = Gate("cx", gate.qubits)
            result += [flip, Gate("rz", gate.qubits[1:], gate.angle), flip]
        else:
            result.append(gate)
    return result


def pair_gates(pair: tuple[int, int], angle: Tensor) -> list[Gate]:
    """R_ij(angle)."""
    return [Gate("rx", pair[:1], angle), Gate("rx", pair[1:], angle), Gate("rzz", pair, angle)]


def su2_gates(angles: Tensor) -> list[Gate]:
    """The hardware-efficient ansatz: RY and RZ layers with CX chains between them.

    `angles` (..., reps + 1, 2, n) are already scaled; layer l applies RY(angles[l, 0, q]) on every qubit, then
    RZ(angles[l, 1, q]); between two layers come CX(0, 1), CX(1, 2) ... and, for more than two qubits, CX(n - 1, 0).
    """
    layers, _, qubits = angles.shape[-3:]
    sequence = []
    for layer in range(layers):
        sequence += [Gate("ry", (qubit,), angles[..., layer, 0, qubit]) for qubit in range(qubits)]
        sequence += [Gate("rz", (qubit,), angles[..., layer, 1, qubit]) for qubit in range(qubits)]
        if layer < layers - 1:
            sequence += [Gate("cx", pair) for pair in cx_chain(qubits)]
    return sequence


def ising_gates(fields: Tensor, couplings: Tensor, reps: int) -> list[Gate]:
    """`reps` Trotter slices of RX(2 h_q / reps) on every qubit, then RZZ(2 J_ij / reps) on all pairs i < j.

    `fields` (..., n) and `couplings` (..., n, n), of which entries i < j are read, are already scaled.
    """
    qubits = fields.shape[-1]
    slice_gates = [Gate("rx", (qubit,), 2 * fields[..., qubit] / reps) for qubit in range(qubits)]
    slice_gates += [Gate("rzz", (i, j), 2 * couplings[..., i, j] / reps) for i, j in combinations(range(qubits), 2)]
    return slice_gates * reps


def cx_chain(qubits: int) -> list[tuple[int, int]]:
    """The controls and targets between two layers of the su2 ansatz."""
    return line_pairs(qubits) + ([(qubits - 1, 0)] if qubits > 2 else [])


def identity(qubits: int, like: Tensor) -> Tensor:
    """The complex identity (2^n, 2^n) of `like`'s precision and device."""
    return torch.eye(2**qubits, dtype=like.dtype.to_complex(), device=like.device)


def parity_signs(qubits: int, subset: Sequence[int], like: Tensor) -> Tensor:
    """The diagonal of the product of Z over `subset`: +1 or -1 for each of the 2^n basis states, as `like`'s dtype."""
    return _signs(qubits, tuple(subset)).to(like)


def parity_matrix(qubits: int, observed: Sequence[int]) -> Tensor:
    """Outcome probabilities to features: float64 (2^n, width), Z_q for each observed qubit, then Z_p Z_q for p < q."""
    subsets = [(q,) for q in observed] + list(combinations(observed, 2))
    return torch.stack([_signs(qubits, subset) for subset in subsets], dim=1)


_FLIPS = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])  # which bits differ, row to column


@lru_cache(maxsize=256)
def _routes(qubits: int, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Index permutations that bring each pair's qubits to the front, each from where the one before left them."""
    index = torch.arange(2**qubits)
    routes, current = [], index
    for pair in pairs:
        rest = [qubit for qubit in range(qubits) if qubit not in pair]
        wanted = torch.zeros_like(index)
        for bit, qubit in enumerate([*rest, *pair]):
            wanted |= ((index >> bit) & 1) << qubit
        routes.append(current.argsort()[wanted])
        current = wanted
    return torch.stack([*routes, current.argsort()])


@lru_cache(maxsize=256)
def _signs(qubits: int, subset: tuple[int, ...]) -> Tensor:
    index = torch.arange(2**qubits)
    signs = torch.ones(2**qubits, dtype=torch.float64)
    for qubit in subset:
        signs = signs * (1.0 - 2.0 * ((index >> qubit) & 1))
    return signs


def _count(columns: Tensor) -> int:
    return columns.shape[-2].bit_length() - 1


def _split(columns: Tensor, qubit: int) -> Tensor:
    """(..., higher qubits, 2, lower qubits, columns)."""
    high = columns.shape[-2] >> (qubit + 1)
    return columns.unflatten(-2, (high, 2, 1 << qubit))
