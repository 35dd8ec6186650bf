"""How many eigenvalues stand out of the bulk: three rules, spelt out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.density import Quadrature
from library.spectral.smoothing import smoothed_density

CLIP = 1e-12  # eigenvalues below it count as this, so that noise around zero makes no gap


@dataclass(frozen=True)
class Outliers:
    """Numbers of outliers by each rule, and how clear the gap is.

    `by_gap` and `gap` = lambda_i / lambda_{i+1} at it (`largest_gap`); `above_negative` (`above_the_negative_side`);
    `beyond_bulk` (`beyond_the_bulk`).
    """

    by_gap: int
    gap: float
    above_negative: int
    beyond_bulk: int


def largest_gap(eigenvalues: Tensor, most: int) -> tuple[int, float]:
    """The number i of eigenvalues above the largest gap on the logarithmic scale, and lambda_i / lambda_{i+1} there.

    i = argmax over 1 <= i <= most of log(lambda_i / lambda_{i+1}), the values in falling order and clipped at 1e-12.
    The paper counts by the largest gap; plain differences nearly always find it after the first value. `most` is
    2 k + 2 for k classes. Where all these values are equal there is no outlier, and the ratio is 1. Raises InputError
    for fewer than two values or most < 1.

    >>> largest_gap(torch.tensor([5.0, 4.0, 3.0, 0.1, 0.09]), 4)[0]
    3
    """
    if len(eigenvalues) < 2 or most < 1:
        raise InputError(f"a gap needs at least 2 eigenvalues and room for one, got {len(eigenvalues)} and {most}")
    falling = eigenvalues.sort(descending=True).values[: most + 1].clamp(min=CLIP)
    ratios = falling[:-1] / falling[1:]
    place = int(ratios.argmax())
    return (0, 1.0) if float(ratios[place]) <= 1 else (place + 1, float(ratios[place]))


def above_the_negative_side(eigenvalues: Tensor, factor: float = 2.0) -> int:
    """The number of eigenvalues above `factor` |lambda_min|: the negative side shows how wide the bulk is.

    It says little when there is no negative side, as for a Gauss-Newton matrix.
    """
    return int((eigenvalues > factor * float(-eigenvalues.min().clamp(max=0))).sum())


def beyond_the_bulk(spectrum: Quadrature, size: int, resolution: int = 100) -> int:
    """The number of eigenvalues right of the bulk, of `size` in all, found on the smoothed density.

    The density is smoothed with a bandwidth s of the range / `resolution`. The bulk is the stretch around its highest
    point where a bandwidth holds at least half an eigenvalue (size rho s >= 1/2); one alone shows only 0.4 of itself.
    """
    low, high = float(spectrum.nodes.min()), float(spectrum.nodes.max())
    width = (high - low) / resolution
    if width <= 0:
        return 0
    points = torch.linspace(low, high, 8 * resolution + 1, dtype=spectrum.nodes.dtype, device=spectrum.nodes.device)
    held = size * width * smoothed_density(spectrum, points, width).value
    peak = int(held.argmax())
    outside = (held[peak:] < 0.5).nonzero()
    edge = high if not len(outside) else float(points[peak + int(outside[0])])
    beyond = (spectrum.weights * (spectrum.nodes > edge)).sum(-1).mean()
    return round(size * float(beyond))


def count_outliers(spectrum: Quadrature, top: Tensor, lowest: float, size: int, classes: int | None) -> Outliers:
    """All rules at once, from a density, the largest eigenvalues `top` and the smallest one `lowest`.

    Without a number of classes the gap is looked for among all of `top`; a single eigenvalue has none. Those above the
    negative side are counted in an exact spectrum and in `top`; when all of `top` are above, the density says how many.
    """
    most = min(len(top) - 1, 2 * classes + 2 if classes else math.inf)
    place, ratio = largest_gap(top, int(most)) if most else (0, 1.0)
    both = torch.cat([top, top.new_tensor([lowest])])
    above = above_the_negative_side(both)
    if spectrum.exact or above == len(top):
        steep = (spectrum.weights * (spectrum.nodes > 2 * max(0.0, -lowest))).sum(-1).mean()
        above = max(above, round(size * float(steep)))
    return Outliers(place, ratio, above, beyond_the_bulk(spectrum, size))
