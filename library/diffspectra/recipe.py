"""The recipe that trains DiffSpectra: molecules from spectra, by joint diffusion of graphs and geometries."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.artifact import Artifact, open_artifact
from library.diffspectra.clipping import adaptive_limit, remembered
from library.diffspectra.conditioned import Conditioned
from library.diffspectra.data import Collate, MoleculeSamples, Sample
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.lines import STEP
from library.diffspectra.loss import loss_weight, terms
from library.diffspectra.pretraining_recipe import PretrainingRecipe, load_encoder
from library.diffspectra.process import DiffusionBatch, DiffusionModel, Draws, draw
from library.diffspectra.schedule import ScheduleName, noise_schedule
from library.diffspectra.specformer import SpecFormerSettings
from library.diffspectra.spectra_recipe import SpectraRecipe
from library.errors import ArtifactError
from library.recipe import Splits, unwrap
from library.weights import load_tensors

NORMS = "norms"  # in the optimiser's first parameter group
AREAS = "areas"  # of an artifact's arrays: the median integral of each modality's training spectra
AREA_MOLECULES = 512  # that the median is over
PAPER: dict[str, Any] = {
    "steps": 1_000_000,
    "batch_size": 256,
    "denoiser": DenoiserSettings.paper(),
    "lr": 2e-4,
    "warmup": 100_000,
    "average": 0.999,
    "self_condition": 0.5,
    "condition_dropout": 0.0,
    "modality_dropout": 0.0,
    "count_weight": 0.0,
    "noise": "cosine",
    "loss_weights": (1.0, 0.25, 0.1),
    "largest_gradient": 10.0,
    "augmentation": None,
    "seed": 42,
}


class DiffSpectraRecipe(SpectraRecipe, frozen=True, extra="forbid"):
    """DiffSpectra on molecules with spectra.

    >>> recipe = DiffSpectraRecipe(preset="paper")
    >>> recipe.denoiser.width, recipe.encoder.features, recipe.batch_size
    (256, 256, 256)
    """

    kind: ClassVar[str] = "diffspectra"
    published: ClassVar[Mapping[str, Any]] = PAPER

    steps: PositiveInt = 600
    """Optimiser steps; the paper's are 1 000 000."""
    batch_size: PositiveInt = Field(32, ge=2)
    """Molecules per optimiser step over all workers; batch normalisation is over all of them."""

    denoiser: DenoiserSettings = DenoiserSettings()
    """The network that denoises."""
    pretrained: str | None = None
    """Artifact of the job diffspectra-pretrain whose encoder is trained on; its sizes must be the same."""
    size_groups: PositiveInt = 4
    """A batch is sorted by atoms into that many groups, each padded to its own largest; only the time depends on it."""

    noise: ScheduleName = "cosine"
    """Noise schedule."""
    self_condition: float = Field(0.5, ge=0, le=1)
    """Probability that the network is given its own prediction, for each molecule."""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that spectra are hidden, for guidance; 0 in the paper."""
    modality_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that one of several spectra is hidden, for inference without it; 0, as in the paper, needs all."""
    loss_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 0.25, 0.1)
    """Weights of coordinates, of elements and charges, and of bonds."""
    count_weight: NonNegativeFloat = 0.1
    """Weight of the cross-entropy of the number of atoms given the spectra; 0, as in the paper, does not learn it."""

    lr: PositiveFloat = 1e-3
    """AdamW's learning rate after the warm-up; 2e-4 in the paper."""
    weight_decay: NonNegativeFloat = 1e-12
    """AdamW's weight decay."""
    warmup: NonNegativeInt = 50
    """Steps in which the rate rises from 0; it is constant after."""
    largest_gradient: PositiveFloat = 10.0
    """Most that the adaptive limit of the gradient's norm may be."""
    average: float = Field(0.999, ge=0, lt=1)
    """Decay of the running average of the weights, after k steps at most (1 + k) / (10 + k)."""
    validation_times: PositiveInt = 4
    """Times, evenly spread, at which validation molecules are denoised, each with its own fixed noise."""

    def encoder_settings(self) -> SpecFormerSettings:
        """The encoder, with tokens for absent spectra where those are trained."""
        return self.encoder.model_copy(update={"absent": self.encoder.absent or self.modality_dropout > 0})

    def datasets(self) -> Splits:
        draws = Draws(
            self.self_condition, self.condition_dropout, self.modality_dropout, rotate=not self.denoiser.equivariant
        )
        return self.splits(lambda spectra: partial(_collate, spectra, draws))

    def network(self) -> Conditioned:
        """A new network, from torch's generator."""
        return Conditioned(
            self.encoder_settings(),
            self.denoiser,
            null=self.condition_dropout > 0,
            count_atoms=self.count_weight > 0,
        )

    def model(self) -> DiffusionModel:
        network = self.network()
        if self.pretrained is not None:
            load_encoder(network.encoder, open_artifact(self.pretrained, kind=PretrainingRecipe.kind))
        return DiffusionModel(network, noise_schedule(self.noise), size_groups=self.size_groups)

    def optimizer(self, model: nn.Module) -> Optimizer:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return AdamW(learning, self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay, amsgrad=True)

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, partial(warmed_up, warmup=self.warmup))

    def largest_norm(self, optimizer: Optimizer) -> float:
        """The adaptive limit, from the norms that the optimiser's first group remembers."""
        return adaptive_limit(optimizer.param_groups[0].get(NORMS, ()), self.largest_gradient)

    def note_norm(self, optimizer: Optimizer, norm: float) -> None:
        group = optimizer.param_groups[0]
        group[NORMS] = remembered(group.get(NORMS, ()), norm, self.largest_gradient)

    def losses(self, model: nn.Module, batch: DiffusionBatch) -> dict[str, Tensor]:
        """`loss`, its weighted parts `position`, `atom` and `bond`, and `count`, the cross-entropy of atom counts."""
        found = model(batch)
        schedule = noise_schedule(self.noise)
        weight = loss_weight(schedule.alpha(batch.times), schedule.sigma(batch.times)).float()
        parts = terms(found.predicted, batch.clean, found.noisy_positions)
        losses = {
            name: factor * (weight * part).mean()
            for name, factor, part in zip(parts._fields, self.loss_weights, parts, strict=True)
        }
        loss = sum(losses.values())
        if found.count_logits is not None:
            losses["count"] = F.cross_entropy(found.count_logits.float(), batch.sizes - 1)
            loss = loss + self.count_weight * losses["count"]
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}}

    def count(self, batch: DiffusionBatch) -> int:
        return len(batch.node_mask)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[DiffusionBatch]) -> dict[str, float]:
        """The losses at fixed times and noise, of the averaged weights, with all spectra shown."""
        times = (torch.arange(self.validation_times, dtype=torch.float64) + 0.5) / self.validation_times
        return super().evaluate(model, (one for batch in batches for one in _at_times(batch, times)))

    def costs(self, samples: MoleculeSamples, indices: Sequence[int]) -> list[float]:
        """Pairs of atoms, which are what a step costs."""
        return samples.sizes[list(indices)].double().square().tolist()

    def after_step(self, model: nn.Module, step: int) -> None:
        unwrap(model).follow(min(self.average, (1 + step) / (10 + step)))

    def stored(self, model: nn.Module, state: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The averaged weights, under the names of a `Conditioned` network."""
        return ((name.removeprefix("average."), value) for name, value in state if name.startswith("average."))

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Median integrals of the training spectra, by which spectra in other units are scaled."""
        data = self.molecules()
        numbers = data.parts["train"][:AREA_MOLECULES].tolist()
        signals = [{name: read(number) for name, read in data.signals.items()} for number in numbers]
        spectra = Collate(self.encoder.modalities, self.broadening).intensities(signals, torch.tensor(numbers))
        areas = [spectra[name].sum(1).double().median() * STEP[name] for name in self.encoder.modalities]
        return {AREAS: torch.stack(areas)}, {}

    def restored(self, weights: Mapping[str, Tensor], *, source: str) -> DiffusionModel:
        """The model whose network and average both are the averaged one, without the artifact it was begun from."""
        network = self.network()
        load_tensors(network, weights, source=source)
        return DiffusionModel(network, noise_schedule(self.noise), size_groups=self.size_groups)


def load_diffspectra(artifact: Artifact) -> tuple[Conditioned, DiffSpectraRecipe]:
    """The network of an artifact of kind `diffspectra` in evaluation mode, and its recipe. Raises ArtifactError."""
    if artifact.kind != DiffSpectraRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'diffspectra'")
    try:
        recipe = DiffSpectraRecipe.model_validate(artifact.recipe)
    except ValueError as error:
        raise ArtifactError(f"{artifact.path}: its recipe does not fit: {str(error).splitlines()[0]}") from error
    return recipe.restored(artifact.weights(), source=str(artifact.path)).average.eval(), recipe


def warmed_up(step: int, *, warmup: int) -> float:
    """The rate as a share of its peak: linear from 0 to 1 at `warmup`, then 1."""
    return min(1.0, step / warmup) if warmup else 1.0


def _collate(spectra: Collate, draws: Draws, samples: Sequence[Sample], keys: Tensor) -> DiffusionBatch:
    return draw(spectra(samples, keys), draws)


def _at_times(batch: DiffusionBatch, times: Tensor) -> Iterable[DiffusionBatch]:
    shown, hidden = torch.ones_like(batch.present), torch.zeros_like(batch.unconditioned)
    for time in times:
        yield batch._replace(times=torch.full_like(batch.times, float(time)), present=shown, unconditioned=hidden)
