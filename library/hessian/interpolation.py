"""The loss on straight lines and planes between solutions: is there a barrier between two minima?

Source: the line test of Goodfellow, Vinyals, Saxe, 2015; Keskar et al., 2017, for large and small batches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError, NonFiniteError
from library.recipe import to_device
from library.spectral.differentiation import evaluation_mode
from library.spectral.operators import as_batches, as_pair, output_and_loss

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Line:
    """Losses at (1 - a) w0 + a w1: `positions` a and `losses`, both (points,); accuracies when labels are classes."""

    positions: Tensor
    losses: Tensor
    accuracies: Tensor | None

    @property
    def barrier(self) -> float:
        """max over 0 <= a <= 1 of L(a) - [(1 - a) L(0) + a L(1)]: how far the line rises above its chord, at least 0.

        The chord joins the positions nearest to the two states. Raises InputError when fewer than two positions lie
        between the states, and NonFiniteError for a loss there that is not finite.
        """
        at, losses = self._inside()
        chord = losses[0] + (losses[-1] - losses[0]) * (at - at[0]) / (at[-1] - at[0])
        return float((losses - chord).max().clamp(min=0))

    @property
    def monotone(self) -> bool:
        """Whether the loss never turns from one state to the other, up to rounding. Raises as `barrier` does."""
        steps = self._inside()[1].diff()
        slack = 1e-6 * float(self.losses.abs().max())
        return bool((steps <= slack).all() or (steps >= -slack).all())

    def _inside(self) -> tuple[Tensor, Tensor]:
        """Positions and losses between the two states."""
        inside = (self.positions > -1e-9) & (self.positions < 1 + 1e-9)
        if int(inside.sum()) < 2:
            raise InputError(
                "the line has fewer than 2 points between its states; take more points, or less beyond them"
            )
        if not bool(torch.isfinite(self.losses[inside]).all()):
            raise NonFiniteError("a loss between the line's two states is not finite")
        return self.positions[inside], self.losses[inside]


def interpolate(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    first: Weights,
    last: Weights,
    *,
    points: int = 25,
    beyond: float = 0.0,
    normalisation_data: Iterable[tuple[Any, Any]] | None = None,
) -> Line:
    """The loss on the straight line between two states of `model` (`state_dict`s, or parameters alone by name).

    The `points` positions reach from -`beyond` to 1 + `beyond`. `loss` is the mean over a batch of pairs (input,
    target) of `data`, weighted by their lengths. With batch normalisation its statistics belong to neither point: they
    are taken anew at each point over `normalisation_data`. The model is left as it was. Raises InputError for fewer
    than two points, or states that do not fit the model.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> ends = [{"weight": torch.tensor([[w]])} for w in (-1.0, 1.0)]
    >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    >>> interpolate(model, nn.functional.mse_loss, data, *ends, points=3).losses.tolist()  # w^2
    [1.0, 0.0, 1.0]
    """
    if points < 2 or not beyond >= 0:
        raise InputError(f"a line needs at least 2 points and beyond >= 0, got {points} and {beyond}")
    positions = torch.linspace(-beyond, 1 + beyond, points, dtype=torch.float64)
    found = [
        _evaluated(model, loss, data, _between(model, first, last, float(a)), normalisation_data) for a in positions
    ]
    losses, hits = zip(*found, strict=True)
    accuracies = None if None in hits else torch.tensor(hits, dtype=torch.float64)
    return Line(positions, torch.tensor(losses, dtype=torch.float64), accuracies)


def plane(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    corners: tuple[Weights, Weights, Weights],
    *,
    points: int = 15,
    margin: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Losses (points, points) on the plane through three states, and the coordinates (points,) of both its axes.

    Entry (i, j) is at w0 + x_i (w1 - w0) + x_j (w2 - w0); the axes reach `margin` beyond 0 and 1. Raises InputError for
    states that do not fit the model.
    """
    origin, right, up = corners
    _require_states(model, corners)
    places = torch.linspace(-margin, 1 + margin, points, dtype=torch.float64)
    losses = torch.empty(points, points, dtype=torch.float64)
    for i, x in enumerate(places):
        for j, y in enumerate(places):
            state = _between(model, origin, right, float(x))
            lifted = {name: state[name] + float(y) * (up[name] - origin[name]).to(state[name]) for name in state}
            losses[i, j] = _evaluated(model, loss, data, lifted, None)[0]
    return losses, places


def _between(model: nn.Module, first: Weights, last: Weights, position: float) -> dict[str, Tensor]:
    """The parameters at a place on the line; what is not a parameter is left to the model."""
    _require_states(model, (first, last))
    return {
        name: torch.lerp(first[name].to(value), last[name].to(value), position)
        for name, value in model.named_parameters()
    }


def _require_states(model: nn.Module, states: Sequence[Weights]) -> None:
    names = dict(model.named_parameters())
    missing = sorted(names.keys() - set.intersection(*(set(state) for state in states)))
    if missing:
        raise InputError(f"an end of the line lacks {missing[0]}, which the model has")
    for name, value in names.items():
        if any(state[name].shape != value.shape for state in states):
            raise InputError(f"{name} has another shape at an end of the line than in the model, {tuple(value.shape)}")


@torch.no_grad()
def _evaluated(
    model: nn.Module, loss: Any, data: Iterable[Any], state: Weights, normalisation_data: Iterable[Any] | None
) -> tuple[float, float | None]:
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    before = {name: value.detach().clone() for name, value in (*parameters.items(), *model.named_buffers())}
    try:
        for name, value in parameters.items():
            value.copy_(state[name])
        if normalisation_data is not None:
            _renew_statistics(model, normalisation_data, device)
        total, hits, units = 0.0, 0.0, 0
        with evaluation_mode(model):
            for batch in as_batches(data):
                source, target = to_device(as_pair(batch), device)
                output, value = output_and_loss(model, loss, source, target)
                total += float(value) * len(target)
                units += len(target)
                labelled = target.ndim == 1 and not target.is_floating_point() and output.ndim == 2
                hits += float((output.argmax(-1) == target).sum()) if labelled else float("nan")
        if not units:
            raise InputError("data: there are no samples")
        return total / units, hits / units if hits == hits else None
    finally:
        for name, value in (*parameters.items(), *model.named_buffers()):
            value.copy_(before[name])


def _renew_statistics(model: nn.Module, data: Iterable[Any], device: torch.device) -> None:
    """Means and variances of all batch normalisations, averaged over the data at the present weights."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(module, module.momentum, module.training) for module in layers]
    for module in layers:
        module.reset_running_stats()
        module.momentum = None  # a plain average
        module.train()
    try:
        for source, _ in data:
            model(to_device(source, device))
    finally:
        for module, momentum, training in before:
            module.momentum, module.training = momentum, training
