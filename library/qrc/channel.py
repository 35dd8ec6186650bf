"""The spectrum of a reservoir's step: its eigenvalues are the memory's time scales, and its onion layer.

At a fixed input s a persistent step is a linear map of the memory, completely positive and trace preserving: one
eigenvalue is 1 (the fixed point), all others lie in the closed unit disk, real or in conjugate pairs. A mode with
eigenvalue lambda decays over tau = -1 / ln |lambda| steps and turns once in 2 pi / |arg lambda|. With m qubits reset
the whole channel on 4^n numbers has at most 4^(n - m) eigenvalues other than 0: those of the map of the memory alone.
With feedback of expectations the step is not linear, and the eigenvalues are those of its Jacobian at the fixed point.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc import gates, pauli
from library.qrc.arnoldi import largest_modulus
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, State, density_matrix, unpack
from library.qrc.steps import Steps

ZERO = 1e-9  # eigenvalues of this modulus or less carry nothing over a step
FIXED_POINT_STEPS = 2000
EXACT_NUMBERS = 256  # of a state, up to which the slowest mode is looked for among all eigenvalues


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one step at each of some inputs.

    `eigenvalues` complex128 (inputs, modes), largest modulus first, the fixed point's 1 left out. Modes that carry
    nothing (|lambda| <= 1e-9) have time scale 0. For a period above 1 they are the principal roots of those of a whole
    period, so that time scales and moduli are of steps there too.
    """

    eigenvalues: Tensor

    @property
    def time_scales(self) -> Tensor:
        """-1 / ln |lambda| in steps, (inputs, modes); infinite on the unit circle."""
        return time_scale(self.eigenvalues.abs())

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
    if not torch.isfinite(matrices).all():
        raise InputError("the step's matrix is not finite: its angles are too large; lower sigma, scale or feedback")
    values = torch.linalg.eigvals(matrices)
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    values = values.gather(-1, order)
    if _keeps_trace(reservoir):
        nearest = (values - 1).abs().argmin(-1, keepdim=True)
        kept = torch.ones_like(values, dtype=torch.bool).scatter_(-1, nearest, False)
        values = values[kept].reshape(len(values), -1)
    return Spectrum(values if reservoir.period == 1 else _root(values, reservoir.period))


def slowest_time_scale(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """`channel_spectrum(...).slowest` in steps, (inputs,), by `second_moduli`."""
    return time_scale(second_moduli(reservoir, inputs))


def second_moduli(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """The largest |lambda| per step at each of `inputs` (inputs, channels), the fixed point's 1 left out: (inputs,).

    Where a state has more than 256 numbers it is only stepped, by Arnoldi's method, and the step's matrix is never
    formed; with noise, whose matrices are formed anyway, it is always taken from all eigenvalues. 0 without memory.
    Raises InputError as `channel_spectrum`.

    >>> second_moduli(QuantumReservoir(), torch.tensor([[0.5]])).round(decimals=6).tolist()
    [0.760732]
    """
    if Layout.of(reservoir).size <= EXACT_NUMBERS or reservoir.noise is not None:
        moduli = channel_spectrum(reservoir, inputs).eigenvalues.abs()
        return moduli.amax(1) if moduli.shape[1] else moduli.sum(1)
    checked_points(inputs)
    found = [_second_modulus(reservoir, value) for value in inputs.cpu().double()]
    moduli = torch.tensor(found, dtype=torch.float64)
    return torch.where(moduli > ZERO, moduli ** (1 / reservoir.period), 0.0)


def time_scale(modulus: Tensor) -> Tensor:
    """-1 / ln |lambda| of moduli; infinite on the unit circle, 0 for |lambda| <= 1e-9."""
    scales = -1 / modulus.clamp(ZERO, 1.0).log()
    return torch.where(modulus > ZERO, scales.abs(), 0.0)


def checked_points(inputs: Tensor) -> None:
    """InputError unless `inputs` are finite and (inputs, channels), at least one of each."""
    if not isinstance(inputs, Tensor):
        raise InputError(f"inputs are a {type(inputs).__name__}; allowed: a tensor (inputs, channels)")
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise InputError(f"inputs have shape {tuple(inputs.shape)}; allowed: (inputs, channels), none of them 0")
    if not torch.isfinite(inputs).all():
        raise InputError(f"inputs: {int((~torch.isfinite(inputs)).sum())} are not finite; give numbers")


def step_matrices(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """What a step does to the state's numbers to first order: float64 (inputs, size, size) for (inputs, channels).

    Linear modes give the map itself; feedback of expectations the Jacobian at the fixed point of a constant input.
    """
    if _is_linear(reservoir):
        return transfer_matrices(reservoir, inputs)
    checked_points(inputs)
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
    checked_points(inputs)
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
    """One step of a state (size,) at an input (channels,), differentiable; feedback of expectations."""
    if reservoir.noise is not None:
        return _noisy_step(reservoir, row, value)
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


def _noisy_step(reservoir: QuantumReservoir, row: Tensor, value: Tensor) -> Tensor:
    layout = Layout.of(reservoir)
    nothing = row.new_zeros(2**reservoir.qubits, 1)
    _, after = pauli.evolve([reservoir], value[None, None], unpack(row[None, None], layout), nothing)
    return after.pack(layout)[0, 0]


def _second_modulus(reservoir: QuantumReservoir, value: Tensor) -> float:
    """Of a step of the ideal circuit, or of a whole period, at an input (channels,).

    The step keeps traces, so modes that decay have none: what Arnoldi's method sees is the step without the trace,
    which is taken away in multiples of the identity.
    """
    layout, step = Layout.of(reservoir), _tangent_step(reservoir, value)
    size = layout.size - layout.counter
    unit = torch.eye(layout.dimension, dtype=torch.float64).repeat(layout.outcomes, 1, 1).flatten()
    unit = torch.nn.functional.pad(unit, (0, size - layout.numbers))
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return largest_modulus(lambda row: step(row - unit * (unit @ row / unit.sum())), start)


def _tangent_step(reservoir: QuantumReservoir, value: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of `step_matrices` with a vector, counter left out, without the matrix."""
    from library.qrc.drive import evolve

    if not _is_linear(reservoir):
        point = fixed_point(reservoir, value)
        return lambda row: torch.func.jvp(lambda state: smooth_step(reservoir, state, value), (point,), (row,))[1]
    layout = Layout.of(reservoir)
    inputs = value.expand(1, reservoir.period, -1)
    nothing = torch.zeros(2**reservoir.qubits, 1, dtype=torch.float64)

    def step(row: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(row, (0, layout.size - len(row)))
        return evolve([reservoir], inputs, [padded[None]], nothing, backend="direct")[1][0, 0, : len(row)]

    return step


def _root(values: Tensor, period: int) -> Tensor:
    """Principal roots; of what is zero but for rounding, 0."""
    modulus = values.abs()
    return torch.where(modulus > ZERO, torch.polar(modulus ** (1 / period), values.angle() / period), 0.0)


def _is_linear(reservoir: QuantumReservoir) -> bool:
    return reservoir.mode == "persistent" or reservoir.feedback_by == "outcome"


def _keeps_trace(reservoir: QuantumReservoir) -> bool:
    return Layout.of(reservoir).numbers > 0 or _is_linear(reservoir)
