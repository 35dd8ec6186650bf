"""The experiments behind the paper's figures: spectra of many tiny networks, over size, classes and separability.

One cell is one setting; `measure_cell` trains its networks of all seeds together and returns a spectrum per seed and
moment (before and after training). `library.hessian.basins` has the experiment on large and small batches.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor

from library.errors import InputError
from library.hessian.factors import factor_eigenvalues, gauss_newton_factor, gradient_factor
from library.hessian.outliers import count_outliers
from library.hessian.report import FLAT
from library.hessian.toy import Activation, Descent, blobs, circles, moons, perceptron, train_together
from library.images import load_images
from library.spectral.density import Quadrature, exact_quadrature, lanczos_quadrature
from library.spectral.eigen import extreme_eigenpairs
from library.spectral.operators import GaussNewton, GradientCovariance, Hessian, dense_matrix
from library.spectral.smoothing import deflated_quadrature, wasserstein_distance

Moment = Literal["start", "end"]


class Cell(BaseModel, frozen=True, extra="forbid"):
    """One setting of data, network and training. The defaults are the reproduction's centre, from which others vary."""

    data: Literal["blobs", "circles", "moons", "images"] = "blobs"
    """Simulated blobs, circles or moons, or real images (Fashion-MNIST, pooled to 7 x 7)."""
    classes: PositiveInt = 5
    """Number of blobs; circles and moons have 2 classes, the images 10."""
    width: PositiveInt = 20
    """Dimensions of the blobs."""
    spread: float = Field(1.0, ge=0)
    """Standard deviation of a blob; their centres lie in a box of half-width 10."""
    samples: PositiveInt = 500
    """Training points; as many again test."""
    hidden: tuple[PositiveInt, ...] = (40,)
    """Sizes of the hidden layers."""
    activation: Activation = "relu"
    """Non-linearity of the hidden layers."""
    rate: PositiveFloat = 0.1
    """Learning rate of gradient descent."""
    batch: PositiveInt | None = None
    """Points per step; None takes all, as the paper's gradient descent does."""
    steps: PositiveInt = 5000
    """Most steps."""
    loss: PositiveFloat = 0.01
    """Training ends at this mean loss."""

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """All points (2 samples, width), training ones first, and labels; a function of the seed alone."""
        generator, count = torch.Generator().manual_seed(seed), 2 * self.samples
        if self.data == "blobs":
            return blobs(count, width=self.width, classes=self.classes, spread=self.spread, generator=generator)
        if self.data != "images":
            return {"circles": circles, "moons": moons}[self.data](count, generator=generator)
        return pooled_images(count, generator=generator)


@dataclass(frozen=True)
class Measured:
    """What one network showed at one moment: headline numbers, all eigenvalues of H, and the largest of G and C.

    Eigenvalues are float64: `eigenvalues` (M,) ascending, `gauss_newton` and `covariance` in falling order.
    """

    cell: Cell
    seed: int
    moment: Moment
    metrics: dict[str, float]
    eigenvalues: np.ndarray
    gauss_newton: np.ndarray
    covariance: np.ndarray


def pooled_images(count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random training images of the shipped sample: 7 x 7 means of 4 x 4 pixels, standardised; and labels."""
    images = load_images().train
    if count > len(images):
        raise InputError(f"{count} images are asked for, the sample has {len(images)}")
    chosen = torch.randperm(len(images), generator=generator)[:count]
    points = F.avg_pool2d(images.pixels[chosen].double() / 255, 4).flatten(1)
    return (points - points.mean(0)) / points.std(0, correction=0).clamp(min=1e-6), images.labels[chosen]


def measure_cell(cell: Cell, seeds: tuple[int, ...], moments: tuple[Moment, ...] = ("end",)) -> list[Measured]:
    """Train a network for every seed, all as one, and take its spectra at the start, the end, or both."""
    drawn = [cell.draw(seed) for seed in seeds]
    points, labels = (torch.stack(part) for part in zip(*drawn, strict=True))
    classes = 1 + int(labels.max())
    sizes = [points.shape[-1], *cell.hidden, classes]
    models = [perceptron(sizes, activation=cell.activation, seed=seed) for seed in seeds]
    found = []
    for moment in moments:
        steps = torch.zeros(len(seeds), dtype=torch.int64)
        if moment == "end":
            descent = Descent(rate=cell.rate, steps=cell.steps, loss=cell.loss, batch=cell.batch)
            steps = train_together(models, points[:, : cell.samples], labels[:, : cell.samples], descent, seed=seeds[0])
        for i, seed in enumerate(seeds):
            found.append(_measured(cell, seed, moment, models[i], points[i], labels[i], classes, int(steps[i])))
    return found


@dataclass(frozen=True)
class Tried:
    """One estimate of a density: how many probes and Lanczos steps, and its distance from the exact spectrum.

    `distance` is Wasserstein-1 as a share of the largest eigenvalue, for plain Lanczos quadrature and for the one with
    the outliers taken out first.
    """

    seed: int
    probes: int
    steps: int
    plain: float
    deflated: float


def measure_estimates(cell: Cell, seed: int, probes: tuple[int, ...], steps: tuple[int, ...]) -> list[Tried]:
    """Estimate a trained network's density with every number of probes and steps, against its exact spectrum."""
    points, labels = cell.draw(seed)
    data = points[: cell.samples], labels[: cell.samples]
    classes = 1 + int(labels.max())
    model = perceptron([points.shape[1], *cell.hidden, classes], activation=cell.activation, seed=seed)
    descent = Descent(rate=cell.rate, steps=cell.steps, loss=cell.loss, batch=cell.batch)
    train_together([model], data[0][None], data[1][None], descent, seed=seed)
    hessian = Hessian(model, F.cross_entropy, data, chunk=64)
    h = dense_matrix(hessian)
    exact = exact_quadrature(h, h[:, :1])
    draw = torch.Generator().manual_seed(seed)
    outliers = extreme_eigenpairs(hessian, hessian.probes(classes, generator=draw), largest=classes, generator=draw)
    unit, found = float(exact.nodes.max()), []
    for count in probes:
        start = hessian.probes(count, generator=draw)
        for depth in steps:
            rules = lanczos_quadrature(h, start, depth), deflated_quadrature(h, outliers, start, depth)
            found.append(Tried(seed, count, depth, *(wasserstein_distance(rule, exact) / unit for rule in rules)))
    return found


def _measured(
    cell: Cell,
    seed: int,
    moment: Moment,
    model: torch.nn.Module,
    points: Tensor,
    labels: Tensor,
    classes: int,
    steps: int,
) -> Measured:
    data = points[: cell.samples], labels[: cell.samples]
    hessian = Hessian(model, F.cross_entropy, data, chunk=64)
    loss, gradient = hessian.loss_and_gradient()
    h = dense_matrix(hessian)
    factor = gauss_newton_factor(GaussNewton(model, F.cross_entropy, data))
    newton = factor_eigenvalues(factor).flip(0)
    covariance = factor_eigenvalues(gradient_factor(GradientCovariance(model, F.cross_entropy, data))).flip(0)
    values = torch.linalg.eigvalsh(h)
    top = values.flip(0)
    rule = Quadrature(values[None], torch.full_like(values[None], 1 / len(values)), exact=True)
    outliers = count_outliers(rule, top[: 2 * classes + 3], float(values[0]), len(values), classes)
    with torch.no_grad():
        output = model(points[cell.samples :])
        test = labels[cell.samples :]
    metrics = {
        "parameters": float(len(values)),
        "steps": float(steps),
        "loss": loss,
        "test_loss": float(F.cross_entropy(output, test)),
        "test_accuracy": float((output.argmax(1) == test).double().mean()),
        "gradient_norm": float(gradient.norm()),
        "largest": float(top[0]),
        "smallest": float(values[0]),
        "outliers_by_gap": float(outliers.by_gap),
        "gap": outliers.gap,
        "outliers_above_negative": float(outliers.above_negative),
        "outliers_beyond_bulk": float(outliers.beyond_bulk),
        "flat_share": float((values.abs() <= FLAT * top[0]).double().mean()),
        "steep": float((values.abs() > FLAT * top[0]).sum()),
        "trace": float(values.sum()),
        "effective_rank": float(values.sum() ** 2 / values.square().sum()),
        "residual_share": float((h - factor.mT @ factor).norm() / h.norm()),
    }
    kept = 2 * classes + 3
    arrays = values.numpy(), newton[:kept].numpy(), covariance[:kept].numpy()
    return Measured(cell, seed, moment, metrics, *arrays)
