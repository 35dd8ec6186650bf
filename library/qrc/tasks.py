"""Benchmark series: short-term memory, NARMA-10, Mackey-Glass, a laser-like intensity, and known time scales.

Each is simulated, exactly repeatable from a seed, and vectorised over series. Targets are aligned with inputs: row t of
a target is what a reservoir has to say once it has seen rows 0..t of the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.readout import ridge_path
from library.qrc.scores import check_pair

TAUS = (2.0, 10.0, 50.0)
DISCARDED = 500  # time units of a Mackey-Glass series before it is on its attractor


def uniform_signal(length: int, *, series: int = 1, high: float = 1.0, seed: int = 0) -> Tensor:
    """Independent inputs, uniform in [0, high): float64 (series, length)."""
    generator = torch.Generator().manual_seed(seed)
    return high * torch.rand(series, length, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class MemoryCapacity:
    """How much of past inputs a reservoir holds.

    recalled     (delays,) squared correlation C_k of the read-out and the input k steps before, on test samples
    noise_floor  what C_k of an unrelated series is on average, 1 / (test samples - 1)
    """

    recalled: Tensor
    noise_floor: float

    @property
    def total(self) -> float:
        """MC = sum_k C_k, from which nothing is subtracted."""
        return float(self.recalled.sum())

    @property
    def mean_delay(self) -> float:
        """sum_k k C_k / MC."""
        return float((torch.arange(len(self.recalled)) * self.recalled.cpu()).sum()) / max(self.total, 1e-300)


def memory_capacity(
    features: Tensor,
    signal: Tensor,
    *,
    delays: int = 41,
    washout: int = 200,
    train_fraction: float = 0.6,
    alpha: float = 1e-9,
) -> MemoryCapacity:
    """Memory capacity of features (time, width) that a scalar signal (time,) has driven, delays 0 .. `delays` - 1.

    One ridge fit with a target per delay on centred features, on the first `train_fraction` of what follows the
    washout; C_k is taken on the rest. Raises InputError when the series is too short. Source: Jaeger, "Short term
    memory in echo state networks", GMD report 152, 2001.
    """
    if features.ndim != 2 or signal.shape != features.shape[:1]:
        raise InputError(f"features {tuple(features.shape)} need a signal of as many steps, not {tuple(signal.shape)}")
    if delays < 1 or washout < 0:
        raise InputError(f"{delays} delays, washout {washout}: at least 1, and at least 0")
    first = max(washout, delays - 1)
    split = first + int(train_fraction * (len(signal) - first))
    if split - first < 2 or len(signal) - split < 3:
        raise InputError(f"{len(signal)} steps are too few for a washout of {washout} and {delays} delays")
    past = torch.stack([signal[first - k : len(signal) - k] for k in range(delays)], 1)
    rows, cut = features[first:], split - first
    path = ridge_path(rows[:cut], past[:cut], [alpha], standardize=False)
    found, wanted = (part - part.mean(0) for part in (path.predictions(rows[cut:])[0], past[cut:]))
    power = (found**2).sum(0) * (wanted**2).sum(0)
    recalled = torch.where(power > 0, (found * wanted).sum(0) ** 2 / power.clamp(min=1e-300), 0.0)
    return MemoryCapacity(recalled, 1 / (len(past) - cut - 1))


def narma10(length: int, *, series: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs u, uniform in [0, 0.5), and NARMA-10's y, both (series, length).

        y_{t+1} = 0.3 y_t + 0.05 y_t sum_{i=0}^{9} y_{t-i} + 1.5 u_{t-9} u_t + 0.1

    The target in row t is y_{t+1}. A series that diverges (y > 1) is drawn again. Source: Atiya and Parlos, IEEE
    Transactions on Neural Networks 11, 2000.
    """
    if length < 11:
        raise InputError(f"NARMA-10 of {length} steps: at least 11")
    inputs, outputs = [], []
    attempt = 0
    while len(inputs) < series:
        u = uniform_signal(length, series=series, high=0.5, seed=seed * 1_000_003 + attempt)
        y = torch.zeros(length + 1, series, dtype=torch.float64)
        rows = u.T.contiguous()
        for t in range(9, length):
            before = y[t]
            y[t + 1] = 0.3 * before + 0.05 * before * y[t - 9 : t + 1].sum(0) + 1.5 * rows[t - 9] * rows[t] + 0.1
        kept = (y <= 1).all(0)  # also False for NaN
        inputs += list(u[kept])
        outputs += list(y[1:].T[kept])
        attempt += 1
    return torch.stack(inputs[:series]), torch.stack(outputs[:series])


def mackey_glass(length: int, *, series: int = 1, tau: float = 17.0, step: float = 0.1, seed: int = 0) -> Tensor:
    """The chaotic series of Mackey and Glass, sampled every time unit: float64 (series, length).

        x'(t) = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t)

    by the classical Runge-Kutta scheme, the delayed value at half steps interpolated linearly. Each series starts from
    a constant past near 1.2, and its first 500 time units are discarded. Source: Mackey and Glass, Science 197, 1977.
    """
    lag, every = round(tau / step), round(1 / step)
    if abs(lag * step - tau) > 1e-9 or abs(every * step - 1) > 1e-9:
        raise InputError(f"step {step}: must divide both 1 and tau {tau}")
    generator = torch.Generator().manual_seed(seed)
    begin = 1.2 + 0.2 * (torch.rand(series, generator=generator, dtype=torch.float64) - 0.5)
    blocks = -(-(length + DISCARDED) * every // lag)
    x = torch.empty((blocks + 1) * lag + 1, series, dtype=torch.float64)
    x[: lag + 1] = begin
    kept, *shares = (float(part) for part in _delayed_step(torch.eye(4, dtype=torch.float64), step))
    for first in range(lag, (blocks + 1) * lag, lag):  # what is delayed is known for a whole lag
        delayed = x[first - lag : first + 1]
        early, late = (0.2 * part / (1 + part**10) for part in (delayed[:-1], delayed[1:]))
        between = (delayed[:-1] + delayed[1:]) / 2
        middle = 0.2 * between / (1 + between**10)
        pushed = sum(share * part for share, part in zip(shares, (early, middle, late), strict=True))
        for t, push in enumerate(pushed, first):
            torch.add(push, x[t], alpha=kept, out=x[t + 1])
    return x[lag + DISCARDED * every :: every][:length].T.contiguous()


def _delayed_step(values: Tensor, step: float) -> Tensor:
    """One Runge-Kutta step of x' = g(t) - 0.1 x for columns (x, g(t), g(t + step / 2), g(t + step)) of `values`."""
    now, early, middle, late = values
    k1 = early - 0.1 * now
    k2 = middle - 0.1 * (now + step / 2 * k1)
    k3 = middle - 0.1 * (now + step / 2 * k2)
    k4 = late - 0.1 * (now + step * k3)
    return now + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def lorenz_intensity(length: int, *, series: int = 1, interval: float = 0.05, seed: int = 0) -> Tensor:
    """A simulated stand-in for a chaotic laser's intensity, whole numbers 0 to 255: float64 (series, length).

    x^2 of Lorenz' system (10, 28, 8/3), which is the equation of a single-mode laser (Haken, 1975), sampled every
    `interval` time units, scaled per series and rounded; Runge-Kutta with steps of at most 0.01.
    """
    if interval <= 0 or length < 2:
        raise InputError(f"{length} samples every {interval}: at least 2 samples and an interval above 0")
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64).expand(series, 3)
    x = x + torch.rand(series, 3, generator=generator, dtype=torch.float64)
    inner = math.ceil(interval / 0.01)
    step = interval / inner

    def slope(p: Tensor) -> Tensor:
        a, b, c = p.unbind(1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], 1)

    discarded = math.ceil(20 / interval)
    kept = torch.empty(length, series, dtype=torch.float64)
    for t in range(-discarded, length):
        if t >= 0:
            kept[t] = x[:, 0] ** 2
        for _ in range(inner):
            k1 = slope(x)
            k2 = slope(x + step / 2 * k1)
            k3 = slope(x + step / 2 * k2)
            k4 = slope(x + step * k3)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return (255 * kept / kept.amax(0)).round().T.contiguous()


def multi_scale(
    length: int, *, taus: Sequence[float] = TAUS, series: int = 1, product: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Independent inputs in [0, 1) and a target with exactly known time scales, both (series, length).

    For each tau the exponential average m_t = exp(-1/tau) m_{t-1} + (1 - exp(-1/tau)) s_t is standardised; the target
    is their sum, or with `product` the product of the fastest and the slowest.
    """
    if not taus or min(taus) <= 0:
        raise InputError(f"taus {tuple(taus)}: one or more, each above 0")
    signal = uniform_signal(length, series=series, seed=seed)
    decay = torch.exp(-1 / torch.tensor(taus, dtype=torch.float64))[:, None]
    averages = torch.empty(length, len(taus), series, dtype=torch.float64)
    now = torch.full((len(taus), series), 0.5, dtype=torch.float64)
    for t, value in enumerate(signal.T):
        now = decay * now + (1 - decay) * value
        averages[t] = now
    scaled = (averages - averages.mean(0)) / averages.std(0)
    target = scaled[:, 0] * scaled[:, -1] if product else scaled.sum(1)
    return signal, target.T.contiguous()


def nrmse(predicted: Tensor, target: Tensor) -> float:
    """Root of the mean squared error over the target's standard deviation. InputError as `scores.scores`."""
    check_pair(predicted, target)
    deviation = float(target.std(correction=0))
    if not deviation > 0:
        raise InputError("the target is constant, so its NRMSE is not defined")
    return float((predicted - target).square().mean().sqrt()) / deviation
