"""The recipe that trains a graph-level anomaly detector."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from library import collective
from library.recipe import Recipe, Splits, to_device
from library.rqgnn.baselines import GCN, GIN
from library.rqgnn.batches import GraphBatch, PreparedGraphs, prepare
from library.rqgnn.calibrated import fitted_arrays
from library.rqgnn.data import GraphData, Vocabulary, load_graphs, stratified_split
from library.rqgnn.loss import class_weights, focal_loss
from library.rqgnn.metrics import detection_metrics
from library.rqgnn.model import RQGNN, Filters, Pooling, RayleighOn

VOCABULARY = "vocabulary.json"
PRESETS: dict[str, dict[str, Any]] = {
    "official": {
        "rq_on": "raw",
        "normalise_rq": False,
        "filters": "frozen",
        "pooling": "rq",
        "shared_query": False,
        "branch": True,
    },
    "paper": {
        "rq_on": "latent",
        "normalise_rq": True,
        "filters": "learned",
        "pooling": "rq",
        "shared_query": True,
        "branch": True,
    },
}


@dataclass(frozen=True, eq=False)
class Material:
    """What a recipe's data settings give: prepared graphs, the numbers of each part, and what nodes are."""

    data: GraphData
    prepared: PreparedGraphs
    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: Vocabulary | None

    @property
    def class_counts(self) -> Tensor:
        """Training graphs of either class, int64 (2,)."""
        return torch.bincount(self.prepared.labels[self.train], minlength=2)


class RqgnnRecipe(Recipe, frozen=True, extra="forbid"):
    """RQGNN on labelled graphs, with the class-balanced focal loss and Adam.

    >>> recipe = RqgnnRecipe(data="tox21:SR-p53", preset="official")
    >>> sum(parameter.numel() for parameter in recipe.model().parameters()) > 20_000
    True
    """

    kind: ClassVar[str] = "rqgnn"
    metric: ClassVar[str] = "auc"
    mode: ClassVar[Literal["min", "max"]] = "max"
    unit: ClassVar[str] = "graphs"

    steps: PositiveInt = 400
    """Optimiser steps."""
    batch_size: PositiveInt = Field(512, ge=2)
    """Graphs per optimiser step over all workers; batch normalisation is over all of them."""

    data: str = "tox21:SR-p53"
    """tox21:ASSAY or hiv (shipped), simulated, a folder of TU files, an NPZ file, or a TU data set's name (MCF-7)."""
    tu_root: str | None = None
    """Folder into which TU data sets are downloaded by name."""
    node_kinds: PositiveInt | None = Field(16, ge=2)
    """Keep the most frequent kinds of nodes, the last standing for all others, unknown ones too; None keeps all."""
    split_seed: NonNegativeInt = 2023
    """Seed of the split by class: 70 % train, 15 % validation, 15 % test."""

    network: Literal["rqgnn", "gin", "gcn"] = "rqgnn"
    """rqgnn, or one of two plain graph networks with mean pooling to compare with."""
    preset: Literal["official", "paper"] | None = None
    """The released code's or the paper's network with all kinds of nodes, whatever node_kinds and the next six say."""
    rq_on: RayleighOn = "latent"
    """What Rayleigh vectors are of: raw features, latent ones, or, as a control without smoothness, their counts."""
    normalise_rq: bool = True
    """Divide x^T L x by x^T x."""
    filters: Filters = "frozen"
    """Whether the wavelet bank learns, or stays at its random start as in the released code."""
    pooling: Pooling = "rq"
    """How nodes become a graph: rq, rq-mean (does not grow with the graph), attention, mean, sum, max."""
    shared_query: bool = False
    """Pool by the Rayleigh branch's output instead of a query of its own."""
    branch: bool = True
    """Whether the Rayleigh vector also reaches the head directly."""
    hidden: PositiveInt = 64
    """Channels h."""
    width: PositiveInt = 4
    """Wavelets in the bank."""
    depth: PositiveInt = 6
    """Chebyshev terms of each wavelet; a node sees depth - 1 steps far."""
    dropout: float = Field(0.4, ge=0, lt=1)
    """Dropout in front of the last layer."""

    loss: Literal["focal", "cross-entropy"] = "focal"
    """The class-balanced focal loss, or plain cross-entropy."""
    beta: float = Field(0.999, ge=0, lt=1)
    """How strongly rare classes weigh more: 0 not at all, near 1 in inverse proportion to their number."""
    gamma: NonNegativeFloat = 1.5
    """How strongly graphs that are already right weigh less."""
    lr: PositiveFloat = 5e-3
    """Adam's learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Adam's weight decay."""

    def material(self) -> Material:
        """The graphs with all that is computed once; kept in memory for the next call."""
        depth = self.depth if self.network == "rqgnn" else 1
        return _material(self.data, self.tu_root, None if self.preset else self.node_kinds, self.split_seed, depth)

    def datasets(self) -> Splits:
        material = self.material()
        parts = (material.train, material.validation, material.test)
        return Splits(
            *(part.tolist() for part in parts),
            collate=lambda chosen, keys: material.prepared.batch(torch.tensor(chosen)),
            fingerprint=f"{material.data.fingerprint} {material.prepared.width} {self.split_seed}",
        )

    def switches(self) -> dict[str, Any]:
        """What distinguishes the network: the preset's, or the fields'."""
        return PRESETS[self.preset] if self.preset else {name: getattr(self, name) for name in PRESETS["official"]}

    def network_of(self, features: int) -> nn.Module:
        """A new network for that many features, from torch's generator."""
        if self.network != "rqgnn":
            return {"gin": GIN, "gcn": GCN}[self.network](features, hidden=self.hidden)
        sizes = {name: getattr(self, name) for name in ("hidden", "width", "depth", "dropout")}
        return RQGNN(features, **sizes, **self.switches())

    def model(self) -> nn.Module:
        return self.network_of(self.material().prepared.width)

    def optimizer(self, model: nn.Module) -> Optimizer:
        return Adam((p for p in model.parameters() if p.requires_grad), self.lr, weight_decay=self.weight_decay)

    def losses(self, model: nn.Module, batch: GraphBatch) -> dict[str, Tensor]:
        return {"loss": self._loss(model(batch).float(), batch.labels)}

    def count(self, batch: GraphBatch) -> int:
        return len(batch.labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[GraphBatch]) -> dict[str, float]:
        """`library.rqgnn.metrics.detection_metrics` over the graphs of all workers, and the mean loss of this one's."""
        margins, labels, loss = [], [], 0.0
        for batch in batches:
            logits = model(batch).float()
            loss += float(self._loss(logits, batch.labels)) * len(batch.labels)
            margins.append(margin(logits))
            labels.append(batch.labels.cpu())
        own = (torch.cat(margins), torch.cat(labels))
        gathered = collective.all_gather(tuple(part.numpy() for part in own))
        every, true = (torch.cat([torch.from_numpy(part[i]) for part in gathered]) for i in (0, 1))
        return detection_metrics(torch.sigmoid(every), true) | {"loss": loss / len(own[0])}

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Calibration and threshold from the validation graphs, and what training normals look like."""
        material = self.material()
        margins = margins_of(model, material.prepared, material.validation, self.batch_size)
        arrays = fitted_arrays(
            material.prepared, material.train, margins, material.prepared.labels[material.validation]
        )
        known = material.vocabulary
        text = {"symbols": list(known.symbols), "other": known.other} if known else None
        return arrays, {VOCABULARY: json.dumps(text)}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "cross-entropy":
            return F.cross_entropy(logits, labels)
        return focal_loss(logits, labels, class_weights(self.material().class_counts, self.beta), self.gamma)


def margin(logits: Tensor) -> Tensor:
    """The logit of the softmax probability of class 1, float64 (graphs,) on the CPU."""
    wide = logits.detach().double().cpu()
    return wide[:, 1] - wide[:, 0]


@torch.no_grad()
def margins_of(model: nn.Module, prepared: PreparedGraphs, chosen: Sequence[int] | Tensor, size: int) -> Tensor:
    """The margins of the chosen graphs in their order, float64 (chosen,), by the model in evaluation mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = torch.as_tensor(chosen).split(size)
    found = torch.cat([margin(model(to_device(prepared.batch(part), device))) for part in parts])
    model.train(was_training)
    return found


@lru_cache(maxsize=4)
def _material(source: str, tu_root: str | None, node_kinds: int | None, split_seed: int, depth: int) -> Material:
    data = load_graphs(source, tu_root=tu_root)
    train, validation, test = stratified_split(data.labels, split_seed)
    vocabulary = None
    if data.kinds is None:
        prepared = prepare(data.graphs, features=data.features, labels=data.labels, depth=depth)
    else:
        vocabulary = Vocabulary.of_training(data, train, node_kinds)
        kinds = vocabulary.numbers(data.vocabulary)[data.kinds]
        prepared = prepare(data.graphs, kinds=kinds, count=len(vocabulary), labels=data.labels, depth=depth)
    return Material(data, prepared, train, validation, test, vocabulary)
