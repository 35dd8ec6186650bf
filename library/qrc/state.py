"""What a quantum reservoir carries from step to step, as one row of real numbers per sequence.

A row holds, in this order: the density matrix of the memory qubits as the real matrix Re rho + Im rho, row by row (one
such matrix per last outcome when outcomes are fed back, weighted by the outcome's probability), then the fed-back
expectations z of the measured qubits, then the steps since the last measurement. Parts that a mode has no use for are
left out. For a period above 1 the matrix is of all qubits, because most steps do not reset any.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import InputError

if TYPE_CHECKING:
    from library.qrc.reservoir import QuantumReservoir


@dataclass(frozen=True)
class Layout:
    """How many numbers of a row are what."""

    outcomes: int
    dimension: int
    feedback: int
    counter: int

    @classmethod
    def of(cls, reservoir: "QuantumReservoir") -> "Layout":
        """The layout of a reservoir's rows."""
        fed = reservoir.mode != "persistent"
        by_outcome = fed and reservoir.feedback_by == "outcome"
        return cls(
            outcomes=2**reservoir.measured_qubits if by_outcome else 1,
            dimension=2 ** (reservoir.qubits if reservoir.period > 1 else reservoir.memory_qubits),
            feedback=reservoir.measured_qubits if fed and not by_outcome else 0,
            counter=int(reservoir.period > 1),
        )

    @property
    def numbers(self) -> int:
        """Of the matrices; none for the one entry that is always 1."""
        entries = self.outcomes * self.dimension**2
        return entries if entries > 1 else 0

    @property
    def size(self) -> int:
        """Of a row."""
        return self.numbers + self.feedback + self.counter


@dataclass
class State:
    """The parts of the rows of several sequences; leading axes are free.

    `density` real (..., outcomes, d, d), which is Re rho + Im rho; `feedback` real (..., m), `counter` int64 (...).
    """

    density: Tensor
    feedback: Tensor
    counter: Tensor

    def __getitem__(self, place) -> "State":
        """Some of the sequences."""
        return State(self.density[place], self.feedback[place], self.counter[place])

    def pack(self, layout: Layout) -> Tensor:
        """Rows float64 (..., size)."""
        parts = [self.feedback.double(), self.counter.double()[..., None][..., : layout.counter]]
        if layout.numbers:
            parts.insert(0, self.density.double().flatten(-3))
        return torch.cat(parts, dim=-1)


def unpack(rows: Tensor, layout: Layout) -> State:
    """The parts of rows (..., size)."""
    lead = rows.shape[:-1]
    matrices = rows[..., : layout.numbers] if layout.numbers else rows.new_ones(*lead, 1)
    density = matrices.reshape(*lead, layout.outcomes, layout.dimension, layout.dimension)
    feedback = rows[..., layout.numbers : layout.numbers + layout.feedback]
    counter = rows[..., -1].long() if layout.counter else torch.zeros(lead, dtype=torch.int64, device=rows.device)
    return State(density, feedback, counter)


def density_matrix(packed: Tensor) -> Tensor:
    """rho, complex (..., d, d), of Re rho + Im rho."""
    return torch.complex(packed + packed.mT, packed - packed.mT) / 2


def packed_matrix(density: Tensor) -> Tensor:
    """Re rho + Im rho of a Hermitian rho."""
    return density.real + density.imag


def initial_state(reservoir: "QuantumReservoir", series: int) -> Tensor:
    """Rows (series, size) before the first input: |0...0>, outcome 0 or z = 1/2, counter 0."""
    layout = Layout.of(reservoir)
    density = torch.zeros(series, layout.outcomes, layout.dimension, layout.dimension, dtype=torch.float64)
    density[:, 0, 0, 0] = 1
    feedback = torch.full((series, layout.feedback), 0.5, dtype=torch.float64)
    return State(density, feedback, torch.zeros(series, dtype=torch.int64)).pack(layout)


def checked_rows(reservoir: "QuantumReservoir", rows: Tensor | None, inputs: Tensor) -> Tensor:
    """The rows of a state for `inputs` (series, time, channels), or the start; InputError for a foreign state."""
    series, size = len(inputs), Layout.of(reservoir).size
    if rows is None:
        return initial_state(reservoir, series).to(inputs.device)
    if rows.shape != (series, size):
        raise InputError(f"the state has shape {tuple(rows.shape)}; this reservoir and input take {(series, size)}")
    if not torch.isfinite(rows).all():
        raise InputError("the state holds numbers that are not finite")
    if (feedback := unpack(rows.double(), Layout.of(reservoir)).feedback).numel() and not (
        (feedback > -1e-9) & (feedback < 1 + 1e-9)
    ).all():
        raise InputError("the state's fed-back expectations lie outside [0, 1]")
    return rows.to(inputs.device, torch.float64)
