"""Layer-wise learning rates from exponents: TempBalance's maps and TB_Sigmoid, as factors of the global rate."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from library.errors import InputError

Map = Literal["linear", "sqrt", "log2", "step", "sigmoid"]


def rate_factors(
    alphas: Sequence[float] | Tensor,
    rule: Map = "linear",
    *,
    low: float = 0.5,
    high: float = 1.5,
    strength: tuple[float, float] = (0.125, 0.125),
    sharpness: float = 10.0,
) -> Tensor:
    """What each layer's learning rate is of the global one: float64 (layers,). A lighter tail learns faster.

    linear    low + (high - low) (alpha_l - min) / (max - min)
    sqrt      sqrt(alpha_l) / mean sqrt(alpha);   log2: likewise
    step      low + (high - low) i / n for the layer of rank i = 0 ... n - 1, ties in the layers' order
    sigmoid   10^phi, phi = s (sigmoid(sharpness (alpha_l - mean alpha)) - 1/2), with s the first of `strength` below
              the mean and the second above it: between 10^(-s / 2) and 10^(s / 2)

    A layer whose alpha is nan takes no part and gets 1; so do all when their alphas are equal. Raises InputError for an
    unknown map, unless 0 < low <= high, for settings that are not finite, sqrt of an alpha that is not positive, and
    log2 of one of at most 1.

    Sources: Zhou et al., "Temperature Balancing", NeurIPS 2023, eq. 2 (linear) and its ablation (sqrt, log2, step); Liu
    et al., "Model Balancing", EMNLP 2024 (sigmoid; strength 0.125 for operator learning, 0.25 for language).

    >>> rate_factors([2.0, 3.0, 4.0], low=0.5, high=1.5).tolist()
    [0.5, 1.0, 1.5]
    """
    if rule not in get_args(Map):
        raise InputError(f"map {rule!r} is unknown; allowed: {', '.join(get_args(Map))}")
    if not 0 < low <= high < math.inf:
        raise InputError(f"rate factors need 0 < low <= high, both finite, got {low} and {high}")
    if not all(map(math.isfinite, (*strength, sharpness))):
        raise InputError(f"strength and sharpness of the sigmoid must be finite, got {strength} and {sharpness}")
    values = torch.tensor([float(alpha) for alpha in alphas], dtype=torch.float64)
    known = torch.isfinite(values)
    factors = torch.ones_like(values)
    if known.any() and values[known].max() > values[known].min():
        factors[known] = _mapped(values[known], rule, low, high, strength, sharpness)
    return factors


def _mapped(
    alphas: Tensor, rule: Map, low: float, high: float, strength: tuple[float, float], sharpness: float
) -> Tensor:
    if rule == "linear":
        return low + (high - low) * (alphas - alphas.min()) / (alphas.max() - alphas.min())
    if rule == "step":
        ranks = alphas.argsort(stable=True).argsort().to(torch.float64)
        return low + (high - low) * ranks / len(alphas)
    if rule == "sigmoid":
        deviation = alphas - alphas.mean()
        size = torch.where(deviation < 0, *torch.tensor(strength, dtype=torch.float64))
        return 10 ** (size * (torch.sigmoid(sharpness * deviation) - 0.5))
    least = 0 if rule == "sqrt" else 1
    if not (alphas > least).all():
        raise InputError(f"the {rule} map needs every alpha above {least}, got {float(alphas.min())}")
    heights = alphas.sqrt() if rule == "sqrt" else alphas.log2()
    return heights / heights.mean()
