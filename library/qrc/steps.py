"""The unitaries of all steps of many reservoirs at once, by gates or as trigonometric polynomials of the input angle.

Every gate of an input with angle t contributes exp(-i t / 2) and exp(+i t / 2), so the columns of U(s) are

    V(t) = sum over k = -G, -G + 2 ... G of exp(i k t / 2) V_k

with G = 3 gates per pair rotation of the channel (1 for rx_anc). The coefficients V_k come from G + 1 samples and a
discrete Fourier transform; after that a step costs one small matrix product, and no gates.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir

KEPT_ENTRIES = 1 << 14  # complex numbers of a batch of unitaries that is kept for the next call: 256 KiB
COEFFICIENT_BYTES = 256 << 20  # most that the coefficients of a batch may take


class Steps:
    """U_res U_in(s) of reservoirs of equal structure, restricted to the columns where reset qubits are |0>.

    `columns` is 2^n for the whole unitaries, or 2^r for the columns of r memory qubits. `fourier` None decides by cost,
    for `points` inputs.
    """

    def __init__(
        self,
        reservoirs: Sequence[QuantumReservoir],
        columns: int,
        channels: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        points: int = 1,
        fourier: bool | None = None,
    ) -> None:
        self.reservoir, self.count, self.columns = reservoirs[0], len(reservoirs), columns
        self.fixed = kept_unitaries(reservoirs).to(device, dtype)
        keys = [(reservoir.scale, reservoir.bias) for reservoir in reservoirs]
        alike = len(set(keys)) == 1
        table = torch.tensor(keys[:1] if alike else keys, dtype=dtype.to_real(), device=device)
        self.scale, self.bias = table[:, 0, None, None, None], table[:, 1, None, None, None]
        self.degrees = channel_degrees(self.reservoir, channels)
        terms = 1
        for degree in self.degrees:
            terms *= degree + 1
        size = self.count * terms * self.fixed.shape[-1] * columns * dtype.itemsize
        if fourier is None:
            fourier = terms <= min(self.fixed.shape[-1], points) and size <= COEFFICIENT_BYTES
        self.coefficients = self._coefficients() if fourier else None

    def block(self, inputs: Tensor) -> Tensor:
        """Complex (time, series * reservoirs, 2^n, columns) of inputs (series, time, channels)."""
        series, time, _ = inputs.shape
        full = self.fixed.shape[-1]
        angles = self.scale * inputs.transpose(0, 1).to(self.scale.dtype) + self.bias
        if self.coefficients is not None:
            waves = _waves(angles, self.degrees).flatten(1, 2)
            values = waves @ self.coefficients
            if len(values) > 1:
                values = values.permute(1, 0, 2)
            return values.reshape(time, series * self.count, full, self.columns)
        rotated = rotate_inputs(self.reservoir, angles, self.columns, self.fixed.dtype)
        flat = rotated.permute(0, 3, 1, 2, 4).flatten(2)  # (1 or reservoirs, 2^n, time * series * columns)
        values = (self.fixed.flatten(0, 1) @ flat[0]) if len(flat) == 1 else self.fixed @ flat
        values = values.reshape(self.count, full, time, series, self.columns).permute(2, 3, 0, 1, 4)
        return values.reshape(time, series * self.count, full, self.columns)

    def _coefficients(self) -> Tensor:
        """(1 or reservoirs, terms, [reservoirs *] 2^n * columns), terms in the order of `_waves`."""
        grids = [
            2 * torch.pi * torch.arange(d + 1, device=self.scale.device).to(self.scale) / (d + 1) for d in self.degrees
        ]
        angles = torch.stack(torch.meshgrid(*grids, indexing="ij"), -1)
        samples = rotate_inputs(self.reservoir, angles, self.columns, self.fixed.dtype)
        shift = sum(angles[..., c] * degree for c, degree in enumerate(self.degrees)) / 2
        shifted = samples * torch.complex(shift.cos(), shift.sin())[..., None, None]
        rotated = torch.fft.fftn(shifted, dim=tuple(range(len(self.degrees))), norm="forward")
        rotated = rotated.flatten(0, len(self.degrees) - 1)
        values = self.fixed[:, None] @ rotated  # (reservoirs, terms, 2^n, columns)
        if len(self.scale) == 1:
            return values.transpose(0, 1).reshape(1, len(rotated), -1).contiguous()
        return values.flatten(2).contiguous()


def kept_unitaries(reservoirs: Sequence[QuantumReservoir]) -> Tensor:
    """`fixed_unitaries`, remembered for small batches: a stream asks for the same ones at every step."""
    few = len(reservoirs) * 4 ** reservoirs[0].qubits <= KEPT_ENTRIES
    return _remembered(tuple(reservoirs)) if few else fixed_unitaries(reservoirs)


@lru_cache(maxsize=256)
def _remembered(reservoirs: tuple[QuantumReservoir, ...]) -> Tensor:
    return fixed_unitaries(reservoirs)


def fixed_unitaries(reservoirs: Sequence[QuantumReservoir]) -> Tensor:
    """The unitaries without inputs: complex128 (reservoirs, 2^n, 2^n); those of equal gates are built together."""
    size = 2 ** reservoirs[0].qubits
    result = torch.empty(len(reservoirs), size, size, dtype=torch.complex128)
    for place, reservoir in enumerate(reservoirs):
        if reservoir.unitary:
            result[place] = reservoir.fixed_unitary()
    for places, sequence in alike_gates(reservoirs):
        start = torch.eye(size, dtype=torch.complex128).expand(len(places), -1, -1)
        result[places] = gates.apply_gates(start, sequence)
    return result


def alike_gates(reservoirs: Sequence[QuantumReservoir]) -> Iterator[tuple[list[int], list[gates.Gate]]]:
    """Places of reservoirs with equal gates, and these gates with one angle per reservoir; own unitaries left out."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for place, reservoir in enumerate(reservoirs):
        if not reservoir.unitary:
            alike[reservoir.kind, reservoir.reps].append(place)
    for places in alike.values():
        drawn = torch.stack([reservoirs[place].sigma * reservoirs[place].drawn_angles() for place in places])
        first = reservoirs[places[0]]
        if first.kind == "su2":
            yield places, gates.su2_gates(drawn)
        else:
            fields = torch.tensor([[reservoirs[k].sigma * reservoirs[k].field] for k in places], dtype=torch.float64)
            yield places, gates.ising_gates(fields.expand(-1, first.qubits), drawn, first.reps)


def rotate_inputs(reservoir: QuantumReservoir, angles: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The columns of U_in for reset qubits |0>: complex (..., 2^n, columns) of angles (..., channels)."""
    full = 2**reservoir.qubits
    start = torch.eye(full, dtype=dtype, device=angles.device)[:, :: full // columns]
    return gates.apply_pairs(start, *input_gates(reservoir, angles))


def input_gates(reservoir: QuantumReservoir, angles: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """U_in of angles (..., channels) as pairs of qubits and a matrix for each, (..., pairs, 4, 4), the first first."""
    channels = angles.shape[-1]
    if reservoir.encoding == "pair":
        pairs = reservoir.input_pairs
        return pairs, gates.pair_matrices(angles[..., [place % channels for place in range(len(pairs))]])
    measured, qubits = reservoir.measured_qubits, reservoir.qubits
    turned = angles.new_zeros(*angles.shape[:-1], measured + measured % 2)
    places = torch.arange(channels, device=angles.device) % measured
    turned = turned.index_add(-1, places, angles)  # rotations of one qubit about one axis add up
    pairs = [(q, (q + 1) % qubits) for q in range(0, measured, 2)]
    return pairs, gates.both_turned(turned[..., ::2], turned[..., 1::2])


def channel_degrees(reservoir: QuantumReservoir, channels: int) -> list[int]:
    """How many rotations carry each channel: the degree of U in exp(i t / 2), and of the channel in exp(i t)."""
    if reservoir.encoding == "rx_anc":
        return [1] * channels
    pairs = len(reservoir.input_pairs)
    return [3 * len(range(channel, pairs, channels)) for channel in range(channels)]


def _waves(angles: Tensor, degrees: Sequence[int]) -> Tensor:
    """exp(i (k - degree / 2) angle), k = 0 ... degree, of every channel, multiplied out: (..., terms)."""
    result = torch.ones(*angles.shape[:-1], 1, dtype=angles.dtype.to_complex(), device=angles.device)
    for channel, degree in enumerate(degrees):
        frequencies = torch.arange(degree + 1, device=angles.device).to(angles) - degree / 2
        phases = angles[..., channel, None] * frequencies
        waves = torch.complex(phases.cos(), phases.sin())
        result = (result[..., :, None] * waves[..., None, :]).flatten(-2)
    return result
