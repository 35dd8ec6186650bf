"""Simulated atmospheric corrosion of aluminium alloys under real weather, and the dose-response of ISO 9223.

The simulator is this project's own, made to have the time scales that corrosion has: the electrolyte film lives for
hours, salt is deposited for days until rain washes it off, pits activate over weeks, products shield for months. Its
output is called simulated wherever it appears. Time step 1 hour, units as in `COLUMNS`; the equations' numbers are in
the comments of `simulate`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.series import QUANTITIES
from library.qrc.weather import CHANNELS, Environment

CATHODE = {"AA2024": 0.05, "AA7075": 0.02, "AA6061": 0.01, "AA1050": 0.002}
"""Share of an alloy's surface that is cathodic: its copper- and iron-rich particles."""
COLUMNS = ("i_A_m2", "C_g_m2", "S_mg_m2", "d_um", "c_mol_L", "a")
GRAMS_PER_AMPERE_HOUR = 0.335520  # aluminium dissolved per A/m2 and hour, g/m2: 3600 s times 93.2 ug/C
GAS, REFERENCE_K = 8.314, 298.15
FARADAY = 96485.0
SALT, ACTIVE = 20.0, 0.02  # mg/m2 of chloride and the share of active surface at the start


@dataclass(frozen=True)
class Condition:
    """Where a panel of metal stands.

    alloy        one of `CATHODE`
    salt         chloride that settles on it, mg/(m2 day), at the site's mean wind
    sheltered    rain does not reach it
    """

    alloy: str = "AA2024"
    salt: float = 60.0
    sheltered: bool = False

    def __post_init__(self) -> None:
        if self.alloy not in CATHODE:
            raise InputError(f"alloy {self.alloy!r}; there are {', '.join(CATHODE)}")
        if not 0 <= self.salt <= 10_000:
            raise InputError(f"salt {self.salt} mg/(m2 day); allowed are 0 to 10000")


@dataclass(frozen=True)
class Corrosion:
    """A simulated course, each (conditions, hours).

    current   A/m2, the rate of corrosion
    loss      g/m2 of metal lost so far
    salt      mg/m2 of chloride on the surface
    film      um of electrolyte
    molarity  mol/L of chloride in it
    active    share of the surface that is active, after the hour; the hour's current is made by the share before
    """

    current: Tensor
    loss: Tensor
    salt: Tensor
    film: Tensor
    molarity: Tensor
    active: Tensor

    def table(self) -> Tensor:
        """All of it as (conditions, hours, 6), in the order of `COLUMNS`."""
        return torch.stack([self.current, self.loss, self.salt, self.film, self.molarity, self.active], -1)


def simulate(environment: Environment, conditions: list[Condition]) -> Corrosion:
    """The corrosion of panels in given conditions under an hourly environment.

    `environment` has one series for all conditions, (hours,), or one for each, (conditions, hours). What depends on the
    weather alone is computed for all hours at once; salt, film, activity and products go hour by hour. Where no wind
    blows at all, each hour has the mean wind.

    Raises InputError for no conditions, and for an environment whose parts differ in their hours, are not finite, or
    cannot be (`library.qrc.series.QUANTITIES`).
    """
    if not conditions:
        raise InputError("conditions: none given")
    _check_environment(environment, len(conditions))
    kelvin, humidity, rain, wind = (
        part.to(torch.float64).expand(len(conditions), -1)
        for part in (environment.temperature + 273.15, environment.humidity, environment.rain, environment.wind)
    )
    like = {"dtype": torch.float64, "device": kelvin.device}
    cathode = torch.tensor([CATHODE[each.alloy] for each in conditions], **like)[:, None]
    deposit = torch.tensor([each.salt for each in conditions], **like)[:, None] / 24
    rain = torch.where(torch.tensor([each.sheltered for each in conditions], device=kelvin.device)[:, None], 0.0, rain)

    # 1: salt settles with the wind and is washed off by rain
    mean = wind.mean(1, keepdim=True)
    settled = deposit * torch.where(mean > 0, wind / mean, 1.0).pow(1.5).clamp(max=5)
    salt = _affine_capped(settled, torch.exp(-0.25 * rain), start=SALT, cap=1500.0)
    # 2, 3: brine, from deliquescence at 75 % to efflorescence at 45 %
    wet = _hysteresis(humidity)
    activity = (humidity / 100).clamp(0.05, 0.99)
    molality = (-0.92 + (0.8464 + 0.24 * -activity.log() / 0.03603).sqrt()) / 0.12
    moles = salt / 35450
    # 4: film thickness
    equilibrium = torch.maximum(wet * 1e3 * moles / molality, 0.01 * activity / (1 - activity))
    film = _film(torch.where(rain > 0, 100.0, 0.0).maximum(equilibrium), torch.exp(-1.4 * (1 - activity)))
    # 5: chloride and wetness
    molarity = (moles / (1e-3 * film)).clamp(1e-4, 6.0)
    wetness = film / (film + 0.1)
    # 6, 7: activation and diffusion currents
    inverse = 1 / kelvin - 1 / REFERENCE_K
    freezing = 1 + torch.exp(-((kelvin - 272.15) / 0.5).clamp(max=50))
    activation = 1.5e-3 * (cathode / 0.05).sqrt() * molarity.sqrt() * torch.exp(-40e3 / GAS * inverse) / freezing
    oxygen = 2.1e-9 * torch.exp(-18e3 / GAS * inverse) * 0.25 * (1 - 0.1 * molarity)
    diffusion = cathode * 4 * FARADAY * oxygen / ((film + 5) * 1e-6)
    # 9: pits become active in weeks
    birth = wetness * molarity / (molarity + 1) / 200
    active = _affine(birth, 1 - birth - 1 / 3000, (1 - wetness) / 1000, start=ACTIVE)
    # 8, 10: current, loss, and products that shield
    before = torch.cat([torch.full_like(active[:, :1], ACTIVE), active[:, :-1]], 1)
    bare = before * wetness / (1 / activation + 1 / diffusion)
    current = _shielded(bare, torch.exp(-1e-3 * rain))
    return Corrosion(current, (GRAMS_PER_AMPERE_HOUR * current).cumsum(1), salt, film, molarity, active)


def iso9223(temperature: float, humidity: float, sulphur: float, chloride: float) -> float:
    """Loss of aluminium in its first year, g/(m2 a), by the dose-response function of ISO 9223:2012.

        0.0042 P^0.73 exp(0.025 RH + f) + 0.0018 S^0.60 exp(0.020 RH + 0.094 T),
        f = 0.009 (T - 10) for T <= 10, else -0.043 (T - 10)

    with annual means: temperature T in degrees Celsius, relative humidity RH in percent, deposition of SO2 (P) and of
    chloride (S) in mg/(m2 day).
    """
    if not math.isfinite(temperature):
        raise InputError(f"temperature {temperature}: a finite number of degrees Celsius")
    if not 0 <= humidity <= 100 or not 0 <= sulphur < math.inf or not 0 <= chloride < math.inf:
        raise InputError(f"humidity {humidity} %, SO2 {sulphur}, chloride {chloride}: 0 to 100 %, and at least 0")
    factor = (0.009 if temperature <= 10 else -0.043) * (temperature - 10)
    values = torch.tensor([0.025 * humidity + factor, 0.020 * humidity + 0.094 * temperature], dtype=torch.float64)
    first, second = values.exp().tolist()
    return 0.0042 * sulphur**0.73 * first + 0.0018 * chloride**0.60 * second


def dose_response(temperature: float, humidity: float, sulphur: float, chloride: float, years: Tensor) -> Tensor:
    """Loss in g/m2 after `years` by ISO 9223 and 9224: C(t) = r t^0.728."""
    return iso9223(temperature, humidity, sulphur, chloride) * years**0.728


def _check_environment(environment: Environment, conditions: int) -> None:
    shapes = {tuple(getattr(environment, name).shape) for name in CHANNELS}
    allowed = [(environment.hours,), (1, environment.hours), (conditions, environment.hours)]
    if not environment.hours or len(shapes) > 1 or not shapes <= set(allowed):
        found = ", ".join(f"{name} {tuple(getattr(environment, name).shape)}" for name in CHANNELS)
        raise InputError(f"environment: {found}; all need one shape, (hours,) or ({conditions}, hours)")
    for name in CHANNELS:
        known, values = QUANTITIES[name], getattr(environment, name)
        wrong = ~((values >= known.low) & (values <= known.high))
        if wrong.any():
            value = float(values[wrong][0])
            raise InputError(f"{name}: {value:g} {known.unit}; possible are {known.low:g} to {known.high:g}")


def _hysteresis(humidity: Tensor) -> Tensor:
    """1 from the hour that reaches 75 % until the hour below 45 %; 0 before either: (conditions, hours)."""
    hours = torch.arange(humidity.shape[1], device=humidity.device).expand_as(humidity)
    up = torch.where(humidity >= 75, hours, -1).cummax(1).values
    down = torch.where(humidity < 45, hours, -1).cummax(1).values
    return (up > down).to(torch.float64)


def _affine_capped(added: Tensor, kept: Tensor, *, start: float, cap: float) -> Tensor:
    """x_t = min((x_{t-1} + added_t) kept_t, cap), hour by hour."""
    states = torch.empty_like(added.T, memory_format=torch.contiguous_format)
    before = torch.full_like(states[0], start)
    for now, plus, times in zip(states, added.T.contiguous(), kept.T.contiguous(), strict=True):
        torch.add(before, plus, out=now).mul_(times).clamp_(max=cap)
        before = now
    return states.T


def _film(floor: Tensor, kept: Tensor) -> Tensor:
    """d_t = min(200, max(floor_t, d_{t-1} kept_t))."""
    states = torch.empty_like(floor.T, memory_format=torch.contiguous_format)
    before = torch.zeros_like(states[0])
    for now, least, times in zip(states, floor.T.contiguous(), kept.T.contiguous(), strict=True):
        torch.maximum(torch.mul(before, times, out=now), least, out=now).clamp_(max=200)
        before = now
    return states.T


def _affine(added: Tensor, kept: Tensor, drained: Tensor, *, start: float) -> Tensor:
    """a_t = a_{t-1} (kept_t - drained_t) + added_t."""
    states = torch.empty_like(added.T, memory_format=torch.contiguous_format)
    before = torch.full_like(states[0], start)
    for now, plus, times in zip(states, added.T.contiguous(), (kept - drained).T.contiguous(), strict=True):
        before = torch.addcmul(plus, before, times, out=now)
    return states.T


def _shielded(bare: Tensor, kept: Tensor) -> Tensor:
    """i_t = bare_t / (1 + L_t / 0.1), L_{t+1} = (L_t + loss of i_t) kept_t, from L = 0."""
    currents = torch.empty_like(bare.T, memory_format=torch.contiguous_format)
    layer = torch.zeros_like(currents[0])
    for now, each, times in zip(currents, bare.T.contiguous(), kept.T.contiguous(), strict=True):
        torch.div(each, 1 + layer / 0.1, out=now)
        layer = torch.add(layer, now, alpha=GRAMS_PER_AMPERE_HOUR).mul_(times)
    return currents.T
