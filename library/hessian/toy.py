"""The paper's own experiment: clusters of points, small fully connected networks, and plain gradient descent.

Source: Sagun, Evci, Guney, Dauphin, Bottou, 2017, and the authors' code (repository leventsagun/hessian-for-basicDL).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from library.errors import InputError, NonFiniteError

Activation = Literal["relu", "tanh", "softplus"]
Shape = Literal["blobs", "circles", "moons"]
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}
INITIAL_SCALE = 0.1  # weights and biases start as 0.1 N(0, 1)
BOX = 10.0  # the blobs' centres are uniform in [-10, 10]^d


def blobs(
    count: int, *, width: int, classes: int, spread: float = 1.0, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` points around `classes` centres uniform in [-10, 10]^width, with deviation `spread`, then standardised.

    Points (count, width) float64, mean 0 and deviation 1 per feature, and labels (count,), as equal in number as
    possible and in random order. Raises InputError for fewer points than classes.
    """
    if not 1 <= classes <= count or width < 1 or not spread >= 0:
        raise InputError(f"blobs: {count} points of width {width} and spread {spread} cannot form {classes} classes")
    centres = BOX * (2 * torch.rand(classes, width, generator=generator, dtype=torch.float64) - 1)
    labels = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
    points = centres[labels] + spread * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return _standardised(points), labels


def circles(
    count: int, *, factor: float = 0.7, noise: float = 0.1, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two concentric circles, the inner one of radius `factor`, with Gaussian noise; standardised. Labels 0 and 1."""
    labels = (torch.arange(count) % 2)[torch.randperm(count, generator=generator)]
    angles = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    radius = torch.where(labels == 0, 1.0, factor)
    return _noisy(torch.stack([radius * angles.cos(), radius * angles.sin()], 1), noise, generator), labels


def moons(count: int, *, noise: float = 0.1, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two interleaving half circles with Gaussian noise; standardised. Labels 0 and 1."""
    labels = (torch.arange(count) % 2)[torch.randperm(count, generator=generator)]
    angles = math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    upper = torch.stack([angles.cos(), angles.sin()], 1)
    lower = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], 1)
    return _noisy(torch.where(labels[:, None] == 0, upper, lower), noise, generator), labels


def perceptron(
    sizes: Sequence[int], *, activation: Activation = "relu", scale: float = INITIAL_SCALE, seed: int = 0
) -> nn.Sequential:
    """A float64 fully connected network whose weights and biases are `scale` N(0, 1), a function of the seed alone."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"a network needs at least two layer sizes, all positive, got {list(sizes)}")
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer, dtype=torch.float64), ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers[:-1])
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(scale * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    return model


@dataclass(frozen=True)
class Descent:
    """How tiny networks are trained: gradient descent until the loss or the gradient is small, or the steps are over.

    `batch` None takes all points at every step; otherwise that many, drawn anew at every step.
    """

    rate: float = 0.1
    steps: int = 5000
    loss: float = 0.01
    gradient: float = 1e-4
    batch: int | None = None


def train_together(
    models: Sequence[nn.Sequential], points: Tensor, labels: Tensor, descent: Descent, *, seed: int = 0
) -> Tensor:
    """Train `perceptron`s of equal sizes, each on its own points, as one. Returns the steps that each took (s,).

    `points` (s, n, d), `labels` (s, n). The models hold the trained weights afterwards. Each stops by itself where
    `descent` says; those that have stopped stand still. The loss is the mean cross-entropy. Raises NonFiniteError when
    a loss is not finite.
    """
    stacked = [torch.stack(each).detach() for each in zip(*(model.parameters() for model in models), strict=True)]
    weights, activation = [value.requires_grad_() for value in stacked], models[0][1] if len(models[0]) > 1 else None
    draw = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(models), dtype=torch.int64)
    active = torch.ones(len(models), dtype=torch.bool)
    for step in range(descent.steps):
        x, y = points, labels
        if descent.batch is not None:
            chosen = torch.randint(points.shape[1], (descent.batch,), generator=draw)
            x, y = points[:, chosen], labels[:, chosen]
        losses = _losses(weights, activation, x, y)
        gradients = torch.autograd.grad(losses.sum(), weights)
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteError(f"the loss of a tiny network is {losses.tolist()}; lower the rate {descent.rate:g}")
        if descent.batch is None:
            norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
            active = active & (losses > descent.loss) & (norms > descent.gradient)
        elif step % 50 == 0:
            active = active & (_losses(weights, activation, points, labels) > descent.loss)
        if not bool(active.any()):
            break
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= descent.rate * gradient * active.view(-1, *[1] * (gradient.ndim - 1))
        taken += active
    with torch.no_grad():
        for i, model in enumerate(models):
            for value, trained in zip(model.parameters(), weights, strict=True):
                value.copy_(trained[i])
    return taken


def _losses(weights: Sequence[Tensor], activation: nn.Module | None, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropies (s,) of stacked networks: weights (s, out, in) and biases (s, out) in turn."""
    for i in range(0, len(weights), 2):
        x = torch.baddbmm(weights[i + 1].unsqueeze(1), x, weights[i].mT)
        x = activation(x) if activation is not None and i + 2 < len(weights) else x
    return (x.logsumexp(-1) - x.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean(-1)


def _standardised(points: Tensor) -> Tensor:
    return (points - points.mean(0)) / points.std(0, correction=0).clamp(min=1e-12)


def _noisy(points: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return _standardised(points + noise * torch.randn(points.shape, generator=generator, dtype=torch.float64))
