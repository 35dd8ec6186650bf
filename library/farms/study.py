"""The experiments behind the results: the bias of shapes, planted heaviness, and pruning a small network."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from library import order
from library.farms.allocation import allocate
from library.farms.analysis import Settings, measure
from library.farms.pruning import InputStatistics, prune_weight
from library.images.data import ImageBatch, image_splits, load_images, stacked
from library.spectral.marchenko_pastur import MarchenkoPastur

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "plain", "rule": "median"},
    "FARMS": {"method": "farms", "rule": "median"},
    "plain, least KS distance": {"method": "plain", "rule": "ks"},
}
ARMS = ("uniform", "plain", "FARMS", "FARMS, shuffled")  # the last is the control: the same ratios, other layers
STUDENT_FREEDOM = 2.5  # of the heavy-tailed entries that are mixed in; their deviation is sqrt(5)


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    window: int = Field(64, ge=8)
    """Rows of FARMS' square windows."""
    ops: int = Field(6, ge=2)
    """Windows per dimension."""
    shapes: tuple[tuple[int, int], ...] = (
        (512, 512),
        (512, 256),
        (512, 128),
        (512, 64),
        (1024, 128),
        (256, 64),
        (128, 512),
    )
    """Of the Gaussian matrices whose exponents should not differ."""
    matrices: int = Field(24, ge=3)
    """Matrices of random shape with planted heaviness, per seed."""
    rows: tuple[PositiveInt, PositiveInt] = (128, 384)
    """Least and most rows of these."""
    columns: tuple[PositiveInt, PositiveInt] = (64, 256)
    """Least and most columns of these."""
    widths: tuple[PositiveInt, ...] = (512, 512, 128, 512, 128, 512, 256)
    """Hidden widths of the network that is pruned."""
    epochs: PositiveInt = 10
    """Passes over the training images."""
    batch_size: PositiveInt = 128
    """Images per step."""
    lr: float = Field(0.05, gt=0)
    """Peak learning rate of SGD with momentum 0.9, which falls along a cosine."""
    calibration: PositiveInt = 1024
    """Training images whose activations Wanda takes."""
    sparsity: float = Field(0.8, gt=0, lt=1)
    """Share of all weights that is pruned."""
    epsilons: tuple[float, ...] = Field((0.05, 0.1, 0.2, 0.3), min_length=1)
    """How far ratios may differ; the one of best validation accuracy counts."""

    def settings(self, name: str) -> Settings:
        """The settings of one of `METHODS`."""
        return Settings(window=self.window, ops=self.ops, **METHODS[name])


def shape_bias(study: Study, seed: int) -> list[dict[str, Any]]:
    """A row per shape: exponents of a Gaussian matrix, plain and FARMS, beside the law's (Marchenko and Pastur)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for shape in study.shapes:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) / max(shape) ** 0.5
        found = {name: _alpha(weight, study, name) for name in ("plain", "FARMS")}
        law = MarchenkoPastur.of_shape(*shape).hill_alpha()
        rows.append({"seed": seed, "rows": shape[0], "columns": shape[1], **found, "law": law})
    return rows


def planted_heaviness(study: Study, seed: int) -> list[dict[str, Any]]:
    """A row per matrix of random shape and heaviness s, sqrt(1 - s^2) Gaussian + s Student: its exponents."""
    generator = torch.Generator().manual_seed(seed)
    sides = (study.rows, study.columns)
    rows = []
    for _ in range(study.matrices):
        shape = tuple(int(torch.randint(low, high + 1, (), generator=generator)) for low, high in sides)
        heaviness = float(torch.rand((), generator=generator))
        light, heavy = (make(shape, generator) for make in (_gaussian, _student))
        weight = ((1 - heaviness**2) ** 0.5 * light + heaviness * heavy) / max(shape) ** 0.5
        found = {name: _alpha(weight, study, name) for name in METHODS}
        rows.append({"seed": seed, "rows": shape[0], "columns": shape[1], "heaviness": heaviness, **found})
    return rows


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's: the correlation of the ranks of two series without ties.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0]))
    -1.0
    """
    ranks = torch.stack([series.argsort().argsort() for series in (left, right)]).to(torch.float64)
    return round(float(torch.corrcoef(ranks)[0, 1]), 12)


def pruned_accuracy(study: Study, seed: int) -> list[dict[str, Any]]:
    """A row per pruner and arm: the test accuracy of a trained network after pruning, epsilon chosen on validation."""
    splits = image_splits(load_images(), seed=seed)
    train, validation, test = (stacked(splits, part) for part in (splits.train, splits.validation, splits.test))
    dense = trained_network(study, train, seed)
    layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
    parameters = [layer.weight.numel() for layer in layers]
    calibration = train.pixels[: study.calibration].flatten(1)
    rows = []
    for pruner in ("wanda", "magnitude"):
        for arm in ARMS:
            epsilons = study.epsilons if arm != "uniform" else (0.0,)
            alphas = _exponents(layers, study, arm, seed)
            tried = []
            for epsilon in epsilons:
                ratios = allocate(alphas, parameters, study.sparsity, epsilon=epsilon).tolist()
                network = pruned_network(dense, ratios, pruner, calibration)
                tried.append((accuracy(network, validation), -epsilon, network))
            best = max(tried, key=lambda one: one[:2])
            rows.append(
                {
                    "seed": seed,
                    "pruner": pruner,
                    "arm": arm,
                    "epsilon": -best[1],
                    "validation": best[0],
                    "accuracy": accuracy(best[2], test),
                    "dense": accuracy(dense, test),
                    "images": len(test.labels),
                }
            )
    return rows


def trained_network(study: Study, train: ImageBatch, seed: int) -> nn.Sequential:
    """A fully connected network, trained from random weights that depend on the seed alone."""
    pixels, labels = train.pixels.flatten(1), train.labels
    widths = [pixels.shape[1], *study.widths, int(labels.max()) + 1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    network = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    optimizer = torch.optim.SGD(network.parameters(), lr=study.lr, momentum=0.9, weight_decay=5e-4)
    steps = study.epochs * (len(labels) // study.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.from_numpy(order.global_batch(seed, step, study.batch_size, len(labels)))
        loss = F.cross_entropy(network(pixels[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def pruned_network(dense: nn.Sequential, ratios: list[float], pruner: str, calibration: Tensor) -> nn.Sequential:
    """A pruned copy: layer after layer, each on what comes through the pruned ones before."""
    shares = iter(ratios)
    parts: list[nn.Module] = []
    for part in dense:
        if isinstance(part, nn.Linear):
            seen = InputStatistics.empty(part.in_features, gram=False)
            seen.add(calibration[None])
            copy = nn.Linear(part.in_features, part.out_features)
            copy.bias.copy_(part.bias)
            copy.weight.copy_(prune_weight(part.weight, pruner, next(shares), seen))
            part = copy
        calibration = part(calibration)
        parts.append(part)
    return nn.Sequential(*parts)


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageBatch) -> float:
    """The share of the images whose class is found."""
    return float((network(images.pixels.flatten(1)).argmax(1) == images.labels).double().mean())


def _exponents(layers: list[nn.Linear], study: Study, arm: str, seed: int) -> list[float]:
    if arm == "uniform":
        return [1.0] * len(layers)
    found = [_alpha(layer.weight.detach(), study, arm.partition(",")[0]) for layer in layers]
    return [found[i] for i in order.permutation(seed, 1, len(found))] if arm.endswith("shuffled") else found


def _alpha(weight: Tensor, study: Study, name: str) -> float:
    _, fit, _ = measure(weight, study.settings(name))
    return float(fit.alpha.mean())


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t of unit deviation, by Bailey's polar method: sqrt(f (u^(-2 / f) - 1)) cos(2 pi v), f its freedom."""
    freedom = STUDENT_FREEDOM
    radius, angle = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    draws = (freedom * (radius.clamp(min=1e-300) ** (-2 / freedom) - 1)).sqrt() * torch.cos(2 * torch.pi * angle)
    return draws / (freedom / (freedom - 2)) ** 0.5
