"""Quantised networks on disk: integers packed to their bits, in three tensors that hold little else.

`integers` uint8: each quantised weight in the network's order, entries row-major, each b bits, least bit first, filled
up to a whole byte per layer. `scales` float32: the scales of their rows. `zeros` int32: their zero points, where the
quantiser has any. `floats` float32: everything else of the state (biases, ranges, other layers), in its order.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.errors import ArtifactError, InputError
from library.hawq.network import QuantizedLayer, quantized_layers
from library.weights import state_tensors

LAYOUT = "bits.json"  # in an artifact: layers, shapes, bits


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers from 0 to 2^bits - 1 as a stream of bits: uint8 (ceil(n bits / 8),). InputError outside."""
    flat = values.flatten().to(torch.int64)
    if bool(((flat < 0) | (flat >= 1 << bits)).any()):
        raise InputError(f"values to pack must be from 0 to {2**bits - 1}")
    stream = (flat[:, None] >> torch.arange(bits) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` whole numbers of a stream that `pack` made: int64 (count,)."""
    stream = (packed.to(torch.int64)[:, None] >> torch.arange(8) & 1).flatten()[: count * bits]
    return (stream.reshape(count, bits) << torch.arange(bits)).sum(1)


def packed_bytes(count: int, bits: int) -> int:
    """Length of the stream of `count` numbers."""
    return -(-count * bits // 8)


def stated_bytes(model: nn.Module) -> int:
    """Bytes of the packed network: integers, scales, zero points, and everything else in float32."""
    layers = quantized_layers(model).values()
    total = sum(packed_bytes(layer.weight.numel(), layer.bits.weight) for layer in layers)
    rows = sum(len(layer.quantizer.rows(layer.weight)) for layer in layers)
    total += rows * (4 if all(layer.quantizer.symmetric for layer in layers) else 8)
    return total + 4 * sum(value.numel() for value in _others(model).values())


@torch.no_grad()
def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a quantised network as the tensors described above."""
    integers, scales, zeros = [], [], []
    for layer in quantized_layers(model).values():
        made = layer.quantizer.quantize(layer.weight.cpu(), layer.bits.weight)
        integers.append(pack(made.integers + _offset(layer), layer.bits.weight))
        scales.append(made.scale.float())
        zeros.append(made.zero.int())
    others = [value.detach().float().cpu().flatten() for value in (_others(model) | _rounded_biases(model)).values()]
    tensors = {
        "integers": torch.cat([torch.empty(0, dtype=torch.uint8), *integers]),
        "scales": torch.cat([torch.empty(0), *scales]),
        "floats": torch.cat([torch.empty(0), *others]),
    }
    symmetric = all(layer.quantizer.symmetric for layer in quantized_layers(model).values())
    return tensors if symmetric else tensors | {"zeros": torch.cat(zeros)}


@torch.no_grad()
def load_packed(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Set a quantised network of the same layers and bits from its packed state; weights become what they stand for.

    Raises ArtifactError when lengths differ.
    """
    layers = quantized_layers(model)
    sizes = {
        "integers": sum(packed_bytes(layer.weight.numel(), layer.bits.weight) for layer in layers.values()),
        "scales": sum(len(layer.quantizer.rows(layer.weight)) for layer in layers.values()),
        "floats": sum(value.numel() for value in _others(model).values()),
    }
    for name, size in sizes.items():
        if name not in tensors or tensors[name].numel() != size:
            found = tensors[name].numel() if name in tensors else "no"
            raise ArtifactError(f"{source} is of another network: {found} entries in {name!r}, {size} are needed")
    places = dict.fromkeys(("integers", "scales", "floats"), 0)

    def take(name: str, count: int) -> Tensor:
        places[name] += count
        return tensors[name][places[name] - count : places[name]]

    for layer in layers.values():
        count, bits, rows = layer.weight.numel(), layer.bits.weight, len(layer.quantizer.rows(layer.weight))
        integers = unpack(take("integers", packed_bytes(count, bits)), bits, count) - _offset(layer)
        zero = tensors["zeros"][places["scales"] : places["scales"] + rows] if "zeros" in tensors else torch.zeros(rows)
        scale = take("scales", rows)
        values = (integers.reshape(rows, -1) - zero[:, None]) * scale[:, None]
        layer.weight.copy_(values.reshape(layer.weight.shape))
        layer.hold()
    for value in _others(model).values():
        value.copy_(take("floats", value.numel()).reshape(value.shape))


def layout_text(model: nn.Module) -> str:
    """The layers of a quantised network with their shapes and bits, and its stated bytes, as JSON."""
    layers = [
        {"name": name, "shape": list(layer.weight.shape), "weight_bits": layer.bits.weight,
         "input_bits": layer.bits.activation if layer.input is not None else None}
        for name, layer in quantized_layers(model).items()
    ]  # fmt: skip
    return json.dumps({"layers": layers, "bytes": stated_bytes(model)}, indent=1)


def _offset(layer: QuantizedLayer) -> int:
    return 2 ** (layer.bits.weight - 1) if layer.quantizer.symmetric else 0


def _rounded_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases of layers with quantised inputs, as those layers use them."""
    return {
        f"{name}.bias" if name else "bias": layer.rounded_bias()
        for name, layer in quantized_layers(model).items()
        if layer.bias is not None and layer.input is not None
    }


def _others(model: nn.Module) -> dict[str, Tensor]:
    """The state beside the quantised weights and the marks of which layers are active."""
    apart = {f"{name}.{part}" if name else part for name in quantized_layers(model) for part in ("weight", "active")}
    return {name: value for name, value in state_tensors(model).items() if name not in apart}
