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
from typing import Any

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import State
from library.qrc.steps import Steps, input_gates, kept_unitaries

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
    options = {"device": inputs.device, "dtype": dtype, "points": series * time, "fourier": fourier}
    steps = None if fed else Steps(reservoirs, dimension, channels, **options)
    memory = state.density.to(real).reshape(lanes, dimension, dimension)
    measure = Measurement(first, dimension, state.counter.flatten())
    feedback = Feedback(reservoirs, state.feedback.to(real), dimension, channels, options) if fed else None
    result = inputs.new_empty(series, len(reservoirs), time, readout.shape[1], dtype=real)
    block = max(1, block_bytes(inputs.device) // (lanes * full * dimension * dtype.itemsize))
    products = memory.new_empty(lanes, full, 2 * dimension)
    rows = (lanes, dimension, products[0].numel() // dimension)
    for begin in range(0, time, block):
        prepared = (steps or feedback).block(inputs[:, begin : begin + block])
        probabilities = memory.new_empty(len(prepared), lanes, full)
        for step, piece in enumerate(prepared):
            column = feedback.columns(piece) if feedback else piece
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
    """The unitaries of steps that begin with rotations by what the measured qubits showed in the last one.

    Only the columns where reset qubits are |0> are ever formed: gates act on these, where a whole unitary would have
    2^n. `fourier` True makes whole unitaries as trigonometric polynomials all the same.
    """

    def __init__(
        self,
        reservoirs: Sequence[QuantumReservoir],
        expectation: Tensor,
        dimension: int,
        channels: int,
        options: dict[str, Any],
    ) -> None:
        self.reservoir, full = reservoirs[0], 2 ** reservoirs[0].qubits
        self.series, self.pairs = len(expectation), self.reservoir.feedback_pairs
        self.expectation = expectation.flatten(0, 1)
        self.dtype = options["dtype"]
        table = expectation.new_tensor([[r.scale, r.bias, r.feedback] for r in reservoirs])
        self.scale, self.bias, self.strengths = table.repeat(self.series, 1).T[..., None]
        start = torch.eye(full, dtype=self.dtype, device=expectation.device)
        self.start = start[:, :: full // dimension]
        signs = [gates.parity_signs(self.reservoir.qubits, (q,), expectation) for q in range(expectation.shape[-1])]
        self.bits = (1 - torch.stack(signs, 1)) / 2
        self.steps = Steps(reservoirs, full, channels, **options) if options["fourier"] else None
        if self.steps is None:
            self.fixed = kept_unitaries(reservoirs).to(start).repeat(self.series, 1, 1)

    def block(self, inputs: Tensor) -> Tensor:
        """What the inputs (series, time, channels) of some steps rotate by: (time, lanes, ...)."""
        if self.steps is not None:
            return self.steps.block(inputs)
        shared = inputs.transpose(0, 1).to(self.scale).repeat_interleave(len(self.scale) // self.series, 1)
        self.input_pairs, matrices = input_gates(self.reservoir, self.scale * shared + self.bias)
        return matrices

    def columns(self, piece: Tensor) -> Tensor:
        """The columns (lanes, 2^n, 2^r) of a step's unitary, after the feedback's rotations."""
        turns = gates.pair_matrices(self.strengths * self.expectation)
        if self.steps is not None:
            return torch.bmm(piece, gates.apply_pairs(self.start, self.pairs, turns))
        pairs = [*self.pairs, *self.input_pairs]
        return torch.bmm(self.fixed, gates.apply_pairs(self.start, pairs, torch.cat([turns, piece], -3)))

    def after(self, probabilities: Tensor) -> None:
        """Remember z = P(bit = 1) of a step's outcome probabilities (lanes, 2^n)."""
        self.expectation = probabilities @ self.bits
