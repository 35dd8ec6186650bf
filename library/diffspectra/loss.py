"""The training loss: coordinates against the molecule turned onto its noisy self, elements, charges and bonds."""

from typing import NamedTuple

import torch
from torch import Tensor

from library.diffspectra.kabsch import aligned
from library.diffspectra.scaling import State


class Terms(NamedTuple):
    """Per molecule (B,): errors of coordinates, of elements and charges, and of bonds, before any weight."""

    position: Tensor
    atom: Tensor
    bond: Tensor

    def total(self, weight: Tensor, factors: tuple[float, float, float]) -> Tensor:
        """weight * (factors . terms), (B,)."""
        return weight * sum(factor * term for factor, term in zip(factors, self, strict=True))


def terms(predicted: State, clean: State, noisy_positions: Tensor) -> Terms:
    """Squared errors of a prediction of the molecule: means over channels, sums over atoms and ordered pairs.

    Coordinates are compared with the clean ones turned by the rotation that lays them on `noisy_positions` (B, N, 3),
    which makes the loss invariant to rotations of the molecule. All are masked: padding counts for nothing.
    """
    target = aligned(noisy_positions, clean.positions)
    position = (predicted.positions - target).square().mean(-1).sum(1)
    atom = (predicted.features - clean.features).square().mean(-1).sum(1)
    bond = (predicted.edges - clean.edges).square().mean(-1).sum((1, 2))
    return Terms(position, atom, bond)


def loss_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """sqrt(alpha / sigma): the less noise, the more an error counts."""
    return torch.sqrt(alpha / sigma)
