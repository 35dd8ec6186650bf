"""Layer-wise learning rates in any training: a recipe class in front of another takes its rates from the spectra.

Every few steps each worker analyses a share of the layers, all learn the exponents, and the factors of the layers'
rates go into a persistent buffer of the model, so that a resumed run has them. The schedule, which goes on before
`after_step` does, multiplies the recipe's own rates by them from its next step on: one update later.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from library import collective
from library.errors import InputError
from library.farms.analysis import Settings, analyze_layer
from library.farms.layers import Layer, find_layers
from library.farms.rates import Map, rate_factors
from library.recipe import unwrap

BUFFER = "rate_factors"


class Balance(BaseModel, frozen=True, extra="forbid"):
    """When exponents are taken, of which layers and how, and how they become learning rates."""

    every: PositiveInt = 100
    """Steps between two choices of the rates (an epoch, as published)."""
    rule: Map = "linear"
    """TempBalance's linear, sqrt, log2 or step, or the sigmoid of Model Balancing (TB_Sigmoid)."""
    low: float = Field(0.5, gt=0, lt=2)
    """Factor of the layer with the heaviest tail (linear, step)."""
    high: float | None = Field(None, gt=0)
    """Factor of the layer with the lightest tail (linear, step); None is 2 - low, as published."""
    strength: tuple[float, float] = (0.125, 0.125)
    """Decades between the extremes below and above the mean alpha (sigmoid)."""
    sharpness: float = Field(10.0, gt=0)
    """How fast the sigmoid rises with alpha."""
    first: bool = True
    """Tune the first layer too; else it keeps the global rate."""
    last: bool = True
    """Tune the last layer too; else it keeps the global rate."""
    analysis: Settings = Settings.image_classifiers()
    """How exponents are taken; method plain is TempBalance as first published."""

    def factors(self, alphas: list[float]) -> Tensor:
        """The factor of each layer."""
        left_out = ([] if self.first else [0]) + ([] if self.last else [len(alphas) - 1])
        kept = [float("nan") if i in left_out else alpha for i, alpha in enumerate(alphas)]
        high = 2 - self.low if self.high is None else self.high
        settings = {"low": self.low, "high": high, "strength": self.strength, "sharpness": self.sharpness}
        return rate_factors(kept, self.rule, **settings)


class Balanced(BaseModel, frozen=True, extra="forbid"):
    """Put in front of a recipe class, `class BalancedNet(Balanced, NetRecipe)`, this gives every layer its own rate.

    Layers are the model's linear and convolutional ones with their biases; a batch norm goes with the convolution
    before it. All engines that keep whole weights, or can gather them, do: ddp, fsdp, zero1, zero2.
    """

    balance: Balance = Balance()
    """Which rates layers get, and when."""

    def model(self) -> nn.Module:
        model = super().model()
        factors = torch.ones(len(find_layers(model)), dtype=torch.float64)
        model.register_buffer(BUFFER, factors)
        model._apply = MethodType(_apply, model)  # of this model alone, whose class is the recipe's affair
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        optimizer = super().optimizer(model)
        groups, numbers = _split(optimizer.param_groups, _layer_numbers(unwrap(model)))
        optimizer.param_groups[:] = groups
        optimizer.layer_numbers = numbers
        optimizer.balanced_model = unwrap(model)
        return optimizer

    def schedule(self, optimizer: Optimizer) -> "BalancedSchedule":
        return BalancedSchedule(optimizer, super().schedule(optimizer))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        metrics = super().after_step(model, step) or {}
        if step % self.balance.every:
            return metrics or None
        inner = unwrap(model)
        alphas = shared_alphas(find_layers(inner), self.balance.analysis)
        getattr(inner, BUFFER).copy_(self.balance.factors(alphas))
        known = [alpha for alpha in alphas if alpha == alpha]
        if not known:
            return metrics or None
        return metrics | {"alpha_mean": sum(known) / len(known), "alpha_min": min(known), "alpha_max": max(known)}


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """A module's own `_apply`, by which it is moved and cast, but factors keep their float64."""
    before = self._buffers[BUFFER]
    type(self)._apply(self, fn, recurse)
    after = self._buffers[BUFFER]
    if after.dtype != before.dtype:
        self._buffers[BUFFER] = before.to(after.device)
    return self


class BalancedSchedule:
    """A recipe's schedule, times each group's factor. It has what the loop calls of a torch scheduler."""

    def __init__(self, optimizer: Optimizer, inner: Any) -> None:
        self.optimizer, self.inner = optimizer, inner
        self.plain = [group["lr"] for group in optimizer.param_groups]
        self._scale()

    def step(self) -> None:
        """Let the recipe's own schedule go one step on its own rates, then multiply them."""
        for group, rate in zip(self.optimizer.param_groups, self.plain, strict=True):
            group["lr"] = rate
        if self.inner is not None:
            self.inner.step()
        self.plain = [group["lr"] for group in self.optimizer.param_groups]
        self._scale()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the rates before the factors, and the recipe's own schedule."""
        return {"plain": self.plain, "inner": None if self.inner is None else self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.plain = list(state["plain"])
        if self.inner is not None:
            self.inner.load_state_dict(state["inner"])

    def _scale(self) -> None:
        factors = getattr(self.optimizer.balanced_model, BUFFER).tolist()
        for group, rate, number in zip(
            self.optimizer.param_groups, self.plain, self.optimizer.layer_numbers, strict=True
        ):
            group["lr"] = rate * (1.0 if number is None else factors[number])


def shared_alphas(layers: list[Layer], settings: Settings) -> list[float]:
    """The exponent of each layer, nan where there is none; workers share the work, the largest layers first.

    Raises InputError, on every worker alike, for weights that are not finite, and for an engine that keeps weights in
    parts which cannot be gathered (zero3).
    """
    order = sorted(range(len(layers)), key=lambda i: (-layers[i].parameters, i))
    ranks, me = collective.world_size(), collective.rank()
    found: dict[int, float] = {}
    faults: list[str] = []
    for place, number in enumerate(order):
        layer = layers[number]
        if hasattr(layer.tensor, "ds_id"):
            raise InputError("layer-wise rates need whole weights, which zero3 keeps in parts; use zero2, fsdp or ddp")
        whole = getattr(layer.tensor, "full_tensor", None)
        if whole is not None:  # every worker takes part in gathering it
            layer = Layer(layer.name, layer.kind, layer.shape, layer.transposed, whole())
        if place % ranks == me:
            try:
                found[number] = analyze_layer(layer, settings)["alpha"]
            except InputError as error:  # told to all workers, of which none may stop alone
                faults.append(str(error))
    parts = collective.all_gather((found, faults))
    if faults := [fault for _, own in parts for fault in own]:
        raise InputError(faults[0])
    gathered = {number: alpha for part, _ in parts for number, alpha in part.items()}
    return [gathered[number] for number in range(len(layers))]


def _layer_numbers(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> number of the layer whose rate it takes."""
    numbers: dict[int, int] = {}
    weights = {id(layer.tensor): number for number, layer in enumerate(find_layers(model))}
    current: int | None = None
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        here = next((weights[id(p)] for p in own if id(p) in weights), None)
        if here is not None:
            current = here
        if here is not None or (isinstance(module, _BatchNorm) and current is not None):
            numbers |= {id(p): current for p in own}
    return numbers


def _split(groups: list[dict[str, Any]], numbers: dict[int, int]) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Each group cut into one per layer, and which layer that is; None for what belongs to no layer."""
    parts = [(group, number, own) for group in groups for number, own in _by_layer(group["params"], numbers)]
    return [{**group, "params": own} for group, _, own in parts], [number for _, number, _ in parts]


def _by_layer(parameters: list[Tensor], numbers: dict[int, int]) -> Iterator[tuple[int | None, list[Tensor]]]:
    found: dict[int | None, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault(numbers.get(id(parameter)), []).append(parameter)
    yield from found.items()
