"""Curvature of any recipe's loss: its batches and losses as a model, and a follower for use while it trains."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import collective
from library.errors import InputError
from library.hessian.analysis import analyze
from library.hessian.report import HessianReport
from library.recipe import Batch, Recipe, Samples, Splits, make_batch, to_device, unwrap
from library.spectral.eigen import extreme_eigenpairs
from library.spectral.operators import Hessian


class RecipeLoss(nn.Module):
    """A recipe's loss as a module: maps (number, batch) to the scalar `recipe.losses(model, batch)["loss"]`.

    What is random in the loss is drawn from the batch's number, so that every product sees the same loss.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        super().__init__()
        self.recipe, self.model = recipe, unwrap(model)

    def forward(self, numbered: tuple[int, Batch]) -> Tensor:
        number, batch = numbered
        with torch.random.fork_rng():
            torch.manual_seed(number)
            return self.recipe.losses(self.model, batch)["loss"]


class RecipeOutputs(nn.Module):
    """A recipe's model as a map from (number, batch) to `recipe.outputs`, for losses that are cross-entropies."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        super().__init__()
        self.recipe, self.model = recipe, unwrap(model)

    def forward(self, numbered: tuple[int, Batch]) -> Tensor:
        return self.recipe.outputs(self.model, numbered[1])


def check_additive(recipe: Recipe, workers: int) -> None:
    """Raise InputError where a loss is no sum over samples, so that several workers would measure another one."""
    if workers > 1 and recipe.contrastive:
        raise InputError(
            f"workers: the loss of {recipe.kind} compares the samples of all workers, so its curvature cannot be "
            f"shared by {workers}; use 1"
        )


def curvature_batches(splits: Splits, samples: Samples, count: int, size: int) -> list[tuple[tuple[int, Batch], Batch]]:
    """This worker's share of the first `count` samples in batches of at most `size`, as pairs for `RecipeLoss`."""
    share = collective.share(min(count, len(samples)))
    starts = range(share.start, share.stop, size)
    found = []
    for start in starts:
        numbers = list(range(start, min(start + size, share.stop)))
        batch = make_batch(splits, samples, numbers, numbers)
        found.append(((start, batch), batch))
    return found


def recipe_hessian(
    recipe: Recipe, model: nn.Module, batches: Iterable[tuple[tuple[int, Batch], Batch]], **options: Any
) -> Hessian:
    """The Hessian of a recipe's loss over `curvature_batches`; `options` are those of `Hessian`."""
    return Hessian(RecipeLoss(recipe, model), _itself, batches, count=recipe.count, **options)


def analyze_recipe(
    recipe: Recipe, model: nn.Module, batches: Sequence[tuple[tuple[int, Batch], Batch]], **options: Any
) -> HessianReport:
    """`analyze` for a recipe's model and loss; a parameter `w` is called `model.w` in the result.

    The Gauss-Newton part, and the classes of a classifier, are there when the recipe tells its outputs and targets.
    """
    module, loss, data, count = recipe_loss(recipe, model, batches)
    return analyze(module, loss, data, count=count, gauss_newton=isinstance(module, RecipeOutputs), **options)


def recipe_loss(
    recipe: Recipe, model: nn.Module, batches: Sequence[tuple[tuple[int, Batch], Batch]]
) -> tuple[nn.Module, Callable[[Tensor, Any], Tensor], list[tuple[Any, Any]], Callable[[Any], int]]:
    """A recipe's loss as module, loss, data and count: outputs and labels where it tells them, else the loss itself."""
    targets = [recipe.targets(batch) for _, batch in batches]
    if any(target is None for target in targets):
        return RecipeLoss(recipe, model), _itself, list(batches), recipe.count
    data = [(numbered, target) for (numbered, _), target in zip(batches, targets, strict=True)]
    return RecipeOutputs(recipe, model), F.cross_entropy, data, len


class CurvatureFollower:
    """Follows the largest Hessian eigenvalues while a recipe trains; call it in `after_step`, or after a step.

    Every `every` steps the eigenvectors of the last time, and a random vector, start the search, so that it takes a few
    products. The samples are the first `samples` of the training data, the same at all times and shared over workers;
    every worker must call it. Works with engines that keep whole weights on each worker (ddp). Raises InputError for
    several workers and a loss that is no sum over samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        *,
        every: int,
        count: int = 3,
        samples: int = 128,
        batch_size: int = 32,
        tolerance: float = 1e-2,
        limit: int = 60,
        device: torch.device | str = "cpu",
    ) -> None:
        check_additive(recipe, collective.world_size())
        self._recipe, self._every, self._count = recipe, every, count
        self._tolerance, self._limit = tolerance, limit
        self._batches = to_device(curvature_batches(splits, splits.train, samples, batch_size), device)
        self._draw = torch.Generator().manual_seed(recipe.seed)
        self._vectors: Tensor | None = None

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """At each `every`-th step `hessian_1`, `hessian_2` ... and how many products it took; else nothing."""
        if step % self._every:
            return {}
        hessian = recipe_hessian(self._recipe, model, self._batches)
        count = min(self._count, hessian.size)
        random = hessian.probes(1 if self._vectors is not None else count, generator=self._draw)
        start = random if self._vectors is None else torch.cat([self._vectors, random], 1)
        pairs = extreme_eigenpairs(
            hessian, start, largest=count, generator=self._draw, tolerance=self._tolerance, limit=self._limit
        )
        self._vectors = pairs.vectors
        values = {f"hessian_{i + 1}": float(value) for i, value in enumerate(pairs.values)}
        return values | {"hessian_products": float(pairs.products)}


def _itself(loss: Tensor, _: Batch) -> Tensor:
    return loss
