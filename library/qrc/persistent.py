"""The circuit as a completely positive map of the memory qubits, evolved step by step for whole batches (direct).

With V = U (., reset qubits |0>) of shape (2^n, 2^r), r memory qubits: A = V rho, the outcome probabilities are the
diagonal of A V^H, and rho' = sum over outcomes k of the reset qubits of A_k V_k^H. The measured qubits that are not
reset lose their coherences.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, State, unpack

BLOCK_BYTES = 4 << 20  # of the unitaries of the steps that are prepared at once: they should stay in the cache


def evolve(
    reservoirs: Sequence[QuantumReservoir], inputs: Tensor, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features (reservoirs, series, time, width) and rows after the last step, for reservoirs of equal structure."""
    first = reservoirs[0]
    layout = Layout.of(first)
    state = unpack(rows, layout)
    series, time, _ = inputs.shape
    lanes = len(reservoirs) * series
    density = state.density[:, :, 0].to(dtype).reshape(lanes, layout.dimension, layout.dimension)
    fixed = torch.stack([reservoir.fixed_unitary() for reservoir in reservoirs]).to(inputs.device, dtype)
    coherent = coherence_mask(first).to(inputs.device, density.real.dtype)
    parities = gates.parity_matrix(first.qubits, range(first.observed_qubits)).to(inputs.device, density.real.dtype)
    features = inputs.new_empty(len(reservoirs), series, time, first.width, dtype=density.real.dtype)
    full, memory = 2**first.qubits, layout.dimension
    block = max(1, BLOCK_BYTES // (lanes * full * memory * dtype.itemsize))
    for begin in range(0, time, block):
        columns = step_columns(reservoirs, fixed, inputs[:, begin : begin + block], memory)
        probabilities = inputs.new_empty(columns.shape[0], lanes, full, dtype=density.real.dtype)
        for step, column in enumerate(columns):
            image = column @ density
            probabilities[step] = (image * column.conj()).sum(-1).real
            density = coherent * (image.reshape(lanes, memory, -1) @ column.reshape(lanes, memory, -1).mH)
        values = (probabilities @ parities).unflatten(1, (len(reservoirs), series))
        features[:, :, begin : begin + block] = values.permute(1, 2, 0, 3)
    after = State(density.reshape(len(reservoirs), series, 1, memory, memory), state.feedback, state.counter)
    return features, after.pack(layout)


def step_columns(reservoirs: Sequence[QuantumReservoir], fixed: Tensor, inputs: Tensor, memory: int) -> Tensor:
    """The columns of U(s_t) for reset qubits |0>: complex (time, reservoirs * series, 2^n, memory)."""
    series, time, _ = inputs.shape
    alike: dict[tuple, list[int]] = defaultdict(list)
    for place, reservoir in enumerate(reservoirs):
        alike[input_key(reservoir)].append(place)
    full = fixed.shape[-1]
    columns = fixed.new_empty(time, len(reservoirs), series, full, memory)
    for places in alike.values():
        rotated = input_columns(reservoirs[places[0]], inputs.transpose(0, 1), memory, fixed.dtype)
        columns[:, places] = fixed[places][:, None] @ rotated[:, None]
    return columns.flatten(1, 2)


def input_key(reservoir: QuantumReservoir) -> tuple:
    """What reservoirs must share to have the same input rotations."""
    return reservoir.scale, reservoir.bias, reservoir.pairs, reservoir.encoding


def input_columns(reservoir: QuantumReservoir, inputs: Tensor, memory: int, dtype: torch.dtype) -> Tensor:
    """The columns of U_in(s) for reset qubits |0>: complex (..., 2^n, memory) of inputs (..., channels)."""
    angles = (reservoir.scale * inputs + reservoir.bias).to(dtype.to_real())
    full = 2**reservoir.qubits
    columns = torch.eye(full, dtype=dtype, device=inputs.device)[:, :: full // memory]
    columns = columns.expand(*inputs.shape[:-1], full, memory)
    channels = angles.shape[-1]
    if reservoir.encoding == "rx_anc":
        for channel in range(channels):
            columns = gates.rotate_x(columns, channel % reservoir.measured_qubits, angles[..., channel])
        return columns
    for place, pair in enumerate(reservoir.input_pairs):
        columns = gates.pair_rotation(columns, pair, angles[..., place % channels])
    return columns


def coherence_mask(reservoir: QuantumReservoir) -> Tensor:
    """1 where the measurement leaves an entry of the memory's density matrix, 0 where it destroys it."""
    index = torch.arange(2**reservoir.memory_qubits)
    kept = index & (2 ** (reservoir.measured_qubits - reservoir.reset_qubits) - 1)
    return (kept[:, None] == kept[None, :]).double()
