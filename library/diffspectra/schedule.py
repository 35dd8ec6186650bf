"""Noise schedules: how much of a molecule is left at time t, and the times at which a sampler looks.

z_t = alpha_t G_0 + sigma_t eps with alpha^2 + sigma^2 = 1 (variance preserving). Everything follows from log alpha:

    sigma^2 = -expm1(2 log alpha)          (1 - alpha^2 would cancel near t = 0)
    lambda  = log alpha - log sigma        (half of the log signal-to-noise ratio; falls with t)
    noise level = 2 lambda                 (what the network sees instead of t)

Sources: Lu et al., "DPM-Solver", 2022 (cosine, linear); Hoogeboom et al., "Equivariant Diffusion", 2022 (polynomial).
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from library.errors import InputError

ScheduleName = Literal["cosine", "linear", "discrete_poly"]
FIRST_TIME = 1e-3  # where samplers stop looking; below it almost nothing is noise
TRAINING_TIME = 1e-5  # the least time of training


class NoiseSchedule(ABC):
    """A variance-preserving schedule. Times are in (0, 1]; computed in float64, returned in the dtype of the input."""

    last_time: float
    """Where samplers start."""

    @abstractmethod
    def _log_alpha(self, time: Tensor) -> Tensor:
        """log alpha of float64 times."""

    @abstractmethod
    def _time(self, log_alpha: Tensor) -> Tensor:
        """The times of float64 log alpha."""

    def log_alpha(self, time: Tensor) -> Tensor:
        """log alpha_t."""
        return self._log_alpha(time.double()).to(time.dtype)

    def alpha(self, time: Tensor) -> Tensor:
        """alpha_t, the share of the molecule."""
        return self._log_alpha(time.double()).exp().to(time.dtype)

    def sigma(self, time: Tensor) -> Tensor:
        """sigma_t, the standard deviation of the noise."""
        return (-torch.expm1(2 * self._log_alpha(time.double()))).sqrt().to(time.dtype)

    def half_log_snr(self, time: Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t); infinite at t = 0."""
        log_alpha = self._log_alpha(time.double())
        return (log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))).to(time.dtype)

    def noise_level(self, time: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), what the network is told."""
        return (2 * self.half_log_snr(time.double())).to(time.dtype)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The inverse of `half_log_snr`."""
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * half_log_snr.double())
        return self._time(log_alpha).to(half_log_snr.dtype)

    def ancestral_times(self, steps: int) -> tuple[Tensor, Tensor]:
        """From and to which times the ancestral sampler steps: float64 (steps,) each; the last goes to 0."""
        _check(steps)
        times = torch.linspace(self.last_time, FIRST_TIME, steps, dtype=torch.float64)
        return times, torch.cat([times[1:], times.new_zeros(1)])

    def even_times(self, steps: int) -> Tensor:
        """`steps` times from `last_time` to FIRST_TIME, evenly spaced in lambda: float64 (steps,)."""
        _check(steps)
        ends = self.half_log_snr(torch.tensor([self.last_time, FIRST_TIME], dtype=torch.float64))
        times = self.time_of(torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64))
        times[0] = self.last_time
        return times

    def ancestral_step(self, time: Tensor, to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of G_t and of the prediction of G_0, and the noise's standard deviation, for a step to time `to` < t.

        With alpha_{t|s} = alpha_t / alpha_s and sigma^2_{t|s} = sigma_t^2 - alpha^2_{t|s} sigma_s^2:
        alpha_{t|s} sigma_s^2 / sigma_t^2,  alpha_s sigma^2_{t|s} / sigma_t^2,  sigma_{t|s} sigma_s / sigma_t.
        """
        log_t, log_s = self._log_alpha(time.double()), self._log_alpha(to.double())
        variance_t, variance_s = -torch.expm1(2 * log_t), -torch.expm1(2 * log_s)
        between = -torch.expm1(2 * (log_t - log_s))  # sigma^2_{t|s}: 1 - alpha^2_{t|s}, as variances are preserved
        own = (log_t - log_s).exp() * variance_s / variance_t
        predicted = log_s.exp() * between / variance_t
        spread = (between * variance_s / variance_t).clamp(min=0).sqrt()
        return own.to(time.dtype), predicted.to(time.dtype), spread.to(time.dtype)

    def released_step(self, time: Tensor, to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same three factors as the released code has them: in single precision, sigma^2 as 1 - alpha^2.

        For the cosine schedule its sigma at time 0 is a rounding error of 2e-4, so that its last step gives 0.9986 of
        the prediction and 0.0014 of G_t, where `ancestral_step` has the prediction itself.
        """
        log_t, log_s = self._log_alpha(time.float()).float(), self._log_alpha(to.float()).float()
        alpha_t, alpha_s = log_t.exp(), log_s.exp()
        sigma_t, sigma_s = (1 - (2 * log_t).exp()).sqrt(), (1 - (2 * log_s).exp()).sqrt()
        ratio = alpha_t / alpha_s
        between = sigma_t**2 - ratio**2 * sigma_s**2
        own, predicted = ratio * sigma_s**2 / sigma_t**2, alpha_s * between / sigma_t**2
        return own, predicted, between.sqrt() * sigma_s / sigma_t


class CosineSchedule(NoiseSchedule):
    """alpha_t = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)), s = 0.008; sampled from T = 0.9946."""

    last_time = 0.9946
    offset = 0.008
    least_cosine = 1e-8  # at t = 1 the cosine is 0 up to rounding

    def _log_alpha(self, time: Tensor) -> Tensor:
        cosine = torch.cos((time + self.offset) / (1 + self.offset) * math.pi / 2).clamp(min=self.least_cosine)
        return (cosine.log() - math.log(math.cos(0.5 * math.pi * self.offset / (1 + self.offset)))).clamp(max=0)

    def _time(self, log_alpha: Tensor) -> Tensor:
        cosine = log_alpha.exp() * math.cos(0.5 * math.pi * self.offset / (1 + self.offset))
        return torch.arccos(cosine) * 2 * (1 + self.offset) / math.pi - self.offset


class LinearSchedule(NoiseSchedule):
    """log alpha_t = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2, with beta from 0.1 to 20."""

    last_time = 1.0
    least, most = 0.1, 20.0

    def _log_alpha(self, time: Tensor) -> Tensor:
        return -0.25 * time.square() * (self.most - self.least) - 0.5 * time * self.least

    def _time(self, log_alpha: Tensor) -> Tensor:
        slope = self.most - self.least
        product = -4 * slope * log_alpha
        return product / slope / ((self.least**2 + product).sqrt() + self.least)


class PolynomialSchedule(NoiseSchedule):
    """alpha^2 = (1 - t^2)^2 at 1001 points, ratios of neighbours at least 0.001, pulled 1e-4 off 0 and 1.

    log alpha is linear between the points t = k / 1000, k = 0 ... 1000.
    """

    last_time = 1.0
    points, least_ratio, precision = 1001, 1e-3, 1e-4

    def __init__(self) -> None:
        self._times = torch.linspace(0, 1, self.points, dtype=torch.float64)
        squared = (1 - self._times.square()).square()
        ratios = torch.cat([squared.new_ones(1), squared[1:] / squared[:-1]]).clamp(self.least_ratio, 1.0)
        squared = (1 - 2 * self.precision) * ratios.cumprod(0) + self.precision
        self._values = 0.5 * squared.log()

    def _log_alpha(self, time: Tensor) -> Tensor:
        return _interpolated(time, self._times.to(time.device), self._values.to(time.device))

    def _time(self, log_alpha: Tensor) -> Tensor:
        return _interpolated(
            log_alpha, self._values.flip(0).to(log_alpha.device), self._times.flip(0).to(log_alpha.device)
        )


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "discrete_poly": PolynomialSchedule,
}


def noise_schedule(name: str) -> NoiseSchedule:
    """The schedule of that name. Raises InputError that lists the names.

    >>> round(float(noise_schedule("cosine").alpha(torch.tensor(0.5))), 4)
    0.7027
    """
    if name not in SCHEDULES:
        raise InputError(f"there is no noise schedule {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]()


def _interpolated(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (places, values), places rising; the outer pieces go on beyond their ends."""
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    left = right - 1
    share = (x - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])


def _check(steps: int) -> None:
    if steps < 1:
        raise InputError(f"a sampler needs at least 1 step, not {steps}")
