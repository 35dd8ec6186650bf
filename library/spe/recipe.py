"""The SPE recipe: positional encodings and a graph network, trained together on graphs with targets."""

from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library import collective
from library.artifact import Artifact
from library.calibration import auroc
from library.errors import ArtifactError, InputError
from library.recipe import Recipe, Splits, unwrap
from library.spe.batch import SpeBatch, collate_graphs
from library.spe.data import GraphData, GraphSamples, load_graphs, spectra_of
from library.spe.network import GraphNetwork
from library.spe.presets import PRESETS
from library.spe.settings import Backbone, Encoding, Schema
from library.spectral.graph_spectra import GraphSpectra
from library.weights import load_tensors

TASK = "task.json"  # in an artifact: what its graphs hold and what it predicts
OF_SPECTRA = ("method", "eigenpairs", "split", "most_nodes")  # what eigenpairs depend on


class SpeRecipe(Recipe, frozen=True, extra="forbid"):
    """SPE (Huang et al., ICLR 2024, arXiv 2310.02579) or a baseline, with a GINE backbone, on graphs with targets.

    Regression minimises the mean absolute error, of standardised targets where the data set says so; binary targets
    the cross-entropy of logits.

    >>> recipe = SpeRecipe(preset="zinc-full")
    >>> recipe.encoding.eigenpairs, recipe.batch_size
    (37, 128)
    """

    kind: ClassVar[str] = "spe"
    metric: ClassVar[str] = "error"
    mode: ClassVar[Literal["min", "max"]] = "min"
    unit: ClassVar[str] = "targets"

    steps: PositiveInt = 400
    """Optimiser steps; the paper's are 79 000 on ZINC-12k and Alchemy, 7 200 for counting."""
    batch_size: PositiveInt = 64
    """Graphs per optimiser step over all workers."""

    data: str = "zinc12k"
    """zinc12k, hiv-scaffold, hiv-size (shipped), counting (simulated), zinc, alchemy (downloaded), or a file."""
    target: str | None = None
    """One of the data's targets alone, such as cycles5; None predicts all."""
    root: str | None = None
    """Folder of data that PyTorch Geometric downloads."""
    smiles_column: str = "smiles"
    """Column of a CSV or Parquet table that holds SMILES."""
    target_columns: tuple[str, ...] = ()
    """Columns of a table that are predicted."""
    cut: Literal["random", "scaffold", "size"] = "random"
    """How a table is cut into parts; scaffold and size set other scaffolds or smaller molecules apart."""
    train_graphs: PositiveInt | None = None
    """Training graphs that are used; None uses all."""
    validate_on: Literal["validation", "ood_validation"] = "validation"
    """Which part decides what is best; ood_validation where scaffolds or sizes are set apart."""
    cache: str | None = None
    """Folder where eigenpairs are kept and found again by content; None computes them in each process."""

    preset: str | None = None
    """A published experiment, such as zinc-full: its encoding, backbone, batch_size, optimiser, whatever these say."""
    encoding: Encoding = Encoding(over_nodes="mean")
    """How places in the graph are encoded; over_nodes is mean, which learned better than the published sum."""
    backbone: Backbone = Backbone()
    """The network that predicts."""
    size_step: PositiveInt = 1
    """Graphs whose sizes are equal after rounding up to a multiple share a product; larger is for accelerators."""

    lr: PositiveFloat = 2e-3
    """Adam's learning rate, at its peak."""
    weight_decay: NonNegativeFloat = 1e-6
    """Adam's weight decay, of everything but biases."""
    warmup: NonNegativeInt | None = 40
    """Steps in which the rate rises from 0, before it falls to 0 linearly; None keeps it constant."""
    lipschitz_penalty: float = Field(0.0, ge=0)
    """Weight of the mean upper bound on the Lipschitz constants of phi in the loss."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, Mapping) else None
        if name is not None and name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return data if name is None else {**data, **PRESETS[name]}

    @model_validator(mode="after")
    def _penalised(self) -> "SpeRecipe":
        bounded = self.encoding.method == "spe" and self.encoding.phi in ("mlp", "deepsets", "spline")
        if self.lipschitz_penalty and not bounded:
            raise ValueError("lipschitz_penalty needs encoding.method spe with phi mlp, deepsets or spline")
        return self

    def graph_data(self) -> GraphData:
        """The graphs with the targets that are asked for; kept in memory for the next call."""
        found = load_graphs(
            self.data,
            root=self.root,
            smiles_column=self.smiles_column,
            target_columns=self.target_columns,
            by=self.cut,
        )
        return found.of_target(self.target)

    def spectra(self) -> GraphSpectra:
        """The graphs' eigenpairs; kept in memory for the next call."""
        source = (self.data, self.root, self.smiles_column, self.target_columns, self.cut)
        return _spectra(source, Encoding(**{name: getattr(self.encoding, name) for name in OF_SPECTRA}), self.cache)

    def samples(self, part: str) -> GraphSamples:
        """The graphs of a part: train, validation, test, ood_validation or ood_test. Raises InputError for others."""
        data = self.graph_data()
        if part not in data.parts:
            raise InputError(f"{data.name} has no part {part!r}; it has {', '.join(data.parts)}")
        chosen = data.parts[part]
        if part == "train" and self.train_graphs is not None:
            if self.train_graphs > len(chosen):
                raise InputError(f"train_graphs: {self.train_graphs} are asked for, {data.name} has {len(chosen)}")
            chosen = chosen[: self.train_graphs]
        return GraphSamples(data, self.spectra(), chosen)

    def datasets(self) -> Splits:
        shape = (self.encoding.eigenpairs, self.encoding.split, self.train_graphs, self.validate_on)
        return Splits(
            self.samples("train"),
            self.samples(self.validate_on),
            self.samples("test"),
            collate=partial(collate_graphs, eigenpairs=self.encoding.eigenpairs, size_step=self.size_step),
            fingerprint=f"{self.graph_data().fingerprint} {' '.join(map(str, shape))}",
        )

    def model(self) -> GraphNetwork:
        data = self.graph_data()
        network = GraphNetwork(self.encoding, self.backbone, data.schema)
        centre, scale = data.target_scale()
        network.centre.copy_(centre)
        network.scale.copy_(scale)
        return network

    def optimizer(self, model: nn.Module) -> Optimizer:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        biases = [parameter for name, parameter in named if "bias" in name]
        others = [parameter for name, parameter in named if "bias" not in name]
        groups = [{"params": others, "weight_decay": self.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        return Adam(groups, self.lr)

    def schedule(self, optimizer: Optimizer) -> LambdaLR | None:
        if self.warmup is None:
            return None
        return LambdaLR(optimizer, partial(warmed_up, steps=self.steps, warmup=self.warmup))

    def losses(self, model: nn.Module, batch: SpeBatch) -> dict[str, Tensor]:
        found, network = model(batch).float(), unwrap(model)
        known = ~batch.targets.isnan()
        if self.binary:
            errors = F.binary_cross_entropy_with_logits(found, batch.targets.nan_to_num(), reduction="none")
        else:
            errors = (found - (batch.targets.nan_to_num() - network.centre) / network.scale).abs()
        error = (errors * known).sum() / known.sum().clamp(min=1)
        if not self.lipschitz_penalty:
            return {"loss": error}
        phi = network.encoder.phi
        if any(hasattr(parameter, "full_tensor") for parameter in phi.parameters()):
            raise InputError("lipschitz_penalty needs whole weights on each worker: engine ddp, zero1 or zero2")
        bound = phi.lipschitz_bound(self.encoding.eigenpairs).mean()
        return {"loss": error + self.lipschitz_penalty * bound, "error": error.detach(), "lipschitz": bound.detach()}

    def count(self, batch: SpeBatch) -> int:
        return int((~batch.targets.isnan()).sum())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[SpeBatch]) -> dict[str, float]:
        """`loss`, `error` (the least is best) and mae in the target's unit, or auroc.

        `error` is the mean absolute error of standardised targets, or 1 minus the mean AUROC.
        """
        found, targets = gathered(model, batches)
        known = ~targets.isnan()
        if self.binary:
            areas = [
                auroc(found[own, i], targets[own, i] > 0).value
                for i in range(found.shape[1])
                if targets[own := known[:, i], i].unique().numel() == 2
            ]
            loss = F.binary_cross_entropy_with_logits(found[known], targets[known])
            area = sum(areas) / len(areas) if areas else float("nan")
            return {"loss": float(loss), "auroc": area, "error": 1 - area}
        network = unwrap(model)
        centre, scale = network.centre.double().cpu(), network.scale.double().cpu()
        errors = (found - (targets - centre) / scale).abs()
        mae = float((errors * scale)[known].mean())
        return {"loss": float(errors[known].mean()), "error": float(errors[known].mean()), "mae": mae}

    @property
    def binary(self) -> bool:
        """Whether targets are 0 or 1."""
        return self.graph_data().schema.task == "binary"

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What graphs hold and what is predicted, so that the artifact needs no data."""
        return {}, {TASK: self.graph_data().schema.model_dump_json(indent=1)}


def load_network(artifact: Artifact) -> tuple[GraphNetwork, SpeRecipe, Schema]:
    """The network of an artifact of kind `spe` in evaluation, its recipe and its task. Raises ArtifactError."""
    if artifact.kind != SpeRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'spe'")
    try:
        recipe = SpeRecipe.model_validate(artifact.recipe)
        schema = Schema.model_validate_json(artifact.text(TASK))
    except ValueError as error:
        raise ArtifactError(
            f"{artifact.path}: its recipe or {TASK} does not fit: {str(error).splitlines()[0]}"
        ) from error
    network = GraphNetwork(recipe.encoding, recipe.backbone, schema)
    load_tensors(network, artifact.weights(), source=str(artifact.path))
    return network.eval(), recipe, schema


def gathered(model: nn.Module, batches: Iterable[SpeBatch]) -> tuple[Tensor, Tensor]:
    """Outputs and targets, float64 (graphs, targets), of the graphs of all workers."""
    rows = [(model(batch).double().cpu(), batch.targets.double().cpu()) for batch in batches]
    own = [torch.cat(part).numpy() for part in zip(*rows, strict=True)]
    found, targets = zip(*collective.all_gather(tuple(own)), strict=True)
    return tuple(torch.cat([torch.from_numpy(part) for part in parts]) for parts in (found, targets))


def warmed_up(step: int, *, steps: int, warmup: int) -> float:
    """The rate as a share of its peak: 0 at step 0, linear to 1 at `warmup`, linear to 0 at `steps`.

    >>> [warmed_up(step, steps=300, warmup=100) for step in (0, 50, 100, 200, 300)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


@lru_cache(maxsize=4)
def _spectra(source: tuple[Any, ...], encoding: Encoding, cache: str | None) -> GraphSpectra:
    name, root, smiles_column, target_columns, by = source
    data = load_graphs(name, root=root, smiles_column=smiles_column, target_columns=target_columns, by=by)
    return spectra_of(data.graphs, encoding, Path(cache) if cache else None)
