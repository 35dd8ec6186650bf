"""Feedback inside each shot: the next step's rotations depend on the bits that this shot measured.

Averaged over shots the map is linear again. With sigma_o the memory's density matrix of the shots whose last outcome
was o, weighted by their share, and V_o the columns of U_res U_in(s) F_o, F_o being the feedback gates of the bits of o,

    p_i = sum_o (V_o sigma_o V_o^H)_ii,   sigma'_k = sum_o K_k V_o sigma_o V_o^H K_k^H

where K_k projects the measured qubits on outcome k and resets those that are to be reset. In mode feedback nothing
but the outcome is left, and p' = T(s) p is a Markov chain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.direct import block_bytes
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import State, density_matrix, packed_matrix
from library.qrc.steps import Steps


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
    fourier: bool | None = None,
) -> tuple[Tensor, State]:
    """As `direct.evolve`, for reservoirs of equal structure whose feedback is of outcomes."""
    first = reservoirs[0]
    series, time, channels = inputs.shape
    outcomes, memory = state.density.shape[-3:-1]
    full, lanes, real = 2**first.qubits, series * len(reservoirs), dtype.to_real()
    readout = readout.to(inputs.device, real)
    options = {"device": inputs.device, "dtype": dtype, "points": series * time, "fourier": fourier}
    steps = Steps(reservoirs, full, channels, **options)
    first_columns = _feedback_columns(reservoirs, memory, inputs.device, dtype).repeat(series, 1, 1)
    kept = 2 ** (first.measured_qubits - first.reset_qubits)  # outcomes of the measured qubits that are not reset
    own = (torch.arange(memory, device=inputs.device) & (kept - 1)) == torch.arange(kept, device=inputs.device)[:, None]
    weighted = density_matrix(state.density.to(real)).reshape(lanes, outcomes, memory, memory)
    result = inputs.new_empty(series, len(reservoirs), time, readout.shape[1], dtype=real)
    block = max(1, block_bytes(inputs.device) // (lanes * full * full * dtype.itemsize))
    for begin in range(0, time, block):
        unitaries = steps.block(inputs[:, begin : begin + block])
        probabilities = inputs.new_empty(len(unitaries), lanes, full, dtype=real)
        for step, unitary in enumerate(unitaries):
            columns = (unitary @ first_columns).unflatten(-1, (outcomes, memory)).transpose(1, 2)
            image = columns @ weighted  # (lanes, outcomes, 2^n, memory)
            probabilities[step] = (image * columns.conj()).real.sum((1, 3))
            split = (lanes, outcomes, memory, full // memory, memory)
            left, right = (
                part.reshape(split).permute(0, 3, 2, 1, 4).flatten(3) for part in (image, columns)
            )  # (lanes, outcome of the reset qubits, memory, last outcome and memory)
            after = left @ right.mH
            projected = after[:, None] * (own[:, None, :, None] & own[:, None, None, :])
            # outcome = reset bits + 2^reset * kept bits: the kept bits are the slower axis
            weighted = projected.reshape(lanes, outcomes, memory, memory)
        values = (probabilities @ readout).unflatten(1, (series, len(reservoirs)))
        result[:, :, begin : begin + block] = values.permute(1, 2, 0, 3)
    packed = packed_matrix(weighted).reshape(state.density.shape)
    return result, State(packed, state.feedback, state.counter)


def _feedback_columns(
    reservoirs: Sequence[QuantumReservoir], memory: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """F_o for every outcome o and reset qubits |0>: complex (reservoirs, 2^n, outcomes * memory)."""
    first = reservoirs[0]
    full, measured = 2**first.qubits, first.measured_qubits
    bits = (torch.arange(2**measured)[:, None] >> torch.arange(measured)) & 1
    strengths = torch.tensor([reservoir.feedback for reservoir in reservoirs], dtype=torch.float64)
    start = torch.eye(full, dtype=torch.complex128)[:, :: full // memory]
    turned = gates.pair_rotations(start, first.feedback_pairs, strengths[:, None, None] * bits)
    return turned.transpose(1, 2).flatten(2).to(device, dtype)
