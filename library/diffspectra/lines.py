"""Line lists: where a molecule absorbs or scatters, and how strongly, before anything is broadened."""

from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import InputError

MODALITIES = ("uv", "ir", "raman")
POINTS = {"uv": 701, "ir": 3501, "raman": 3501}
ORIGIN = {"uv": 1.0, "ir": 500.0, "raman": 500.0}
STEP = {"uv": 0.02, "ir": 1.0, "raman": 1.0}
UNITS = {"uv": "eV", "ir": "cm-1", "raman": "cm-1"}


class Lines(NamedTuple):
    """Lines of one spectrum.

    positions  float32 (lines,): excitation energies in eV, or wavenumbers of modes in cm-1
    strengths  float32 (lines,): oscillator strengths, IR intensities in km/mol, or Raman activities in angstrom^4/amu
    """

    positions: Tensor
    strengths: Tensor


def grid(modality: str) -> Tensor:
    """The points of a spectrum, float32: UV-Vis 1 to 15 eV by 0.02, IR and Raman 500 to 4000 cm-1 by 1."""
    steps = torch.arange(POINTS[known(modality)], dtype=torch.float64)
    return (ORIGIN[modality] + STEP[modality] * steps).float()


def known(modality: str) -> str:
    """The modality itself. Raises InputError for one that there is not."""
    if modality not in MODALITIES:
        raise InputError(f"there is no modality {modality!r}; there are {', '.join(MODALITIES)}")
    return modality


def chosen(modalities: tuple[str, ...]) -> tuple[str, ...]:
    """The modalities in their fixed order, each once. Raises InputError for none, or for one that there is not."""
    if not modalities:
        raise InputError(f"no modality was chosen; there are {', '.join(MODALITIES)}")
    asked = {known(modality) for modality in modalities}
    return tuple(modality for modality in MODALITIES if modality in asked)


def check_lines(lines: Lines, modality: str, name: str = "molecule") -> None:
    """Raise InputError, beginning with `name`, for lines that are not finite, not positive, or not as many."""
    positions, strengths = lines
    if positions.shape != strengths.shape or positions.ndim != 1:
        raise InputError(f"{name}: {tuple(positions.shape)} {modality} positions, {tuple(strengths.shape)} strengths")
    if not (torch.isfinite(positions).all() and torch.isfinite(strengths).all()):
        raise InputError(f"{name}: a {modality} line is not finite")
    if bool((strengths < 0).any()):
        raise InputError(f"{name}: a {modality} strength is negative")
    if not bool(((positions > 0) & (strengths > 0)).any()):
        raise InputError(f"{name}: no {modality} line has a positive position and strength")
