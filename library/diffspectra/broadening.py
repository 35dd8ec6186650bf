"""From line lists to spectra, a batch at a time, and the perturbations that measured spectra show."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from library.diffspectra.lines import ORIGIN, POINTS, STEP, Lines, grid, known
from library.errors import InputError

LASER = 1e7 / 532.0  # cm-1, of a laser of 532 nm
KELVIN_PER_WAVENUMBER = 1.438776877  # h c / k in K cm
CHUNK_VALUES = 1 << 24  # of line shapes that are held at a time
FOUR_LOG_2 = 4 * math.log(2)


class Broadening(BaseModel, frozen=True, extra="forbid"):
    """How lines become bands.

    Lorentzian of full width w:  I(x) = sum_k A_k (w / 2 pi) / ((x - x_k)^2 + w^2 / 4)
    Gaussian of full width w:    I(x) = sum_k A_k sqrt(4 ln 2 / (pi w^2)) exp(-4 ln 2 (x - x_k)^2 / w^2)

    Lines at or below zero are left out. The widths of IR and Raman are those of DetaNet's simulator (Zou et al., 2023).
    """

    uv_width: PositiveFloat = 0.3
    """Full width at half maximum in eV."""
    ir_width: PositiveFloat = 15.0
    """Full width at half maximum in cm-1."""
    raman_width: PositiveFloat = 12.0
    """Full width at half maximum in cm-1."""
    uv_shape: Literal["lorentzian", "gaussian"] = "lorentzian"
    """Line shape of UV-Vis; IR and Raman are Lorentzian."""
    frequency_scale: PositiveFloat = 1.0
    """Factor of the wavenumbers; 0.965 brings B3LYP's harmonic ones near measured ones."""
    raman: Literal["activity", "intensity"] = "activity"
    """Activities S_k, broadened, as they are, or turned into what a laser of 532 nm at 298 K scatters: each point of
    the spectrum times (nu_0 - nu)^4 / nu / (1 - exp(-h c nu / k T)), relative to 1000 cm-1."""
    temperature: PositiveFloat = 298.0
    """Kelvin, of `raman` "intensity"."""

    def width(self, modality: str) -> float:
        """The full width of a modality."""
        return {"uv": self.uv_width, "ir": self.ir_width, "raman": self.raman_width}[modality]


class Augmentation(BaseModel, frozen=True, extra="forbid"):
    """Perturbations drawn anew for every sample: widths, calibration of both axes, and noise."""

    width: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.5)
    """Least and largest factor of the widths, one draw per spectrum."""
    frequency_scale: tuple[PositiveFloat, PositiveFloat] = (0.97, 1.01)
    """Least and largest factor of wavenumbers, one draw per molecule for IR and Raman together."""
    shift: float = Field(5.0, ge=0)
    """Largest shift of a spectrum of IR or Raman in cm-1, one draw each."""
    uv_shift: float = Field(0.0, ge=0)
    """Largest shift of a UV-Vis spectrum in eV."""
    noise: float = Field(0.005, ge=0)
    """Standard deviation of noise at every point, in units of the spectrum's largest intensity; what falls below zero
    is zero."""

    @model_validator(mode="after")
    def _ordered(self) -> "Augmentation":
        for name in ("width", "frequency_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}")
        return self


def broaden(
    lines: Sequence[Lines],
    modality: str,
    settings: Broadening = Broadening(),  # noqa: B008 - frozen
    *,
    width_factor: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The intensities I of many line lists on the grid of their modality: float32 (B, points).

    `width_factor`, `scale` and `shift` (B,) change the width, stretch the positions, then move them, for each alone.
    Raises InputError for no line lists, a modality that there is not, and lines that are not finite.

    >>> carbon_monoxide = Lines(torch.tensor([2143.0]), torch.tensor([60.0]))
    >>> spectrum = broaden([carbon_monoxide], "ir")[0]
    >>> int(spectrum.argmax()) + 500, round(float(spectrum.sum()))
    (2143, 60)
    """
    modality = known(modality)
    if not lines:
        raise InputError(f"there are no {modality} lines to broaden")
    positions = pad_sequence([one.positions for one in lines], batch_first=True).double()
    strengths = pad_sequence([one.strengths for one in lines], batch_first=True).double()
    if not (torch.isfinite(positions).all() and torch.isfinite(strengths).all()):
        raise InputError(f"a {modality} line is not finite")
    strengths = strengths.masked_fill(positions <= 0, 0.0)
    if modality != "uv":
        positions = positions * settings.frequency_scale
    if scale is not None:
        positions = positions * scale.double()[:, None]
    if shift is not None:
        positions = positions + shift.double()[:, None]
    widths = torch.full((len(lines),), settings.width(modality), dtype=torch.float64, device=positions.device)
    if width_factor is not None:
        widths = widths * width_factor.double()
    low, step = ORIGIN[modality], STEP[modality]
    shape = settings.uv_shape if modality == "uv" else "lorentzian"
    rows = max(1, CHUNK_VALUES // (max(1, positions.shape[1]) * POINTS[modality]))
    positions, strengths, widths = (positions - low) / step, strengths / step, widths / step
    parts = [
        _bands(*part, POINTS[modality], shape)
        for part in zip(positions.split(rows), strengths.split(rows), widths.split(rows), strict=True)
    ]
    spectra = torch.cat(parts)
    if modality == "raman" and settings.raman == "intensity":
        spectra = spectra * _scattering(grid(modality).to(spectra.device), settings.temperature)
    return spectra


def augmented(
    lines: Sequence[dict[str, Lines]],
    modalities: Sequence[str],
    settings: Broadening,
    augmentation: Augmentation,
    keys: Tensor,
) -> dict[str, Tensor]:
    """Perturbed intensities of the modalities, each (B, points), drawn from the sample's key alone."""
    generators = [torch.Generator().manual_seed(int(key)) for key in keys]
    draws = torch.stack([torch.rand(1 + 2 * len(modalities), generator=generator) for generator in generators])
    low, high = augmentation.frequency_scale
    scale = low + (high - low) * draws[:, 0]
    found = {}
    for place, modality in enumerate(modalities):
        low, high = augmentation.width
        most = augmentation.uv_shift if modality == "uv" else augmentation.shift
        clean = broaden(
            [one[modality] for one in lines],
            modality,
            settings,
            width_factor=low + (high - low) * draws[:, 1 + 2 * place],
            scale=None if modality == "uv" else scale,
            shift=most * (2 * draws[:, 2 + 2 * place] - 1),
        )
        found[modality] = noisy(clean, augmentation.noise, generators)
    return found


def noisy(intensities: Tensor, noise: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Intensities (B, points) with Gaussian noise of `noise` times their maximum, cut at zero; one generator a row."""
    if noise == 0:
        return intensities
    drawn = torch.stack([torch.randn(intensities.shape[1], generator=generator) for generator in generators])
    return (intensities + noise * intensities.amax(1, keepdim=True) * drawn).clamp(min=0)


def network_input(intensities: Tensor) -> Tensor:
    """log10(1 + I), what the network reads. Raises InputError for intensities that are negative or not finite."""
    if not torch.isfinite(intensities).all():
        raise InputError("a spectrum has an intensity that is not finite")
    if bool((intensities < 0).any()):
        raise InputError(f"a spectrum has the negative intensity {float(intensities.min()):.4g}")
    return torch.log1p(intensities) / math.log(10)


def _bands(positions: Tensor, strengths: Tensor, widths: Tensor, points: int, shape: str) -> Tensor:
    """Positions and strengths (b, lines), widths (b,), all in steps of a grid from 0: float32 (b, points).

    In single precision, with whole steps and fractions of positions apart, so that no digits cancel.
    """
    whole = positions.round()
    steps = torch.arange(points, device=positions.device)
    offset = (steps - whole[:, :, None].long()).float() - (positions - whole).float()[:, :, None]
    if shape == "gaussian":
        height = (FOUR_LOG_2 / math.pi) ** 0.5 * strengths / widths[:, None]
        values = offset.square_().mul_((-FOUR_LOG_2 / widths.square()).float()[:, None, None]).exp_()
    else:
        height = strengths * (widths / (2 * math.pi))[:, None]
        values = offset.square_().add_((widths.square() / 4).float()[:, None, None]).reciprocal_()
    return torch.bmm(height.float()[:, None], values)[:, 0]


def _scattering(wavenumbers: Tensor, temperature: float) -> Tensor:
    """(nu_0 - nu)^4 / nu / (1 - exp(-h c nu / k T)), relative to its value at 1000 cm-1."""

    def factor(nu: Tensor) -> Tensor:
        return (LASER - nu) ** 4 / nu / -torch.expm1(-KELVIN_PER_WAVENUMBER * nu / temperature)

    return (factor(wavenumbers.double()) / factor(torch.tensor(1000.0, dtype=torch.float64))).float()
