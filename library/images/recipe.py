"""The recipe that trains an image classifier: what other methods then compress, watch or take apart."""

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.artifact import Artifact
from library.errors import ArtifactError
from library.images.data import ImageBatch, image_splits, load_images
from library.images.networks import image_network
from library.recipe import Recipe, Splits
from library.weights import load_tensors


class ClassifierRecipe(Recipe, frozen=True, extra="forbid"):
    """An image network from random weights: SGD with Nesterov momentum and a one-cycle learning rate.

    >>> ClassifierRecipe(network="resnet20").model().blocks[0].first.conv.weight.shape
    torch.Size([16, 16, 3, 3])
    """

    kind: ClassVar[str] = "classifier"
    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"
    unit: ClassVar[str] = "images"

    steps: PositiveInt = 350
    """Optimiser steps."""
    batch_size: PositiveInt = 128
    """Images per optimiser step over all workers."""

    network: str = "cnn8"
    """cnn8 (seven convolutions, a linear layer), resnet20, -32, -56, or a folder or hub name OWNER/NAME."""
    images: str = "fashion-mnist"
    """fashion-mnist (shipped), an NPZ file, a folder with idx files, or one with train and val folders of classes."""
    image_size: PositiveInt = 224
    """Side of what is cut out of images in folders; other images keep theirs."""
    train_images: PositiveInt | None = None
    """Training images that are used; None uses all."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that validates."""

    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov momentum."""
    weight_decay: float = Field(5e-4, ge=0)
    """Decay of all parameters."""
    warmup_fraction: float = Field(0.3, ge=0, lt=1)
    """Share of the steps in which the rate rises."""

    def datasets(self) -> Splits:
        return image_splits(
            load_images(self.images, size=self.image_size),
            validation_fraction=self.validation_fraction,
            train_images=self.train_images,
        )

    def model(self) -> nn.Module:
        data = load_images(self.images, size=self.image_size)
        return image_network(self.network, data.shape[0], len(data.classes))

    def optimizer(self, model: nn.Module) -> Optimizer:
        nesterov = self.momentum > 0
        return SGD(
            model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov
        )

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, partial(one_cycle, steps=self.steps, warmup=self.warmup_fraction))

    def losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        logits = self.outputs(model, batch).float()
        return {"loss": F.cross_entropy(logits, batch.labels), "accuracy": accuracy(logits.detach(), batch.labels)}

    def outputs(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The network's logits (images, classes)."""
        return model(batch.pixels.to(next(model.parameters()).dtype))

    def targets(self, batch: ImageBatch) -> Tensor:
        """The images' labels (images,)."""
        return batch.labels

    def count(self, batch: ImageBatch) -> int:
        return len(batch.labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Mean cross-entropy in nats, and the share of images whose likeliest class is right."""
        return super().evaluate(model, batches)


def load_classifier(artifact: Artifact) -> tuple[nn.Module, ClassifierRecipe]:
    """The network of an artifact of kind `classifier`, in evaluation mode, and its recipe. Raises ArtifactError."""
    if artifact.kind != ClassifierRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'classifier'")
    try:
        recipe = ClassifierRecipe.model_validate(artifact.recipe)
    except ValueError as error:
        raise ArtifactError(f"{artifact.path}: its recipe does not fit: {str(error).splitlines()[0]}") from error
    model = recipe.model()
    load_tensors(model, artifact.weights(), source=str(artifact.path))
    return model.eval(), recipe


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows of `logits` (batch, classes) whose largest entry is at `labels`."""
    return (logits.argmax(1) == labels).float().mean()


def one_cycle(step: int, *, steps: int, warmup: float, start: float = 0.04) -> float:
    """The rate as a share of its peak: a half cosine up from `start` over `warmup` of the steps, then one down to 0.

    Source: Smith, Topin, "Super-convergence", 2019, with cosines.
    """
    rise = warmup * steps
    if step < rise:
        return start + (1 - start) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise))) / 2
