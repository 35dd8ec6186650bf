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
TENSORS = ("curvature", "probe_error", "data_error", "perturbation", "omega", "activation_trace", "activation_omega")


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
    tensors = {name: value.clone() for name in TENSORS if isinstance(value := getattr(found, name), Tensor)}
    plain = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in (*TENSORS, "layers")}
    plain |= {"layers": {f.name: getattr(found.layers, f.name) for f in fields(found.layers)}}
    write_artifact(path, kind=KIND, recipe=json.loads(json.dumps(plain)), weights=tensors, metrics={}, data="")


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote. Raises ArtifactError when it is missing, damaged or another thing."""
    artifact = open_artifact(path, kind=KIND)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in artifact.recipe.items()}
    tensors = dict.fromkeys(TENSORS) | artifact.weights()
    table = {name: tuple(value) for name, value in plain.pop("layers").items()}
    try:
        return Sensitivity(**plain, **tensors, layers=LayerTable(**table))
    except TypeError as error:
        raise ArtifactError(f"{path} is no sensitivity of this version: {error}") from error


def tempered(found: Sensitivity, power: float) -> Sensitivity:
    """The sensitivity with its curvature to a power: 1 is the method, 0 the plain quantisation error.

    Omega becomes ||dW||^2 (Omega / ||dW||^2)^power, which moves the choice of bits around the frontier's.
    """
    ratio = found.omega / found.perturbation.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(found, omega=found.perturbation * ratio.pow(power))
