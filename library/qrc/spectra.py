"""The time scales of whatever a hybrid is made of, as rows of a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.channel import EXACT_NUMBERS, channel_spectrum, second_moduli, time_scale
from library.qrc.hybrid import HybridReservoir
from library.qrc.reservoir import QuantumReservoir
from library.qrc.schema import Schema
from library.qrc.shots import SampledReservoir
from library.qrc.state import Layout


def about(schema: Schema, scales: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an artifact says of its series, and of its reservoirs by `time_scales`: JSON values, NaN is null."""
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in scales
    ]
    return {"series": schema.model_dump(mode="json"), "time_scales": rows}


def time_scales(reservoir: HybridReservoir, inputs: Tensor, *, most: int = 8) -> list[dict[str, Any]]:
    """A row for each member and the layer: longest time scale at the mean input and its range over inputs, annulus.

    inputs  (series, time, channels) as the reservoir sees them; up to `most` of them, evenly spaced, are looked at

    A member that is fed back and has no fixed point has NaN. So has the inner edge of the annulus of a member whose
    state has more than 256 numbers: of its modes only the slowest is looked for.
    """
    flat = inputs.flatten(0, 1).cpu()
    few = flat[:: max(1, len(flat) // most)][:most]
    rows = []
    for number, each in enumerate(reservoir.members):
        row: dict[str, Any] = {"reservoir": f"member {number}"}
        member = each.reservoir if isinstance(each, SampledReservoir) else each
        if isinstance(member, QuantumReservoir):
            row |= {"kind": f"{member.mode} {member.kind}"} | _quantum(member, flat.mean(0), few)
            row |= {"sigma": member.sigma} | ({"feedback": member.feedback} if member.mode != "persistent" else {})
            row |= {"qubits": member.qubits, "measured": member.measured_qubits}
            row |= {"width": member.width, "cx_per_step": member.cx_per_step}
        else:
            row |= {"kind": "echo state"} | _classical(member.describe()) | {"width": member.width}
        rows.append(row)
    if reservoir.layer is not None:
        row = {"reservoir": "layer", "kind": f"echo state, {reservoir.wiring}"}
        rows.append(row | _classical(reservoir.layer.describe()) | {"width": reservoir.layer.width})
    return rows


def _quantum(member: QuantumReservoir, mean: Tensor, few: Tensor) -> dict[str, float]:
    around = few if member.mode == "persistent" else mean[None]
    try:
        moduli = second_moduli(member, torch.cat([mean[None], around]))
        low, high = _annulus(member, mean[None], float(moduli[0]))
    except InputError:
        return dict.fromkeys(("tau", "tau_least", "tau_most", "annulus_low", "annulus_high"), float("nan"))
    scales = time_scale(moduli)
    return {
        "tau": float(scales[0]),
        "tau_least": float(scales.min()),
        "tau_most": float(scales.max()),
        "annulus_low": low,
        "annulus_high": high,
    }


def _annulus(member: QuantumReservoir, mean: Tensor, outer: float) -> tuple[float, float]:
    if Layout.of(member).size > EXACT_NUMBERS:
        return float("nan"), outer
    return channel_spectrum(member, mean).annulus


def _classical(found: dict[str, Any]) -> dict[str, float]:
    low, high = found["annulus"]
    return {
        "tau": found["tau"],
        "tau_least": found["tau"],
        "tau_most": found["tau"],
        "annulus_low": low,
        "annulus_high": high,
    }
