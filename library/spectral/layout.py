"""How a vector of all parameters is made up of a model's parameters."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which entries of a parameter vector belong to which parameter: blocks by name, in order, each row-major."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each block."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each block lies in the vector."""
        edges = itertools.pairwise(itertools.accumulate(self.sizes, initial=0))
        return {name: slice(*edge) for name, edge in zip(self.names, edges, strict=True)}

    def split(self, block: Tensor) -> list[Tensor]:
        """Vectors (n, p) as one tensor (p, *shape) for each parameter."""
        pieces = block.mT.contiguous().split(self.sizes, dim=-1)
        return [piece.reshape(-1, *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """One tensor (p, *shape) for each parameter as vectors (n, p)."""
        return torch.cat([piece.flatten(1) for piece in pieces], -1).mT
