"""The experiments behind the results: RQGNN beside its ablations and controls, on sets with natural imbalance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt

from library import order
from library.calibration import auroc
from library.recipe import make_batch, seed_step, seeded_model
from library.rqgnn.calibrated import Decision, energy_curves
from library.rqgnn.metrics import detection_metrics
from library.rqgnn.recipe import Material, RqgnnRecipe, margins_of

RELEASED = {"node_kinds": None, "rq_on": "raw", "normalise_rq": False, "filters": "learned"}  # but for its filters
ARMS: Mapping[str, dict[str, Any]] = {
    "RQGNN": RELEASED,
    "RQGNN, frozen filters (released code)": {"preset": "official"},
    "RQGNN, quotients normalised": RELEASED | {"normalise_rq": True},
    "RQGNN as in the paper (latent)": {"preset": "paper"},
    "RQGNN, our default": {},
    "RQGNN, our default, learned filters": {"filters": "learned"},
    "RQGNN, our default, raw quotients": {"rq_on": "raw", "normalise_rq": False},
    "control: atom counts instead of quotients": RELEASED | {"rq_on": "counts"},
    "without the Rayleigh branch": RELEASED | {"branch": False},
    "same bank, mean pooling, no quotients": RELEASED | {"branch": False, "pooling": "mean"},
    "GIN, cross-entropy": {"network": "gin", "loss": "cross-entropy", "node_kinds": None},
    "GIN, the same loss": {"network": "gin", "node_kinds": None},
    "GCN, cross-entropy": {"network": "gcn", "loss": "cross-entropy", "node_kinds": None},
}
CANDIDATES = (  # for the default
    "RQGNN, our default",
    "RQGNN, our default, learned filters",
    "RQGNN, our default, raw quotients",
    "RQGNN, frozen filters (released code)",
    "RQGNN as in the paper (latent)",
)
MAIN = (  # what is measured on a large set, too
    "RQGNN",
    *CANDIDATES,
    "control: atom counts instead of quotients",
    "same bank, mean pooling, no quotients",
    "GIN, cross-entropy",
)
REGRESSIONS = (
    "logistic regression on nodes and edges",
    "logistic regression on atom counts",
    "logistic regression on quotients x^T L x",
)


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    sets: tuple[str, ...] = ("tox21:SR-p53", "tox21:SR-HSE", "hiv")
    """Sets of graphs that are trained on."""
    large: tuple[str, ...] = ("hiv",)
    """Those of them on which only the main networks are trained."""
    steps: PositiveInt = 250
    """Optimiser steps."""
    large_steps: PositiveInt = 250
    """Optimiser steps on large sets."""
    evaluations: PositiveInt = 5
    """Looks at the validation graphs, evenly over the steps; the best area counts."""
    batch_size: PositiveInt = Field(512, ge=2)
    """Graphs per step."""
    hidden: PositiveInt = 64
    """Channels."""

    def arms(self, name: str) -> tuple[str, ...]:
        """The networks that are trained on a set."""
        return MAIN if name in self.large else tuple(ARMS)


def trained(study: Study, name: str, arm: str, seed: int) -> dict[str, Any]:
    """One arm on one set: test metrics at the best validation AUC, with threshold and calibration from validation."""
    steps = study.large_steps if name in study.large else study.steps
    recipe = RqgnnRecipe(
        data=name, steps=steps, batch_size=study.batch_size, hidden=study.hidden, seed=seed, **ARMS[arm]
    )
    material, splits = recipe.material(), recipe.datasets()
    labels = material.prepared.labels
    model = seeded_model(recipe)
    optimizer = recipe.optimizer(model)
    best, kept, chosen = -1.0, {}, 0
    looks = {round((i + 1) * steps / study.evaluations) for i in range(study.evaluations)}
    for step in range(steps):
        seed_step(recipe, step)
        model.train()
        indices = order.global_batch(seed, step, recipe.batch_size, len(splits.train))
        keys = order.sample_keys(seed, step, recipe.batch_size)
        recipe.losses(model, make_batch(splits, splits.train, indices, keys))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in looks:
            margins = margins_of(model, material.prepared, material.validation, 1024)
            seen = detection_metrics(torch.sigmoid(margins), labels[material.validation])
            if seen["auc"] >= best:
                best, chosen = seen["auc"], step + 1
                kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(kept)
    parts = (margins_of(model, material.prepared, part, 1024) for part in (material.validation, material.test))
    return {"set": name, "arm": arm, "seed": seed, "step": chosen, "validation_auc": best, **_tested(*parts, material)}


def regressions(study: Study, name: str) -> list[dict[str, Any]]:
    """Logistic regressions on a few numbers per graph: what needs no network. They have no seed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    material = RqgnnRecipe(data=name, node_kinds=None).material()
    prepared = material.prepared
    sizes = torch.stack([prepared.graphs.sizes, prepared.graphs.edge_counts], 1).float()
    rows = []
    for arm, inputs in zip(REGRESSIONS, (sizes, prepared.squares, prepared.energies), strict=True):
        table, labels = inputs.double().numpy(), prepared.labels.numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model.fit(table[material.train], labels[material.train])
        margins = torch.from_numpy(np.asarray(model.decision_function(table)))
        rows.append(
            {
                "set": name,
                "arm": arm,
                "seed": 0,
                "validation_auc": auroc(margins[material.validation], prepared.labels[material.validation]).value,
                **_tested(margins[material.validation], margins[material.test], material),
            }
        )
    return rows


def class_curves(name: str, kinds: int = 4, graphs: int = 400) -> list[dict[str, Any]]:
    """Accumulated energies of both classes for the most frequent kinds: a row per kind, class and point.

    Over at most `graphs` training graphs of each class that have the kind: mean, and 25 % and 75 % quantiles.
    """
    material = RqgnnRecipe(data=name, node_kinds=kinds + 1).material()
    points = torch.linspace(0, 2, 41, dtype=torch.float64)
    rows = []
    for label in (0, 1):
        chosen = material.train[material.prepared.labels[material.train] == label][:graphs]
        curves = energy_curves(material.prepared, chosen, points)
        present = material.prepared.squares[chosen] > 0
        for kind in range(kinds):
            own = curves[present[:, kind], :, kind]
            low, high = own.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
            rows += [
                {
                    "kind": material.vocabulary.symbols[kind],
                    "label": label,
                    "point": float(points[i]),
                    "mean": float(own[:, i].mean()),
                    "low": float(low[i]),
                    "high": float(high[i]),
                    "graphs": len(own),
                }
                for i in range(len(points))
            ]
    return rows


def _tested(validation: torch.Tensor, test: torch.Tensor, material: Material) -> dict[str, float]:
    """Test metrics of margins, by a decision fitted to the validation margins; `raw_ece` without calibration."""
    labels = material.prepared.labels
    decision = Decision.fit(validation, labels[material.validation])
    truth = labels[material.test]
    found = detection_metrics(decision.scaling.probability(test), truth, threshold=decision.threshold)
    raw = detection_metrics(torch.sigmoid(test), truth)
    return found | {"raw_ece": raw["ece"], "argmax_f1": raw["macro_f1"]}
