"""Reservoirs side by side, and a classical layer beside or above them.

onion      several small reservoirs with different time scales see the same inputs; their features are joined
parallel   an echo state network sees the inputs too: features [members, x_t]
stacked    it sees the members' standardised features instead: features [members, x_t]

Sources: Tandon et al., arXiv 2505.22837, claim that a classical layer behind an onion of quantum reservoirs helps and
do not publish how it is wired; both wirings are offered for that reason.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from library.errors import InputError
from library.qrc.drive import drive_many
from library.qrc.esn import EchoState, drive_echo_states
from library.qrc.reservoir import QuantumReservoir, Reservoir
from library.qrc.shots import SampledReservoir, drive_sampled

Member = QuantumReservoir | SampledReservoir | EchoState
Wiring = Literal["parallel", "stacked"]


class HybridReservoir(BaseModel, frozen=True, extra="forbid"):
    """Members side by side, with an echo state network as a layer beside or above them if there is one.

    >>> onion = HybridReservoir(members=tuple(QuantumReservoir(qubits=2, sigma=s) for s in (0.1, 1.0)))
    >>> onion.width
    6
    """

    members: tuple[Member, ...] = Field(min_length=1)
    """The first layer."""
    layer: EchoState | None = None
    """The classical layer."""
    wiring: Wiring = "parallel"
    """What the layer sees: the inputs, or the members' features."""
    centre: tuple[float, ...] = ()
    """Means of the members' features on the training part, which a stacked layer's inputs are relative to."""
    spread: tuple[float, ...] = ()
    """Their deviations."""

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if len(self.centre) != len(self.spread) or len(self.centre) not in (0, self.first_width):
            raise InputError(f"centre and spread need a number for each of {self.first_width} features, or none")
        if self.wiring == "stacked" and self.layer is None:
            raise InputError("wiring stacked: there is no layer to stack")
        return self

    @property
    def first_width(self) -> int:
        """Features of the members."""
        return sum(member.width for member in self.members)

    @property
    def width(self) -> int:
        """Features of members and layer."""
        return self.first_width + (self.layer.width if self.layer else 0)

    @property
    def blocks(self) -> list[range]:
        """The columns of each member's features, then the layer's."""
        parts = [*self.members, *([self.layer] if self.layer else [])]
        ends = list(itertools.accumulate(part.width for part in parts))
        return [range(end - part.width, end) for part, end in zip(parts, ends, strict=True)]

    def start(self, series: int) -> Tensor:
        """The states of members and layer before the first input, one row of numbers for each series."""
        return torch.cat([part.start(series) for part in self._parts()], 1)

    def drive(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (series, time, width) for inputs (series, time, channels), and the state after them.

        Raises InputError for a stacked layer that is not calibrated, and what the members raise.
        """
        parts = self._parts()
        states: list[Tensor] | None = None
        if state is not None:
            sizes = [part.start(1).shape[1] for part in parts]
            if state.shape != (len(inputs), sum(sizes)):
                raise InputError(
                    f"the state has shape {tuple(state.shape)}; this reservoir takes {(len(inputs), sum(sizes))}"
                )
            if not torch.isfinite(state).all():
                raise InputError("the state holds numbers that are not finite")
            states = list(state.split(sizes, 1))
        features, after = drive_members(self.members, inputs, states and states[: len(self.members)])
        first = torch.cat(features, -1)
        if self.layer is None:
            return first, torch.cat(after, 1)
        above, last = self.layer.drive(self.layer_inputs(inputs, first), states and states[-1])
        return torch.cat([first, above], -1), torch.cat([*after, last], 1)

    def joined(self, inputs: Tensor, first: Tensor) -> Tensor:
        """Features (series, time, width) from those of the members, (series, time, first_width), driven elsewhere."""
        if self.layer is None:
            return first
        return torch.cat([first, self.layer.drive(self.layer_inputs(inputs, first))[0]], -1)

    def layer_inputs(self, inputs: Tensor, first: Tensor) -> Tensor:
        """What the layer sees: the inputs, or the members' features in units of their deviation."""
        if self.wiring == "parallel":
            return inputs
        if not self.centre:
            raise InputError("the stacked layer is not calibrated: call `calibrated` with the members' features")
        centre, spread = (first.new_tensor(values) for values in (self.centre, self.spread))
        return (first - centre) / spread

    def calibrated(self, first: Tensor) -> Self:
        """The same reservoir, its stacked layer relative to these features (..., first_width) of the members."""
        if self.wiring == "parallel":
            return self
        rows = first.reshape(-1, first.shape[-1])
        deviation = rows.std(0, correction=0)
        spread = torch.where(deviation > 1e-9, deviation, 1.0)
        return self.model_copy(update={"centre": tuple(rows.mean(0).tolist()), "spread": tuple(spread.tolist())})

    def describe(self) -> dict[str, Any]:
        """Each part's description."""
        found: dict[str, Any] = {"width": self.width, "members": [member.describe() for member in self.members]}
        return found | ({"layer": self.layer.describe(), "wiring": self.wiring} if self.layer else {})

    def _parts(self) -> list[Reservoir]:
        return [*self.members, *([self.layer] if self.layer else [])]


def drive_members(
    members: Sequence[Member],
    inputs: Tensor,
    states: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.complex128,
) -> tuple[list[Tensor], list[Tensor]]:
    """Features and last states of the members, each sort as one batch; `dtype` is that of the quantum ones."""
    features: list[Any] = [None] * len(members)
    after: list[Any] = [None] * len(members)
    sorts = (
        (QuantumReservoir, partial(drive_many, dtype=dtype)),
        (SampledReservoir, partial(drive_sampled, dtype=dtype)),
        (EchoState, drive_echo_states),
    )
    for kind, drive in sorts:
        places = [place for place, member in enumerate(members) if isinstance(member, kind)]
        if places:
            own = None if states is None else [states[place] for place in places]
            found = drive([members[place] for place in places], inputs, own)
            for place, values, last in zip(places, *found, strict=True):
                features[place], after[place] = values, last
    return features, after
