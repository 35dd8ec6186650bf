"""Evolve many quantum reservoirs over the same input sequences at once."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc import direct, gates, outcome, parallel, pauli, scan
from library.qrc.reservoir import Backend, QuantumReservoir
from library.qrc.state import Layout, State, checked_rows, unpack

WORKING_BYTES = {"cpu": 512 << 10, "cuda": 1 << 30}  # of one step of all lanes: it should stay in the cache of a core

ENOUGH = 16  # reservoirs with equal input rotations that make a batch of their own


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
    Reservoirs of equal structure evolve as one batch, and share the input rotations where scale and bias agree.
    complex64 halves time and memory, with errors of the order of 1e-5 after some hundred steps, and gives float32
    features.

    backend    auto      the cheapest that applies to each batch
               direct    step by step, with the gates of the inputs
               fourier   step by step, with the steps' unitaries as trigonometric polynomials (`library.qrc.steps`)
               parallel  time cut into overlapping pieces (`library.qrc.parallel`); mode persistent, period 1
               scan      all steps at once by prefix products (`library.qrc.scan`); the same modes
               pauli     transfer matrices of all qubits (`library.qrc.pauli`), the one that takes noise

    Raises InputError for inputs of another shape, none or not finite, for another number of states, and for a backend
    that cannot evolve one of the reservoirs.
    """
    inputs = checked_inputs(inputs)
    rows = _starts(reservoirs, inputs, states)
    features: list[Tensor] = [inputs] * len(reservoirs)
    for places in grouped(reservoirs):
        together = [reservoirs[k] for k in places]
        readout = gates.parity_matrix(together[0].qubits, range(together[0].observed_qubits))
        outputs, after = evolve(together, inputs, [rows[k] for k in places], readout, backend=backend, dtype=dtype)
        for k, place in enumerate(places):
            features[place], rows[place] = outputs[:, k], after[:, k]
    return features, rows


def evolve(
    reservoirs: Sequence[QuantumReservoir],
    inputs: Tensor,
    rows: Sequence[Tensor],
    readout: Tensor,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.complex128,
    estimate: direct.Estimate | None = None,
) -> tuple[Tensor, Tensor]:
    """Outcome probabilities times `readout`, (series, reservoirs, time, width), and the rows after the last step.

    For reservoirs of equal structure, in pieces whose steps fit the cache. `estimate` replaces each step's
    probabilities by what was seen of them.
    """
    first = reservoirs[0]
    layout = Layout.of(first)
    engine = _engine(reservoirs, inputs, backend, estimate)
    state = unpack(torch.stack(list(rows), 1), layout)
    series, per_step = len(inputs), 48 * 2**first.qubits * layout.dimension
    lanes = max(16, WORKING_BYTES.get(inputs.device.type, 1 << 30) // per_step)
    wide = min(len(reservoirs), max(1, lanes // series))
    tall = min(series, lanes)
    outputs, packed = [], []
    for top in range(0, series, tall):
        across = [
            engine(
                reservoirs[left : left + wide],
                inputs[top : top + tall],
                state[top : top + tall, left : left + wide],
                readout,
                dtype=dtype,
            )
            for left in range(0, len(reservoirs), wide)
        ]
        outputs.append(torch.cat([values for values, _ in across], 1))
        packed.append(torch.cat([after.pack(layout) for _, after in across], 1))
    return torch.cat(outputs), torch.cat(packed)


def grouped(reservoirs: Sequence[QuantumReservoir]) -> list[list[int]]:
    """The places of reservoirs that evolve as one batch; those that share input rotations stay together if many do."""
    groups: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, reservoir in enumerate(reservoirs):
        groups[_structure(reservoir)][reservoir.scale, reservoir.bias].append(place)
    batches = []
    for shared in groups.values():
        batches += [places for places in shared.values() if len(places) >= ENOUGH]
        rest = [place for places in shared.values() if len(places) < ENOUGH for place in places]
        batches += [rest] if rest else []
    return batches


def checked_inputs(inputs: Tensor) -> Tensor:
    """The inputs in float64, when they are finite and (series, time, channels) with at least one of each."""
    if not isinstance(inputs, Tensor):
        raise InputError(f"inputs are a {type(inputs).__name__}; allowed: a tensor (series, time, channels)")
    if inputs.ndim != 3 or 0 in inputs.shape:
        raise InputError(f"inputs have shape {tuple(inputs.shape)}; allowed: (series, time, channels), none of them 0")
    inputs = inputs.double()
    finite = torch.isfinite(inputs)
    if not finite.all():
        series, step, channel = (~finite).nonzero()[0].tolist()
        raise InputError(f"inputs are not finite at series {series}, step {step}, channel {channel}; fill gaps before")
    return inputs


def _starts(reservoirs: Sequence[QuantumReservoir], inputs: Tensor, states: Sequence[Tensor] | None) -> list[Tensor]:
    if states is not None and len(states) != len(reservoirs):
        raise InputError(f"{len(states)} states for {len(reservoirs)} reservoirs")
    given = [None] * len(reservoirs) if states is None else states
    return [checked_rows(reservoir, rows, inputs) for reservoir, rows in zip(reservoirs, given, strict=True)]


def _structure(reservoir: QuantumReservoir) -> tuple:
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


def _engine(
    reservoirs: Sequence[QuantumReservoir], inputs: Tensor, backend: Backend, estimate: direct.Estimate | None
) -> Callable[..., tuple[Tensor, State]]:
    """What evolves one piece; InputError for a backend that cannot."""
    first = reservoirs[0]
    by_outcome = first.mode != "persistent" and first.feedback_by == "outcome"
    steady = first.mode == "persistent" and first.period == 1
    allowed = {
        "auto": True,
        "direct": first.noise is None,
        "fourier": first.noise is None,
        "parallel": first.noise is None and steady and estimate is None,
        "scan": first.noise is None and steady and estimate is None,
        "pauli": not by_outcome and not any(reservoir.unitary for reservoir in reservoirs),
    }
    if not allowed.get(backend):
        fitting = ", ".join(name for name, fits in allowed.items() if fits)
        raise InputError(f"backend {backend} cannot evolve this reservoir; allowed: {fitting}")
    if backend == "pauli" or first.noise is not None:
        return lambda *args, **options: pauli.evolve(*args, **options, estimate=estimate)
    fourier = {"direct": False, "fourier": True}.get(backend)
    if by_outcome:
        return lambda *args, **options: outcome.evolve(*args, **options, fourier=fourier)
    if backend in ("parallel", "scan"):
        return parallel.evolve if backend == "parallel" else scan.evolve
    if backend == "auto" and steady and estimate is None:
        return parallel.evolve_if_cheaper
    return lambda *args, **options: direct.evolve(*args, **options, fourier=fourier, estimate=estimate)
