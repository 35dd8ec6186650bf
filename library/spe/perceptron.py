"""The multilayer perceptron that all parts are made of, on one tensor or on several that share batch statistics."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from library.spe.norms import NormName, make_norm


class Perceptron(nn.Module):
    """`layers` - 1 times linear, norm, ReLU and dropout, then a linear layer: (..., width) to (..., out).

    >>> Perceptron(3, 8, 2, layers=3)
    Perceptron(3, 8, 2, layers=3, norm=layer)
    """

    def __init__(
        self, width: int, hidden: int, out: int, *, layers: int, norm: NormName = "layer", dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1)]
        self.norm, self.dropout = norm, dropout
        self.hidden = nn.ModuleList(nn.Linear(widths[i], hidden) for i in range(layers - 1))
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(widths[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        for place, linear in enumerate(self.hidden):
            [x] = self.activate(place, [linear(x)])
        return self.last(x)

    def activate(self, place: int, rows: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Norm, ReLU and dropout after hidden layer `place`, for tensors that share batch statistics."""
        active = self.norms[place](rows, weights, relu=True)
        return [F.dropout(x, self.dropout, self.training) for x in active] if self.dropout else active

    def __repr__(self) -> str:
        sizes = [self.hidden[0] if self.hidden else self.last, self.last]
        width, hidden = sizes[0].in_features, sizes[-1].in_features
        return (
            f"Perceptron({width}, {hidden}, {self.last.out_features}, layers={len(self.hidden) + 1}, norm={self.norm})"
        )
