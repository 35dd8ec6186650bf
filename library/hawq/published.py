"""The published ImageNet measurements of ResNet18 and ResNet50 behind HAWQ-V3's bits, and exact choices from them."""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from library.errors import InputError
from library.hawq.analysis import Sensitivity
from library.hawq.costs import BitChoice
from library.hawq.layers import LayerTable
from library.hawq.plan import BudgetKind
from library.hawq.programme import select
from library.samples import sample_file

NETWORKS = ("resnet18", "resnet50")
BITS = (4, 8)
FRACTIONS = (0.25, 0.5, 0.75)
DIFFERING = {("resnet50", "size", 0.25): {39: 4}}  # where the published configuration is not the best: layers, bits


@dataclass(frozen=True)
class PublishedNetwork:
    """A network's published sensitivities, its latencies in ms (layers, 2), and the layers that share bits."""

    sensitivity: Sensitivity
    latency: np.ndarray
    ties: list[list[int]]

    def costs(self, kind: BudgetKind) -> np.ndarray:
        """(layers, 2) at 4 and 8 bits: MB of 10^6 bytes, 10^9 bit operations (inputs have the weights' bits), or ms."""
        layers = self.sensitivity.layers
        if kind == "latency":
            return self.latency
        per_bit = np.array(BITS) if kind == "size" else np.array(BITS) ** 2
        return np.outer(layers.n_params if kind == "size" else layers.macs, per_bit) / (8e6 if kind == "size" else 1e9)


@dataclass(frozen=True)
class PublishedChoice:
    """The best bits under a limit of cost(all 4) + fraction (cost(all 8) - cost(all 4)), and the published ones."""

    bits: tuple[int, ...]
    omega: float
    cost: float
    limit: float
    lower_bound: float
    published_bits: tuple[int, ...]
    published_omega: float


@lru_cache(maxsize=2)
def published(network: str) -> PublishedNetwork:
    """The measurements of `resnet18` or `resnet50`. Raises InputError for another name.

    >>> len(published("resnet50").sensitivity.layers.names)
    52
    """
    if network not in NETWORKS:
        raise InputError(f"there are published measurements of {', '.join(NETWORKS)}, not of {network!r}")
    with sample_file("hawq", "published.json").open("rb") as stream:
        content = json.load(stream)[network]
    trace = torch.tensor(content["mean_trace"], dtype=torch.float64)
    perturbation = torch.tensor([content["perturbation"][str(b)] for b in BITS], dtype=torch.float64).T.contiguous()
    layers = LayerTable(tuple(map(str, range(len(trace)))), tuple(content["weights"]), tuple(content["macs"]))
    unknown = torch.full_like(trace, float("nan"))
    found = Sensitivity("hessian", layers, BITS, trace, unknown, unknown, perturbation, trace[:, None] * perturbation)
    latency = np.array([content["latency_ms"][str(b)] for b in BITS]).T
    return PublishedNetwork(found, latency, content["ties"])


def published_choice(network: str, kind: BudgetKind, fraction: float) -> PublishedChoice:
    """The best bits of a network within a fraction of one budget, exactly, beside the published configuration.

    The published one is known at 0.25, 0.5 and 0.75; elsewhere the best stands for it. Source: HAWQ-V3, Yao et al.,
    ICML 2021, section 3.4, and `bit_config.py` of its repository.
    """
    found = published(network)
    costs, omega = found.costs(kind), found.sensitivity.table([BitChoice(b) for b in BITS])
    low, high = costs.sum(0)
    limit = float(low + fraction * (high - low))
    best = select(omega, {kind: costs}, {kind: limit}, ties=found.ties)
    theirs = best.choice.copy()
    for layer, bits in DIFFERING.get((network, kind, fraction), {}).items():
        theirs[layer] = BITS.index(bits)
    rows = np.arange(len(omega))
    return PublishedChoice(
        bits=tuple(BITS[i] for i in best.choice),
        omega=float(omega[rows, best.choice].sum()),
        cost=best.cost,
        limit=limit,
        lower_bound=best.lower_bound,
        published_bits=tuple(BITS[i] for i in theirs),
        published_omega=float(omega[rows, theirs].sum()),
    )
