"""The recipe that pre-trains SpecFormer on spectra and geometries of molecules."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library import collective
from library.artifact import Artifact
from library.diffspectra.data import Collate, Sample
from library.diffspectra.geometry_encoder import GeometrySettings
from library.diffspectra.pretraining import (
    Pretrained,
    PretrainingBatch,
    PretrainingModel,
    contrastive_loss,
    draw_pretraining,
    reconstruction_loss,
)
from library.diffspectra.specformer import SpecFormer, SpecFormerSettings
from library.diffspectra.spectra_recipe import SpectraRecipe
from library.errors import ArtifactError, InputError
from library.recipe import Splits
from library.weights import load_tensors

ENCODER = "encoder."
PAPER: dict[str, Any] = {
    "steps": 400_000,
    "batch_size": 128,
    "geometry": GeometrySettings.paper(),
    "mask_ratio": 0.1,
    "temperature": 0.07,
    "shift": 0.04,
    "loss_weights": (1.0, 1.0, 1.0),
    "lr": 4e-4,
    "warmup": 10_000,
    "augmentation": None,
}


class PretrainingRecipe(SpectraRecipe, frozen=True, extra="forbid"):
    """SpecFormer pre-trained by hidden patches, contrast with geometries, and their denoising.

    >>> PretrainingRecipe(preset="paper").geometry.layers
    8
    """

    kind: ClassVar[str] = "diffspectra-pretrain"
    contrastive: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Any]] = PAPER

    steps: PositiveInt = 300
    """Optimiser steps; the paper's are 400 000."""
    batch_size: PositiveInt = Field(64, ge=2)
    """Molecules per optimiser step over all workers: the others' spectra are what each is told from."""

    geometry: GeometrySettings = GeometrySettings()
    """The encoder of geometries."""
    mask_ratio: float = Field(0.1, gt=0, lt=1)
    """Share of each spectrum's patches that are hidden."""
    temperature: PositiveFloat = 0.07
    """Of the contrast."""
    shift: PositiveFloat = 0.04
    """Standard deviation of the noise on positions in angstrom."""
    loss_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0, 1.0)
    """Weights of denoising, contrast and reconstruction."""

    lr: PositiveFloat = 1e-3
    """AdamW's learning rate at its peak; 4e-4 in the paper."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay."""
    warmup: NonNegativeInt = 30
    """Steps in which the rate rises from 0, before it falls to 0 as a cosine."""

    @model_validator(mode="after")
    def _hides(self) -> "PretrainingRecipe":
        for modality in self.encoder.modalities:
            patches = self.encoder.patches(modality)
            if int(patches * (1 - self.mask_ratio)) in (0, patches):
                raise ValueError(f"mask_ratio {self.mask_ratio} hides all or none of the {patches} {modality} patches")
        return self

    def datasets(self) -> Splits:
        return self.splits(lambda spectra: partial(_collate, spectra, self.encoder))

    def model(self) -> PretrainingModel:
        return PretrainingModel(self.encoder, self.geometry, ratio=self.mask_ratio, shift=self.shift)

    def optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, partial(warmed_cosine, steps=self.steps, warmup=self.warmup))

    def losses(self, model: nn.Module, batch: PretrainingBatch) -> dict[str, Tensor]:
        """`loss` and its parts: `denoise`, `contrast`, and `reconstruct`, summed over spectra."""
        found: Pretrained = model(batch)
        contrast = contrastive_loss(found.molecules, found.spectra, self.temperature)
        return self._joined(found, batch, contrast)

    def count(self, batch: PretrainingBatch) -> int:
        return len(batch.node_mask)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[PretrainingBatch]) -> dict[str, float]:
        """The losses, the contrast among all molecules, and `matched`: whose nearest spectrum is their own."""
        sums: dict[str, float] = {}
        molecules, spectra, total = [], [], 0
        for batch in batches:
            found: Pretrained = model(batch)
            molecules.append(found.molecules.float().cpu())
            spectra.append(found.spectra.float().cpu())
            parts = self._joined(found, batch, found.molecules.new_zeros(()))
            for name in ("denoise", "reconstruct"):
                sums[name] = sums.get(name, 0.0) + float(parts[name]) * self.count(batch)
            total += self.count(batch)
        gathered = collective.all_gather((torch.cat(molecules).numpy(), torch.cat(spectra).numpy()))
        m, s = (F.normalize(torch.cat([torch.from_numpy(one[i]) for one in gathered]), dim=-1) for i in (0, 1))
        scores, own = m @ s.T / self.temperature, torch.arange(len(m))
        metrics = {name: value / total for name, value in sums.items()}
        metrics["contrast"] = float(F.cross_entropy(scores, own))
        weights = dict(zip(("denoise", "contrast", "reconstruct"), self.loss_weights, strict=True))
        metrics["loss"] = sum(weight * metrics[name] for name, weight in weights.items())
        return metrics | {"matched": float((scores.argmax(1) == own).float().mean())}

    def _joined(self, found: Pretrained, batch: PretrainingBatch, contrast: Tensor) -> dict[str, Tensor]:
        """Denoising is a mean over molecules of means over their atoms, of noise in units of its own deviation."""
        errors = (found.arrows - batch.shifts).square().mean(-1) * batch.node_mask
        denoise = (errors.sum(1) / batch.node_mask.sum(1)).mean()
        reconstruct = sum(reconstruction_loss(found.errors[m], found.hidden[m]) for m in found.errors)
        parts = {"denoise": denoise, "contrast": contrast, "reconstruct": reconstruct}
        loss = sum(weight * part for weight, part in zip(self.loss_weights, parts.values(), strict=True))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


def load_encoder(encoder: SpecFormer, artifact: Artifact) -> None:
    """Copy the encoder of a pre-training into one of the same sizes; learned tokens of absent spectra stay as they are.

    Raises ArtifactError for another kind of artifact, InputError for other sizes.
    """
    if artifact.kind != PretrainingRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of {PretrainingRecipe.kind!r}")
    settings = PretrainingRecipe.model_validate(artifact.recipe).encoder
    own = encoder.settings.model_copy(update={"absent": settings.absent})
    if own != settings:
        differing = [name for name, value in own if value != getattr(settings, name)]
        raise InputError(f"{artifact.path}: its encoder differs in {', '.join(differing)}; take the same sizes")
    state = {k.removeprefix(ENCODER): v for k, v in artifact.weights().items() if k.startswith(ENCODER)}
    kept = {name: value for name, value in encoder.state_dict().items() if name.startswith("absent.")}
    load_tensors(encoder, {**kept, **state}, source=str(artifact.path))


def warmed_cosine(step: int, *, steps: int, warmup: int) -> float:
    """The rate as a share of its peak: linear from 0 to 1 at `warmup`, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _collate(
    spectra: Collate, settings: SpecFormerSettings, samples: Sequence[Sample], keys: Tensor
) -> PretrainingBatch:
    return draw_pretraining(spectra(samples, keys), settings)
