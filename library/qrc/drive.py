"""Evolve many quantum reservoirs over the same input sequences at once."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc import gates
from library.qrc.direct import evolve
from library.qrc.reservoir import Backend, QuantumReservoir
from library.qrc.state import Layout, checked_rows, unpack


def drive_many(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    states: Sequence[Tensor] | None = None,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.complex128,
) -> tuple[list[Tensor], list[Tensor]]:
    """Features (series, time, width) of every reservoir, and the states after the last step.

    `inputs` float64 (series, time, channels) drive all of them; `states` continue from there, one per reservoir.
    Reservoirs of equal structure evolve as one batch, and share the input rotations where scale, bias and pairs agree.
    complex64 halves time and memory, with errors of about 1e-6.

    Raises InputError for inputs of another shape, none or not finite, for another number of states, and for a backend
    that cannot evolve one of the reservoirs.
    """
    inputs = checked_inputs(inputs)
    if states is not None and len(states) != len(reservoirs):
        raise InputError(f"{len(states)} states for {len(reservoirs)} reservoirs")
    rows = [
        checked_rows(reservoir, None if states is None else states[k], inputs) for k, reservoir in enumerate(reservoirs)
    ]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, reservoir in enumerate(reservoirs):
        groups[structure(reservoir)].append(place)
    features: list[Tensor] = [inputs] * len(reservoirs)
    for places in groups.values():
        together = [reservoirs[k] for k in places]
        layout = Layout.of(together[0])
        state = unpack(torch.stack([rows[k] for k in places], 1), layout)
        readout = gates.parity_matrix(together[0].qubits, range(together[0].observed_qubits))
        outputs, after = evolve(together, inputs, state, readout, dtype=dtype)
        packed = after.pack(layout)
        for k, place in enumerate(places):
            features[place], rows[place] = outputs[:, k], packed[:, k]
    return features, rows


def structure(reservoir: QuantumReservoir) -> tuple:
    """What reservoirs must share to evolve as one batch."""
    return (
        reservoir.mode,
        reservoir.qubits,
        reservoir.measured_qubits,
        reservoir.reset_qubits,
        reservoir.feedback_by,
        reservoir.period,
        reservoir.observed,
        reservoir.encoding,
        reservoir.pairs,
        reservoir.noise is not None,
    )


def checked_inputs(inputs: Tensor) -> Tensor:
    """The inputs in float64, when they are finite and (series, time, channels) with at least one of each."""
    if inputs.ndim != 3 or 0 in inputs.shape:
        raise InputError(f"inputs have shape {tuple(inputs.shape)}; allowed: (series, time, channels), none of them 0")
    inputs = inputs.double()
    finite = torch.isfinite(inputs)
    if not finite.all():
        series, step, channel = (~finite).nonzero()[0].tolist()
        raise InputError(f"inputs are not finite at series {series}, step {step}, channel {channel}; fill gaps before")
    return inputs
