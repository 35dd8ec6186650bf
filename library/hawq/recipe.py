"""The HAWQ-V2 recipe for image classifiers: choose each layer's bits, and fine-tune the quantised network."""

import json
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from library.artifact import open_artifact
from library.errors import InputError
from library.hawq.calibration import fit_temperature
from library.hawq.layers import fold_batch_norm
from library.hawq.network import all_active
from library.hawq.quantized_recipe import QuantizedRecipe
from library.images.data import ImageBatch, load_images, stacked
from library.images.networks import image_network, is_pretrained
from library.images.recipe import ClassifierRecipe, accuracy, load_classifier
from library.recipe import Splits

CONFIG = "config.json"  # in an artifact: the configuration of a network of transformers
TASK = "task.json"  # in an artifact: shape and scaling of its images, class names, temperature


class HawqRecipe(QuantizedRecipe, frozen=True, extra="forbid"):
    """HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852) on an image classifier.

    The trained network's batch norms are folded into its convolutions, the curvature of all layers is measured, the
    bits with the least Omega within the budget are chosen exactly, the input ranges are calibrated, and the quantised
    network is fine-tuned with straight-through gradients, the most sensitive layers first.

    >>> HawqRecipe(chosen=(8, 5, 5, 4, 3, 3, 2, 8), steps=10).budget
    'size'
    """

    kind: ClassVar[str] = "hawq"
    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"
    unit: ClassVar[str] = "images"

    steps: PositiveInt = 100
    """Optimiser steps of the fine-tuning."""
    batch_size: PositiveInt = 128
    """Images per optimiser step over all workers."""

    classifier: ClassifierRecipe = ClassifierRecipe()
    """The network that is quantised, how it is trained, and on which images."""
    weights: str | None = None
    """The trained network, an artifact of that classifier: its folder. `prism run hawq` trains one when it is None."""
    probe_images: PositiveInt = 512
    """Training images that the curvature is taken on, and the input ranges."""
    probe_batch: PositiveInt = 64
    """Of these at a time."""

    def datasets(self) -> Splits:
        return self.classifier.datasets()

    def network(self) -> nn.Module:
        """The full-precision network, batch norms folded, in evaluation mode: one per process, not to be changed.

        Raises InputError when there are no weights, or they are of another classifier.
        """
        if self.weights is None and not is_pretrained(self.classifier.network):
            raise InputError("weights: name the artifact of a trained classifier; `prism run hawq` trains one itself")
        return _folded(self.weights, self.classifier.network, self.classifier.images, self.classifier.image_size)

    def measurement(self) -> list[ImageBatch]:
        """The training images on which curvature and ranges are measured, in batches."""
        splits = self.datasets()
        count = min(self.probe_images, len(splits.train))
        edges = [*range(0, count, self.probe_batch), count]
        return [stacked(splits, splits.train, b - a, start=a) for a, b in pairwise(edges)]

    def measured_on(self) -> dict[str, Any]:
        return {"probe_images": self.probe_images, "probe_batch": self.probe_batch}

    def teacher(self, device: torch.device) -> nn.Module:
        self.network()  # refuses what is not there
        made_of = (self.weights, self.classifier.network, self.classifier.images, self.classifier.image_size)
        return _teacher(*made_of, device)

    def outputs(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        return model(batch.pixels)

    def targets(self, batch: ImageBatch) -> Tensor:
        return batch.labels

    def count(self, batch: ImageBatch) -> int:
        return len(batch.labels)

    def scores(self, logits: Tensor, batch: ImageBatch) -> dict[str, Tensor]:
        return {"accuracy": accuracy(logits, batch.labels)}

    @torch.no_grad()
    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The layers' bits, and what a server needs: shape and scaling of images, class names, temperature."""
        arrays, texts = super().attachments(model)
        data, splits = load_images(self.classifier.images, size=self.classifier.image_size), self.datasets()
        device = next(model.parameters()).device
        with all_active(model):
            edges = [*range(0, len(splits.validation), self.batch_size), len(splits.validation)]
            batches = [stacked(splits, splits.validation, b - a, start=a) for a, b in pairwise(edges)]
            logits = torch.cat([model(batch.pixels.to(device)).float().cpu() for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        found = fit_temperature(logits, labels)
        task = {"shape": data.shape, "mean": data.mean, "std": data.std, "classes": data.classes} | found
        texts[TASK] = json.dumps(task, indent=1)
        if is_pretrained(self.classifier.network):
            texts[CONFIG] = model.network.config.to_json_string(use_diff=False)
        return arrays, texts


@lru_cache(maxsize=4)
def _folded(weights: str | None, network: str, images: str, size: int) -> nn.Module:
    model, recipe = _full_precision(weights, network, images, size)
    if recipe is not None and (recipe.network, recipe.images) != (network, images):
        raise InputError(
            f"weights: {weights} is a {recipe.network} on {recipe.images}, not the {network} on {images} asked for"
        )
    shape = load_images(images, size=size).shape
    fold_batch_norm(model, torch.zeros(2, *shape))
    return model


def _full_precision(
    weights: str | None, network: str, images: str, size: int
) -> tuple[nn.Module, ClassifierRecipe | None]:
    """The network of an artifact with its recipe, or a pre-trained one, in evaluation mode."""
    if weights is not None:
        return load_classifier(open_artifact(weights))
    data = load_images(images, size=size)
    return image_network(network, data.shape[0], len(data.classes)).eval(), None


@lru_cache(maxsize=2)
def _teacher(weights: str | None, network: str, images: str, size: int, device: torch.device) -> nn.Module:
    """The full-precision network on a device."""
    return _full_precision(weights, network, images, size)[0].to(device).requires_grad_(False)
