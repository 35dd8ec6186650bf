"""What an artifact holds beside the weights: calibration, threshold, and what training normals look like."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from library.calibration import PlattScaling
from library.errors import ArtifactError, InputError
from library.rqgnn.batches import PreparedGraphs
from library.rqgnn.metrics import best_threshold
from library.spectral.graph_laplacians import quotients
from library.spectral.graph_spectra import accumulated_energy, eigenpairs, spectral_energies
from library.spectral.graphs import Graphs

POINTS = 41  # of [0, 2] at which accumulated energies are kept
NORMALS = 600  # training normals whose spectra make the reference
QUANTILES = 101


@dataclass(frozen=True)
class Reference:
    """Training normals: accumulated energies and Rayleigh quotients by feature.

    `points` (41,) within [0, 2]. `mean`, `low`, `high` (features, 41): mean and 5 % and 95 % quantiles of F(t) over the
    graphs that have the feature, zero where none has. `quantiles` (features, 101) of the quotients, nan where none has.
    """

    points: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    quantiles: Tensor

    def percentile(self, quotients: Tensor) -> Tensor:
        """Per cent of training normals with a smaller quotient: (graphs, features), nan where none is known."""
        below = (self.quantiles[None] < quotients[..., None]).sum(-1)
        known = torch.isfinite(self.quantiles).all(-1)
        return torch.where(known, below / (QUANTILES - 1) * 100, torch.nan).clamp(max=100)


@dataclass(frozen=True)
class Decision:
    """From a margin to a probability and a decision: calibrated and chosen on validation graphs."""

    scaling: PlattScaling
    threshold: float

    @classmethod
    def fit(cls, margins: Tensor, labels: Tensor) -> "Decision":
        """The scaling of validation margins (n,), and the probability of largest macro-F1 on them."""
        scaling = PlattScaling.fit(margins, labels)
        return cls(scaling, best_threshold(scaling.probability(margins), labels)[0])


def fitted_arrays(prepared: PreparedGraphs, train: Tensor, margins: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The arrays of an artifact: the decision fitted to validation margins and labels, and the reference."""
    decision = Decision.fit(margins, labels)
    numbers = torch.tensor([decision.scaling.slope, decision.scaling.offset, decision.threshold], dtype=torch.float64)
    reference = reference_of(prepared, train[prepared.labels[train] == 0])
    return {"decision": numbers} | {
        f"reference.{field.name}": getattr(reference, field.name) for field in fields(reference)
    }


def read_decision(arrays: Mapping[str, Tensor]) -> tuple[Decision, Reference]:
    """The decision and reference of an artifact. Raises ArtifactError when they are missing or malformed."""
    try:
        slope, offset, threshold = arrays["decision"].tolist()
        reference = Reference(**{field.name: arrays[f"reference.{field.name}"] for field in fields(Reference)})
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the artifact holds no decision or reference: {error}") from error
    if not slope > 0 or not 0 <= threshold <= 1:
        raise ArtifactError(
            "the artifact's decision is corrupt: its slope must be positive, its threshold a probability"
        )
    return Decision(PlattScaling(slope, offset), threshold), reference


def reference_of(prepared: PreparedGraphs, normals: Tensor) -> Reference:
    """The reference of normal graphs; spectra are of at most 600 of them, evenly taken. Raises InputError for none."""
    if len(normals) == 0:
        raise InputError("there is no normal training graph to compare with")
    points = torch.linspace(0, 2, POINTS, dtype=torch.float64)
    chosen = normals[torch.linspace(0, len(normals) - 1, min(NORMALS, len(normals))).round().long().unique()]
    curves = energy_curves(prepared, chosen, points)
    present = prepared.squares[chosen] > 0
    found = []
    for feature in range(prepared.width):
        own = curves[present[:, feature], :, feature]
        if len(own):
            levels = own.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
            found.append(torch.stack([own.mean(0), *levels]))
        else:
            found.append(torch.zeros(3, POINTS, dtype=torch.float64))
    mean, low, high = torch.stack(found, 1)
    every, squares = quotients(prepared.energies, prepared.squares)[normals].double(), prepared.squares[normals]
    levels = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    quantiles = torch.full((prepared.width, QUANTILES), torch.nan, dtype=torch.float64)
    for feature in range(prepared.width):
        own = every[squares[:, feature] > 0, feature]
        if len(own):
            quantiles[feature] = own.quantile(levels)
    return Reference(points, mean, low, high, quantiles)


def energy_curves(prepared: PreparedGraphs, chosen: Tensor, points: Tensor) -> Tensor:
    """F(t) of the chosen graphs: float64 (chosen, points, features); zero for a feature that a graph lacks."""
    graphs: Graphs = prepared.graphs.select(chosen)
    nodes = prepared.graphs.nodes_of(chosen)
    if prepared.features is not None:
        signals = prepared.features[nodes].double()
    else:
        signals = torch.nn.functional.one_hot(prepared.kinds[nodes], prepared.width).double()
    spectra = eigenpairs(graphs)
    energies = spectral_energies(graphs, spectra, signals)
    sizes = graphs.sizes.tolist()
    parts = zip(spectra.values.split(sizes), energies.split(sizes), strict=True)
    return torch.stack([accumulated_energy(values, own, points) for values, own in parts])
