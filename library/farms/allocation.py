"""Pruning ratios of layers from their exponents: a layer with a lighter tail is less trained, and pruned more."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from library.errors import InputError

Mapping = Literal["uniform", "block", "layer"]
CAP = 0.998  # most that is pruned of a layer; the published code sets ratios above 1 to it
CAP_AT = {0.7: 0.99999}  # and to this at that target


def allocate(
    alphas: Sequence[float] | Tensor,
    parameters: Sequence[int] | Tensor,
    sparsity: float,
    *,
    epsilon: float = 0.2,
    blocks: Sequence[int] | None = None,
    cap: float = CAP,
    compatible: bool = False,
) -> Tensor:
    """The share of each layer's weights to prune: float64 (layers,), whose mean over all weights is `sparsity`.

    With r_l = 1 - epsilon + 2 epsilon (alpha_l - min alpha) / (max alpha - min alpha) and p_l weights in layer l, the
    ratio is eta r_l, eta = sparsity sum p_l / sum p_l r_l. Ratios above `cap` become `cap`, and the rest is scaled
    until the mean holds again (to rounding). Equal alphas give the same ratio everywhere.

    alphas       one per layer, larger for lighter tails
    parameters   weights per layer
    epsilon      how far ratios differ, in [0, 1) (the papers' tau); 0 is uniform
    blocks       number of the block of each layer: its layers then share their mean alpha (AlphaPruning, and FARMS as
                 published); None gives each layer its own
    compatible   as in the published code: only ratios above 1 are lowered, to 0.998 (0.99999 at sparsity 0.7), and the
                 mean is not restored

    Raises InputError for alphas or numbers of weights that are not finite, lists of different lengths, a sparsity
    outside (0, 1) or not below the cap, a cap outside (0, 1], and an epsilon outside [0, 1).

    Source: Lu et al., "AlphaPruning", NeurIPS 2024, section 3.2; Hu et al., ICML 2025.

    >>> allocate([2.0, 3.0, 4.0], [100, 100, 200], 0.5, epsilon=0.5).tolist()
    [0.2222222222222222, 0.4444444444444444, 0.6666666666666666]
    """
    values = torch.as_tensor(alphas, dtype=torch.float64)
    weights = torch.as_tensor(parameters, dtype=torch.float64)
    if values.ndim != 1 or values.shape != weights.shape or not len(values):
        raise InputError(f"one alpha and one number of weights per layer: got {values.numel()} and {weights.numel()}")
    if not torch.isfinite(values).all():
        missing = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise InputError(f"layers {', '.join(map(str, missing[:5]))} have no finite alpha; leave them out")
    if not ((weights > 0) & torch.isfinite(weights)).all():
        raise InputError("a layer has no weights, or not a finite number of them")
    if not 0 < cap <= 1:
        raise InputError(f"the cap of a ratio must lie in (0, 1], got {cap}")
    if not 0 < sparsity < 1 or (sparsity >= cap and not compatible):
        raise InputError(f"sparsity must lie in (0, {min(1.0, cap):g}), got {sparsity}")
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon must lie in [0, 1), got {epsilon}")
    if blocks is not None:
        values = _block_means(values, blocks)
    span = values.max() - values.min()
    scale = torch.ones_like(values)
    if span > 0:
        scale = 1 - epsilon + 2 * epsilon * (values - values.min()) / span
    ratios = scale * sparsity * weights.sum() / (weights @ scale)
    if compatible:
        return torch.where(ratios > 1, CAP_AT.get(sparsity, CAP), ratios)
    return _filled(scale, weights, sparsity, cap)


def achieved(ratios: Tensor, parameters: Sequence[int] | Tensor) -> float:
    """The mean of the ratios over all weights."""
    weights = torch.as_tensor(parameters, dtype=torch.float64)
    return float(ratios @ weights / weights.sum())


def _block_means(values: Tensor, blocks: Sequence[int]) -> Tensor:
    if len(blocks) != len(values):
        raise InputError(f"one block number per layer: got {len(blocks)} for {len(values)} layers")
    _, places, counts = torch.as_tensor(blocks).unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, places, values)
    return (sums / counts)[places]


def _filled(scale: Tensor, weights: Tensor, sparsity: float, cap: float) -> Tensor:
    """min(cap, eta scale) with the eta for which the weighted mean is `sparsity`; each round caps at least one more."""
    capped = torch.zeros_like(scale, dtype=torch.bool)
    while True:
        rest = sparsity * weights.sum() - cap * weights[capped].sum()
        ratios = torch.where(capped, cap, scale * rest / (weights * scale)[~capped].sum())
        above = (ratios > cap) & ~capped
        if not above.any():
            return ratios
        capped |= above
