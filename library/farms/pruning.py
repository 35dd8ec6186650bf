"""What to prune of one layer, and how the rest makes up for it: magnitude, Wanda, SparseGPT; free or N of M.

A weight W is (out, in), its inputs X (tokens, in); masks are True where W is pruned. Sources: Sun et al., "A Simple and
Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024; Frantar and Alistarh, "SparseGPT", ICML 2023,
algorithm 1.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from library import collective
from library.errors import InputError

Pruner = Literal["magnitude", "wanda", "sparsegpt"]
DAMPING = 0.01  # of the mean diagonal, added to the Hessian before it is inverted
BLOCK = 128  # columns that SparseGPT decides at once


@dataclass
class InputStatistics:
    """What the pruners need of a layer's inputs, summed over calibration sequences of any number and length.

    squares   sum over tokens of x_j^2, float64 (in,)
    gram      sum over tokens of x x^T, float64 (in, in); None unless asked for, as only SparseGPT needs it
    """

    squares: Tensor
    gram: Tensor | None
    sequences: int = field(default=0)

    @classmethod
    def empty(cls, width: int, *, gram: bool, device: torch.device | str = "cpu") -> "InputStatistics":
        """Statistics of nothing."""
        made = torch.zeros(width, width, dtype=torch.float64, device=device) if gram else None
        return cls(torch.zeros(width, dtype=torch.float64, device=device), made)

    def add(self, inputs: Tensor) -> None:
        """Take in sequences (sequences, tokens, in), or one (tokens, in). Raises InputError for another shape."""
        width = len(self.squares)
        if inputs.ndim not in (2, 3) or inputs.shape[-1] != width:
            raise InputError(f"inputs must have shape (sequences, tokens, {width}), got {tuple(inputs.shape)}")
        inputs = inputs[None] if inputs.ndim == 2 else inputs
        tokens = inputs.detach().flatten(0, -2).to(torch.float32)
        self.squares += tokens.to(torch.float64).square().sum(0)
        if self.gram is not None:
            self.gram += tokens.mT @ tokens
        self.sequences += len(inputs)

    def summed(self) -> "InputStatistics":
        """The statistics of all workers' sequences, on every worker."""
        count = collective.all_sum(torch.tensor(self.sequences))
        gram = None if self.gram is None else collective.all_sum(self.gram)
        return InputStatistics(collective.all_sum(self.squares), gram, int(count))

    @property
    def scaler(self) -> Tensor:
        """Wanda's mean over the sequences of ||X_j||^2, (in,). Raises InputError before the first sequence."""
        self._check_some()
        return self.squares / self.sequences

    @property
    def hessian(self) -> Tensor:
        """SparseGPT's (2 / sequences) sum X^T X, (in, in). Raises InputError when it was not collected."""
        if self.gram is None:
            raise InputError("the Gram matrix of the inputs was not collected")
        self._check_some()
        return self.gram * (2 / self.sequences)

    def _check_some(self) -> None:
        if self.sequences < 1:
            raise InputError("no input of the layer has been seen; add sequences first")


def magnitude_mask(weight: Tensor, sparsity: float, *, compatible: bool = False) -> Tensor:
    """The int(numel sparsity) smallest |W| of the whole layer, the first ones on a tie.

    `compatible` is as published: the next one too, and whatever ties with it. Raises InputError for a sparsity outside
    [0, 1] and weights that are not finite.
    """
    _check_sparsity(sparsity)
    _check_finite(weight)
    return _smallest(weight.abs(), int(weight.numel() * sparsity), compatible=compatible)


def wanda_metric(weight: Tensor, scaler: Tensor) -> Tensor:
    """|W_ij| sqrt(scaler_j), in float32 or better. Raises InputError for norms that do not fit, or are not finite."""
    if weight.ndim != 2 or scaler.shape != weight.shape[1:]:
        raise InputError(f"{scaler.numel()} input norms do not fit a weight of shape {tuple(weight.shape)}")
    _check_finite(weight)
    if not ((scaler >= 0) & torch.isfinite(scaler)).all():
        raise InputError("the mean squares of a layer's inputs must be finite and not negative")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype).abs() * scaler.to(dtype).sqrt()


def wanda_mask(weight: Tensor, scaler: Tensor, sparsity: float) -> Tensor:
    """In each output row the int(in sparsity) entries of least metric, the first ones on a tie."""
    _check_sparsity(sparsity)
    count = int(weight.shape[1] * sparsity)
    order = wanda_metric(weight, scaler).sort(dim=-1, stable=True).indices[:, :count]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)


def pattern_mask(metric: Tensor, n: int, m: int) -> Tensor:
    """In every group of m columns of each row the n entries of least metric. Raises InputError for what cannot be."""
    _check_pattern(n, m, metric.shape[1])
    groups = metric.unflatten(1, (-1, m))
    order = groups.sort(dim=-1, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    pattern: tuple[int, int] | None = None,
    block: int = BLOCK,
    damping: float = DAMPING,
    compatible: bool = False,
) -> Tensor:
    """The pruned weight of SparseGPT, whose kept entries make up for the pruned ones: a new (out, in), dtype kept.

    With U the upper Cholesky factor of (H + damping mean(diag H) I)^-1, columns are decided `block` at a time: the
    int(count sparsity) entries of least w^2 / U_jj^2 of the block, the first ones on a tie (when `compatible` one more,
    and whatever ties with it), or with a `pattern` (n, m) the n least of every m columns as they are reached. Each
    pruned entry's error w / U_jj is taken off the columns to its right, times U_j. Inputs that never occur (H_jj = 0)
    have their column pruned.

    Raises InputError for shapes that do not fit, weights that are not finite, a Hessian that is not finite or not
    positive definite with this damping, a block of no column, and a pattern that does not divide the columns.
    """
    _check_sparsity(sparsity)
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        shape = " x ".join(map(str, weight.shape))
        raise InputError(f"a Hessian of {tuple(hessian.shape)} does not fit a weight of {shape}")
    _check_finite(weight)
    if block < 1:
        raise InputError(f"SparseGPT decides at least 1 column at a time, got block={block}")
    columns = weight.shape[1]
    if pattern is not None:
        _check_pattern(*pattern, columns)
        block = max(pattern[1], block - block % pattern[1])
    dead = hessian.diagonal() == 0
    upper = _inverse_factor(hessian, dead, damping).to(torch.float32)
    left = weight.to(torch.float32, copy=True)
    left[:, dead] = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, factor = left[:, start:stop], upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        if pattern is None:
            mask = _smallest((part / diagonal).square(), int(part.numel() * sparsity), compatible=compatible)
        else:
            mask = torch.zeros_like(part, dtype=torch.bool)
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                mask[:, group] = pattern_mask((part[:, group] / diagonal[group]).square(), *pattern)
            errors[:, j] = torch.where(mask[:, j], part[:, j], 0.0) / diagonal[j]
            part[:, j:] -= errors[:, j, None] * factor[j, j:]
        part[mask] = 0
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return left.to(weight.dtype)


def prune_weight(
    weight: Tensor,
    pruner: Pruner,
    sparsity: float,
    statistics: InputStatistics | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    compatible: bool = False,
) -> Tensor:
    """The weight (out, in) after one of the pruners; `pattern` (n, m) prunes n of m instead of the share `sparsity`.

    Raises InputError for an unknown pruner, and when Wanda or SparseGPT are asked for without statistics of the inputs.
    """
    if pruner not in get_args(Pruner):
        raise InputError(f"pruner {pruner!r} is unknown; allowed: {', '.join(get_args(Pruner))}")
    if pruner != "magnitude" and statistics is None:
        raise InputError(f"{pruner} needs statistics of the layer's inputs")
    if pruner == "sparsegpt":
        hessian = statistics.hessian
        return sparsegpt(weight, hessian, sparsity, pattern=pattern, compatible=compatible)
    work = weight.to(torch.float32)
    if pattern is not None:
        metric = work.abs() if pruner == "magnitude" else wanda_metric(work, statistics.scaler)
        mask = pattern_mask(metric, *pattern)
    elif pruner == "magnitude":
        mask = magnitude_mask(work, sparsity, compatible=compatible)
    else:
        mask = wanda_mask(work, statistics.scaler, sparsity)
    return weight.masked_fill(mask, 0)


def _smallest(metric: Tensor, count: int, *, compatible: bool) -> Tensor:
    """The `count` smallest entries, the first ones on a tie; when compatible all up to the next one's value."""
    count = min(count + compatible, metric.numel())
    if count == 0:
        return torch.zeros_like(metric, dtype=torch.bool)
    threshold = metric.flatten().kthvalue(count).values
    mask = metric <= threshold
    if compatible or int(mask.sum()) == count:
        return mask
    ties = metric == threshold
    excess = ties & (ties.flatten().cumsum(0).view_as(ties) > count - int((metric < threshold).sum()))
    return mask & ~excess


def _check_finite(weight: Tensor) -> None:
    if (wrong := int((~torch.isfinite(weight)).sum())) > 0:
        raise InputError(f"{wrong} of {weight.numel()} weights of a layer are not finite")


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    matrix = hessian.to(torch.float64, copy=True)
    if not torch.isfinite(matrix).all():
        raise InputError("the Hessian of a layer's inputs is not finite; the calibration diverges")
    diagonal = matrix.diagonal()
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    lower, wrong = torch.linalg.cholesky_ex(matrix)
    if int(wrong):
        raise InputError(f"the Hessian of a layer's inputs is not positive definite with damping {damping:g}; raise it")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity of a layer must lie in [0, 1], got {sparsity}")


def _check_pattern(n: int, m: int, columns: int) -> None:
    if not 0 < n < m or columns % m:
        raise InputError(f"a pattern prunes 0 < n < m of every m columns, and m divides them: {n}:{m} of {columns}")
