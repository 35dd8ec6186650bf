"""Layers that can be quantised: finding them, what they cost, and taking batch norm into convolutions."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.recipe import to_device
from library.spectral.differentiation import evaluation_mode

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
FOLDED_AGREEMENT = 1e-3  # largest change of an output, relative to the largest output, that rounding may cause


@dataclass(frozen=True)
class LayerTable:
    """The layers of a network in the order of its modules: names, weight entries, multiply-accumulates per sample."""

    names: tuple[str, ...]
    n_params: tuple[int, ...]
    macs: tuple[int, ...]

    def index(self, names: Sequence[str]) -> list[int]:
        """Places of layers by name. Raises InputError that lists the layers."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise InputError(f"there is no layer {unknown[0]!r}; layers are {', '.join(self.names)}")
        return [self.names.index(name) for name in names]


def quantizable_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name; a weight that two layers share counts once, under its first name.

    `names` restricts to these. Raises InputError when there is none, or for a name that is no such layer.
    """
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    if names is not None:
        unknown = [name for name in names if name not in found]
        if unknown:
            raise InputError(f"{unknown[0]!r} is no layer that can be quantised; those are {', '.join(found)}")
        found = {name: module for name, module in found.items() if name in set(names)}
    if not found:
        raise InputError("the model has no convolution and no linear layer to quantise")
    return found


@torch.no_grad()
def layer_table(model: nn.Module, inputs: Any, names: Sequence[str] | None = None) -> LayerTable:
    """The layers of `model`, with multiply-accumulates counted on `inputs` and divided by its number of samples.

    `inputs` is a tensor, or a mapping or sequence that begins with one. Raises InputError when it has no samples.
    """
    layers, samples = quantizable_layers(model, names), _samples(inputs)
    macs = dict.fromkeys(layers, 0)

    def counter(name: str):
        def count(module: nn.Module, _: Any, output: Tensor) -> None:
            positions = output.numel() // (output.shape[1] if isinstance(module, nn.Conv1d | nn.Conv2d) else 1)
            per_output = module.weight[0].numel() * (len(module.weight) if not isinstance(module, nn.Linear) else 1)
            macs[name] += positions * per_output

        return count

    handles = [module.register_forward_hook(counter(name)) for name, module in layers.items()]
    try:
        with evaluation_mode(model):
            model(to_device(inputs, next(iter(layers.values())).weight.device))
    finally:
        for handle in handles:
            handle.remove()
    sizes = tuple(module.weight.numel() for module in layers.values())
    return LayerTable(tuple(layers), sizes, tuple(macs[name] // samples for name in layers))


def _samples(inputs: Any) -> int:
    """The number of samples in a batch of inputs, at least 1."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    first = inputs if isinstance(inputs, Tensor) else next(iter(values), None)
    if not isinstance(first, Tensor) or not first.ndim or not len(first):
        raise InputError(
            "inputs: a tensor, or a mapping or sequence that begins with one, of at least one sample is needed"
        )
    return len(first)


@torch.no_grad()
def fold_batch_norm(model: nn.Module, inputs: Any) -> list[str]:
    """Take every batch norm that directly follows a convolution into it, in place; names of the convolutions.

    w' = w gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; the batch norm becomes an identity.
    Which follows which is seen from one evaluation-mode pass over `inputs`. Raises InputError when the outputs would
    differ, which happens where a convolution's output is also used elsewhere; the model is then left as it was.
    """
    with evaluation_mode(model):
        before = model(inputs)
        pairs = _convolution_norm_pairs(model, inputs)
        after = _fold_pairs(deepcopy(model), pairs)(inputs)
    if not bool((after - before).abs().max() <= FOLDED_AGREEMENT * before.abs().max()):
        raise InputError(
            f"folding batch norm changed the outputs by {float((after - before).abs().max()):.3g}: a convolution's "
            "output is used beside its batch norm, so that this network cannot be folded"
        )
    _fold_pairs(model, pairs)
    return list(pairs)


def _convolution_norm_pairs(model: nn.Module, inputs: Any) -> dict[str, str]:
    """The name of the batch norm whose input is a convolution's output, by the convolution's name."""
    outputs: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    pairs: dict[str, str] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):

            def produced(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                kept.append(output)
                outputs[id(output)] = name

            handles.append(module.register_forward_hook(produced))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):

            def consumed(norm: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                source = outputs.get(id(arguments[0]))
                if source is not None:
                    if norm.running_var is None:
                        raise InputError(f"batch norm {name!r} keeps no running statistics, so it cannot be folded")
                    pairs[source] = name

            handles.append(module.register_forward_pre_hook(consumed))
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def _fold_pairs(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    for convolution, norm in pairs.items():
        _fold(model.get_submodule(convolution), model.get_submodule(norm))
        parent, _, child = norm.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shape = (-1, *[1] * (convolution.weight.ndim - 1))
    bias = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    bias = bias * factor + (0 if norm.bias is None else norm.bias)
    convolution.weight.mul_(factor.reshape(shape))
    if convolution.bias is None:
        convolution.bias = nn.Parameter(bias)
    else:
        convolution.bias.copy_(bias)
