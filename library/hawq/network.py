"""Quantised networks: layers that compute with quantised weights and inputs, and turning a network into one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import InputError
from library.hawq.activations import ActivationQuantizer, ActivationSettings
from library.hawq.costs import BitChoice
from library.hawq.layers import QUANTIZABLE, quantizable_layers
from library.hawq.plan import BitPlan
from library.hawq.quantizers import Grid, WeightQuantizer, straight_through
from library.spectral.differentiation import evaluation_mode

BIAS_LEVELS = 2.0**31  # biases are 32-bit integers of scale (input scale) x (weight scale)


class QuantizedLayer(nn.Module):
    """What quantised layers share: bits, quantisers, and whether they are in force.

    The weight stays in full precision for training, and its gradient passes straight through the quantiser. The
    buffer `active`, part of the state, is 0 while the layer still computes in full precision.
    """

    weight: Tensor
    bias: Tensor | None
    active: Tensor

    def prepare(
        self, choice: BitChoice, quantizer: WeightQuantizer, activations: ActivationSettings | None
    ) -> "QuantizedLayer":
        """Set the bits; inputs stay in full precision when `activations` is None."""
        self.bits, self.quantizer = choice, quantizer
        made = ActivationQuantizer(choice.activation, activations) if activations else None
        self.input = made and made.fit(self.weight)
        self.held = False
        self.register_buffer("active", torch.ones((), dtype=torch.uint8, device=self.weight.device))
        return self

    def hold(self) -> None:
        """Take the weight as quantised already, as it is when it was read from integers."""
        self.held = True

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias as the integers stand for them; as they are while not active."""
        calibrating = self.input is not None and self.input.calibrating
        if calibrating:
            self.input.observe(x)
        if calibrating or not bool(self.active):
            return x, self.weight, self.bias
        if self.held:
            return (x if self.input is None else self.input(x)), self.weight, self.bias
        grid = self.quantizer.grid(self.weight, self.bits.weight)
        values = grid.values(grid.integers(self.quantizer.rows(self.weight.detach())))
        weight = straight_through(self.weight, values.reshape(self.weight.shape).to(self.weight.dtype))
        if self.input is None:
            return x, weight, self.bias
        return self.input(x), weight, self.rounded_bias(grid)

    def rounded_bias(self, grid: Grid | None = None) -> Tensor | None:
        """The bias in whole multiples of (input scale) x (weight scale), as 32-bit integers hold it."""
        if self.bias is None or self.held:
            return self.bias
        grid = grid or self.quantizer.grid(self.weight, self.bits.weight)
        scale = self.input.scale() * grid.scale.flatten()
        integers = torch.round(self.bias.detach() / scale).clamp(-BIAS_LEVELS, BIAS_LEVELS - 1)
        return straight_through(self.bias, integers * scale)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A convolution over sequences with quantised weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.quantized(x)
        return self._conv_forward(x, weight, bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution over images with quantised weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.quantized(x)
        return self._conv_forward(x, weight, bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantised weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self.quantized(x))


KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}


def quantize(
    model: nn.Module,
    plan: BitPlan | Mapping[str, int | BitChoice],
    *,
    quantizer: WeightQuantizer | None = None,
    activations: ActivationSettings | None = None,
    calibration: Iterable[Any] = (),
) -> nn.Module:
    """A quantised copy of `model` with the bits of a plan, or of a mapping from layer names to bits.

    Layers that the plan does not name stay as they are. With `activations` the named layers' inputs are quantised too,
    in static ranges that are observed on the `calibration` inputs. Raises InputError for names that are no layers,
    bits that are not allowed, layers that share one weight, or activations without calibration.

    >>> from library.images import image_network
    >>> small = quantize(image_network("cnn8"), {"head": 4})
    >>> small.head.weight.unique().numel() > 16 >= small.head.quantized(torch.zeros(1, 64))[1][0].unique().numel()
    True
    """
    copy = converted(deepcopy(model), plan_choices(plan), quantizer=quantizer, activations=activations)
    if activations is not None:
        calibrate(copy, calibration)
    return copy


def converted(
    model: nn.Module,
    choices: Mapping[str, BitChoice],
    *,
    quantizer: WeightQuantizer | None,
    activations: ActivationSettings | None,
) -> nn.Module:
    """The same model with the named layers turned into quantised ones, in place; ranges are not known yet.

    Raises InputError for a kind of layer that is not known, and for one that shares its weight with another layer.
    """
    for name, layer in quantizable_layers(model, list(choices)).items():
        kind = next((made for base, made in KINDS.items() if type(layer) is base), None)
        if kind is None:
            raise InputError(f"layer {name!r} is a {type(layer).__name__}, a kind that is not known; leave it out")
        _require_own_weight(model, name, layer)
        layer.__class__ = kind
        layer.prepare(choices[name], quantizer or WeightQuantizer(), activations)
    return model


def _require_own_weight(model: nn.Module, name: str, layer: nn.Module) -> None:
    for other, module in model.named_modules():
        if module is not layer and isinstance(module, QUANTIZABLE) and module.weight is layer.weight:
            raise InputError(
                f"layers {name!r} and {other!r} share one weight; leave {name!r} out, or give each its own"
            )


def plan_choices(plan: BitPlan | Mapping[str, int | BitChoice]) -> dict[str, BitChoice]:
    """The bits of each layer that a plan names."""
    if isinstance(plan, BitPlan):
        return dict(zip(plan.layers.names, plan.choices, strict=True))
    return {name: entry if isinstance(entry, BitChoice) else BitChoice(entry) for name, entry in plan.items()}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of a network by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Iterable[Any]) -> None:
    """Observe the inputs of every quantised layer in full precision, and fix their ranges.

    Raises InputError when there are no inputs, or a layer saw none.
    """
    quantizers = {name: layer.input for name, layer in quantized_layers(model).items() if layer.input is not None}
    try:
        for each in quantizers.values():
            each.calibrating = True
        with evaluation_mode(model):
            for batch in inputs:
                model(batch)
    finally:
        for each in quantizers.values():
            each.calibrating = False
    unseen = [name for name, each in quantizers.items() if bool(each.low.isnan())]
    if unseen:
        raise InputError(f"layer {unseen[0]!r} saw no input to calibrate its range on; give calibration batches")


@contextmanager
def all_active(model: nn.Module) -> Iterator[None]:
    """Inside the block every layer is quantised, whatever stage of fine-tuning the network is in."""
    layers = list(quantized_layers(model).values())
    before = [layer.active.clone() for layer in layers]
    try:
        for layer in layers:
            layer.active.fill_(1)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.active.copy_(value)


def set_active(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Quantise the layers whose name is chosen, and let the others compute in full precision."""
    for name, layer in quantized_layers(model).items():
        layer.active.fill_(int(chosen(name)))
