"""The unitaries of one step: pair rotations of the inputs, and the fixed reservoir gates that sigma scales.

Qubit 0 is the least significant bit of a basis index (the convention of qiskit); matrices act on column vectors.
RX(t) = exp(-i t X / 2), RY and RZ likewise, RZZ(t) = exp(-i t Z x Z / 2), and the pair rotation of the literature

    R_ij(t) = CX_ij RZ_j(t) CX_ij (RX_i(t) x RX_j(t)) = RZZ_ij(t) (RX_i(t) x RX_j(t)).

Functions act on stacks of columns, complex (..., 2^n, columns), with angles (...).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor


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
    return (blocks * half.cos() - 1j * half.sin() * blocks.flip(-3)).reshape(columns.shape)


def rotate_y(columns: Tensor, qubit: int, angle: Tensor) -> Tensor:
    """RY(angle) on one qubit."""
    blocks = _split(columns, qubit)
    half = angle[..., None, None, None, None] / 2
    sign = torch.tensor([-1.0, 1.0], dtype=angle.dtype, device=columns.device)[:, None, None]
    return (blocks * half.cos() + half.sin() * sign * blocks.flip(-3)).reshape(columns.shape)


def rotate_z(columns: Tensor, qubit: int, angle: Tensor) -> Tensor:
    """RZ(angle) on one qubit."""
    return _phases(columns, (qubit,), angle)


def rotate_zz(columns: Tensor, pair: tuple[int, int], angle: Tensor) -> Tensor:
    """RZZ(angle) on two qubits."""
    return _phases(columns, pair, angle)


def controlled_x(columns: Tensor, control: int, target: int) -> Tensor:
    """CX: flips `target` where `control` is 1."""
    index = torch.arange(columns.shape[-2], device=columns.device)
    return columns[..., index ^ (((index >> control) & 1) << target), :]


def pair_rotation(columns: Tensor, pair: tuple[int, int], angle: Tensor) -> Tensor:
    """R_ij(angle): RX on both qubits, then RZZ."""
    turned = rotate_x(rotate_x(columns, pair[0], angle), pair[1], angle)
    return rotate_zz(turned, pair, angle)


def su2_unitary(angles: Tensor) -> Tensor:
    """The hardware-efficient ansatz: RY and RZ layers with CX chains between them; (2^n, 2^n).

    `angles` (..., reps + 1, 2, n) are already scaled; layer l applies RY(angles[l, 0, q]) on every qubit, then
    RZ(angles[l, 1, q]); between two layers come CX(0, 1), CX(1, 2) ... and, for more than two qubits, CX(n - 1, 0).
    """
    layers, _, qubits = angles.shape[-3:]
    columns = identity(qubits, angles).expand(*angles.shape[:-3], -1, -1)
    for layer in range(layers):
        for qubit in range(qubits):
            columns = rotate_y(columns, qubit, angles[..., layer, 0, qubit])
        for qubit in range(qubits):
            columns = rotate_z(columns, qubit, angles[..., layer, 1, qubit])
        if layer < layers - 1:
            for control, target in cx_chain(qubits):
                columns = controlled_x(columns, control, target)
    return columns


def ising_unitary(fields: Tensor, couplings: Tensor, reps: int) -> Tensor:
    """`reps` Trotter slices of RX(2 h_q / reps) on every qubit, then RZZ(2 J_ij / reps) on all pairs; (2^n, 2^n).

    `fields` (..., n) and `couplings` (..., n, n), of which entries i < j are read, are already scaled.
    """
    qubits = fields.shape[-1]
    columns = identity(qubits, fields).expand(*fields.shape[:-1], -1, -1)
    for _ in range(reps):
        for qubit in range(qubits):
            columns = rotate_x(columns, qubit, 2 * fields[..., qubit] / reps)
        for i, j in combinations(range(qubits), 2):
            columns = rotate_zz(columns, (i, j), 2 * couplings[..., i, j] / reps)
    return columns


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


@lru_cache(maxsize=256)
def _signs(qubits: int, subset: tuple[int, ...]) -> Tensor:
    index = torch.arange(2**qubits)
    signs = torch.ones(2**qubits, dtype=torch.float64)
    for qubit in subset:
        signs = signs * (1.0 - 2.0 * ((index >> qubit) & 1))
    return signs


def _phases(columns: Tensor, subset: tuple[int, ...], angle: Tensor) -> Tensor:
    half = angle[..., None] * parity_signs(_count(columns), subset, angle) / 2
    return columns * torch.complex(half.cos(), -half.sin())[..., None]


def _count(columns: Tensor) -> int:
    return columns.shape[-2].bit_length() - 1


def _split(columns: Tensor, qubit: int) -> Tensor:
    """(..., higher qubits, 2, lower qubits, columns)."""
    high = columns.shape[-2] >> (qubit + 1)
    return columns.unflatten(-2, (high, 2, 1 << qubit))
