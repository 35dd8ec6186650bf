"""Curvature with respect to a layer's input: each sample's own Hessian, all samples in one product.

The Hessian of the summed loss with respect to the activations of N samples is block diagonal over the samples, since
in evaluation mode one sample's activations do not enter another's loss. So one product with a stack of N probes,
differentiating the summed loss with respect to the activation tensor, gives every sample's H_n z_n as a row.
Source: HAWQ-V2, Dong et al., NeurIPS 2020, section on activations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError, NonFiniteError
from library.hawq.curvature import Loss
from library.hawq.layers import quantizable_layers
from library.recipe import to_device
from library.spectral.differentiation import evaluation_mode


def activation_forms(
    model: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any],
    layers: Sequence[str] | None = None,
    *,
    generator: torch.Generator,
    probes: int = 1,
) -> dict[str, Tensor]:
    """z_n' H_n z_n of every layer, probe and sample, float64 (probes, samples) by layer; H_n is of sample n's own loss.

    `loss(output, target)` must be the mean over samples. Divide by the size of one activation for the average trace.
    """
    found = {name: [] for name in quantizable_layers(model, layers)}
    with evaluation_mode(model), torch.enable_grad():
        inputs, summed = _recorded_inputs(model, loss, batch, list(found))
        slopes = torch.autograd.grad(summed, list(inputs.values()), create_graph=True)
        for _ in range(probes):
            for (name, value), slope in zip(inputs.items(), slopes, strict=True):
                z = (2 * torch.randint(0, 2, value.shape, generator=generator) - 1).to(value)
                found[name].append((z * hessian_rows(slope, value, z)).double().flatten(1).sum(1))
    forms = {name: torch.stack(rows) for name, rows in found.items()}
    if not all(bool(torch.isfinite(rows).all()) for rows in forms.values()):
        raise NonFiniteError("an activation trace is not finite")
    return forms


def activation_products(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """H_n v_n for every sample n, by layer: `vectors` are (samples, *activation), and so are the results."""
    with evaluation_mode(model), torch.enable_grad():
        inputs, summed = _recorded_inputs(model, loss, batch, list(vectors))
        slopes = torch.autograd.grad(summed, list(inputs.values()), create_graph=True)
        return {
            name: hessian_rows(slope, value, vectors[name].to(value))
            for (name, value), slope in zip(inputs.items(), slopes, strict=True)
        }


def hessian_rows(slope: Tensor, value: Tensor, vectors: Tensor) -> Tensor:
    """d(slope . vectors)/d value, in the shape of `value`; 0 where the slope does not depend on it."""
    if not slope.requires_grad:
        return torch.zeros_like(value)
    [found] = torch.autograd.grad(slope, value, vectors, retain_graph=True, allow_unused=True)
    return torch.zeros_like(value) if found is None else found


def _recorded_inputs(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], names: list[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """The input tensor of each layer, and the loss summed over samples, on one graph."""
    layers = quantizable_layers(model, names)
    device = next(iter(layers.values())).weight.device
    source, target = to_device(batch, device)
    inputs: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            if name in inputs:
                raise InputError(f"layer {name!r} is used twice in one pass; its activations have no single trace")
            value = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
            inputs[name] = value
            return value, *arguments[1:]

        return record

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in layers.items()]
    try:
        output = model(source)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in inputs]
    if missing:
        raise InputError(f"layer {missing[0]!r} takes no part in the forward pass")
    return {name: inputs[name] for name in names}, loss(output, target) * len(output)
