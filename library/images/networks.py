"""Small networks for images: a plain convolutional one with batch norm, and residual ones as in the CIFAR papers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from library.batch_norm import GlobalBatchNorm2d
from library.errors import InputError

PLAIN_CHANNELS = (16, 16, 32, 32, 48, 48, 64)
PLAIN_STRIDES = (2, 1, 2, 1, 2, 1, 1)


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = GlobalBatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PlainNet(nn.Module):
    """3 x 3 convolutions with batch norm and ReLU, global average pooling, one linear layer: no layer dominates.

    With the default widths 79 120 weights in 8 layers. Images (batch, channels, h, w) to logits (batch, classes).
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        *,
        widths: Sequence[int] = PLAIN_CHANNELS,
        strides: Sequence[int] = PLAIN_STRIDES,
    ) -> None:
        super().__init__()
        pairs = zip((channels, *widths[:-1]), widths, strides, strict=True)
        self.blocks = nn.ModuleList(ConvNorm(before, after, stride=stride) for before, after, stride in pairs)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; a 1 x 1 convolution on the shortcut where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, out_channels, stride=stride)
        self.second = ConvNorm(out_channels, out_channels)
        changes = stride > 1 or channels != out_channels
        self.shortcut = ConvNorm(channels, out_channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: a stem, three stages of `blocks` blocks each, pooling, a linear layer.

    Depth 6 `blocks` + 2; source: He, Zhang, Ren, Sun, "Deep residual learning", 2016, section 4.2, with projection
    shortcuts (their option B).
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, *, blocks: int = 3, widths: tuple[int, int, int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(channels, widths[0])
        stages, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(ResidualBlock(before, width, stride=2 if stage and not block else 1))
                before = width
        self.blocks = nn.ModuleList(stages)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn8": PlainNet,
    "resnet20": ResNet,
    "resnet32": lambda channels, classes: ResNet(channels, classes, blocks=5),
    "resnet56": lambda channels, classes: ResNet(channels, classes, blocks=9),
}


class Logits(nn.Module):
    """An image classifier of transformers as a network from pixels to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).logits


def is_pretrained(name: str) -> bool:
    """Whether a network is a folder or hub name of transformers, such as microsoft/resnet-50, with its own weights."""
    return name not in NETWORKS and ("/" in name or (Path(name) / "config.json").is_file())


def network_from_config(text: str) -> nn.Module:
    """A network of the configuration of transformers in `text`, with random weights."""
    from transformers import AutoConfig, AutoModelForImageClassification

    content = json.loads(text)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    return Logits(AutoModelForImageClassification.from_config(config))


def image_network(name: str, channels: int = 1, classes: int = 10) -> nn.Module:
    """A network by name: a new one, with torch's random numbers as they stand, or a pre-trained one of transformers.

    Raises InputError that lists the names, and for a pre-trained one that cannot be read or has other classes.

    >>> sum(p.numel() for p in image_network("cnn8").parameters())
    79642
    """
    if is_pretrained(name):
        return _pretrained(name, classes)
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}, folders and hub names")
    return NETWORKS[name](channels, classes)


def _pretrained(name: str, classes: int) -> nn.Module:
    from transformers import AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"network {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if network.config.num_labels != classes:
        raise InputError(f"network {name!r} knows {network.config.num_labels} classes, the images have {classes}")
    return Logits(network)
