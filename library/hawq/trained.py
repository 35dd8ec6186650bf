"""A quantised classifier, read back from its artifact: integers become the weights that they stand for."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.hawq.analysis import Sensitivity
from library.hawq.costs import BitChoice
from library.hawq.language import HawqLanguageRecipe
from library.hawq.layers import fold_batch_norm
from library.hawq.network import converted
from library.hawq.packing import LAYOUT, load_packed
from library.hawq.recipe import CONFIG, TASK, HawqRecipe
from library.hawq.store import MEASURED, from_tensors
from library.images.networks import image_network, is_pretrained, network_from_config

TOGETHER = 256  # images; what more of them need no longer fits a processor's cache


@dataclass(frozen=True)
class QuantizedClassifier:
    """A quantised network with what it needs to answer: `shape` (channels, height, width), scaling, classes, T."""

    model: nn.Module
    recipe: HawqRecipe
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    temperature: float
    layout: dict[str, Any]

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Calibrated class probabilities (n, classes) of uint8 images (n, channels, height, width).

        Raises InputError for images of another shape or type.
        """
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.shape or not len(pixels):
            raise InputError(
                f"images must be uint8 (n, {', '.join(map(str, self.shape))}), got {pixels.dtype} {tuple(pixels.shape)}"
            )
        return torch.cat([self._probabilities(some) for some in pixels.split(TOGETHER)])

    def _probabilities(self, pixels: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        scaled = (pixels.float() / 255 - self.mean) / self.std
        return (self.model(scaled.to(device)).float().cpu() / self.temperature).softmax(1)


def measured_sensitivity(artifact: Artifact) -> Sensitivity | None:
    """What the bits of a quantised network's artifact were chosen from; None when they were given.

    Raises ArtifactError for an artifact of another kind than `hawq` and `hawq-lm`.
    """
    if artifact.kind not in (HawqRecipe.kind, HawqLanguageRecipe.kind):
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'hawq' or 'hawq-lm'")
    if MEASURED not in artifact.manifest.files:
        return None
    return from_tensors(artifact.arrays(), json.loads(artifact.text(MEASURED)), source=str(artifact.path))


def load_hawq(artifact: Artifact) -> QuantizedClassifier:
    """The classifier of an artifact of kind `hawq`, in evaluation mode. Needs neither data nor the first network.

    Raises ArtifactError when the artifact is of another kind or its parts do not fit.
    """
    if artifact.kind != HawqRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'hawq'")
    try:
        recipe = HawqRecipe.model_validate(artifact.recipe)
        layout, task = json.loads(artifact.text(LAYOUT)), json.loads(artifact.text(TASK))
        if is_pretrained(recipe.classifier.network):
            model = network_from_config(artifact.text(CONFIG)).eval()
        else:
            model = image_network(recipe.classifier.network, task["shape"][0], len(task["classes"])).eval()
        fold_batch_norm(model, torch.zeros(2, *task["shape"]))
        choices = {
            entry["name"]: BitChoice(entry["weight_bits"], entry["input_bits"] or 32) for entry in layout["layers"]
        }
        activations = recipe.activations if recipe.activation_bits else None
        model = converted(model, choices, quantizer=recipe.quantizer, activations=activations)
        scaling = [torch.tensor(task[name])[:, None, None] for name in ("mean", "std")]
        shape, classes, temperature = tuple(task["shape"]), tuple(task["classes"]), float(task["temperature"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: its parts do not fit: {str(error).splitlines()[0]}") from error
    load_packed(model, artifact.weights(), source=str(artifact.path))
    return QuantizedClassifier(model.eval(), recipe, shape, *scaling, classes, temperature, layout)
