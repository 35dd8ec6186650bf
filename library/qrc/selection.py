"""Greedy choice of reservoirs from moments alone: no pass over the data after the moments are there.

Candidates are blocks of features. A step tries every candidate beside those that are chosen: with the Gram matrix of
the chosen ones factorised as L L', a candidate c adds the block

    V = L^(-1) G_sc,    S = G_cc + alpha I - V' V,    w_c = S^(-1) (b_c - V' L^(-1) b_s),

and the error of the joint read-out on validation series is a quadratic form in their moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.readout import Moments, checked_alphas


@dataclass(frozen=True)
class Step:
    """One step of the greedy choice.

    candidate  number of the block that was added
    error      validation NRMSE with it, the mean over validation sets and outputs
    alpha      the regularisation with which it is least
    """

    candidate: int
    error: float
    alpha: float


def forward_selection(
    train: Moments,
    validation: Sequence[Moments],
    blocks: Sequence[Sequence[int]],
    *,
    most: int,
    alphas: Sequence[float] = (1e-8, 1e-6, 1e-4, 1e-2),
    costs: Sequence[Sequence[float]] = (),
    limits: Sequence[float] = (),
) -> list[Step]:
    """The best block, then the best beside it, and so on, `most` of them or fewer when no further one helps.

    blocks  columns of the features that belong to each candidate
    costs   what each candidate takes of each of `limits`; a choice stays within all of them

    Raises InputError without candidates or validation sets, and for a validation target that is constant.
    """
    if not blocks or not validation:
        raise InputError("a choice needs at least one candidate and one validation set")
    grid = checked_alphas(alphas, train.mean.device)
    if (grid <= 0).any():
        raise InputError("alphas: the choice among collinear candidates needs alphas above 0")
    problem = _Problem(train, validation, [torch.as_tensor(list(block)) for block in blocks])
    taken = torch.tensor(costs, dtype=torch.float64).reshape(len(blocks), len(limits)) if limits else None
    chosen: list[int] = []
    steps: list[Step] = []
    best = torch.inf
    while len(steps) < most and len(chosen) < len(blocks):
        errors = torch.stack([problem.errors(chosen, float(alpha)) for alpha in grid])  # (alphas, candidates)
        errors[:, chosen] = torch.inf
        if taken is not None:
            errors[:, (taken[chosen].sum(0) + taken > torch.tensor(limits)).any(1)] = torch.inf
        place = int(errors.argmin())
        error, number = float(errors.flatten()[place]), place % len(blocks)
        if not error < best:
            break
        best = error
        chosen.append(number)
        steps.append(Step(number, error, float(grid[place // len(blocks)])))
    return steps


class _Problem:
    """Moments about the training mean, in units of the training deviation."""

    def __init__(self, train: Moments, validation: Sequence[Moments], blocks: Sequence[Tensor]) -> None:
        width, deviation = train.width, train.deviation()
        scale = torch.where(deviation > 1e-14, deviation, torch.inf)
        scale[width:] = 1.0
        self.gram = train.about(train.mean, scale)
        self.tests = torch.stack([part.about(train.mean, scale) for part in validation])  # (sets, D + O, D + O)
        self.variance = torch.stack([part.deviation()[width:] ** 2 for part in validation])  # (sets, O)
        if (self.variance <= 0).any():
            raise InputError("a validation target is constant, so its NRMSE is not defined")
        self.targets = torch.arange(width, len(train.mean))
        self.blocks = blocks

    def errors(self, chosen: Sequence[int], alpha: float) -> Tensor:
        """Validation NRMSE (candidates,) of each candidate beside the chosen ones."""
        errors = torch.full((len(self.blocks),), torch.inf, dtype=torch.float64)
        by_width: dict[int, list[int]] = {}
        for number, block in enumerate(self.blocks):
            by_width.setdefault(len(block), []).append(number)
        for numbers in by_width.values():
            errors[numbers] = self._errors(chosen, torch.stack([self.blocks[i] for i in numbers]), alpha).cpu()
        return errors

    def _errors(self, chosen: Sequence[int], columns: Tensor, alpha: float) -> Tensor:
        """The same for candidates of equal width, (candidates, width) columns, all at once."""
        gram, targets = self.gram, self.targets
        held = torch.cat([self.blocks[i] for i in chosen]) if chosen else torch.zeros(0, dtype=torch.int64)
        eye = torch.eye(len(held)).to(gram)
        lower = torch.linalg.cholesky(gram[held][:, held] + alpha * eye)
        across = gram[held][:, columns].movedim(1, 0)  # (candidates, held, width)
        above = torch.linalg.solve_triangular(lower, across, upper=False)
        own = gram[columns[:, :, None], columns[:, None, :]] + alpha * torch.eye(columns.shape[1]).to(gram)
        lower_own = torch.linalg.cholesky(own - above.mT @ above)
        known = torch.linalg.solve_triangular(lower, gram[held][:, targets], upper=False)  # (held, O)
        new = torch.cholesky_solve(gram[columns[:, :, None], targets] - above.mT @ known, lower_own)
        old = torch.linalg.solve_triangular(lower.mT, known - above @ new, upper=True)
        weights = torch.cat([-old, -new, torch.eye(len(targets)).to(gram).expand(len(columns), -1, -1)], 1)
        every = torch.cat([held.expand(len(columns), -1), columns, targets.expand(len(columns), -1)], 1)
        moments = self.tests[:, every[:, :, None], every[:, None, :]]  # (sets, candidates, all, all)
        squares = torch.einsum("cio,scij,cjo->sco", weights, moments, weights).clamp(min=0)
        return (squares / self.variance[:, None]).sqrt().mean((0, 2))
