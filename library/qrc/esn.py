"""Echo state networks: a fixed random recurrent layer, plain or in segregated groups of units ("onion").

    x_t = (1 - leak) x_{t-1} + leak tanh(W x_{t-1} + W_in v_t + beta)

W is Gaussian, scaled to a spectral radius; W_in and beta are uniform in +- `input_scale`. An onion's W is block
diagonal, and block k has its eigenvalues in an annulus lo_k <= |lambda| <= hi_k: of a Gaussian block G = V diag(l) V^-1
with spectral radius r, moduli become sqrt(lo^2 + (hi^2 - lo^2) (|l| / r)^2) with phases kept.

Sources: Jaeger, "The echo state approach", GMD report 148, 2001; Tortorella and Micheli, "Onion Echo State Networks",
ICANN 2024, whose abstract gives the idea of the annuli; the map of moduli is ours.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from library.errors import InputError

Fraction = Annotated[float, Field(ge=0, le=1)]
THIRDS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))


class EchoState(BaseModel, frozen=True, extra="forbid"):
    """A classical reservoir's configuration; what it computes depends on it alone.

    >>> EchoState(units=4).drive(torch.zeros(1, 3, 2, dtype=torch.float64))[0].shape
    torch.Size([1, 3, 4])
    """

    type: Literal["echo-state"] = "echo-state"
    units: PositiveInt = 30
    """Units, which are also the features."""
    spectral_radius: float = Field(0.9, gt=0, allow_inf_nan=False)
    """Largest modulus of W's eigenvalues; below 1 the state forgets its start in practice."""
    leak: float = Field(0.3, gt=0, le=1)
    """Share of a state that is renewed each step."""
    input_scale: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Largest input weight and bias."""
    density: float = Field(1.0, gt=0, le=1)
    """Share of W's entries that are not zero."""
    annuli: tuple[tuple[Fraction, Fraction], ...] = ()
    """Least and largest modulus of each group's eigenvalues as shares of the spectral radius; none is one group."""
    seed: NonNegativeInt = 0
    """Seed of the weights."""

    @model_validator(mode="after")
    def _groups(self) -> "EchoState":
        if any(low >= high for low, high in self.annuli):
            raise ValueError(f"annuli: {self.annuli}; each is a smaller and a larger share of the spectral radius")
        if len(self.annuli) > self.units:
            raise ValueError(f"{len(self.annuli)} annuli need as many units, there are {self.units}")
        if self.annuli and self.density < 1:
            raise ValueError("density: groups with annuli are dense; leave it at 1")
        return self

    @property
    def width(self) -> int:
        """Number of features."""
        return self.units

    def start(self, series: int) -> Tensor:
        """The state before the first input, zero: (series, units)."""
        return torch.zeros(series, self.units, dtype=torch.float64)

    def drive(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (series, time, units) for inputs (series, time, channels), and the last of them.

        Raises InputError for inputs of another shape or that are not finite, and for such a state.
        """
        [features], [last] = drive_echo_states([self], inputs, None if state is None else [state])
        return features, last

    def weights(self, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """W (units, units), W_in (units, channels) and beta (units,), on the CPU; not to be written to."""
        return _weights(self, channels)

    def describe(self) -> dict[str, Any]:
        """What it is, with the moduli of its eigenvalues and its longest time scale.

        They are those of (1 - leak) I + leak W, the state's own dynamics at rest.
        """
        own = (1 - self.leak) * torch.eye(self.units, dtype=torch.float64) + self.leak * self.weights(1)[0]
        moduli = torch.linalg.eigvals(own).abs()
        largest = float(moduli.max())
        return {
            "reservoir": "onion echo state network" if self.annuli else "echo state network",
            "features": self.units,
            "annulus": (float(moduli.min()), largest),
            "tau": math.inf if largest >= 1 else -1 / math.log(largest) if largest > 0 else 0.0,
        }


def drive_echo_states(
    reservoirs: Sequence[EchoState], inputs: Tensor | Sequence[Tensor], states: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """States and last states of many networks, those of equal size in one batch.

    inputs are (series, time, channels), shared by all networks or one for each.
    """
    own = [inputs] * len(reservoirs) if isinstance(inputs, Tensor) else list(inputs)
    if states is not None and len(states) != len(reservoirs):
        raise InputError(f"{len(states)} states for {len(reservoirs)} reservoirs")
    for each in {id(each): each for each in own}.values():
        _check(each)
    groups: dict[tuple[int, torch.Size], list[int]] = {}
    for place, (reservoir, each) in enumerate(zip(reservoirs, own, strict=True)):
        groups.setdefault((reservoir.units, each.shape), []).append(place)
    features: list[Any] = [None] * len(reservoirs)
    last: list[Any] = [None] * len(reservoirs)
    for (units, (series, _, channels)), places in groups.items():
        drawn = [reservoirs[i].weights(channels) for i in places]
        device = own[places[0]].device
        weights, entry, bias = (torch.stack(parts).to(device) for parts in zip(*drawn, strict=True))
        leaks = torch.tensor([reservoirs[i].leak for i in places], dtype=torch.float64, device=device)
        begin = torch.zeros(len(places), series, units, dtype=torch.float64, device=device)
        if states is not None:
            begin = torch.stack([_checked_state(states[i], series, units).to(begin) for i in places])
        if isinstance(inputs, Tensor):
            drive = torch.einsum("stc,knc->tksn", inputs, entry)
        else:
            drive = torch.einsum("kstc,knc->tksn", torch.stack([own[i] for i in places]), entry)
        found = run(drive + bias[:, None], weights, leaks, begin)
        for place, states_of_one in zip(places, found.movedim(0, 2), strict=True):  # (series, time, units) each
            features[place], last[place] = states_of_one, states_of_one[:, -1]
    return features, last


def run(drive: Tensor, weights: Tensor, leaks: Tensor, start: Tensor) -> Tensor:
    """The recursion itself: states (time, networks, series, units).

    drive    (time, networks, series, units), W_in v_t + beta
    weights  (networks, units, units), leaks (networks,), start (networks, series, units)
    """
    transposed = weights.mT.contiguous()
    states = torch.empty_like(drive)
    before, leak = start, leaks[:, None, None].expand_as(start).contiguous()
    for now, pushed in zip(states, drive, strict=True):
        torch.lerp(before, torch.baddbmm(pushed, before, transposed).tanh_(), leak, out=now)
        before = now
    return states


@lru_cache(maxsize=512)
def _weights(reservoir: EchoState, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(reservoir.seed)
    units, scale = reservoir.units, reservoir.input_scale

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * scale

    if reservoir.annuli:
        sizes = [len(part) for part in torch.arange(units).tensor_split(len(reservoir.annuli))]
        blocks = [_annulus(size, *shares, generator) for size, shares in zip(sizes, reservoir.annuli, strict=True)]
        recurrent = torch.block_diag(*blocks) * reservoir.spectral_radius
    else:
        recurrent = torch.randn(units, units, generator=generator, dtype=torch.float64)
        if reservoir.density < 1:
            recurrent *= torch.rand(units, units, generator=generator) < reservoir.density
        recurrent *= reservoir.spectral_radius / float(torch.linalg.eigvals(recurrent).abs().max().clamp(min=1e-300))
    return recurrent, uniform(units, channels), uniform(units)


def _annulus(size: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A real matrix with eigenvalues in an annulus."""
    values, vectors = torch.linalg.eig(torch.randn(size, size, generator=generator, dtype=torch.float64))
    moduli = values.abs()
    mapped = (low**2 + (high**2 - low**2) * (moduli / moduli.max()) ** 2).sqrt()
    return (vectors @ torch.diag(values * mapped / moduli.clamp(min=1e-300)) @ torch.linalg.inv(vectors)).real


def _checked_state(state: Tensor, series: int, units: int) -> Tensor:
    if state.shape != (series, units):
        raise InputError(f"the state has shape {tuple(state.shape)}; this reservoir and input take {(series, units)}")
    if not torch.isfinite(state).all():
        raise InputError("the state holds numbers that are not finite")
    return state


def _check(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):
        raise InputError(f"inputs are a {type(inputs).__name__}; needed is a float64 tensor (series, time, channels)")
    if inputs.ndim != 3 or not inputs.shape[1] or inputs.dtype != torch.float64:
        raise InputError(
            f"inputs are {inputs.dtype} {tuple(inputs.shape)}; needed is float64 (series, time, channels), time >= 1"
        )
    if not torch.isfinite(inputs).all():
        raise InputError("inputs: some are not finite")
