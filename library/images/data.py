"""Labelled images: the shipped sample, files in the usual forms, and the splits that a recipe trains on."""

import gzip
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from library.errors import InputError
from library.recipe import Samples, Splits
from library.samples import sample_file

SAMPLE = "fashion-mnist"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of what pre-trained networks expect


class ImageBatch(NamedTuple):
    """`pixels` float32 (batch, channels, height, width), standardised; `labels` int64 (batch,)."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Images:
    """Images in memory: `pixels` uint8 (n, channels, height, width) and `labels` int64 (n,). Samples are pairs."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, one folder per class, read when asked for: RGB, shorter side scaled, centre cut out."""

    files: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.files[index], self.size), int(self.labels[index])


@dataclass(frozen=True)
class ImageData:
    """A labelled set: training and test images, class names, and each channel's mean and deviation of pixel / 255."""

    train: Images | ImageFiles
    test: Images | ImageFiles
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train[0][0].shape)


@lru_cache(maxsize=4)
def load_images(source: str = SAMPLE, *, size: int = 224) -> ImageData:
    """A labelled image set by name or place.

    `fashion-mnist` is the shipped sample, 10 000 training and 2 000 test images of 28 x 28. Otherwise `source` is

    * an NPZ file with `x_train`, `y_train`, `x_test`, `y_test` (uint8 images (n, h, w) or (n, h, w, c)) and, if the
      classes have names, `class_names`;
    * a folder with the four `*-ubyte` or `*-ubyte.gz` files of MNIST and Fashion-MNIST;
    * a folder with `train` and `val` or `test`, a folder per class in each (ImageNet): images are read when asked
      for, their shorter side scaled to `size` / 0.875 and a centre of `size` cut out.

    Mean and deviation are those of the training images, and ImageNet's for folders of classes. Raises InputError that
    says what is missing or malformed.

    >>> data = load_images()
    >>> len(data.train), data.shape, data.classes[9]
    (10000, (1, 28, 28), 'Ankle boot')
    """
    if source == SAMPLE:
        with sample_file("images", "fashion_mnist.npz").open("rb") as stream, np.load(stream) as arrays:
            return _in_memory(dict(arrays), SAMPLE)
    place = Path(source)
    if place.is_file():
        try:
            with np.load(place, allow_pickle=False) as arrays:
                return _in_memory(dict(arrays), str(place))
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{place} is not an NPZ file of images: {error}") from error
    if not place.is_dir():
        raise InputError(f"no images at {source!r}; give {SAMPLE}, an NPZ file, or a folder of images")
    if list(place.glob("*-ubyte*")):
        return _in_memory(_idx_arrays(place), str(place))
    return _class_folders(place, size)


def image_splits(
    data: ImageData, *, validation_fraction: float = 0.1, train_images: int | None = None, seed: int = 0
) -> Splits:
    """Training, validation and test parts for a recipe; batches are `ImageBatch`.

    The validation part is drawn from the training images by a permutation of `seed`; `train_images` keeps that many of
    what is left. Raises InputError when a part would be empty.
    """
    count = len(data.train)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    held_out = round(validation_fraction * count)
    kept = order[held_out:][: train_images or count]
    if not 0 < held_out < count or (train_images or 0) > count - held_out:
        raise InputError(
            f"{count} images cannot give {validation_fraction:g} of them to validation and "
            f"{train_images or 'some'} to training"
        )
    content = f"{data.fingerprint} {validation_fraction} {train_images} {seed}"
    return Splits(
        Subset(data.train, kept.tolist()),
        Subset(data.train, order[:held_out].tolist()),
        data.test,
        collate=partial(collate_images, mean=data.mean, std=data.std),
        fingerprint=sha256(content.encode()).hexdigest(),
    )


def collate_images(
    samples: Sequence[tuple[Tensor, int]], keys: Tensor | None, *, mean: Sequence[float], std: Sequence[float]
) -> ImageBatch:
    """One batch: pixels scaled to [0, 1] and standardised per channel. Nothing is random, so `keys` are not used."""
    pixels = torch.stack([pixels for pixels, _ in samples]).float() / 255
    centre, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return ImageBatch((pixels - centre) / scale, torch.tensor([label for _, label in samples]))


def stacked(splits: Splits, samples: Samples, count: int | None = None, *, start: int = 0) -> ImageBatch:
    """Samples `start` to `start + count` of a part in one batch; all from `start` when `count` is None.

    Raises InputError when there are not that many.
    """
    stop = len(samples) if count is None else start + count
    if not start < stop <= len(samples):
        raise InputError(f"{count} images from number {start} are asked for, there are {len(samples)}")
    return splits.collate([samples[i] for i in range(start, stop)], torch.zeros(stop - start, dtype=torch.int64))


def read_image(file: Path, size: int) -> Tensor:
    """An image file as uint8 (3, size, size): RGB, shorter side scaled to size / 0.875, centre cut out."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{file} is not an image that can be read: {error}") from error
    scale = size / 0.875 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _in_memory(arrays: dict[str, np.ndarray], source: str) -> ImageData:
    missing = {"x_train", "y_train", "x_test", "y_test"} - arrays.keys()
    if missing:
        raise InputError(f"{source} lacks {', '.join(sorted(missing))}; it holds {', '.join(sorted(arrays))}")
    parts = [_part(arrays, name, source) for name in ("train", "test")]
    count = 1 + int(max(part.labels.max() for part in parts))
    classes = tuple(map(str, arrays.get("class_names", range(count))))
    if count > len(classes):
        raise InputError(f"{source}: a label is {count - 1}, but there are only {len(classes)} class names")
    if parts[0].pixels.shape[1:] != parts[1].pixels.shape[1:]:
        raise InputError(f"{source}: training and test images differ in shape")
    scaled = parts[0].pixels.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0).clamp(min=1e-6)
    content = sha256(b"".join(tensor.numpy().tobytes() for part in parts for tensor in (part.pixels, part.labels)))
    return ImageData(*parts, classes, tuple(mean.tolist()), tuple(std.tolist()), content.hexdigest())


def _part(arrays: dict[str, np.ndarray], name: str, source: str) -> Images:
    pixels, labels = arrays[f"x_{name}"], arrays[f"y_{name}"]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels) or not len(labels):
        raise InputError(
            f"{source}: x_{name} must be uint8 images (n, h, w) or (n, h, w, c) with one label each, got "
            f"{pixels.dtype} {pixels.shape} and {len(labels)} labels"
        )
    layout = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2).contiguous()
    return Images(layout, torch.from_numpy(labels.astype(np.int64)))


def _idx_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the four files in the format of MNIST (idx)."""
    names = {"train": "train", "test": "t10k"}
    arrays = {}
    for part, prefix in names.items():
        for letter, kind in (("x", "images-idx3"), ("y", "labels-idx1")):
            found = sorted(folder.glob(f"{prefix}-{kind}-ubyte*"))
            if not found:
                raise InputError(f"{folder} lacks {prefix}-{kind}-ubyte or the same with .gz")
            arrays[f"{letter}_{part}"] = _idx_array(found[0])
    return arrays


def _idx_array(file: Path) -> np.ndarray:
    content = file.read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        if content[2] != 8:
            raise ValueError("its numbers are no unsigned bytes")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise InputError(f"{file} is not a whole file of unsigned bytes in the idx format: {error}") from error


def _class_folders(folder: Path, size: int) -> ImageData:
    train, test = folder / "train", folder / ("val" if (folder / "val").is_dir() else "test")
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if not classes or not test.is_dir():
        raise InputError(f"{folder} holds no train and val folders with a folder per class")
    parts, content = [], sha256(str(size).encode())
    for place in (train, test):
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((place / name).glob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise InputError(f"{place} holds no images ({', '.join(SUFFIXES)}) in the folders of its classes")
        for file, _ in files:
            content.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
        parts.append(ImageFiles(tuple(file for file, _ in files), torch.tensor([label for _, label in files]), size))
    return ImageData(*parts, tuple(classes), IMAGENET_MEAN, IMAGENET_STD, content.hexdigest())
