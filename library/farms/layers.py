"""The layers of a model, wherever its weights are: a module, a state by name, safetensors, or an artifact.

A layer says what it is without its weight being read; `load` reads that one tensor. So a model of any size needs the
memory of one layer.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.artifact import MANIFEST, Artifact, open_artifact
from library.errors import ArtifactError, InputError
from library.language.hub import is_loadable, load_errors

Source = nn.Module | Mapping[str, Tensor] | Artifact | str | Path
Kind = Literal["linear", "conv"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|emb|embed|embeddings?|embed_(in|tokens|positions)|tok_embeddings|"
    r"(word|position|token_type|relative_attention|patch)_(embeddings?|bias)|relative_attention_bias)\.weight$"
)
EXPERTS = re.compile(r"(^|\.)experts\.[a-z_]+$")
ATTENTION_INPUTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's
PACKED = (".qweight", ".weight_packed", ".weight.absmax")


@dataclass(frozen=True)
class Layer:
    """One weight of a model. `shape` is (out, in) or (out, in, *kernel), whatever the order in which it is stored.

    `tensor` holds the weight, or else `file` and `key` say where it is; `expert` picks one of a stack of experts.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    tensor: Tensor | None = None
    file: Path | None = None
    key: str = ""
    expert: int | None = None

    @property
    def parameters(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    def load(self) -> Tensor:
        """The weight as `shape` says, in the dtype in which it is stored.

        Raises InputError when it is quantised or has entries that are not finite, naming the layer, and ArtifactError
        for a file that cannot be read.
        """
        weight = self._read() if self.tensor is None else self.tensor
        if self.tensor is not None and self.expert is not None:
            weight = weight[self.expert]
        if weight.is_meta:
            raise InputError(f"layer {self.name} is on the meta device; load its weights first")
        if not weight.is_floating_point():
            raise InputError(f"layer {self.name} is quantised ({weight.dtype}); give its weights in floating point")
        weight = weight.detach().mT if self.transposed else weight.detach()
        if weight.element_size() == 1:
            weight = weight.to(torch.float32)
        if (wrong := int((~torch.isfinite(weight)).sum())) > 0:
            raise InputError(f"layer {self.name}: {wrong} of {weight.numel()} weights are not finite")
        return weight

    def _read(self) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as tensors:
                whole = tensors.get_slice(self.key)
                return whole[:] if self.expert is None else whole[self.expert]
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.file} cannot be read: {str(error).splitlines()[0]}") from error


def find_layers(source: Source) -> list[Layer]:
    """The linear and convolutional layers of a model, a weight that several names share only once.

    Those of a module come in its own order, those of a state, files or an artifact by name, numbers by their size.

    source   a torch module; a state by name; a safetensors file or a folder of them, such as a Hugging Face model's;
             an artifact or its folder; the name OWNER/NAME of a model on the Hugging Face hub

    Embeddings, norms, recurrent layers and biases are not among them, an output layer and the input projections of
    nn.MultiheadAttention are. Layouts that keep a weight as (in, out), like GPT-2's, are told from the length of their
    biases. A stack of experts gives one layer for each expert. A parametrised weight, such as a weight-normed one, is
    seen in a module only, with the value that it has now: a state holds its parts. And a state, which knows no modules,
    takes every weight of more than two dimensions for a convolution, nn.Bilinear's too. Raises InputError for what is
    no model, when there is no layer, or the weights are packed integers; ArtifactError for an unreadable file.
    """
    if isinstance(source, nn.Module):
        found = list(_of_module(source))
    elif isinstance(source, Mapping):
        found = list(_of_state(source))
    elif isinstance(source, Artifact):
        found = list(_of_files(source.weight_files()))
    elif isinstance(source, str | Path):
        found = list(_of_files(_files(Path(source))))
    else:
        raise InputError(
            f"a model is a torch module, a state by name, a path, a hub name or an artifact, "
            f"not a {type(source).__name__}; give a single weight as {{'weight': tensor}}"
        )
    if not found:
        raise InputError("the model has no linear or convolutional layer")
    return found


def _of_module(model: nn.Module) -> Iterator[Layer]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"  # transformers' own, a linear layer kept as (in, out)
        layer = transposed or isinstance(module, (nn.Linear, *CONVOLUTIONS))
        for name, weight in _own_weights(module, layer):
            path = f"{prefix}.{name}" if prefix else name
            if id(weight) in seen or weight.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            if (name == "weight" and layer) or (name in ATTENTION_INPUTS and isinstance(module, nn.MultiheadAttention)):
                seen.add(id(weight))
                yield _layer(path, tuple(weight.shape), transposed=transposed, tensor=weight)
            elif weight.ndim == 3 and EXPERTS.search(path):
                yield from _experts(_layer(path, tuple(weight.shape), tensor=weight))


def _own_weights(module: nn.Module, layer: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module itself; of a layer also a weight that is computed from others (weight norm)."""
    own = dict(module.named_parameters(recurse=False))
    if layer and "weight" not in own:
        with torch.no_grad():
            own["weight"] = module.weight
    yield from own.items()


def _of_state(state: Mapping[str, Tensor]) -> Iterator[Layer]:
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            hint = f"; give what is under {name!r}" if isinstance(tensor, Mapping) else "; give torch tensors"
            raise InputError(f"a state holds tensors by name, but {name!r} is a {kind}{hint}")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for layer in _of_shapes(shapes):
        tensor = state[layer.key]
        place = (tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size(), layer.shape)
        if layer.expert is None and tensor.device.type != "meta":
            if place in seen:
                continue
            seen.add(place)
        yield replace(layer, tensor=tensor)


def _of_files(files: list[Path]) -> Iterator[Layer]:
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    places[name] = file
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    for layer in _of_shapes(shapes):
        yield replace(layer, file=places[layer.key])


def _files(path: Path) -> list[Path]:
    if (path / MANIFEST).is_file():
        return open_artifact(path, verify=False).weight_files()
    if path.is_dir() and (found := sorted(path.glob("*.safetensors"))):
        return found
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if not path.exists() and is_loadable(str(path)):
        return _files(_from_hub(str(path)))
    raise InputError(f"{path} is no safetensors file, nor a folder that holds one, nor an artifact")


def _from_hub(name: str) -> Path:
    """The folder of a hub model's safetensors on this machine, brought here where they are not yet."""
    from huggingface_hub import snapshot_download

    with load_errors("model", name, None):
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))


def _of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    """Layers by the names and shapes of a state's tensors, in natural order."""
    if packed := next((name for name in shapes if name.endswith(PACKED)), None):
        raise InputError(f"{packed} holds packed integers; give the weights in floating point")
    turned = _transposed(shapes)
    for name in sorted(shapes, key=_natural):
        shape = shapes[name]
        if len(shape) == 3 and EXPERTS.search(name.removesuffix(".weight")):
            yield from _experts(_layer(name, shape))
        elif len(shape) >= 2 and name.split(".")[-1] in ("weight", *ATTENTION_INPUTS) and not EMBEDDING.search(name):
            yield _layer(name, shape, transposed=name in turned)


def _transposed(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of the matrices kept as (in, out): their bias is as long as a row, not as a column.

    A square one, whose bias cannot tell, is kept as the others of its block are.
    """
    sure: set[str] = set()
    square: set[str] = set()
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias")
        if len(shape) == 2 and name.endswith(".weight") and bias is not None and len(bias) == 1:
            if shape[0] == shape[1]:
                square.add(name)
            elif bias[0] == shape[1]:
                sure.add(name)
    blocks = {_block(name) for name in sure}
    return sure | {name for name in square if _block(name) in blocks}


def _block(name: str) -> str:
    """The name up to its last number: the block that a layer belongs to."""
    return re.sub(r"^(.*\.\d+)\..*$", r"\1", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _layer(path: str, shape: tuple[int, ...], *, transposed: bool = False, tensor: Tensor | None = None) -> Layer:
    name = path.removesuffix(".weight") if path != "weight" else path
    kind: Kind = "linear" if len(shape) == 2 else "conv"
    return Layer(name, kind, shape[::-1] if transposed else shape, transposed, tensor, key=path)


def _experts(stack: Layer) -> Iterator[Layer]:
    for number in range(stack.shape[0]):
        yield replace(stack, name=f"{stack.name}[{number}]", kind="linear", shape=stack.shape[1:], expert=number)
