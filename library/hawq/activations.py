"""Static quantisation of activations: ranges are observed on calibration data, then fixed."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from library.errors import InputError
from library.hawq.quantizers import LEAST_SCALE, bit_numbers, straight_through


class ActivationSettings(BaseModel, frozen=True, extra="forbid"):
    """How the range of a layer's input is found, and what integers cover it.

    `symmetric`: s = max(|min|, |max|, 1e-8) / (2^(b-1) - 1), q in [-2^(b-1), 2^(b-1) - 1]. `unsigned`:
    s = (max - min) / (2^b - 1) and q in [0, 2^b - 1] with zero point 0, for inputs that come out of a ReLU. `auto` is
    unsigned where no negative input was seen. Source: HAWQ-V3, Yao et al., 2021.
    """

    mode: Literal["auto", "symmetric", "unsigned"] = "auto"
    """Signed or unsigned integers; auto decides by the least input that was seen."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Running average of each batch's extremes with this momentum; None takes the extremes over all batches."""
    percentile: float | None = Field(None, gt=50, le=100)
    """A percentile of each batch in place of its extremes."""

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of one batch, or their percentiles; the least is 0 for unsigned percentiles."""
        flat = x.detach().flatten()
        if self.percentile is None:
            return flat.min(), flat.max()
        high = flat.kthvalue(max(1, round(len(flat) * self.percentile / 100))).values
        if self.mode == "unsigned" or (self.mode == "auto" and bool(flat.min() >= 0)):
            return torch.zeros_like(high), high
        return -(-flat).kthvalue(max(1, round(len(flat) * (1 - (100 - self.percentile) / 100)))).values, high

    def scale(self, low: Tensor, high: Tensor, bits: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, least and largest integer for a range; all of the shape of `bits`."""
        levels = 2.0 ** torch.as_tensor(bits, dtype=low.dtype, device=low.device)
        symmetric = (torch.maximum(low.abs(), high.abs()).clamp(min=LEAST_SCALE) / (levels / 2 - 1), -levels / 2)
        unsigned = ((high - low).clamp(min=LEAST_SCALE) / (levels - 1), torch.zeros_like(levels))
        signed = low < 0 if self.mode == "auto" else torch.tensor(self.mode == "symmetric", device=low.device)
        scale, least = (torch.where(signed, a, b) for a, b in zip(symmetric, unsigned, strict=True))
        return scale, least, least + levels - 1


class ActivationQuantizer(nn.Module):
    """Quantises a layer's input with a static range, held in the buffers `low` and `high`.

    While `calibrating` is true each batch widens the range before it is quantised; afterwards the range is fixed.
    Raises InputError when it is used before any batch was seen. The gradient passes straight through.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, settings: ActivationSettings | None = None) -> None:
        super().__init__()
        [self.bits] = bit_numbers(bits, "bits of an activation")
        self.settings, self.calibrating = settings or ActivationSettings(), False
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    def fit(self, like: Tensor) -> "ActivationQuantizer":
        """Hold the range on the device of `like`, and in float64 where that is float64."""
        return self.to(like.device, torch.promote_types(like.dtype, torch.float32))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Widen or average the range by one batch. Raises InputError when the batch is empty or not finite."""
        if not x.numel():
            raise InputError("an activation has no entries while its range is calibrated")
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(x.detach())):
            raise InputError("an activation is not finite while its range is calibrated")
        low, high = self.settings.extremes(x)
        if bool(self.low.isnan()):
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.settings.momentum is None:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            kept = self.settings.momentum
            self.low.copy_(kept * self.low + (1 - kept) * low)
            self.high.copy_(kept * self.high + (1 - kept) * high)

    def scale(self) -> Tensor:
        """The scale of the present range. Raises InputError when nothing was seen yet."""
        return self._grid()[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.observe(x)
        scale, least, most = self._grid()
        integers = (x.detach() * (1 / scale)).round_().clamp_(least, most)  # one array of the input's size, not four
        return straight_through(x, integers.mul_(scale))

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        if bool(self.low.isnan()):
            raise InputError("an activation's range is not known: calibrate the network first")
        return self.settings.scale(self.low, self.high, self.bits)


@torch.no_grad()
def activation_errors(
    x: Tensor, low: Tensor, high: Tensor, bits: Sequence[int], settings: ActivationSettings
) -> Tensor:
    """||Q_b(a) - a||^2 per sample, averaged over the samples of `x` (n, ...), for every bit number: float64 (bits,)."""
    numbers = torch.tensor(bits, dtype=x.dtype, device=x.device)
    scale, least, most = (part.reshape(-1, 1) for part in settings.scale(low, high, numbers))
    flat = x.flatten()
    errors = torch.zeros(len(bits), dtype=torch.float64, device=x.device)
    for part in flat.split(1 << 20):
        integers = torch.maximum(torch.minimum(torch.round(part * (1 / scale)), most), least)
        errors += (integers * scale - part).double().square().sum(1)
    return errors / len(x)
