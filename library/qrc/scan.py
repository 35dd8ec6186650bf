"""A step as a polynomial of its input angle, and all steps at once by an associative scan.

A persistent step with input angle t is a real matrix M(t) on the numbers of the memory, and a trigonometric polynomial

    M(t) = sum over k = -G ... G of exp(i k t) M_k

of degree G, the number of rotations that carry the channel (3 per pair, 1 for rx_anc; several channels multiply out).
So 2 G + 1 sampled matrices and a Fourier transform give every M(t) without gates, smooth in the input. The memory after
step t is M_t ... M_1 r_0; prefix products of all t take log2(T) rounds of batched products instead of T steps in a row:
for an accelerator and few memory qubits, where one step alone would leave it idle.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc import direct
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, State
from library.qrc.steps import channel_degrees

BLOCK_BYTES = 256 << 20  # of the matrices that are scanned at once
MOST_TERMS = 4096


class StepPolynomial:
    """M(t) and the read-out before it, of one persistent reservoir of period 1.

    `readout` (2^n, width) is applied to the outcome probabilities. Raises InputError for inputs that turn nothing
    (scale 0) and for more than 4096 terms: channels multiply.
    """

    def __init__(self, reservoir: QuantumReservoir, channels: int, readout: Tensor) -> None:
        self.reservoir = reservoir
        self.degrees = channel_degrees(reservoir, channels)
        terms = math.prod(2 * degree + 1 for degree in self.degrees)
        if reservoir.scale == 0 or terms > MOST_TERMS:
            raise InputError(f"no polynomial of {terms} terms at scale {reservoir.scale:g}; use the backend direct")
        grids = [2 * torch.pi * torch.arange(2 * d + 1, dtype=torch.float64) / (2 * d + 1) for d in self.degrees]
        angles = torch.stack(torch.meshgrid(*grids, indexing="ij"), -1)
        samples = _sampled(reservoir, ((angles - reservoir.bias) / reservoir.scale).flatten(0, -2), readout)
        shaped = samples.reshape(*angles.shape[:-1], *samples.shape[1:])
        axes = tuple(range(channels))
        coefficients = torch.fft.fftshift(torch.fft.fftn(shaped, dim=axes, norm="forward"), dim=axes)
        self.coefficients = coefficients.flatten(0, channels - 1)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """M (..., 4^r, 4^r) and the read-out (..., width, 4^r) at inputs (..., channels), differentiable in them."""
        angles = self.reservoir.scale * inputs + self.reservoir.bias
        waves = torch.ones(*angles.shape[:-1], 1, dtype=torch.complex128, device=inputs.device)
        for channel, degree in enumerate(self.degrees):
            phases = angles[..., channel, None] * torch.arange(-degree, degree + 1, device=inputs.device)
            turned = torch.complex(phases.cos(), phases.sin())
            waves = (waves[..., :, None] * turned[..., None, :]).flatten(-2)
        values = torch.tensordot(waves, self.coefficients.to(inputs.device), 1).real
        size = values.shape[-1]
        return values[..., :size, :], values[..., size:, :]


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
) -> tuple[Tensor, State]:
    """As `direct.evolve`, for persistent reservoirs of period 1, by scans over blocks of time."""
    series, time, channels = inputs.shape
    size = state.density.shape[-1] ** 2
    block = max(1, BLOCK_BYTES // (8 * series * size * (size + readout.shape[1])))
    outputs, ends = [], []
    for place, reservoir in enumerate(reservoirs):
        polynomial = StepPolynomial(reservoir, channels, readout)
        vector = state.density[:, place].reshape(series, size, 1)
        values = []
        for begin in range(0, time, block):
            steps, read = polynomial(inputs[:, begin : begin + block])
            after = prefix_products(steps) @ vector[:, None]
            before = torch.cat([vector[:, None], after[:, :-1]], 1)
            values.append((read @ before)[..., 0])
            vector = after[:, -1]
        outputs.append(torch.cat(values, 1))
        ends.append(vector.reshape(state.density[:, place].shape))
    result = torch.stack(outputs, 1).to(dtype.to_real())
    return result, State(torch.stack(ends, 1), state.feedback, state.counter)


def prefix_products(matrices: Tensor) -> Tensor:
    """P_t = M_t ... M_1 for matrices (..., time, size, size), by doubling: log2(time) rounds of batched products."""
    result, reach = matrices, 1
    while reach < matrices.shape[-3]:
        joined = result[..., reach:, :, :] @ result[..., :-reach, :, :]
        result = torch.cat([result[..., :reach, :, :], joined], -3)
        reach *= 2
    return result


def _sampled(reservoir: QuantumReservoir, inputs: Tensor, readout: Tensor) -> Tensor:
    """M stacked upon the read-out, (inputs, 4^r + width, 4^r), from one step of every basis matrix."""
    layout = Layout.of(reservoir)
    size = layout.dimension**2
    lanes = size * len(inputs)
    basis = torch.eye(size, dtype=torch.float64).repeat(len(inputs), 1)
    start = State(
        basis.reshape(lanes, 1, 1, layout.dimension, layout.dimension),
        torch.zeros(lanes, 1, 0, dtype=torch.float64),
        torch.zeros(lanes, 1, dtype=torch.int64),
    )
    repeated = inputs.repeat_interleave(size, 0)[:, None]
    values, after = direct.evolve([reservoir], repeated, start, readout.cpu().double(), fourier=False)
    columns = torch.cat([after.density.reshape(lanes, size), values[:, 0, 0]], 1)
    return columns.unflatten(0, (len(inputs), size)).mT
