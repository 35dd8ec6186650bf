"""What a reservoir is, and the quantum one: a frozen configuration whose states and features are functions of it."""

from itertools import combinations
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, FiniteFloat, model_validator
from torch import Tensor

from library.errors import InputError
from library.qrc import gates
from library.qrc.noise import Noise

Backend = Literal["auto", "direct", "fourier", "parallel", "scan", "pauli"]
UNITARY_TOLERANCE = 1e-10
MOST_QUBITS = 10
NOISY_QUBITS = 6  # transfer matrices of 4^n x 4^n reals are formed: 128 MiB at six qubits


class Reservoir(Protocol):
    """A driven system that turns input sequences into feature sequences, without any trained part.

    `width`     features per step
    `start`     the states of `series` sequences before their first input; the first axis is the sequence
    `drive`     float64 (series, time, channels) -> features float64 (series, time, width), and the states after the
                last step: driving in pieces gives the features of driving at once
    `describe`  what a person or a record wants to know of it, ready for JSON
    """

    @property
    def width(self) -> int: ...
    def start(self, series: int) -> Tensor: ...
    def drive(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def describe(self) -> dict[str, Any]: ...


class QuantumReservoir(BaseModel, frozen=True, extra="forbid"):
    """A small quantum circuit applied once per step, with exact expectation values as features.

    A step with input s rotates pairs of qubits by scale * s + bias, applies a fixed unitary whose angles are scaled by
    sigma, reads <Z_q> and <Z_p Z_q>, measures the qubits 0 ... measured - 1, and resets the first `reset` of them.

    persistent   memory lives in the qubits that are not reset: rho -> M(U rho U^T), linear in rho
    feedback     all qubits start anew each step, and are rotated first by feedback * z, z = (1 - <Z>) / 2 of the last
                 step: memory lives in z alone, and the map is not linear
    both         persistent, with the feedback of the measured qubits before the inputs

    Features are [<Z_q>, q in Q ascending; <Z_p Z_q>, p < q lexicographic], Q all qubits or the measured ones, taken
    before the measurement acts on the state (they are what it reports).

    Source: a reconstruction. Tandon et al., arXiv 2505.22837, publish neither circuit nor data; the onion idea is of
    Tortorella and Micheli, ICANN 2024. Mode `feedback` and the bias -0.31 follow a public skeleton that names the
    paper, the pair rotation is of the neighbouring literature; the rest is our design.

    >>> reservoir = QuantumReservoir(qubits=3, sigma=0.3)
    >>> features, state = reservoir.drive(torch.rand(2, 50, 1, dtype=torch.float64))
    >>> tuple(features.shape), reservoir.memory_qubits
    ((2, 50, 6), 2)
    """

    mode: Literal["persistent", "feedback", "both"] = "persistent"
    """Where memory lives: in qubits, in what is fed back, or both."""
    qubits: int = Field(4, ge=2)
    """Qubits n, 2 to 10: matrices of all of them are formed."""
    measured: int | None = Field(None, ge=0)
    """How many qubits are measured each step, the first ones; None is 1, and all in mode feedback."""
    reset: int | None = Field(None, ge=0)
    """How many of these are reset after it, the first ones; None resets all of them."""
    kind: Literal["su2", "ising"] = "su2"
    """Fixed gates: layers of RY and RZ with CX chains, or Trotter slices of a transverse-field Ising model."""
    reps: int = Field(2, ge=1, le=20)
    """Their CX chains, or slices."""
    sigma: FiniteFloat = Field(1.0, ge=0)
    """Scale of their angles: the smaller, the longer the memory."""
    field: FiniteFloat = 1.0
    """Transverse field h of the Ising model."""
    scale: FiniteFloat = 0.5
    """a of the input angle a s + b."""
    bias: FiniteFloat = -0.31
    """b of the input angle."""
    encoding: Literal["pair", "rx_anc"] = "pair"
    """Pair rotations R_ij, channel p mod d on pair p; or RX on measured qubit k mod m for channel k."""
    pairs: Literal["ring", "line"] = "ring"
    """Which qubits the pair rotations couple: (i, i + 1 mod n), or without the closing one."""
    feedback: FiniteFloat = 1.0
    """f of the feedback angle f z."""
    feedback_by: Literal["expectation", "outcome"] = "expectation"
    """Feed back expectation values over all shots, or inside each shot the bit that it measured."""
    period: int = Field(1, ge=1)
    """Measure and reset after every period-th step only; features between are exact expectation values."""
    observed: Literal["all", "measured"] = "all"
    """Whose expectation values are features: all qubits', or only what the measurement reports."""
    noise: Noise | None = None
    """Errors of the device; None is the ideal circuit."""
    angles: tuple[FiniteFloat, ...] = ()
    """Unscaled angles instead of drawn ones: su2 [layer, RY or RZ, qubit] flat, ising J_ij for i < j."""
    unitary: tuple[FiniteFloat, ...] = ()
    """A fixed unitary of your own instead of the gates: its entries by rows, real and imaginary part in turn."""
    seed: int = Field(0, ge=0)
    """Of the drawn angles: su2 uniform in (-pi, pi), ising J_ij uniform in (-1, 1)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n, m = self.qubits, self.measured_qubits
        if n > MOST_QUBITS:
            size = 16 * 4**n / 2**30
            raise InputError(f"{n} qubits: each of a step's matrices takes {size:.3g} GiB; allowed: 2 to {MOST_QUBITS}")
        if self.mode == "feedback" and (m != n or self.reset not in (None, n)):
            raise InputError(f"mode feedback measures and resets all {n} qubits; leave measured and reset out")
        if self.mode != "feedback" and m >= n:
            raise InputError(f"measured {m} of {n} qubits leaves no memory; allowed: 0 to {n - 1}")
        if self.reset_qubits > m:
            raise InputError(f"reset {self.reset_qubits} qubits, but only {m} are measured")
        if m == 0 and (self.mode == "both" or self.observed == "measured" or self.encoding == "rx_anc"):
            raise InputError(
                "no measured qubit: mode both, observed measured and the encoding rx_anc need at least one"
            )
        if self.feedback_by == "outcome" and self.mode == "persistent":
            raise InputError("feedback_by outcome needs mode feedback or both")
        if self.period > 1 and self.mode != "persistent":
            raise InputError("a period above 1 needs mode persistent: feedback acts in every step")
        if self.noise is not None and (n > NOISY_QUBITS or self.feedback_by == "outcome" or self.unitary):
            raise InputError(
                f"noise needs at most {NOISY_QUBITS} qubits (its transfer matrix has 4^n x 4^n entries, "
                f"{8 * 16**n / 2**30:.3g} GiB here), feedback of expectations, and no unitary of your own"
            )
        self._check_angles()
        return self

    def _check_angles(self) -> None:
        n = self.qubits
        wanted = (self.reps + 1) * 2 * n if self.kind == "su2" else n * (n - 1) // 2
        if self.angles and len(self.angles) != wanted:
            raise InputError(f"angles has {len(self.angles)} entries; {self.kind} of {n} qubits takes {wanted}")
        if self.unitary:
            if self.angles:
                raise InputError("give angles or a unitary of your own, not both")
            if len(self.unitary) != 2 * 4**n:
                raise InputError(f"unitary has {len(self.unitary)} numbers; {n} qubits take {2 * 4**n}")
            matrix = self._own_unitary()
            error = (matrix.mH @ matrix - torch.eye(2**n)).abs().max()
            if not error <= UNITARY_TOLERANCE:
                raise InputError(f"unitary is none: U^H U differs from the identity by {float(error):.2g}")

    @property
    def measured_qubits(self) -> int:
        """m, how many qubits are measured."""
        if self.measured is not None:
            return self.measured
        return self.qubits if self.mode == "feedback" else 1

    @property
    def reset_qubits(self) -> int:
        """How many of these are reset."""
        return self.measured_qubits if self.reset is None else self.reset

    @property
    def memory_qubits(self) -> int:
        """How many qubits carry the state from step to step."""
        return self.qubits - self.reset_qubits

    @property
    def observed_qubits(self) -> int:
        """How many qubits are read, the first ones."""
        return self.qubits if self.observed == "all" else self.measured_qubits

    @property
    def width(self) -> int:
        """Features per step, q (q + 1) / 2 for q observed qubits."""
        return self.observed_qubits * (self.observed_qubits + 1) // 2

    @property
    def input_pairs(self) -> list[tuple[int, int]]:
        """The pairs of the pair encoding, in order."""
        return gates.ring_pairs(self.qubits) if self.pairs == "ring" else gates.line_pairs(self.qubits)

    @property
    def feedback_pairs(self) -> list[tuple[int, int]]:
        """The pairs that are rotated by the feedback of their first qubit, in order; none in mode persistent."""
        return [] if self.mode == "persistent" else gates.ring_pairs(self.qubits)[: self.measured_qubits]

    @property
    def cx_per_step(self) -> int:
        """CX gates of one step on hardware, an RZZ counted as two."""
        n = self.qubits
        fixed = self.reps * (len(gates.cx_chain(n)) if self.kind == "su2" else n * (n - 1))
        rotated = len(self.input_pairs) if self.encoding == "pair" else 0
        return fixed + 2 * (rotated + len(self.feedback_pairs))

    @property
    def feature_names(self) -> list[str]:
        """Z0, Z1 ... Z0Z1 ..."""
        qubits = range(self.observed_qubits)
        return [f"Z{q}" for q in qubits] + [f"Z{p}Z{q}" for p, q in combinations(qubits, 2)]

    def drawn_angles(self) -> Tensor:
        """The unscaled angles: float64 (reps + 1, 2, n) for su2, (n, n) with J_ij at i < j for ising."""
        n = self.qubits
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "su2":
            if self.angles:
                return torch.tensor(self.angles, dtype=torch.float64).reshape(self.reps + 1, 2, n)
            uniform = torch.rand(self.reps + 1, 2, n, generator=generator, dtype=torch.float64)
            return (2 * uniform - 1) * torch.pi
        rows, columns = torch.triu_indices(n, n, 1)
        couplings = torch.zeros(n, n, dtype=torch.float64)
        if self.angles:
            couplings[rows, columns] = torch.tensor(self.angles, dtype=torch.float64)
        else:
            couplings[rows, columns] = 2 * torch.rand(len(rows), generator=generator, dtype=torch.float64) - 1
        return couplings

    def fixed_unitary(self) -> Tensor:
        """The reservoir's unitary without inputs: complex128 (2^n, 2^n)."""
        if self.unitary:
            return self._own_unitary()
        angles = self.drawn_angles()
        return gates.apply_gates(gates.identity(self.qubits, angles), self.fixed_gates())

    def fixed_gates(self) -> list[gates.Gate]:
        """The same as gates in order; InputError for a unitary of your own, of which no gates are known."""
        if self.unitary:
            raise InputError("a unitary of your own has no gates: use kind su2 or ising")
        angles = self.sigma * self.drawn_angles()
        if self.kind == "su2":
            return gates.su2_gates(angles)
        fields = torch.full((self.qubits,), self.sigma * self.field, dtype=torch.float64)
        return gates.ising_gates(fields, angles, self.reps)

    def start(self, series: int) -> Tensor:
        """The state before the first input: all qubits |0>, and z = 1/2 (no knowledge) or the outcome 0."""
        from library.qrc.state import initial_state

        return initial_state(self, series)

    def drive(self, inputs: Tensor, state: Tensor | None = None, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """Features float64 (series, time, width) for inputs (series, time, channels), and the state after them.

        `backend` forces one of the exact methods, which agree to rounding; see `library.qrc.drive.drive_many`.
        Raises InputError for inputs of another shape, none, or not finite, and for a state of another reservoir.
        """
        from library.qrc.drive import drive_many

        features, states = drive_many([self], inputs, None if state is None else [state], backend=backend)
        return features[0], states[0]

    def describe(self) -> dict[str, Any]:
        """The configuration as far as it differs from the defaults, width, memory qubits and CX gates per step."""
        chosen = self.model_dump(mode="json", exclude_defaults=True)
        derived = {"width": self.width, "memory_qubits": self.memory_qubits, "cx_per_step": self.cx_per_step}
        return {"reservoir": "quantum", "mode": self.mode, "qubits": self.qubits, "kind": self.kind} | chosen | derived

    def _own_unitary(self) -> Tensor:
        entries = torch.tensor(self.unitary, dtype=torch.float64).reshape(2**self.qubits, 2**self.qubits, 2)
        return torch.view_as_complex(entries)
