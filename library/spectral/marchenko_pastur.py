"""The Marchenko-Pastur law: the spectrum of a large matrix of independent entries, the reference of an untrained layer.

For a matrix of sides n <= m with independent entries of mean 0 and variance 1, the eigenvalues of its Gram matrix
divided by m follow, as the sides grow with q = n / m fixed, the density

    f(x) = sqrt((b - x)(x - a)) / (2 pi q x),   a, b = (1 -+ sqrt q)^2.

With x = 1 + q + 2 sqrt(q) cos t the integrals over [a, b] become smooth ones over t in [0, pi]:
f(x) dx = 2 sin^2(t) / (pi x) dt. Source: Marchenko and Pastur, 1967.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError

NODES = 200  # of the Gauss-Legendre rule on smooth integrands


@dataclass(frozen=True)
class MarchenkoPastur:
    """The law of shape ratio q = shorter / longer side, in (0, 1].

    >>> round(MarchenkoPastur(1.0).quantile(0.5), 4)  # the constant of optimal hard thresholding
    0.6528
    >>> [round(MarchenkoPastur(q).hill_alpha(), 3) for q in (1.0, 0.5, 0.25)]
    [2.122, 2.706, 3.455]
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"the shape ratio must lie in (0, 1]: shorter over longer side; got {self.ratio}")

    @classmethod
    def of_shape(cls, rows: int, columns: int) -> "MarchenkoPastur":
        """The law of a matrix of that shape."""
        return cls(min(rows, columns) / max(rows, columns))

    @property
    def support(self) -> tuple[float, float]:
        """a and b, the ends of the spectrum."""
        root = math.sqrt(self.ratio)
        return (1 - root) ** 2, (1 + root) ** 2

    def density(self, x: Tensor) -> Tensor:
        """f at x, 0 outside the support; float64 of the same shape."""
        x = x.to(torch.float64)
        low, high = self.support
        inside = ((high - x) * (x - low)).clamp(min=0).sqrt() / (2 * math.pi * self.ratio)
        return torch.where(inside > 0, inside / x, 0.0)

    def quantile(self, share: float) -> float:
        """The x below which that share of the eigenvalues lies, by bisection. Raises InputError outside [0, 1]."""
        if not 0 <= share <= 1:
            raise InputError(f"a quantile is asked for a share in [0, 1], got {share}")
        return float(self._point(self._angle(1 - share)))

    def hill_alpha(self, position: float = 2.0) -> float:
        """The limit of the median rule's alpha: its tail is the upper 1 - 1 / position of the law.

        alpha = 1 + (1 - 1 / position) / integral_{x > x_0} ln(x / x_0) f(x) dx. Raises InputError unless position > 1.
        """
        if not position > 1:
            raise InputError(f"position must be above 1 (2 is the median), got {position}")
        tail = 1 - 1 / position
        angle = self._angle(tail)
        angles, weights = _rule(angle)
        logs = np.log(self._point(angles) / self._point(angle))
        return 1 + tail / float((weights * self._rate(angles) * logs).sum())

    def _angle(self, upper: float) -> float:
        """The angle t whose upper part of the law, x(0) >= x >= x(t), has probability `upper`."""
        low, high = 0.0, math.pi
        for _ in range(60):
            middle = (low + high) / 2
            angles, weights = _rule(middle)
            low, high = (middle, high) if float((weights * self._rate(angles)).sum()) < upper else (low, middle)
        return (low + high) / 2

    def _point(self, angle: float | np.ndarray) -> np.ndarray:
        return 1 + self.ratio + 2 * math.sqrt(self.ratio) * np.cos(angle)

    def _rate(self, angles: np.ndarray) -> np.ndarray:
        return 2 * np.sin(angles) ** 2 / (math.pi * self._point(angles))


def _rule(end: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss-Legendre rule on [0, end]."""
    nodes, weights = _unit_rule()
    return end * (nodes + 1) / 2, end * weights / 2


@cache
def _unit_rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(NODES)
