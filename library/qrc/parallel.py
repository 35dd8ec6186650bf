"""Parallel in time: a contracting reservoir forgets its start, so that pieces of one series can evolve as a batch.

The time axis is cut into pieces that start `overlap` steps early from the maximally mixed memory. The distance between
a piece's memory at its true beginning and the end of the piece before is measured, not assumed: a completely positive
trace-preserving map never lets it grow, so their sum bounds the error of every later state. When it is too large the
overlap is doubled, up to plain evolution.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from library.qrc import direct
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import State, density_matrix

TOLERANCE = 1e-13  # what the slowest mode has fallen to within the suggested overlap
CERTIFIED = 5e-13  # trace norm of what all pieces of a series together may be off: rounding alone makes some 1e-14
STEP_SECONDS = 3e-5  # of a step's calls, whatever its size
OVERHEAD_SECONDS = 1e-2  # of finding the overlap, and for each reservoir besides
EIGENVALUE_SECONDS = 8e-9  # times the cube of the memory's 4^r numbers
SHORTEST = 16  # steps of an overlap
FLOPS = 8e9  # real operations per second of small matrix products on one core
MOST_PIECES = 64


def evolve_if_cheaper(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
) -> tuple[Tensor, State]:
    """`evolve` where it is expected to take at most two thirds of the time of plain evolution, else that."""
    series, time, _ = inputs.shape
    lanes = series * len(reservoirs)
    if time * STEP_SECONDS < 4 * OVERHEAD_SECONDS or lanes > MOST_PIECES // 4:
        return direct.evolve(reservoirs, inputs, state, readout, dtype=dtype)
    if not _pays(reservoirs, lanes, time, SHORTEST):
        return direct.evolve(reservoirs, inputs, state, readout, dtype=dtype)
    overlap = suggested_overlap(reservoirs, inputs)
    if not _pays(reservoirs, lanes, time, overlap):
        return direct.evolve(reservoirs, inputs, state, readout, dtype=dtype)
    return evolve(reservoirs, inputs, state, readout, dtype=dtype, overlap=overlap)


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
    overlap: int | None = None,
) -> tuple[Tensor, State]:
    """As `direct.evolve`, for persistent reservoirs of period 1 of equal structure."""
    series, time, channels = inputs.shape
    lanes = series * len(reservoirs)
    overlap = suggested_overlap(reservoirs, inputs) if overlap is None else overlap
    while (pieces := best_pieces(reservoirs[0], lanes, time, overlap)) > 1:
        length = (time - overlap) // pieces
        windows = inputs.unfold(1, overlap + length, length)[:, :pieces].transpose(2, 3)
        windows = windows.reshape(series * pieces, overlap + length, channels)
        begun = _starts(state, pieces)
        early, at_begin = direct.evolve(reservoirs, windows[:, :overlap], begun, readout, dtype=dtype)
        late, at_end = direct.evolve(reservoirs, windows[:, overlap:], at_begin, readout, dtype=dtype)
        if _mismatch(at_begin, at_end, pieces) <= (CERTIFIED if dtype == torch.complex128 else 1e-5):
            joined = late.unflatten(0, (series, pieces)).transpose(1, 2).flatten(2, 3)
            first = early.unflatten(0, (series, pieces))[:, 0]
            last = _each(at_end, pieces, -1)
            done = overlap + pieces * length
            if done == time:
                return torch.cat([first, joined], 2), last
            rest, after = direct.evolve(reservoirs, inputs[:, done:], last, readout, dtype=dtype)
            return torch.cat([first, joined, rest], 2), after
        overlap *= 2
    return direct.evolve(reservoirs, inputs, state, readout, dtype=dtype)


def suggested_overlap(reservoirs: Sequence[QuantumReservoir], inputs: Tensor) -> int:
    """Steps after which the slowest mode at the mean input has fallen to the tolerance, a quarter more, at least 16."""
    from library.qrc.channel import second_moduli

    mean = inputs.mean((0, 1), keepdim=True)[0]
    slowest = max(
        float(second_moduli(reservoir, mean)[0]) if reservoir.memory_qubits else 0.0 for reservoir in reservoirs
    )
    if slowest >= 1 - 1e-9:
        return inputs.shape[1]
    return max(SHORTEST, math.ceil(1.25 * math.log(TOLERANCE) / math.log(max(slowest, 1e-3))))


def best_pieces(reservoir: QuantumReservoir, lanes: int, time: int, overlap: int) -> int:
    """The number of pieces, a power of 2, of the least expected time; 1 when the overlap leaves nothing to cut."""
    most = min(MOST_PIECES, max(1, (time - overlap) // max(overlap, 1)))
    return min((2**k for k in range(most.bit_length())), key=lambda n: seconds(reservoir, lanes, time, overlap, n))


def seconds(reservoir: QuantumReservoir, lanes: int, time: int, overlap: int, pieces: int) -> float:
    """Expected time of the evolution in pieces."""
    full, memory = 2**reservoir.qubits, 2**reservoir.memory_qubits
    per_step = (8 * full * full * memory + 12 * full * memory * memory) / FLOPS
    steps = overlap + (time - overlap) / pieces if pieces > 1 else time
    return steps * (STEP_SECONDS + lanes * pieces * per_step)


def _pays(reservoirs: Sequence[QuantumReservoir], lanes: int, time: int, overlap: int) -> bool:
    """Whether pieces with this overlap, which has to be found, take at most two thirds of plain evolution's time."""
    first = reservoirs[0]
    found = OVERHEAD_SECONDS + len(reservoirs) * EIGENVALUE_SECONDS * 64**first.memory_qubits
    cut = seconds(first, lanes, time, overlap, best_pieces(first, lanes, time, overlap))
    return found + cut <= 2 / 3 * seconds(first, lanes, time, 0, 1)


def _starts(state: State, pieces: int) -> State:
    """The given state for the first piece of each series, and the maximally mixed memory for the others."""
    dimension = state.density.shape[-1]
    mixed = torch.eye(dimension, dtype=state.density.dtype, device=state.density.device) / dimension
    density = state.density[:, None].repeat(1, pieces, *[1] * (state.density.ndim - 1))
    density[:, 1:] = mixed
    return State(
        density.flatten(0, 1), state.feedback.repeat_interleave(pieces, 0), state.counter.repeat_interleave(pieces, 0)
    )


def _each(state: State, pieces: int, place: int) -> State:
    return State(
        *(part.unflatten(0, (-1, pieces))[:, place] for part in (state.density, state.feedback, state.counter))
    )


def _mismatch(at_begin: State, at_end: State, pieces: int) -> float:
    """The largest sum over a series' joints of trace norms of what is off there, apart from traces' rounding."""
    begins = _of_trace_one(at_begin.density.unflatten(0, (-1, pieces))[:, 1:])
    ends = _of_trace_one(at_end.density.unflatten(0, (-1, pieces))[:, :-1])
    norms = torch.linalg.eigvalsh(density_matrix(begins - ends)).abs().sum((-1, -2))
    return float(norms.sum(1).max())


def _of_trace_one(density: Tensor) -> Tensor:
    return density / density.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
