"""The tensors that make up a module's state, by name: parameters (tied ones once) and persistent buffers."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from library.errors import ArtifactError


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter (tied ones under their first name) and persistent buffer of `model`, not copied."""
    return dict(model.named_parameters()) | dict(persistent_buffers(model))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every buffer that belongs to the model's state."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str = "the artifact") -> None:
    """Copy `tensors` into `model`. Raises ArtifactError, and changes nothing, when names or shapes differ."""
    own = state_tensors(model)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        raise ArtifactError(
            f"{source} is of another model: {_listed('missing', missing)}{_listed('unknown', foreign)}".rstrip("; ")
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ArtifactError(
                f"{source} is of another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"this model needs {tuple(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{what} {shown}; "
