"""The spectrum of a reservoir's step: its eigenvalues are the memory's time scales, and its onion layer.

At a fixed input s a persistent step is a linear map of the memory, completely positive and trace preserving: one
eigenvalue is 1 (the fixed point), all others lie in the closed unit disk, real or in conjugate pairs. A mode with
eigenvalue lambda decays over tau = -1 / ln |lambda| steps and turns once in 2 pi / |arg lambda|. With m qubits reset
the whole channel on 4^n numbers has at most 4^(n - m) eigenvalues other than 0: those of the map of the memory alone.
With feedback of expectations the step is not linear, and the eigenvalues are those of its Jacobian at the fixed point.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, State, density_matrix, unpack
from library.qrc.steps import Steps

ZERO = 1e-9  # eigenvalues of this modulus or less carry nothing over a step
FIXED_POINT_STEPS = 2000


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one step at each of some inputs.

    `eigenvalues` complex128 (inputs, modes), largest modulus first, the fixed point's 1 left out. Modes that carry
    nothing (|lambda| <= 1e-9) have time scale 0.
    """

    eigenvalues: Tensor

    @property
    def time_scales(self) -> Tensor:
        """-1 / ln |lambda| in steps, (inputs, modes); infinite on the unit circle."""
        modulus = self.eigenvalues.abs().clamp(max=1.0)
        scales = -1 / modulus.clamp(min=ZERO).log()
        return torch.where(modulus > ZERO, scales.abs(), 0.0)

    @property
    def periods(self) -> Tensor:
        """2 pi / |arg lambda| in steps, (inputs, modes); infinite for modes that do not turn."""
        angle = self.eigenvalues.angle().abs()
        return torch.where(angle > 1e-12, 2 * torch.pi / angle, torch.inf)

    @property
    def slowest(self) -> Tensor:
        """The longest time scale tau_2, (inputs,); 0 without memory."""
        return self.time_scales.amax(1) if self.eigenvalues.shape[1] else self.time_scales.sum(1)

    @property
    def annulus(self) -> tuple[float, float]:
        """The least and the largest modulus of the modes that carry something, over all inputs; (0, 0) for none."""
        modulus = self.eigenvalues.abs()
        modulus = modulus[modulus > ZERO]
        return (float(modulus.min()), float(modulus.max())) if len(modulus) else (0.0, 0.0)

    def describe(self) -> dict:
        """The slowest scale (median and range over the inputs), its period, and the annulus, ready for JSON."""
        slowest = self.slowest
        return {
            "time_scale": float(slowest.median()),
            "time_scale_range": [float(slowest.min()), float(slowest.max())],
            "annulus": list(self.annulus),
            "modes": int((self.eigenvalues[0].abs() > ZERO).sum()),
        }


def channel_spectrum(reservoir: QuantumReservoir, inputs: Tensor) -> Spectrum:
    """The eigenvalues of a step at each of `inputs` (inputs, channels): e.g. the mean input, and its spread.

    For feedback of expectations, those of the Jacobian at the fixed point that each constant input leads to; raises
    InputError where there is none (the edge of chaos).

    >>> slow, fast = (QuantumReservoir(sigma=sigma, scale=0.2, bias=-0.1, pairs="line") for sigma in (0.1, 1.0))
    >>> half = torch.tensor([[0.5]])
    >>> bool(channel_spectrum(slow, half).slowest > channel_spectrum(fast, half).slowest)
    True
    """
    matrices = step_matrices(reservoir, inputs)
    values = torch.linalg.eigvals(matrices)
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    values = values.gather(-1, order)
    if _keeps_trace(reservoir):
        nearest = (values - 1).abs().argmin(-1, keepdim=True)
        kept = torch.ones_like(values, dtype=torch.bool).scatter_(-1, nearest, False)
        values = values[kept].reshape(len(values), -1)
    return Spectrum(values)


def step_matrices(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """What a step does to the state's numbers to first order: float64 (inputs, size, size) for (inputs, channels).

    Linear modes give the map itself; feedback of expectations the Jacobian at the fixed point of a constant input.
    """
    if _is_linear(reservoir):
        return transfer_matrices(reservoir, inputs)
    result = []
    for value in inputs:
        point = fixed_point(reservoir, value)
        result.append(torch.func.jacrev(lambda row, value=value: smooth_step(reservoir, row, value))(point))
    return torch.stack(result)


def transfer_matrices(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """The linear map of Re rho + Im rho in one step: float64 (inputs, size, size), similar to the channel's matrix.

    For a period above 1 it is `period` steps at the same input. Raises InputError for feedback of expectations, which
    is not linear.
    """
    from library.qrc.drive import evolve

    if not _is_linear(reservoir):
        raise InputError("feedback of expectations is not linear: it has no transfer matrix, only a Jacobian")
    layout = Layout.of(reservoir)
    if not layout.numbers:
        return torch.ones(len(inputs), 1, 1, dtype=torch.float64)
    basis = torch.eye(layout.numbers, dtype=torch.float64, device=inputs.device)
    basis = torch.nn.functional.pad(basis, (0, layout.size - layout.numbers))
    repeated = inputs.double().repeat_interleave(layout.numbers, 0)[:, None].expand(-1, reservoir.period, -1)
    nothing = torch.zeros(2**reservoir.qubits, 1, dtype=torch.float64)
    rows = basis.repeat(len(inputs), 1)
    _, after = evolve([reservoir], repeated, [rows], nothing, backend="pauli" if reservoir.noise else "direct")
    return after[:, 0, : layout.numbers].unflatten(0, (len(inputs), -1)).mT


def superoperator(unitary: Tensor, measured: int, reset: int) -> Tensor:
    """The whole channel of U, then measurement and reset: S = sum_k conj(K_k) x K_k, complex (..., 4^n, 4^n).

    It acts on column-stacked density matrices, as qiskit's SuperOp. The first `measured` qubits lose their coherences
    and the first `reset` of these go to |0>.
    """
    size = unitary.shape[-1]
    index = torch.arange(size, device=unitary.device)
    outcome = index & (2**measured - 1)
    kraus = torch.zeros(2**measured, size, size, dtype=unitary.dtype, device=unitary.device)
    kraus[outcome, index & ~(2**reset - 1), index] = 1
    whole = kraus @ unitary[..., None, :, :]
    return torch.einsum("...kij,...kab->...iajb", whole.conj(), whole).reshape(*unitary.shape[:-2], size**2, size**2)


def fixed_point(reservoir: QuantumReservoir, value: Tensor, tolerance: float = 1e-11) -> Tensor:
    """The state (size,) that a constant input (channels,) leads to.

    Raises InputError when the states still differ by more than `tolerance` after 2000 steps: there is none, the map
    oscillates, or its slowest mode is slower than that.
    """
    rows = reservoir.start(1)
    piece = value.double().expand(1, 50 * reservoir.period, -1)
    for _ in range(FIXED_POINT_STEPS // 50):
        _, after = reservoir.drive(piece, rows)
        _, further = reservoir.drive(piece[:, : reservoir.period], after)
        rows = after
        if (further - after).abs().max() <= tolerance:
            return after[0]
    raise InputError(
        f"no fixed point at input {value.tolist()} within {FIXED_POINT_STEPS} steps; lower the feedback, or raise sigma"
    )


def smooth_step(reservoir: QuantumReservoir, row: Tensor, value: Tensor) -> Tensor:
    """One step of a state (size,) at an input (channels,), differentiable; ideal circuit, feedback of expectations."""
    layout = Layout.of(reservoir)
    state = unpack(row[None], layout)
    steps = Steps(
        [reservoir], 2**reservoir.qubits, len(value), device=row.device, dtype=torch.complex128, fourier=False
    )
    unitary = steps.block(value[None, None])[0]
    start = torch.eye(2**reservoir.qubits, dtype=torch.complex128, device=row.device)[:, :: 2**reservoir.reset_qubits]
    turned = gates.pair_rotations(start, reservoir.feedback_pairs, reservoir.feedback * state.feedback)
    columns = unitary @ turned
    density = density_matrix(state.density[:, 0])
    image = columns @ density
    probabilities = (image * columns.conj()).real.sum(-1)
    blocks = (1, layout.dimension, -1)
    after = image.reshape(blocks) @ columns.reshape(blocks).mH
    index = torch.arange(layout.dimension, device=row.device) & (
        2 ** (reservoir.measured_qubits - reservoir.reset_qubits) - 1
    )
    after = after * (index[:, None] == index[None, :])
    outcomes, places = (torch.arange(size, device=row.device) for size in (len(start), reservoir.measured_qubits))
    bits = ((outcomes[:, None] >> places) & 1).double()
    return State((after.real + after.imag)[:, None], probabilities @ bits, state.counter).pack(layout)[0]


def _is_linear(reservoir: QuantumReservoir) -> bool:
    return reservoir.mode == "persistent" or reservoir.feedback_by == "outcome"


def _keeps_trace(reservoir: QuantumReservoir) -> bool:
    return Layout.of(reservoir).numbers > 0 or _is_linear(reservoir)
