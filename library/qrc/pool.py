"""Many reservoirs on one task: scaled inputs, features, and the validation error of each one's read-out at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from library.errors import InputError
from library.qrc.hybrid import Member, drive_members
from library.qrc.nowcast import Nowcast
from library.qrc.readout import ALPHAS, RANK, Moments, checked_alphas

CLIP = (0.0, 1.2)  # of inputs scaled by their range in training


@dataclass(frozen=True)
class Part:
    """Series of places: `inputs` (places, hours, channels) scaled on the training part, `targets` (..., outputs)."""

    inputs: Tensor
    targets: Tensor

    def first(self, hours: int) -> Self:
        """Its first hours."""
        return type(self)(self.inputs[:, :hours], self.targets[:, :hours])


def parts_of(task: Nowcast, names: Sequence[str] = ("train", "validation", "test")) -> dict[str, Part]:
    """The named parts of a task; a search asks for training and validation alone."""
    found = {name: task.series(getattr(task, name)) for name in {"train": None, **dict.fromkeys(names)}}
    rows = found["train"][0].flatten(0, 1)
    low, high = rows.amin(0), rows.amax(0)
    return {name: Part(((found[name][0] - low) / (high - low)).clamp(*CLIP), found[name][1]) for name in names}


@dataclass(frozen=True)
class Fitted:
    """Of each reservoir: the validation NRMSE (reservoirs,), averaged over places and outputs, and alpha with it.

    `predictions` are those of the test features with that alpha, (places, hours, outputs) each; empty without any.
    """

    errors: Tensor
    alphas: Tensor
    predictions: list[Tensor]


def fit_pool(
    train: Sequence[Tensor],
    validation: Sequence[Tensor],
    targets: tuple[Tensor, Tensor],
    *,
    washout: int,
    alphas: Sequence[float] = ALPHAS,
    test: Sequence[Tensor] = (),
) -> Fitted:
    """Ridge read-outs of many reservoirs, those of equal width as one batch, alpha by the validation error.

    train, validation   per reservoir features (places, hours, width)
    targets             of both, (places, hours, outputs)
    test                features of other series, which are predicted and take no part in any choice

    Raises InputError for a washout that leaves nothing, and a constant validation target.
    """
    if washout >= min(targets[0].shape[1], targets[1].shape[1]) - 1:
        raise InputError(f"washout {washout} leaves nothing of {targets[0].shape[1]} hours")
    errors = torch.empty(len(train), dtype=torch.float64)
    chosen = torch.empty(len(train), dtype=torch.float64)
    predictions: list[Tensor] = [train[0]] * len(test)
    wanted, checked = (part[:, washout:].to(torch.float64) for part in targets)
    deviation = checked.std(1, correction=0)  # (places, outputs)
    if (deviation <= 0).any():
        raise InputError("a validation target is constant, so its NRMSE is not defined")
    widths: dict[int, list[int]] = {}
    for place, features in enumerate(train):
        widths.setdefault(features.shape[-1], []).append(place)
    grid = checked_alphas(alphas, wanted.device)
    for places in widths.values():
        x = torch.stack([train[i][:, washout:].to(torch.float64).flatten(0, 1) for i in places])
        tests = torch.stack([validation[i][:, washout:].to(torch.float64) for i in places])
        weights, mean, centre = _weights(x, wanted.flatten(0, 1), grid)
        # (batch, places, hours, width) x (batch, alphas, width, outputs)
        found = torch.einsum("bptd,bado->bapto", tests - mean[:, None, None], weights) + centre
        squares = (found - checked).square().mean(3)
        scores = (squares.sqrt() / deviation).mean((2, 3))
        best = scores.argmin(1)
        errors[places] = scores.gather(1, best[:, None])[:, 0].cpu()
        chosen[places] = grid[best].cpu()
        for place, own, number, middle in zip(places, weights, best.tolist(), mean, strict=True):
            if test:
                predictions[place] = (test[place].to(torch.float64) - middle) @ own[number] + centre
    return Fitted(errors, chosen, predictions)


def _weights(x: Tensor, y: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (batch, alphas, width, outputs) in raw units, means (batch, width), and the targets' mean."""
    count = x.shape[1]
    mean, centre = x.mean(1), y.mean(0)
    x = x - mean[:, None]
    scale = x.square().mean(1).sqrt()
    scale = torch.where(scale > 1e-14, scale, torch.inf)
    x = x / scale[:, None]
    across, triangle = torch.linalg.qr(x)  # the singular values of the triangle are those of x, to all their digits
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    real = values > RANK * values[:, :1].clamp(min=1e-300)
    factor = real[:, None] * values[:, None] / (values[:, None] ** 2 + alphas[:, None] * count).clamp(min=1e-300)
    along = left.mT @ (across.mT @ (y - centre))
    weights = torch.einsum("bjd,baj,bjo->bado", right, factor, along)
    return weights / scale[:, None, :, None], mean, centre


def features_of(members: Sequence[Member], parts: Mapping[str, Part]) -> dict[str, list[Tensor]]:
    """Features (places, hours, width) of each member, by part; all places of all parts go in one batch.

    Parts of fewer hours are filled up at their end, which changes no feature before it.
    """
    longest = max(part.inputs.shape[1] for part in parts.values())
    filled = [_filled(part.inputs, longest) for part in parts.values()]
    features, _ = drive_members(members, torch.cat(filled))
    split = [each.split([len(part) for part in filled]) for each in features]
    return {
        name: [each[place][:, : part.inputs.shape[1]] for each in split]
        for place, (name, part) in enumerate(parts.items())
    }


def _filled(inputs: Tensor, hours: int) -> Tensor:
    return torch.cat([inputs, inputs[:, -1:].expand(-1, hours - inputs.shape[1], -1)], 1)


def joint_moments(
    features: Sequence[Tensor], targets: Tensor, washout: int
) -> tuple[Moments, list[Moments], list[range]]:
    """Moments of all features side by side: of all places together, of each place, and each reservoir's columns."""
    x = torch.cat([each[:, washout:].to(torch.float64) for each in features], -1)
    each = [Moments.of(a, b) for a, b in zip(x, targets[:, washout:], strict=True)]
    ends = torch.tensor([part.shape[-1] for part in features]).cumsum(0).tolist()
    columns = [range(end - part.shape[-1], end) for end, part in zip(ends, features, strict=True)]
    return Moments.total(each), each, columns
