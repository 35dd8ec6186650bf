"""SPE as it was first formulated, step by step: for tests of equality and to measure the fast form against.

Each graph's Q with all its channels is formed from a diagonal matrix per channel, all graphs are padded to as many
columns as the largest one has nodes, messages are gathered and scattered along edges, and every linear layer runs on
every padded entry. It takes a network's own weights; statistics of batch norm see the padding, and follow it in
training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.spe.batch import SpeBatch
from library.spe.columns import ColumnGin
from library.spe.network import Eigenvectors, GraphNetwork, Spe
from library.spe.norms import EPSILON, MOMENTUM, BatchNorm, LayerNorm, NoNorm
from library.spe.perceptron import Perceptron
from library.spe.rho import PerceptronRho


def plain_forward(network: GraphNetwork, batch: SpeBatch) -> Tensor:
    """The output (B, targets) of a network whose encoder is an `Spe` with rho gin or mlp."""
    encodings = plain_encodings(network.encoder, batch)
    encoder = network.encoder
    try:
        network.encoders[0] = _Given(encodings)
        return network(batch)
    finally:
        network.encoders[0] = encoder


def plain_encodings(encoder: Spe, batch: SpeBatch) -> Tensor:
    """Encodings (N, p)."""
    vectors = Eigenvectors()(batch)
    most = int(batch.counts.max())
    padded, mask = [], []
    for v, phi in zip(vectors.split(batch.counts.tolist()), encoder.phi(batch.values, batch.kept), strict=True):
        q = v @ phi.T.diag_embed() @ v.T
        padded.append(F.pad(q.permute(1, 2, 0), (0, 0, 0, most - len(v))))
        mask.append((torch.arange(most, device=v.device) < len(v)).expand(len(v), most))
    x, own = torch.cat(padded), torch.cat(mask)[..., None]
    if isinstance(encoder.rho, PerceptronRho):
        return (encoder.rho.mlp(x) * own).sum(1)
    return (_plain_gin(encoder.rho.gin, x, batch) * own).sum(1)


def _plain_gin(gin: ColumnGin, x: Tensor, batch: SpeBatch) -> Tensor:
    """X <- MLP((1 + eps) X + sum of the neighbours' X), X (N, columns, width)."""
    for place, layer in enumerate(gin.layers):
        if place and gin.between is not None:
            x = _plain_norm(gin.between[place - 1], x)
        messages = torch.zeros_like(x).index_add(0, batch.destinations, x[batch.sources])
        x = _plain_perceptron(layer.mlp, (1 + layer.eps) * x + messages)
    return x


def _plain_perceptron(mlp: Perceptron, x: Tensor) -> Tensor:
    for linear, norm in zip(mlp.hidden, mlp.norms, strict=True):
        x = F.relu(_plain_norm(norm, linear(x)))
    return mlp.last(x)


def _plain_norm(norm: BatchNorm | LayerNorm | NoNorm, x: Tensor) -> Tensor:
    """PyTorch's batch norm over all rows, which sees the padding; the others as they are."""
    if not isinstance(norm, BatchNorm):
        return norm([x])[0]
    statistics = norm.running_mean, norm.running_var
    found = F.batch_norm(x.flatten(0, -2), *statistics, norm.weight, norm.bias, norm.training, MOMENTUM, EPSILON)
    return found.view_as(x)


class _Given(nn.Module):
    """An encoder whose encodings are known."""

    def __init__(self, encodings: Tensor) -> None:
        super().__init__()
        self.encodings = encodings

    def forward(self, batch: SpeBatch) -> Tensor:
        return self.encodings
