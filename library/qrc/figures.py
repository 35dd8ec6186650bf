"""Pictures of memory: the eigenvalues of reservoirs as the layers of an onion, and what moves them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.drawing import blank, open_frame
from library.qrc.channel import ZERO, Spectrum, channel_spectrum
from library.qrc.onion import time_scale_sweep
from library.qrc.reservoir import QuantumReservoir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444", "#A6761D")  # Okabe and Ito's
SCALES = (1, 3, 10, 30)  # steps, of the circles


def onion_figure(
    reservoirs: Sequence[QuantumReservoir], inputs: Tensor | None = None, names: Sequence[str] | None = None
) -> "Figure":
    """The modes of each reservoir: left in the unit disk, right by how many steps they last.

    `inputs` (inputs, channels) are the values at which the spectra are taken, by default 0.5; `names` label the
    reservoirs, by default what sets their time scale.
    """

    inputs = torch.full((1, 1), 0.5, dtype=torch.float64) if inputs is None else inputs
    spectra = [channel_spectrum(reservoir, inputs) for reservoir in reservoirs]
    labels = list(names or map(label, reservoirs))
    drawn = blank(10.0, 4.4)
    disk, lasting = drawn.subplots(1, 2, width_ratios=[1, 1.25])
    draw_disk(disk, spectra)
    disk.set_title("Modes of memory: farther out lasts longer", loc="left", fontsize=10)
    draw_lasting(lasting, spectra, labels)
    return drawn


def knobs_figure(
    template: QuantumReservoir | None = None,
    *,
    sigmas: Sequence[float] = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0),
    seeds: Sequence[int] = range(8),
) -> "Figure":
    """How the angles' scale sigma and the number of measured qubits move the eigenvalues and the time scales.

    At an input that rotates nothing, of reservoirs like `template` (su2 by default), for every number of measured
    qubits: medians over seeds, bands from the lowest to the highest.
    """

    template = template or QuantumReservoir()
    still = QuantumReservoir(**template.model_dump() | {"scale": 0.2, "bias": -0.1, "mode": "persistent"})
    measured = range(1, template.qubits)
    sweep = time_scale_sweep(still, sigmas, measured, seeds)
    drawn = blank(10.5, 6.4)
    top, bottom = drawn.subfigures(2, 1, height_ratios=[1, 1.15])
    shown = (sigmas[1], sigmas[len(sigmas) // 2], sigmas[-1])
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    for axis, sigma in zip(top.subplots(1, len(shown)), shown, strict=True):
        members = [QuantumReservoir(**still.model_dump() | {"sigma": sigma, "measured": count}) for count in measured]
        draw_disk(axis, [channel_spectrum(member, half) for member in members])
        axis.set_title(f"modes at sigma = {sigma:g} (seed 0)", loc="left", fontsize=10)
    scale = bottom.subplots()
    for count, scales, colour in zip(measured, sweep, COLOURS, strict=False):
        kept = scales.clamp(min=0.1)
        scale.fill_between(sigmas, kept.amin(1), kept.amax(1), color=colour, alpha=0.15, lw=0)
        scale.plot(
            sigmas,
            kept.median(1).values,
            "o-",
            color=colour,
            ms=4,
            label=f"{count} of {template.qubits} measured and reset",
        )
    scale.set_xscale("log")
    scale.set_yscale("log")
    scale.set_xticks(list(sigmas), [f"{sigma:g}" for sigma in sigmas])
    scale.minorticks_off()
    scale.yaxis.set_major_formatter("{x:g}")
    scale.set_xlabel("sigma, the scale of the fixed angles")
    scale.set_ylabel("slowest mode lasts (steps)")
    scale.set_title(
        f"What sets how long a {template.kind} reservoir remembers (median and range of {len(seeds)} seeds)",
        loc="left",
        fontsize=10,
    )
    scale.legend(frameon=False, fontsize=9)
    _bare(scale)
    return drawn


def draw_disk(axis: "Axes", spectra: Sequence[Spectrum]) -> None:
    """Eigenvalues in the unit disk, with circles where a mode lasts 1, 3, 10 and 30 steps."""
    angle = torch.linspace(0, 2 * torch.pi, 200)
    axis.plot(angle.cos(), angle.sin(), color="0.3", lw=1)
    for steps in SCALES:
        radius = float(torch.exp(torch.tensor(-1.0 / steps)))
        axis.plot(radius * angle.cos(), radius * angle.sin(), color="0.8", lw=0.7, zorder=0)
    for spectrum, colour in zip(spectra, _colours(), strict=False):
        values = spectrum.eigenvalues.flatten()
        values = values[values.abs() > ZERO]
        axis.plot(values.real, values.imag, "o", color=colour, ms=3.2, alpha=0.75, mew=0)
    axis.set_aspect("equal")
    axis.set_xlim(-1.08, 1.08)
    axis.set_ylim(-1.08, 1.08)
    axis.set_xticks([-1, 0, 1])
    axis.set_yticks([-1, 0, 1])
    lasting = ", ".join(map(str, SCALES))
    axis.set_xlabel(f"real part\ncircles: lasts {lasting} steps", fontsize=9)
    axis.set_ylabel("imaginary part", fontsize=9)
    _bare(axis)


def draw_lasting(axis: "Axes", spectra: Sequence[Spectrum], labels: Sequence[str]) -> None:
    """A line for each reservoir, a mark for each of its modes at the steps that it lasts, the slowest named."""
    longest = 1.0
    for row, (spectrum, colour) in enumerate(zip(spectra, _colours(), strict=False)):
        scales = spectrum.time_scales.flatten()
        scales = scales[(scales > 0.05) & torch.isfinite(scales)]
        if not len(scales):
            continue
        longest = max(longest, float(scales.max()))
        axis.hlines(row, scales.min(), scales.max(), color=colour, alpha=0.25, lw=9)
        axis.plot(scales, torch.full_like(scales, row), "|", color=colour, ms=14, mew=1.2)
        axis.annotate(
            f"{float(spectrum.slowest.median()):.3g} steps",
            (float(scales.max()), row),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            color=colour,
        )
    axis.set_xscale("log")
    axis.set_xlim(0.15, max(30.0, 3.5 * longest))
    axis.set_ylim(len(spectra) - 0.5, -0.5)
    axis.set_yticks(range(len(spectra)), labels, fontsize=9)
    for tick, colour in zip(axis.get_yticklabels(), _colours(), strict=False):
        tick.set_color(colour)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("a mode falls to 1/e within (steps)", fontsize=9)
    axis.set_title("How long each reservoir remembers", loc="left", fontsize=10)
    _bare(axis)


def label(reservoir: QuantumReservoir) -> str:
    """What sets a reservoir's time scale, in a few words."""
    if reservoir.mode == "feedback":
        return f"{reservoir.kind}, feedback {reservoir.feedback:.3g}"
    fed = f", feedback {reservoir.feedback:.3g}" if reservoir.mode == "both" else ""
    return f"{reservoir.kind}, sigma {reservoir.sigma:.3g}, {reservoir.measured_qubits} measured{fed}"


def _colours() -> list[str]:
    return list(COLOURS) * 4


def _bare(axis: "Axes") -> None:
    open_frame(axis)
    axis.tick_params(labelsize=8)
