"""The echo state property: whether a reservoir forgets its start, and how fast.

Two copies that start apart and get the same inputs must meet. The rate is the Lyapunov exponent of their distance, in
1 / steps: negative when they do; its inverse is the time after which the start is forgotten by a factor e.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.channel import slowest_time_scale
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import Layout, State, density_matrix, initial_state, unpack

SMALL = 1e-7  # the distance that nonlinear copies are kept at, so that the exponent is of the linearised map
CONSTANT = 1e-6  # variance of a feature that tells nothing
FLOOR = 1e-14  # distances below this are rounding


@dataclass(frozen=True)
class Echo:
    """How copies of a reservoir that start apart approach each other under the same inputs.

    rate        Lyapunov exponent per step; negative: the echo state property holds for these inputs
    remaining   largest distance of the features after the last step, of copies that started from opposite states
    """

    rate: float
    remaining: float

    @property
    def memory(self) -> float:
        """Steps after which what was before has fallen to 1 / e; infinite when it never does."""
        return -1 / self.rate if self.rate < 0 else math.inf


def echo_state(reservoir: QuantumReservoir, inputs: Tensor, *, renormalize: int = 10) -> Echo:
    """Drive copies that differ in their start by `inputs` (time, channels), and compare.

    The rate comes from the growth of a small difference that is scaled back every `renormalize` steps, after a third of
    the inputs has turned it to the slowest direction; for linear modes this is (1 / T) ln || M(s_T) ... M(s_1) || on
    traceless matrices. Raises InputError for fewer than 3 * renormalize inputs.
    """
    time = len(inputs)
    if time < 3 * renormalize:
        raise InputError(f"{time} inputs are too few for a rate; allowed: {3 * renormalize} or more")
    starts = torch.cat([initial_state(reservoir, 1), opposite_state(reservoir)])
    features, _ = reservoir.drive(inputs.expand(2, -1, -1), starts)
    remaining = float((features[0, -1] - features[1, -1]).abs().max())
    if Layout.of(reservoir).size == 0:
        return Echo(-math.inf, remaining)
    return Echo(_rate(reservoir, inputs, starts, renormalize), remaining)


def check_echo_state(reservoir: QuantumReservoir, inputs: Tensor, washout: int, *, tolerance: float = 1e-2) -> Echo:
    """Before use: the copies must have met to `tolerance` (of features in [-1, 1]) after `washout` of the inputs.

    Raises InputError with what to change when they have not. Warns when the slowest time scale at the mean input is
    more than a fifth of the washout, so that features may still drift; when a unital channel (measured, never reset)
    lets all features fade to 0; when input angles span more than half a turn, so that different inputs may look alike;
    and when a feature's variance over the inputs is below 1e-6, so that it tells nothing.
    """
    if not 0 < washout <= len(inputs):
        raise InputError(f"washout {washout} must lie in 1 to {len(inputs)}, the length of the inputs")
    echo = echo_state(reservoir, inputs[:washout], renormalize=max(1, min(10, washout // 3)))
    if not echo.remaining <= tolerance:
        raise InputError(
            f"after a washout of {washout} steps features still depend on the start, by {echo.remaining:.2g} "
            f"(allowed {tolerance:g}): use a longer washout, a larger sigma, more measured qubits or less feedback"
        )
    span = abs(reservoir.scale) * float((inputs.amax(0) - inputs.amin(0)).max())
    if span > math.pi:
        warnings.warn(
            f"input angles span {span:.3g}, more than half a turn: different inputs may look alike; lower the scale",
            stacklevel=2,
        )
    _warn_of_constant_features(reservoir, inputs)
    if reservoir.mode == "persistent" and reservoir.noise is None:
        if reservoir.reset_qubits == 0:
            warnings.warn(
                "no qubit is reset: the channel is unital and features fade to 0; reset at least one", stacklevel=2
            )
        slowest = float(slowest_time_scale(reservoir, inputs.mean(0, keepdim=True))[0])
        if slowest > washout / 5:
            warnings.warn(
                f"the slowest time scale is {slowest:.3g} steps, more than a fifth of the washout of {washout}: "
                "features may still drift; use a longer washout or a larger sigma",
                stacklevel=2,
            )
    return echo


def opposite_state(reservoir: QuantumReservoir) -> Tensor:
    """A state (1, size) far from the start: memory qubits |1>, fed-back expectations 1, outcomes all 1."""
    layout = Layout.of(reservoir)
    density = torch.zeros(1, layout.outcomes, layout.dimension, layout.dimension, dtype=torch.float64)
    density[0, -1, -1, -1] = 1
    feedback = torch.ones(1, layout.feedback, dtype=torch.float64)
    return State(density, feedback, torch.zeros(1, dtype=torch.int64)).pack(layout)


def trace_distance(reservoir: QuantumReservoir, left: Tensor, right: Tensor) -> Tensor:
    """Trace norm of the difference of the memories of states (..., size), plus the largest difference of z: (...,)."""
    layout = Layout.of(reservoir)
    one, other = unpack(left, layout), unpack(right, layout)
    norm = torch.linalg.eigvalsh(density_matrix(one.density - other.density)).abs().sum((-1, -2))
    return norm + (one.feedback - other.feedback).abs().sum(-1)


def _warn_of_constant_features(reservoir: QuantumReservoir, inputs: Tensor) -> None:
    features, _ = reservoir.drive(inputs[None])
    variances = features[0, len(inputs) // 2 :].var(0, correction=0)
    constant = [name for name, value in zip(reservoir.feature_names, variances, strict=True) if value < CONSTANT]
    if constant:
        warnings.warn(
            f"features {', '.join(constant[:6])}{' ...' if len(constant) > 6 else ''} hardly vary (variance below "
            f"{CONSTANT:g}): raise the scale of the inputs or sigma",
            stacklevel=3,
        )


def _rate(reservoir: QuantumReservoir, inputs: Tensor, starts: Tensor, renormalize: int) -> float:
    """Mean growth of the logarithm of the distance of a pair, which is pulled back after each piece."""
    linear = reservoir.mode == "persistent" or reservoir.feedback_by == "outcome"
    size = 1.0 if linear else SMALL
    pair = torch.stack([starts[0], starts[0] + size * (starts[1] - starts[0])])
    settled, growth, steps = len(inputs) // 3, 0.0, 0
    before = float(trace_distance(reservoir, pair[0], pair[1]))
    for begin in range(0, len(inputs), renormalize):
        piece = inputs[begin : begin + renormalize]
        _, pair = reservoir.drive(piece.expand(2, -1, -1), pair)
        after = float(trace_distance(reservoir, pair[0], pair[1]))
        if after <= FLOOR * size:
            return -math.inf
        if begin >= settled:
            growth, steps = growth + math.log(after / before), steps + len(piece)
        pair = torch.stack([pair[0], pair[0] + _traceless(reservoir, pair[1] - pair[0]) * (size / after)])
        before = float(trace_distance(reservoir, pair[0], pair[1]))
    return growth / steps


def _traceless(reservoir: QuantumReservoir, difference: Tensor) -> Tensor:
    """Without the rounding error's trace, which never decays, and would be all that is left after enough rescaling."""
    layout = Layout.of(reservoir)
    state = unpack(difference, layout)
    entries = layout.outcomes * layout.dimension
    trace = state.density.diagonal(dim1=-2, dim2=-1).sum((-1, -2))[..., None, None, None]
    unit = torch.eye(layout.dimension, dtype=difference.dtype, device=difference.device)
    return State(state.density - trace * unit / entries, state.feedback, state.counter).pack(layout)
