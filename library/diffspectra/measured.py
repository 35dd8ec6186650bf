"""Spectra of people: any axis and unit, brought onto the grid of their modality."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from library.diffspectra.lines import ORIGIN, POINTS, STEP, UNITS, grid, known
from library.errors import InputError

EV_NM = 1239.841984  # h c in eV nm
CM_PER_EV = 8065.543937
AXES = {"uv": ("eV", "nm", "cm-1"), "ir": ("cm-1", "um"), "raman": ("cm-1",)}
VALUES = ("intensity", "absorbance", "transmittance", "percent transmittance")
Values = Literal["intensity", "absorbance", "transmittance", "percent transmittance"]
NOISE = 0.02  # of the maximum, down to which an intensity below zero passes as noise and is cut
COVERED = 0.5  # share of the grid that a spectrum must cover
LEAST_TRANSMITTANCE = 1e-4


class Measured(NamedTuple):
    """Intensities on the grid, float32 (points,), and what a user should know of how they came about."""

    intensities: Tensor
    warnings: list[str]


class Recording(BaseModel, frozen=True, extra="forbid"):
    """A spectrum as an instrument or a program gives it."""

    y: tuple[float, ...]
    """What was recorded at each place."""
    x: tuple[float, ...] | None = None
    """The places, rising or falling; None is the modality's own grid."""
    axis: str | None = None
    """Unit of x: eV (the default of UV-Vis), nm, cm-1 (of IR and Raman), um."""
    values: Values = "intensity"
    """What y is."""
    absolute: bool = False
    """Whether y is in the units that the network has learned from; others are scaled to a typical integral."""

    def on_grid(self, modality: str, area: float | None) -> Measured:
        """The intensities on the grid of a modality, with the integral `area` unless absolute. Raises InputError."""
        given = None if self.absolute else area
        return on_grid(modality, self.y, self.x, axis=self.axis, values=self.values, area=given)


def on_grid(
    modality: str,
    y: Sequence[float],
    x: Sequence[float] | None = None,
    *,
    axis: str | None = None,
    values: str = "intensity",
    area: float | None = None,
) -> Measured:
    """A spectrum y over x, or over the modality's own grid, as intensities on that grid.

    `axis` is the unit of x: eV, nm or cm-1 for UV-Vis, cm-1 or um for IR, cm-1 (shifts) for Raman; `values` what y is:
    transmittance T becomes absorbance -log10 T. Finer points are averaged over the cells of the grid, coarser ones
    interpolated; beyond the measured range there is zero. With `area` the spectrum is scaled to that integral, since
    instruments give intensities in units of their own.

    Raises InputError for lengths that do not fit, values that are not finite, axes that turn back or miss more than
    half of the grid, negative intensities below noise, spectra of zeros, and an area that is not positive.
    """
    y = _numbers(y, known(modality))
    if values not in VALUES:
        raise InputError(f"{modality}: values {values!r}; there are {', '.join(VALUES)}")
    if y.ndim != 1 or not len(y) or not np.isfinite(y).all():
        raise InputError(f"{modality}: a list of finite numbers is needed")
    if area is not None and not 0 < area < np.inf:
        raise InputError(f"{modality}: area {area:g}; it must be positive and finite")
    if values.endswith("transmittance"):
        y = _absorbance(y / (100 if values.startswith("percent") else 1), modality)
    warnings: list[str] = []
    if x is None:
        if len(y) != POINTS[modality]:
            points = grid(modality)
            raise InputError(
                f"{modality}: {len(y)} points; the grid has {POINTS[modality]}, {float(points[0]):g} to "
                f"{float(points[-1]):g} {UNITS[modality]} by {STEP[modality]:g}. Give x to have others resampled"
            )
    else:
        y, warnings = _resampled(modality, y, _numbers(x, modality), axis or UNITS[modality])
    top = y.max()
    if y.min() < -NOISE * max(top, 0) or top <= 0:
        what = "is zero everywhere" if not y.any() else f"falls to {y.min():.4g}, its maximum is {top:.4g}"
        raise InputError(f"{modality}: the spectrum {what}; correct its baseline, or leave the modality out")
    if (y < 0).any():
        warnings.append(f"{modality}: {int((y < 0).sum())} points below zero were set to zero")
    if values != "intensity" or area is None:
        warnings += _suspicion(modality, y, values)
    y = y.clip(min=0)
    if area is not None:
        y = y * (area / (y.sum() * STEP[modality]))
    return Measured(torch.from_numpy(y).float(), warnings)


def _numbers(given: Sequence[float], modality: str) -> np.ndarray:
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{modality}: a list of finite numbers is needed") from error


def _absorbance(transmittance: np.ndarray, modality: str) -> np.ndarray:
    if transmittance.min() < -NOISE or transmittance.max() > 1.5:
        raise InputError(
            f"{modality}: transmittances from {transmittance.min():.4g} to {transmittance.max():.4g}; they lie between "
            "0 and 1, or 0 and 100 for percent transmittance"
        )
    return -np.log10(transmittance.clip(LEAST_TRANSMITTANCE, 1.0))


def _resampled(modality: str, y: np.ndarray, x: np.ndarray, axis: str) -> tuple[np.ndarray, list[str]]:
    if axis not in AXES[modality]:
        raise InputError(f"{modality}: x in {axis!r}; there are {', '.join(AXES[modality])}")
    if x.shape != y.shape or len(x) < 2:
        raise InputError(f"{modality}: {len(x)} places for {len(y)} values; both need the same length, at least 2")
    if not np.isfinite(x).all() or (x.min() <= 0 and axis in ("nm", "um")):
        raise InputError(f"{modality}: x has places that are not finite, or wavelengths that are not positive")
    x = _converted(x, modality, axis)
    steps = np.diff(x)
    if not (steps > 0).all() and not (steps < 0).all():
        turn = int(np.flatnonzero(np.sign(steps) != np.sign(steps[0]))[0]) if steps[0] else 0
        raise InputError(f"{modality}: x must rise or fall throughout; it does not at point {turn + 1}")
    if x[0] > x[-1]:
        x, y = x[::-1], y[::-1]
    places = ORIGIN[modality] + STEP[modality] * np.arange(POINTS[modality])
    slack = STEP[modality] / 100
    inside = (places >= x[0] - slack) & (places <= x[-1] + slack)
    if inside.mean() < COVERED:
        raise InputError(
            f"{modality}: {x[0]:g} to {x[-1]:g} {UNITS[modality]} cover {inside.mean():.0%} of the grid "
            f"{places[0]:g} to {places[-1]:g}; at least {COVERED:.0%} are needed"
        )
    warnings = []
    if not inside.all():
        warnings.append(f"{modality}: {1 - inside.mean():.0%} of the grid was not measured and is taken as zero")
    if np.median(np.diff(x)) > 0.75 * STEP[modality]:
        return np.where(inside, np.interp(places, x, y), 0.0), warnings
    gathered = np.concatenate([[0.0], np.cumsum(np.diff(x) * (y[1:] + y[:-1]) / 2)])
    edges = ORIGIN[modality] + STEP[modality] * (np.arange(POINTS[modality] + 1) - 0.5)
    clipped = edges.clip(x[0], x[-1])
    spans = np.diff(clipped)
    cells = np.diff(np.interp(clipped, x, gathered))
    return np.divide(cells, spans, out=np.zeros_like(cells), where=spans > 0), warnings


def _converted(x: np.ndarray, modality: str, axis: str) -> np.ndarray:
    """To eV for UV-Vis, to cm-1 for the others."""
    if modality == "uv":
        return {"eV": x, "nm": EV_NM / np.where(x == 0, np.nan, x), "cm-1": x / CM_PER_EV}[axis]
    return x if axis == "cm-1" else 1e4 / x


def _suspicion(modality: str, y: np.ndarray, values: str) -> list[str]:
    """Bands are narrow: a spectrum that is near its maximum nearly everywhere is a transmittance, or upside down."""
    if values.endswith("transmittance") or np.median(y) < 0.7 * y.max():
        return []
    return [f"{modality}: most of it is near its maximum, as in transmittance; say so in `values` where it is"]
