"""How good predictions are: errors, coverage of intervals, and paired comparisons in blocks of time."""

import torch
from torch import Tensor

from library.errors import InputError


def scores(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """NRMSE (root mean squared error over the target's deviation), MSE, MAE and R^2 over all entries.

    Raises InputError for a constant target, for other shapes than the target's, and for values that are not finite.
    """
    check_pair(predicted, target)
    variance = float(target.var(correction=0))
    if not variance > 0:
        raise InputError(
            "the target is constant, so its NRMSE is not defined; use more series, or longer ones (more curves)"
        )
    squared = float((predicted - target).square().mean())
    return {
        "nrmse": (squared / variance) ** 0.5,
        "mse": squared,
        "mae": float((predicted - target).abs().mean()),
        "r2": 1 - squared / variance,
    }


def coverage(lower: Tensor, upper: Tensor, target: Tensor) -> float:
    """The share of targets inside their intervals. InputError for ends that do not fit the target."""
    check_pair(lower, target, "lower ends")
    check_pair(upper, target, "upper ends")
    return float(((lower <= target) & (target <= upper)).double().mean())


def check_pair(predicted: Tensor, target: Tensor, name: str = "predictions") -> None:
    """InputError unless both have the same shape, at least one entry, and are finite."""
    if predicted.shape != target.shape or not target.numel():
        raise InputError(
            f"{name} {tuple(predicted.shape)} and target {tuple(target.shape)}: both need the same shape, not empty"
        )
    for each, values in ((name, predicted), ("target", target)):
        if not torch.isfinite(values).all():
            raise InputError(f"{each}: {int((~torch.isfinite(values)).sum())} values are not finite")


def paired_gain(
    first: Tensor, second: Tensor, *, block: int, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """How much smaller, relatively, the root mean squared error of `first` is than of `second`: gain, lower, upper end.

    Both are squared errors (series, time) of the same targets. Blocks of `block` steps are drawn with replacement, the
    same ones for both, so that what the two share cancels. Gains are 1 - RMSE(first) / RMSE(second).

    Source: block bootstrap, Kuensch, Annals of Statistics 17, 1989.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(f"squared errors {tuple(first.shape)} and {tuple(second.shape)}: both (series, time), alike")
    if block < 1:
        raise InputError(f"blocks of {block} steps; allowed: 1 or more")
    count = first.shape[1] // block
    if count < 2:
        raise InputError(f"{first.shape[1]} steps have {count} blocks of {block}; at least 2 are needed")
    sums = torch.stack([part[:, : count * block].unflatten(1, (count, block)).sum(2) for part in (first, second)])
    sums = sums.flatten(1)  # (2, blocks of all series)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(sums.shape[1], (draws, sums.shape[1]), generator=generator)
    totals = sums[:, drawn].sum(-1)
    gains = 1 - (totals[0] / totals[1]).sqrt()
    ends = torch.quantile(gains, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=gains.dtype))
    return 1 - float((first.sum() / second.sum()).sqrt()), *ends.tolist()
