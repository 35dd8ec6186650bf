"""What a device with finitely many shots reports: features with sampling noise, in two experiments.

independent   every step is its own experiment: the circuit restarts for each step, `shots` times, and all qubits are
              measured at its end. The outcome counts of a step are multinomial in the exact probabilities, so no
              trajectory is simulated.
trajectory    one long circuit, `shots` times: the measured qubits' outcomes of all steps of a shot belong together.
              State vectors of all shots evolve as one batch, each collapsing by its own outcomes.

An estimate of a feature f has variance (1 - f^2) / shots in both; what differs is how estimates of different steps go
together. Source: Monte Carlo wave functions (Dalibard, Castin, Molmer, PRL 68, 580, 1992) for the second.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from library.errors import InputError
from library.qrc import gates, trajectories
from library.qrc.drive import checked_inputs, evolve, grouped
from library.qrc.reservoir import QuantumReservoir
from library.qrc.state import checked_rows

Sampling = Literal["independent", "trajectory"]


class SampledReservoir(BaseModel, frozen=True, extra="forbid"):
    """A quantum reservoir read with finitely many shots; a reservoir like any other.

    Feedback of expectations feeds the estimates back, as a device would. The noise is a function of the seed, of the
    step's number and of how a series is cut into pieces: the state's last entry counts the steps.

    >>> exact = QuantumReservoir(qubits=2)
    >>> inputs = torch.rand(1, 20, 1, dtype=torch.float64)
    >>> noisy, _ = SampledReservoir(reservoir=exact, shots=4096).drive(inputs)
    >>> bool((noisy - exact.drive(inputs)[0]).abs().max() < 0.1)
    True
    """

    reservoir: QuantumReservoir
    """What is sampled."""
    shots: int = Field(16384, ge=1)
    """Shots per step."""
    sampling: Sampling = "independent"
    """An experiment per step, or one long circuit; see the module."""
    seed: int = Field(0, ge=0)
    """Of the outcomes."""

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        inner = self.reservoir
        if self.sampling == "trajectory":
            if inner.observed_qubits > inner.measured_qubits:
                raise InputError("one long circuit reports only measured qubits: use observed measured, or independent")
            if inner.noise is not None or inner.period > 1:
                raise InputError("trajectory sampling takes no noise and measures every step: use independent")
        return self

    @property
    def width(self) -> int:
        """Features per step."""
        return self.reservoir.width

    def start(self, series: int) -> Tensor:
        """The state before the first input: float64 (series, size), the exact state or all shots', and the counter."""
        if self.sampling == "trajectory":
            inner = trajectories.start(self.reservoir, series, self.shots)
        else:
            inner = self.reservoir.start(series)
        return torch.cat([inner, torch.zeros(series, 1, dtype=torch.float64)], 1)

    @property
    def stepwise(self) -> bool:
        """Whether what was drawn in one step acts on the next, so that steps are drawn one by one."""
        fed = self.reservoir.mode != "persistent" and self.reservoir.feedback_by == "expectation"
        return fed or self.sampling == "trajectory"

    def drive(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimated features float64 (series, time, width) for inputs (series, time, channels), and the state after."""
        if not self.stepwise:
            features, states = drive_sampled([self], inputs, None if state is None else [state])
            return features[0], states[0]
        inputs = checked_inputs(inputs)
        state = self.checked(state, inputs)
        generator = self.generator(state)
        if self.sampling == "trajectory":
            features, after = trajectories.evolve(self.reservoir, inputs, state[:, :-1], self.shots, generator)
            return features, self.counted(after, state, inputs)
        inner = self.reservoir
        outputs, after = evolve(
            [inner],
            inputs,
            [checked_rows(inner, state[:, :-1], inputs)],
            gates.parity_matrix(inner.qubits, range(inner.observed_qubits)),
            estimate=lambda probabilities: self.seen(probabilities, generator),
        )
        return outputs[:, 0], self.counted(after[:, 0], state, inputs)

    def seen(self, probabilities: Tensor, generator: torch.Generator) -> Tensor:
        """Shares of the shots that show each outcome."""
        return sample_counts(probabilities, self.shots, generator) / self.shots

    def generator(self, state: Tensor) -> torch.Generator:
        """Of what is drawn from a state (series, size) on."""
        return torch.Generator(state.device).manual_seed((self.seed * 1_000_003 + int(state[0, -1])) % 2**63)

    def checked(self, state: Tensor | None, inputs: Tensor) -> Tensor:
        """The state for inputs (series, time, channels), or the start; InputError for a foreign one."""
        state = self.start(len(inputs)).to(inputs.device) if state is None else state
        if state.shape != (wanted := (len(inputs), self.start(1).shape[1])):
            raise InputError(f"the state has shape {tuple(state.shape)}; this reservoir and input take {wanted}")
        if not torch.isfinite(state).all():
            raise InputError("the state holds numbers that are not finite")
        return state

    def counted(self, after: Tensor, state: Tensor, inputs: Tensor) -> Tensor:
        """The state after the inputs: what the reservoir carries, and the steps so far."""
        return torch.cat([after, state[:, -1:] + inputs.shape[1]], 1)

    def describe(self) -> dict[str, Any]:
        """The reservoir's description, and the shots."""
        return self.reservoir.describe() | {"shots": self.shots, "sampling": self.sampling, "shot_seed": self.seed}


def drive_sampled(
    members: Sequence[SampledReservoir],
    inputs: Tensor,
    states: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.complex128,
) -> tuple[list[Tensor], list[Tensor]]:
    """Features (series, time, width) of every member, and the states after the last step.

    Each draws what it would draw alone. The probabilities of members whose draws do not act on later steps are evolved
    together, in the precision of `dtype`. Raises InputError as `library.qrc.drive.drive_many`.
    """
    inputs = checked_inputs(inputs)
    begun = [member.checked(None if states is None else states[k], inputs) for k, member in enumerate(members)]
    features: list[Any] = [None] * len(members)
    after: list[Any] = [None] * len(members)
    for place, member in enumerate(members):
        if member.stepwise:
            features[place], after[place] = member.drive(inputs, begun[place])
    free = [place for place, member in enumerate(members) if not member.stepwise]
    for group in grouped([members[place].reservoir for place in free]):
        places = [free[k] for k in group]
        together = [members[place].reservoir for place in places]
        rows = [checked_rows(each, begun[k][:, :-1], inputs) for each, k in zip(together, places, strict=True)]
        everything = torch.eye(2 ** together[0].qubits, dtype=torch.float64)
        parities = gates.parity_matrix(together[0].qubits, range(together[0].observed_qubits)).to(inputs.device)
        outputs, ends = evolve(together, inputs, rows, everything, dtype=dtype)
        for k, place in enumerate(places):
            member, state = members[place], begun[place]
            features[place] = member.seen(outputs[:, k].double(), member.generator(state)) @ parities
            after[place] = member.counted(ends[:, k], state, inputs)
    return features, after


def sample_counts(probabilities: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Multinomial counts of `shots` outcomes with probabilities (..., outcomes), as reals of the same shape.

    Drawn as binomials of what is left, outcome after outcome.
    """
    probabilities = probabilities.clamp(min=0)
    tails = probabilities.flip(-1).cumsum(-1).flip(-1)
    left = torch.full(probabilities.shape[:-1], float(shots), dtype=probabilities.dtype, device=probabilities.device)
    counts = torch.zeros_like(probabilities)
    for outcome in range(probabilities.shape[-1] - 1):
        share = probabilities[..., outcome] / tails[..., outcome].clamp(min=1e-300)
        counts[..., outcome] = torch.binomial(left, share.clamp(max=1), generator=generator)
        left = left - counts[..., outcome]
    counts[..., -1] = left
    return counts


def shot_covariance(probabilities: Tensor, parities: Tensor, shots: int) -> Tensor:
    """The covariance of one step's estimated features: float64 (..., width, width), (P' diag(p) P - f f') / shots.

    `probabilities` (..., 2^n) and `parities` (2^n, width) of `gates.parity_matrix`; its diagonal is (1 - f^2) / shots.
    """
    features = probabilities @ parities
    second = torch.einsum("...i,ia,ib->...ab", probabilities, parities, parities)
    return (second - features[..., :, None] * features[..., None, :]) / shots


def outcome_probabilities(reservoir: QuantumReservoir, inputs: Tensor) -> Tensor:
    """Exact probabilities of all qubits' outcomes: float64 (series, time, 2^n), for inputs (series, time, channels)."""
    inputs = checked_inputs(inputs)
    everything = torch.eye(2**reservoir.qubits, dtype=torch.float64)
    outputs, _ = evolve([reservoir], inputs, [checked_rows(reservoir, None, inputs)], everything)
    return outputs[:, 0]
