"""Does the second-order prediction hold? The predicted change of the loss against the true one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.errors import NonFiniteError
from library.hawq.curvature import Loss
from library.hawq.network import all_active, quantized_layers
from library.hawq.plan import BitPlan
from library.recipe import to_device
from library.spectral import Hessian
from library.spectral.differentiation import evaluation_mode

TRUSTED = (0.25, 4.0)  # ratios of the true to the predicted change outside which a plan is not to be trusted


@dataclass(frozen=True)
class Validity:
    """The change of the mean loss when a network is quantised.

    `predicted` is Omega / 2 and `true` what was found; `linear` = g' dW is what a network that is not at a minimum
    adds, and `quadratic` = dW' H dW / 2 the exact second-order term over all quantised weights together.
    """

    predicted: float
    true: float
    linear: float
    quadratic: float

    @property
    def ratio(self) -> float:
        """The true change over the predicted one."""
        return self.true / self.predicted if self.predicted else float("inf")

    @property
    def warning(self) -> str | None:
        """Why the prediction is not to be trusted; None when it is within a factor of 4."""
        if TRUSTED[0] <= self.ratio <= TRUSTED[1]:
            return None
        return (
            f"the loss changes by {self.true:.3g} where {self.predicted:.3g} was predicted; the second-order model "
            f"does not hold at these bits (neglected slope {self.linear:.2g}, exact quadratic term "
            f"{self.quadratic:.2g}): give the layers with the most weights more bits, or raise the budget"
        )


def check_validity(
    model: nn.Module, quantized: nn.Module, loss: Loss, data: Sequence[tuple[Any, Any]], plan: BitPlan
) -> Validity:
    """Compare Omega / 2 of a plan with the true change of the loss on `data`, and with the exact terms behind it.

    `quantized` is the network that `quantize` made of `model` with that plan. Raises NonFiniteError.
    """
    layers = quantized_layers(quantized)
    names = [f"{name}.weight" if name else "weight" for name in layers]
    operator = Hessian(model, loss, list(data), parameters=names)
    before, gradient = operator.loss_and_gradient()
    changes = {
        f"{name}.weight" if name else "weight": layer.quantizer.fake(layer.weight, layer.bits.weight).detach()
        for name, layer in layers.items()
    }
    weights = dict(model.named_parameters())
    change = operator.layout.join([(changes[n] - weights[n].detach())[None] for n in operator.layout.names])
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), evaluation_mode(quantized), all_active(quantized):
        units = 0
        for batch in data:
            source, target = to_device(batch, operator.device)
            total += len(target) * loss(quantized(source), target).double().cpu()
            units += len(target)
    after = float(total) / units
    if not after - after == 0:
        raise NonFiniteError(f"the loss of the quantised network is {after}")
    return Validity(
        predicted=plan.omega / 2,
        true=after - before,
        linear=float(gradient.double() @ change[:, 0].double()),
        quadratic=float((change.double() * operator(change).double()).sum()) / 2,
    )
