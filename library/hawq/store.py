"""Sensitivities on disk, found again by the content that they were measured on: traces are taken once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.artifact import open_artifact, write_artifact
from library.errors import ArtifactError
from library.hawq.analysis import Sensitivity
from library.hawq.layers import LayerTable
from library.weights import state_tensors

KIND = "hawq-sensitivity"
MEASURED = "sensitivity.json"  # in an artifact of a quantised network: what its bits were chosen from
TENSORS = (
    "curvature",
    "probe_error",
    "data_error",
    "perturbation",
    "omega",
    "forms",
    "shares",
    "activation_trace",
    "activation_omega",
)


def cached(folder: str | Path | None, key: str, measure: Callable[[], Sensitivity]) -> Sensitivity:
    """The sensitivity that `folder` holds under `key`, or else what `measure` finds, kept there for the next time.

    A damaged one is measured again. With no folder nothing is kept.
    """
    if folder is None:
        return measure()
    place = Path(folder) / key
    try:
        return load_sensitivity(place)
    except ArtifactError:
        made = measure()
    save_sensitivity(made, place)
    return made


def content_key(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that identify a network's weights and the settings of a measurement."""
    digest = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in state_tensors(model).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def save_sensitivity(found: Sensitivity, path: str | Path) -> None:
    """Write a sensitivity as an artifact, whole or not at all."""
    tensors, text = as_tensors(found)
    write_artifact(path, kind=KIND, recipe=json.loads(text), weights=tensors, metrics={}, data="")


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote. Raises ArtifactError when it is missing, damaged or another thing."""
    artifact = open_artifact(path, kind=KIND)
    return from_tensors(artifact.weights(), artifact.recipe, source=str(path))


def as_tensors(found: Sensitivity) -> tuple[dict[str, Tensor], str]:
    """A sensitivity as named tensors, and the rest of it as JSON."""
    tensors = {name: value.clone() for name in TENSORS if isinstance(value := getattr(found, name), Tensor)}
    plain = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in (*TENSORS, "layers")}
    plain |= {"layers": {f.name: getattr(found.layers, f.name) for f in fields(found.layers)}}
    return tensors, json.dumps(plain, indent=1)


def from_tensors(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], *, source: str) -> Sensitivity:
    """What `as_tensors` took apart. Raises ArtifactError when the parts do not fit."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    try:
        table = {name: tuple(value) for name, value in values.pop("layers").items()}
        return Sensitivity(**values, **(dict.fromkeys(TENSORS) | dict(tensors)), layers=LayerTable(**table))
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{source} holds no sensitivity of this version: {error}") from error


def tempered(found: Sensitivity, power: float) -> Sensitivity:
    """The sensitivity with its curvature to a power: 1 is the method, 0 the plain quantisation error.

    Omega becomes ||dW||^2 (Omega / ||dW||^2)^power, which moves the choice of bits around the frontier's.
    """
    ratio = found.omega / found.perturbation.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(found, omega=found.perturbation * ratio.pow(power))
