"""The experiments behind the results: do sensitivities rank settings by their true loss, and choose good bits?"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt, model_validator
from torch import nn

from library import files
from library.artifact import Artifact
from library.errors import InputError
from library.hawq.analysis import Metric, Sensitivity
from library.hawq.costs import BitChoice, size_costs
from library.hawq.network import quantize
from library.hawq.pareto import frontier as exact_frontier
from library.hawq.plan import BitPlan
from library.hawq.recipe import HawqRecipe
from library.hawq.trained import load_hawq
from library.hawq.validity import check_validity
from library.images.data import ImageBatch, stacked
from library.recipe import fit

METHOD, FIRST, PLAIN, INVERSE, UNIFORM, RANDOM = (
    "HAWQ-V2 (mean trace)",
    "HAWQ-V1 (top eigenvalue)",
    "unweighted error",
    "inverse trace",
    "uniform",
    "random",
)
METRICS: dict[str, Metric] = {METHOD: "hessian", FIRST: "top-eigenvalue", PLAIN: "unweighted"}
TOO_MANY = 2000  # draws per random setting that is asked for, before the budget counts as out of reach


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    mean_bits: tuple[float, ...] = Field((3.0, 2.5), min_length=1)
    """Bits per weight at which settings of equal size are compared; the first is the one that is judged."""
    random_settings: PositiveInt = 40
    """Random settings of that size."""
    tolerance: float = Field(0.03, gt=0, lt=1)
    """How far below the budget a random setting may be, as a share of it."""
    finetune_steps: PositiveInt = 60
    """Steps of fine-tuning at the first budget."""
    test_images: PositiveInt | None = None
    """Test images that are evaluated; None takes all."""

    @model_validator(mode="after")
    def _within_bits(self) -> "Study":
        if any(not 2 <= mean <= 8 for mean in self.mean_bits):
            raise ValueError("mean_bits: from 2 to 8")
        return self


@dataclass(frozen=True)
class Compared:
    """What one seed found: rows of `settings` (per budget and choice) and of `ranks`, `validity` and `traces`."""

    settings: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    validity: list[dict[str, Any]]
    traces: list[dict[str, Any]]


def compare(trained: Artifact, recipe: HawqRecipe, study: Study) -> Compared:
    """Choose bits by each metric at equal size, evaluate them and random settings on test images, without fine-tuning.

    `recipe` says how curvature is measured and weights quantised; inputs stay in full precision. At the first budget
    the chosen settings are also fine-tuned.
    """
    recipe = recipe.model_copy(update={"weights": str(trained.path), "activation_bits": None})
    network, batches = recipe.network(), _test_batches(recipe, study)
    measured = {name: recipe.model_copy(update={"curvature": metric}).sensitivity() for name, metric in METRICS.items()}
    measured[INVERSE] = _inverted(measured[METHOD])
    settings, ranks, checks = [], [], []
    for mean in study.mean_bits:
        plans = {name: _plan(found, mean) for name, found in measured.items()}
        if float(mean).is_integer():
            plans[UNIFORM] = _explicit(measured[METHOD], [int(mean)] * len(measured[METHOD].layers.names))
        drawn = random_plans(measured[METHOD], mean, study.random_settings, study.tolerance, seed=recipe.seed)
        losses, accuracies = [], []
        for plan in drawn:
            loss, accuracy = evaluated(quantize(network, plan, quantizer=recipe.quantizer), batches)
            losses.append(loss)
            accuracies.append(accuracy)
        for name, plan in plans.items():
            loss, accuracy = evaluated(quantize(network, plan, quantizer=recipe.quantizer), batches)
            row = {"mean_bits": mean, "choice": name, "bits": " ".join(str(c.weight) for c in plan.choices)}
            row |= {"size": plan.mean_bits, "accuracy": accuracy, "loss": loss}
            if mean == study.mean_bits[0]:
                tuned_loss, tuned_accuracy = _finetuned(recipe, plan, study, batches)
                row |= {"tuned_accuracy": tuned_accuracy, "tuned_loss": tuned_loss}
            settings.append(row)
        settings.append(
            {"mean_bits": mean, "choice": RANDOM, "bits": f"{len(drawn)} settings"}
            | {"size": float(np.mean([plan.mean_bits for plan in drawn]))}
            | {"accuracy": float(np.mean(accuracies)), "loss": float(np.mean(losses))}
        )
        for name, found in measured.items():
            omegas = [_explicit(found, [c.weight for c in plan.choices]).omega for plan in drawn]
            ranks.append({"mean_bits": mean, "metric": name, "spearman": spearman(omegas, losses)})
        checks += [
            {"mean_bits": mean, "choice": name} | _checked(network, recipe, plans[name])
            for name in (METHOD, UNIFORM)
            if name in plans
        ]
    loss, accuracy = evaluated(network, batches)
    settings.append({"mean_bits": 32.0, "choice": "full precision", "bits": "32", "size": 32.0}
                    | {"accuracy": accuracy, "loss": loss})  # fmt: skip
    found = measured[METHOD]
    columns = zip(found.layers.names, found.layers.n_params, found.curvature, found.probe_error, found.data_error,
                  strict=True)  # fmt: skip
    traces = [
        {"layer": name, "weights": n, "mean_trace": float(trace), "probe_error": float(a), "data_error": float(b)}
        for name, n, trace, a, b in columns
    ]
    return Compared(settings, ranks, checks, traces)


@torch.no_grad()
def evaluated(model: nn.Module, batches: list[ImageBatch]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    loss = right = 0.0
    for batch in batches:
        logits = model(batch.pixels)
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        right += float((logits.argmax(1) == batch.labels).sum())
    count = sum(len(batch.labels) for batch in batches)
    return loss / count, right / count


def random_plans(found: Sensitivity, mean: float, count: int, tolerance: float, *, seed: int) -> list[BitPlan]:
    """Different settings, each layer's bits drawn uniformly, whose size is within `tolerance` below a mean of bits.

    Raises InputError when too few draws hit that size.
    """
    generator = np.random.default_rng([seed, round(1000 * mean)])
    sizes = np.array(found.layers.n_params)
    kept: dict[tuple[int, ...], BitPlan] = {}
    for _ in range(TOO_MANY * count):
        bits = generator.choice(found.bits, len(sizes))
        reached = float(bits @ sizes / sizes.sum()) / mean
        if 1 - tolerance <= reached <= 1:
            kept.setdefault(tuple(map(int, bits)), _explicit(found, bits.tolist()))
        if len(kept) == count:
            return list(kept.values())
    raise InputError(f"mean_bits: {len(kept)} of {count} random settings of {mean:g} bits per weight were found")


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def _test_batches(recipe: HawqRecipe, study: Study) -> list[ImageBatch]:
    splits = recipe.datasets()
    count = min(study.test_images or len(splits.test), len(splits.test))
    edges = [*range(0, count, 500), count]
    return [stacked(splits, splits.test, b - a, start=a) for a, b in pairwise(edges)]


def _plan(found: Sensitivity, mean: float) -> BitPlan:
    choices = [BitChoice(b) for b in found.bits]
    front = exact_frontier(found.omega.numpy(), size_costs(found.layers.n_params, choices))
    chosen = front.choose(mean * sum(found.layers.n_params))
    return BitPlan(found.layers, tuple(choices[i] for i in chosen.choice), chosen.omega, chosen)


def _explicit(found: Sensitivity, bits: list[int]) -> BitPlan:
    choices = tuple(BitChoice(b) for b in bits)
    omega = sum(float(found.omega[i, found.bits.index(b)]) for i, b in enumerate(bits))
    return BitPlan(found.layers, choices, omega)


def _inverted(found: Sensitivity) -> Sensitivity:
    curvature = 1 / found.curvature.clamp(min=1e-9 * float(found.curvature.max()))
    return replace(found, curvature=curvature, omega=curvature[:, None] * found.perturbation)


def _checked(network: nn.Module, recipe: HawqRecipe, plan: BitPlan) -> dict[str, float]:
    quantized = quantize(network, plan, quantizer=recipe.quantizer)
    found = check_validity(network, quantized, F.cross_entropy, recipe.measurement(), plan)
    return {"predicted": found.predicted, "true": found.true, "linear": found.linear, "quadratic": found.quadratic}


def _finetuned(recipe: HawqRecipe, plan: BitPlan, study: Study, batches: list[ImageBatch]) -> tuple[float, float]:
    changes = {"chosen": tuple(c.weight for c in plan.choices), "steps": study.finetune_steps, "stages": 1}
    with files.scratch_folder() as folder:
        tuned = fit(recipe.model_copy(update=changes), path=folder / "tuned", device="cpu")
        return evaluated(load_hawq(tuned).model, batches)
