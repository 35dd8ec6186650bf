"""Large and small batches: do they end in different basins? Train with one, go on with the other, look at the line.

Source: Sagun et al. 2017, section on large and small batches; the usual evidence for different basins compares two
separate runs instead (Keskar et al. 2017).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor, nn

from library.errors import InputError, NonFiniteError
from library.hessian.interpolation import Line, interpolate
from library.images import load_images

Run = Literal["large", "large then small", "large continued", "small alone"]
LINES: dict[str, tuple[Run, Run]] = {
    "large to its small-batch continuation": ("large", "large then small"),
    "large continued to the small-batch continuation": ("large continued", "large then small"),
    "large to a separate small-batch run": ("large", "small alone"),
}


class Basins(BaseModel, frozen=True, extra="forbid"):
    """The experiment's size: a network of one hidden layer on real images (Fashion-MNIST)."""

    images: PositiveInt = 2000
    """Training images; half as many test."""
    hidden_units: PositiveInt = 64
    """Width of the hidden layer."""
    step_size: PositiveFloat = 0.05
    """Learning rate of all runs."""
    large_batch: PositiveInt = 1000
    """Images per step of the large-batch run."""
    large_steps: PositiveInt = 600
    """Its steps, until the loss is nearly flat."""
    continued_steps: PositiveInt = 1200
    """Further steps of the large-batch run that simply goes on."""
    small_batch: PositiveInt = 10
    """Images per step of the small-batch runs."""
    small_steps: PositiveInt = 4000
    """Their steps."""
    line_points: PositiveInt = 41
    """Points on each line."""


@dataclass(frozen=True)
class Basin:
    """One seed: training and test loss at the end of each run, and the lines of `LINES` on the training loss."""

    seed: int
    train: dict[Run, float]
    test: dict[Run, float]
    lines: dict[str, Line]


def measure_basins(settings: Basins, seed: int) -> Basin:
    """Train the four runs from one initial point and evaluate the loss along the lines between their ends."""
    data, test = _images(settings, seed)
    if settings.large_batch > settings.images:
        raise InputError(f"large_batch {settings.large_batch} is more than the {settings.images} images")
    model = _network(data[0].shape[1], settings.hidden_units, seed)
    draw = torch.Generator().manual_seed(seed)
    large, small = settings.large_batch, settings.small_batch
    start = _state(model)
    ends: dict[Run, dict[str, Tensor]] = {}
    ends["large"] = _trained(model, start, data, settings.large_steps, large, settings.step_size, draw)
    ends["large then small"] = _trained(
        model, ends["large"], data, settings.small_steps, small, settings.step_size, draw
    )
    ends["large continued"] = _trained(
        model, ends["large"], data, settings.continued_steps, large, settings.step_size, draw
    )
    ends["small alone"] = _trained(model, start, data, settings.small_steps, small, settings.step_size, draw)
    lines = {
        name: interpolate(model, F.cross_entropy, [data], ends[a], ends[b], points=settings.line_points)
        for name, (a, b) in LINES.items()
    }
    return Basin(seed, _losses(model, ends, data), _losses(model, ends, test), lines)


def _images(settings: Basins, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    sets, draw = load_images(), torch.Generator().manual_seed(seed)
    parts = []
    for part, count in ((sets.train, settings.images), (sets.test, settings.images // 2)):
        if count > len(part):
            raise InputError(f"{count} images are asked for, the sample has {len(part)}")
        chosen = torch.randperm(len(part), generator=draw)[:count]
        pixels = (part.pixels[chosen].float().flatten(1) / 255 - sets.mean[0]) / sets.std[0]
        parts.append((pixels, part.labels[chosen]))
    return parts[0], parts[1]


def _network(width: int, hidden: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def _trained(
    model: nn.Module,
    start: dict[str, Tensor],
    data: tuple[Tensor, Tensor],
    steps: int,
    batch: int,
    rate: float,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Plain stochastic gradient descent from a state, batches drawn anew at every step; the state at its end."""
    model.load_state_dict(start)
    parameters = list(model.parameters())
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (batch,), generator=draw)
        loss = F.cross_entropy(model(data[0][chosen]), data[1][chosen])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-rate)
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss of a run with batches of {batch} is {float(loss)}; lower step_size {rate:g}")
    return _state(model)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _losses(model: nn.Module, ends: dict[Run, dict[str, Tensor]], data: tuple[Tensor, Tensor]) -> dict[Run, float]:
    found = {}
    for name, state in ends.items():
        model.load_state_dict(state)
        found[name] = float(F.cross_entropy(model(data[0]), data[1]))
    return found
