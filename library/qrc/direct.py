"""The circuit as a completely positive map of the memory qubits, evolved step by step for whole batches.

With V = U (., reset qubits |0>) of shape (2^n, 2^r), r memory qubits: A = V rho, the outcome probabilities are the
diagonal of A V^H, and rho' = sum over outcomes k of the reset qubits of A_k V_k^H. The measured qubits that are not
reset lose their coherences.

A Hermitian rho is carried as the real matrix R = Re rho + Im rho (its parts are the symmetric and the antisymmetric
half), for which (1 - i) rho = R - i R^T. So A~ = V (R - i R^T), and with both A~ and V read as rows of real numbers

    R'_ij = sum_k <A~_ki, V_kj>,   p_i = <A~_i, V_i>:

half the arithmetic of the complex products, no conjugated copies, and rho stays Hermitian to the last bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import State
from library.qrc.steps import Steps

Estimate = Callable[[Tensor], Tensor]


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    state: State,
    readout: Tensor,
    *,
    dtype: torch.dtype = torch.complex128,
    fourier: bool | None = None,
    estimate: Estimate | None = None,
) -> tuple[Tensor, State]:
    """Outcome probabilities times `readout`, real (series, reservoirs, time, width), and the state after the last step.

    For reservoirs of equal structure whose feedback, if any, is of expectations. `state` has leading axes (series,
    reservoirs), `readout` is (2^n, width). `estimate` replaces the probabilities (lanes, 2^n) of a step by what was
    seen of them, both for the read-out and for what is fed back.
    """
    first = reservoirs[0]
    series, time, channels = inputs.shape
    lanes, full, dimension = series * len(reservoirs), 2**first.qubits, state.density.shape[-1]
    fed = first.mode != "persistent"
    real = dtype.to_real()
    readout = readout.to(inputs.device, real)
    width, points = full if fed else dimension, series * time
    options = {"device": inputs.device, "dtype": dtype, "points": points, "fourier": fourier}
    steps = Steps(reservoirs, width, channels, **options)
    memory = state.density.to(real).reshape(lanes, dimension, dimension)
    measure = Measurement(first, dimension, state.counter.flatten())
    feedback = Feedback(reservoirs, state.feedback.to(real).reshape(lanes, -1), series, dimension) if fed else None
    result = inputs.new_empty(series, len(reservoirs), time, readout.shape[1], dtype=real)
    block = max(1, block_bytes(inputs.device) // (lanes * full * steps.columns * dtype.itemsize))
    products = memory.new_empty(lanes, full, 2 * dimension)
    rows = (lanes, dimension, products[0].numel() // dimension)
    for begin in range(0, time, block):
        columns = steps.block(inputs[:, begin : begin + block])
        probabilities = memory.new_empty(len(columns), lanes, full)
        for step, whole in enumerate(columns):
            column = feedback.before(whole) if feedback else whole
            image = torch.bmm(column, torch.complex(memory, -memory.mT))
            left, right = torch.view_as_real(image), torch.view_as_real(column)
            torch.mul(left.view(products.shape), right.reshape(products.shape), out=products)
            torch.sum(products, -1, out=probabilities[step])
            memory = measure(torch.bmm(left.view(rows), right.reshape(rows).mT))
            if estimate:
                probabilities[step] = estimate(probabilities[step])
            if feedback:
                feedback.after(probabilities[step])
        values = (probabilities @ readout).unflatten(1, (series, len(reservoirs)))
        result[:, :, begin : begin + block] = values.permute(1, 2, 0, 3)
    after = State(
        memory.reshape(state.density.shape),
        feedback.expectation.reshape(state.feedback.shape) if feedback else state.feedback,
        measure.counter.reshape(state.counter.shape),
    )
    return result, after


def block_bytes(device: torch.device) -> int:
    """Most that the unitaries of steps prepared at once may take: on a CPU they should stay in the cache."""
    return 512 << 20 if device.type == "cuda" else 2 << 20


class Measurement:
    """What the measurement of a step does to the memory: dephasing, and for a period above 1 the reset."""

    def __init__(self, reservoir: QuantumReservoir, dimension: int, counter: Tensor) -> None:
        self.period, self.counter = reservoir.period, counter
        self.reset = 2**reservoir.reset_qubits if reservoir.period > 1 else 1
        index = torch.arange(dimension, device=counter.device)
        kept = (
            index & (2**reservoir.measured_qubits - 1)
            if self.period > 1
            else index & (2 ** (reservoir.measured_qubits - reservoir.reset_qubits) - 1)
        )
        self.mask = (kept[:, None] == kept[None, :]) if int(kept.max()) else None

    def __call__(self, memory: Tensor) -> Tensor:
        """The memory after the step, real (lanes, d, d)."""
        after = memory if self.mask is None else memory * self.mask
        if self.period == 1:
            return after
        if self.reset > 1:
            blocks = after.reshape(len(after), -1, self.reset, after.shape[-1] // self.reset, self.reset)
            after = torch.zeros_like(blocks)
            after[:, :, 0, :, 0] = blocks.diagonal(dim1=2, dim2=4).sum(-1)
            after = after.reshape(memory.shape)
        self.counter = (self.counter + 1) % self.period
        return torch.where((self.counter == 0)[:, None, None], after, memory)


class Feedback:
    """The rotations by what the measured qubits showed in the last step."""

    def __init__(
        self, reservoirs: Sequence[QuantumReservoir], expectation: Tensor, series: int, dimension: int
    ) -> None:
        self.pairs, self.expectation = reservoirs[0].feedback_pairs, expectation
        strengths = expectation.new_tensor([reservoir.feedback for reservoir in reservoirs])
        self.strengths = strengths.repeat(series)[:, None]
        full = 2 ** reservoirs[0].qubits
        start = torch.eye(full, dtype=expectation.dtype.to_complex(), device=expectation.device)
        self.start = start[:, :: full // dimension]
        signs = [
            gates.parity_signs(reservoirs[0].qubits, (qubit,), expectation) for qubit in range(expectation.shape[1])
        ]
        self.bits = (1 - torch.stack(signs, 1)) / 2

    def before(self, unitary: Tensor) -> Tensor:
        """The columns of the step's unitary (lanes, 2^n, 2^n) after the feedback's rotations."""
        return unitary @ gates.pair_rotations(self.start, self.pairs, self.strengths * self.expectation)

    def after(self, probabilities: Tensor) -> None:
        """Remember z = P(bit = 1) of a step's outcome probabilities (lanes, 2^n)."""
        self.expectation = probabilities @ self.bits
