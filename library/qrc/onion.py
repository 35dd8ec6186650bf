"""Onions: small reservoirs side by side, each with its own ring of the spectrum, designed by their time scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.channel import Spectrum, channel_spectrum, slowest_time_scale
from library.qrc.reservoir import QuantumReservoir

RANGES = {"sigma": (0.03, 2.0), "feedback": (0.01, 3.0)}  # of the knob that moves the time scale
GRID = 13  # values of the knob at which the time scale is known before the bisection
BISECTIONS = 12
ENOUGH = 0.02  # relative error of a time scale that ends the bisection


@dataclass(frozen=True)
class OnionDesign:
    """Reservoirs whose slowest time scales were asked for; `spectra` are at the inputs of the design."""

    reservoirs: tuple[QuantumReservoir, ...]
    targets: tuple[float, ...]
    spectra: tuple[Spectrum, ...]

    @property
    def achieved(self) -> list[float]:
        """The slowest time scale of each, in steps."""
        return [float(spectrum.slowest.median()) for spectrum in self.spectra]

    @property
    def annuli(self) -> list[tuple[float, float]]:
        """The ring of each: least and largest modulus of the eigenvalues that carry something."""
        return [spectrum.annulus for spectrum in self.spectra]

    @property
    def overlaps(self) -> list[float]:
        """How much of the smaller of each pair of neighbouring rings lies in the other one: 0 apart, 1 inside."""
        return [annulus_overlap(*pair) for pair in pairwise(self.annuli)]

    def describe(self) -> list[dict[str, Any]]:
        """Target, time scale, ring and configuration of each, ready for JSON."""
        return [
            {"target": target} | spectrum.describe() | reservoir.describe()
            for target, spectrum, reservoir in zip(self.targets, self.spectra, self.reservoirs, strict=True)
        ]


def onion(count: int | None = None, **settings: Any) -> tuple[QuantumReservoir, ...]:
    """Reservoirs from settings that are one value for all, or a list with one for each; seeds count up from one value.

    Raises InputError when lists have different lengths, or another than `count`. Without any list there are three
    with sigma 0.1, 0.3 and 1.

    >>> [(member.measured, member.seed) for member in onion(sigma=0.3, measured=[1, 2, 3])]
    [(1, 0), (2, 1), (3, 2)]
    """
    lengths = {name: len(value) for name, value in settings.items() if isinstance(value, list)}
    if not lengths and count is None:
        settings, lengths = {"sigma": [0.1, 0.3, 1.0]} | settings, {"sigma": 3}
        if not isinstance(settings["sigma"], list):
            lengths = {}
    size = next(iter(lengths.values()), 3) if count is None else count
    wrong = [f"{name} has {length}" for name, length in lengths.items() if length != size]
    if wrong or size < 1:
        raise InputError(f"an onion of {size} reservoirs: {', '.join(wrong) or 'at least 1'}; give one value or {size}")
    seed = settings.pop("seed", 0)
    settings["seed"] = seed if isinstance(seed, list) else [seed + k for k in range(size)]
    return tuple(
        QuantumReservoir(**{name: value[k] if isinstance(value, list) else value for name, value in settings.items()})
        for k in range(size)
    )


def design_onion(
    targets: Sequence[float], template: QuantumReservoir | None = None, *, inputs: Tensor | None = None
) -> OnionDesign:
    """Reservoirs like `template` whose slowest time scales are `targets` (steps), found by bisection of sigma.

    The time scale is the median over `inputs` (inputs, channels), by default the middle 0.5 of one channel. sigma is
    searched in [0.03, 2], from its slow end; where it cannot reach a target, more qubits are measured (shorter), from
    the template's number on. In mode feedback the knob is the feedback's strength in [0.01, 3], where a time scale is
    that of the Jacobian. Seeds count up from the template's.

    Raises InputError for targets that are not positive, and for one out of reach, with what can be reached.

    >>> design = design_onion((2.0, 8.0))
    >>> [abs(found / wanted - 1) < 0.05 for found, wanted in zip(design.achieved, design.targets)]
    [True, True]
    """
    template = template or QuantumReservoir()
    inputs = torch.full((1, 1), 0.5, dtype=torch.float64) if inputs is None else inputs.double()
    if not targets or not all(math.isfinite(target) and target > 0 for target in targets):
        raise InputError(f"time scales must be positive numbers of steps, got {list(targets)}")
    reservoirs = tuple(
        _designed(template.model_copy(update={"seed": template.seed + k}), float(target), inputs)
        for k, target in enumerate(targets)
    )
    spectra = tuple(channel_spectrum(reservoir, inputs) for reservoir in reservoirs)
    return OnionDesign(reservoirs, tuple(map(float, targets)), spectra)


def annulus_overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The common part of two rings of moduli, as a share of the narrower one."""
    common = min(one[1], other[1]) - max(one[0], other[0])
    narrow = min(one[1] - one[0], other[1] - other[0])
    return 1.0 if narrow == 0 and common >= 0 else max(0.0, common) / max(narrow, 1e-300)


def time_scale_sweep(
    template: QuantumReservoir,
    sigmas: Sequence[float],
    measured: Sequence[int],
    seeds: Sequence[int],
    value: float = 0.5,
) -> Tensor:
    """The slowest time scale for each number of measured qubits, sigma and seed: float64 (measured, sigmas, seeds).

    At the input `value` of one channel. What sigma and the number of mid-circuit measurements do to the memory.
    """
    inputs = torch.full((1, 1), value, dtype=torch.float64)
    result = torch.empty(len(measured), len(sigmas), len(seeds), dtype=torch.float64)
    for place, count in enumerate(measured):
        for number, sigma in enumerate(sigmas):
            for column, seed in enumerate(seeds):
                changed = {"measured": count, "sigma": sigma, "seed": seed}
                reservoir = QuantumReservoir(**template.model_dump() | changed)
                result[place, number, column] = slowest_time_scale(reservoir, inputs)[0]
    return result


def _designed(template: QuantumReservoir, target: float, inputs: Tensor) -> QuantumReservoir:
    knob = "feedback" if template.mode == "feedback" else "sigma"
    low, high = RANGES[knob]
    values = torch.logspace(math.log10(low), math.log10(high), GRID, dtype=torch.float64).tolist()
    most = template.qubits if template.mode == "feedback" else template.qubits - 1
    reached: list[float] = []
    for measured in range(template.measured_qubits, most + 1):
        start = QuantumReservoir(**template.model_dump() | {"measured": measured})
        known = [(value, _time_scale(start, knob, value, inputs)) for value in values]
        known = [(value, scale) for value, scale in known if scale is not None]
        reached += [scale for _, scale in known]
        for left, right in pairwise(known):
            if min(left[1], right[1]) <= target <= max(left[1], right[1]):
                return _bisected(start, knob, left, right, target, inputs)
    raise InputError(
        f"a time scale of {target:g} steps is out of reach by {knob} in [{low:g}, {high:g}]; "
        f"this reservoir reaches {min(reached):.3g} to {max(reached):.3g}"
    )


def _bisected(
    start: QuantumReservoir,
    knob: str,
    left: tuple[float, float],
    right: tuple[float, float],
    target: float,
    inputs: Tensor,
) -> QuantumReservoir:
    """The knob between two values whose time scales enclose the target, halved on the logarithm."""
    best = min(left, right, key=lambda end: abs(end[1] - target))
    for _ in range(BISECTIONS):
        if abs(best[1] / target - 1) < ENOUGH:
            break
        middle = math.sqrt(left[0] * right[0])
        scale = _time_scale(start, knob, middle, inputs)
        if scale is None:
            break
        best = min(best, (middle, scale), key=lambda end: abs(end[1] - target))
        if (scale > target) == (left[1] > target):
            left = (middle, scale)
        else:
            right = (middle, scale)
    return start.model_copy(update={knob: best[0]})


def _time_scale(reservoir: QuantumReservoir, knob: str, value: float, inputs: Tensor) -> float | None:
    """The median slowest time scale; None where feedback is so strong that there is no fixed point."""
    try:
        return float(slowest_time_scale(reservoir.model_copy(update={knob: value}), inputs).median())
    except InputError:
        if knob == "sigma":
            raise
        return None
