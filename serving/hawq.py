"""The endpoints of a network quantised by HAWQ-V2: `classify` for images, `advise` for bits."""

import base64
import binascii
import io
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, PrivateAttr, model_validator

from library.errors import InputError
from serving.endpoint import ARROW, NPY, BulkRequest, Endpoint, Request, Response, optional

if TYPE_CHECKING:
    import PIL.Image
    import pyarrow
    from torch import Tensor

    from library.artifact import Artifact
    from library.hawq.advice import Advice
    from library.hawq.trained import QuantizedClassifier

File = Annotated[str, Field(min_length=4, max_length=20_000_000)]
Row = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=4096, fail_fast=True)]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_FILES = 64
MOST_PIXELS = 1 << 24  # of one file
DECODED = 64  # pixels of a file that cost as much as one of the network
SMALL = 100  # layers x bit numbers of a question that is answered in a few milliseconds
MOST = 1e100  # of numbers that describe a network: their products stay finite
Trace = Annotated[float, Field(ge=-MOST, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=1 << 44)]  # times bits of weight and input, over 2000 layers, is below 2^63
Costs = Annotated[list[NotNegative], Field(fail_fast=True)]


class ClassifyRequest(BulkRequest):
    """One of `image`, `images` and `pixels`.

    Images may also be the body itself: a NumPy file of uint8 of the network's size, (height, width), (images, height,
    width) or (images, channels, height, width); or an Arrow table whose column `image` holds image files.
    """

    image: File = optional(
        description=f"An image file ({', '.join(FORMATS)}) in base64; it is scaled to the network's size."
    )
    images: list[File] = optional(min_length=1, max_length=MOST_FILES, description="Several such files.")
    pixels: list[Row] = optional(
        min_length=1, max_length=4096, fail_fast=True, description="One grey image as rows of 0 to 255."
    )
    explain: bool = Field(False, description="Return the probability of every class, and the bits of every layer.")
    _decoded: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = self.model_fields_set & {"image", "images", "pixels"} | ({"body"} if self.bulk is not None else set())
        if len(given) != 1:
            raise ValueError(f"give one of image, images and pixels, not {' and '.join(sorted(given)) or 'none'}")
        self._decoded = sum(math.prod(_size(name, content)) for name, content in self.files())
        return self

    def files(self) -> list[tuple[str, bytes]]:
        """The image files, each with the name of its place."""
        if isinstance(self.bulk, list):
            return [(f"body: image[{i}]", file) for i, file in enumerate(self.bulk)]
        if self.image is not None:
            return [("image", _content("image", self.image))]
        return [(f"images[{i}]", _content(f"images[{i}]", file)) for i, file in enumerate(self.images or ())]

    def decoded(self) -> int:
        """How many pixels its image files have before they are scaled."""
        return self._decoded

    def count(self) -> int:
        """How many images there are."""
        if self.bulk is not None:
            return len(self.bulk)
        return len(self.images) if "images" in self.model_fields_set else 1


class Classification(BaseModel, frozen=True):
    """What one image shows."""

    label: str = Field(description="Name of the likeliest class.")
    probability: float = Field(ge=0, le=1, description="Its calibrated probability.")
    probabilities: dict[str, float] | None = Field(description="Of every class; null unless `explain` is true.")


class ClassifyResponse(Response):
    """One result for each image, in the order of the request."""

    results: list[Classification]
    bits: dict[str, int] | None = Field(description="Bits of each layer's weights; null unless `explain` is true.")


class AdviseRequest(Request):
    """A budget, and the network that it is for: by numbers, or the one that is served when there are none."""

    budget: Literal["size", "bops", "latency"] = Field("size", description="What is limited.")
    fraction: float = Field(0.375, gt=0, le=1, description="Share of the cost of the most bits everywhere.")
    traces: list[Trace] = optional(
        min_length=1, max_length=2000, fail_fast=True, description="Mean trace Tr(H)/n of each layer."
    )
    errors: Costs = optional(description="Their standard errors, for the stability.")
    n_params: list[Annotated[Count, Field(ge=1)]] = optional(fail_fast=True, description="Weights of each layer.")
    macs: list[Count] = optional(fail_fast=True, description="Multiply-accumulates, for budget=bops.")
    bits: list[Annotated[int, Field(ge=2, le=16)]] = optional(min_length=1, max_length=15)
    perturbation: list[Costs] = optional(
        fail_fast=True, description="||Q_b(W) - W||^2 of each layer (rows) at each of `bits` (columns)."
    )
    latency: list[Costs] = optional(fail_fast=True, description="Seconds, likewise, for budget=latency.")
    ties: list[Annotated[list[int], Field(fail_fast=True)]] = Field(
        [], max_length=2000, fail_fast=True, description="Sets of layers, from 0, that must share bits."
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {"traces", "n_params", "bits", "perturbation"}
        given = self.model_fields_set & (needed | {"errors", "macs"})
        if given and needed - given:
            raise ValueError(f"{min(needed - given)}: a network given by numbers needs {', '.join(sorted(needed))}")
        if self.budget == "latency" and "latency" not in self.model_fields_set:
            raise ValueError("latency: budget=latency needs it")
        return self


class AdviseResponse(Response):
    """The least sensitive bits within the budget, and what surrounds them."""

    layers: list[str]
    bits: list[int]
    omega: float = Field(description="Their sensitivity; half of it predicts the change of the loss.")
    cost: float = Field(description="In bits of the weights, bit operations, or seconds.")
    limit: float
    slack: float
    lower_bound: float = Field(description="No bits within the limit have a smaller Omega than this.")
    frontier: list[tuple[float, float]] = Field(description="Points (cost, Omega) that no other setting beats.")
    stability: float | None = Field(description="Share of traces within their errors that choose the same bits.")
    warnings: list[str]


class Classify(Endpoint):
    """Classifies images with the packed network."""

    name = "classify"
    summary = "What an image shows: its class and calibrated probability, by a network of a few bits per weight."
    kind = "hawq"
    model = "hawq"
    Request = ClassifyRequest
    Response = ClassifyResponse
    examples = {  # noqa: RUF012 - read only
        "pixels": {"pixels": [[0] * 9 + [200] * 10 + [0] * 9 for _ in range(28)], "explain": True},
    }
    media = (NPY, ARROW)
    cost_unit = f"pixels (images x height x width of the network, or those of image files / {DECODED})"
    request_cost = 64 << 16
    batch_cost = 256 << 16

    def __init__(self, classifier: "QuantizedClassifier", version: str):
        self.classifier, self.version = classifier, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.hawq.trained import load_hawq

        found = load_hawq(artifact)
        found.model.to(device)
        return cls(found, artifact.version)

    @classmethod
    def read(cls, body: "np.ndarray | pyarrow.Table", settings: dict[str, Any]) -> ClassifyRequest:
        return ClassifyRequest.model_validate(settings, context=_images(body))

    def scores(self, response: ClassifyResponse) -> list[float]:
        return [result.probability for result in response.results]

    def cost(self, request: ClassifyRequest) -> int:
        _, height, width = self.classifier.shape
        return max(request.count() * height * width, request.decoded() // DECODED)

    def group(self, request: ClassifyRequest) -> Hashable:
        return ()

    def answer(self, requests: Sequence[ClassifyRequest]) -> list[ClassifyResponse]:
        import torch

        pixels = [image for request in requests for image in self._pixels(request)]
        rows = iter(self.classifier.probabilities(torch.stack(pixels)).tolist())
        return [self._response(request, [next(rows) for _ in range(request.count())]) for request in requests]

    def limits(self) -> dict[str, int]:
        channels, height, width = self.classifier.shape
        layout = self.classifier.layout
        bits = {f"bits {entry['name']}": entry["weight_bits"] for entry in layout["layers"]}
        return {"channels": channels, "height": height, "width": width, "bytes": layout["bytes"]} | bits

    def _response(self, request: ClassifyRequest, rows: list[list[float]]) -> ClassifyResponse:
        classes, results = self.classifier.classes, []
        for row in rows:
            best = max(range(len(row)), key=row.__getitem__)
            every = dict(zip(classes, row, strict=True)) if request.explain else None
            results.append(Classification(label=classes[best], probability=row[best], probabilities=every))
        layers = self.classifier.layout["layers"]
        bits = {entry["name"]: entry["weight_bits"] for entry in layers} if request.explain else None
        return ClassifyResponse(model=self.version, results=results, bits=bits)

    def _pixels(self, request: ClassifyRequest) -> "list[Tensor]":
        import torch

        channels, height, width = self.classifier.shape
        if isinstance(request.bulk, np.ndarray):
            if request.bulk.shape[1:] != (channels, height, width):
                needed = f"{channels} channels, {height} rows and {width} columns"
                raise InputError(f"body: images of {request.bulk.shape[1:]} given, needed are {needed}")
            return list(torch.from_numpy(request.bulk.copy()))
        if "pixels" not in request.model_fields_set:
            return [_scaled(name, content, self.classifier.shape) for name, content in request.files()]
        rows = request.pixels
        if channels != 1 or len(rows) != height or any(len(row) != width for row in rows):
            shape = f"{height} rows of {width}" if channels == 1 else "none: this network takes colour, send image"
            raise InputError(f"pixels: {len(rows)} rows of {len(rows[0])} given, needed are {shape}")
        return [torch.from_numpy(np.array(rows, np.uint8))[None]]


class Advise(Endpoint):
    """Chooses bits for a network that is described by numbers, or for the one that is served."""

    name = "advise"
    summary = "How many bits each layer needs within a budget: exact, with the frontier and a proven bound."
    kind = "hawq"
    model = "hawq"
    Request = AdviseRequest
    Response = AdviseResponse
    examples = {  # noqa: RUF012 - read only
        "numbers": {
            "fraction": 0.5,
            "traces": [0.13, 0.007, 0.005],
            "n_params": [144, 2304, 4608],
            "bits": [2, 4, 8],
            "perturbation": [[3.5, 0.07, 0.0002], [8.6, 0.16, 0.0005], [16.4, 0.3, 0.0009]],
        },
        "served": {"budget": "bops", "fraction": 0.4},
    }
    cost_unit = "layers x bit numbers"
    request_cost = 20_000
    batch_cost = 20_000

    def __init__(self, found: Any, version: str):
        self.found, self.version = found, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.hawq.trained import measured_sensitivity

        return cls(measured_sensitivity(artifact), artifact.version)

    def cost(self, request: AdviseRequest) -> int:
        return max(1, self._size(request)[0])

    def group(self, request: AdviseRequest) -> Hashable:
        """Small questions share a call, which costs as much as the answer to one; a larger one has its own."""
        size, has_errors = self._size(request)
        return () if size <= SMALL and not has_errors else id(request)

    def _size(self, request: AdviseRequest) -> tuple[int, bool]:
        """Layers times bit numbers, and whether their stability is asked for, which is tens of answers' work."""
        if request.traces is not None:
            return len(request.traces) * len(request.bits or ()), request.errors is not None
        if self.found is None:
            return 0, False
        return self.found.perturbation.numel(), bool(self.found.probe_error.isfinite().all())

    def answer(self, requests: Sequence[AdviseRequest]) -> list[AdviseResponse]:
        return [self._advised(request) for request in requests]

    def _advised(self, request: AdviseRequest) -> AdviseResponse:
        from library.hawq.advice import advise, described
        from library.hawq.plan import Budget

        if "traces" in request.model_fields_set:
            found = described(
                request.traces,
                request.n_params,
                request.perturbation,
                request.bits,
                macs=request.macs,
                errors=request.errors,
            )
        elif self.found is None:
            raise InputError("traces: the bits of the served network were given, not measured; describe one by numbers")
        else:
            found = self.found
        latency = tuple(map(tuple, request.latency or ()))
        budget = Budget(kind=request.budget, fraction=request.fraction, latency=latency)
        return self._response(found.layers.names, advise(found, budget, ties=request.ties))

    def _response(self, layers: Sequence[str], advice: "Advice") -> AdviseResponse:
        return AdviseResponse(
            model=self.version,
            layers=list(layers),
            bits=list(advice.bits),
            omega=advice.omega,
            cost=advice.cost,
            limit=advice.limit,
            slack=advice.slack,
            lower_bound=advice.lower_bound,
            frontier=list(advice.frontier),
            stability=advice.stability,
            warnings=list(advice.warnings),
        )


def _images(body: "np.ndarray | pyarrow.Table") -> np.ndarray | list[bytes]:
    """Images (images, channels, height, width) of uint8, or files."""
    if isinstance(body, np.ndarray):
        if body.dtype != np.uint8 or body.ndim not in (2, 3, 4):
            raise InputError(f"body: uint8 of 2 to 4 dimensions is needed, this is {body.dtype} of {body.ndim}")
        return body.reshape(-1, 1, *body.shape[-2:]) if body.ndim < 4 else body
    if body.column_names != ["image"] or "binary" not in str(body.schema.types[0]):
        raise InputError("body: a table with one column `image` of binary files is needed")
    if body.column(0).null_count:
        raise InputError("body: image: some are missing")
    if len(body) > MOST_FILES:
        raise InputError(f"body: {len(body)} image files; at most {MOST_FILES} are allowed")
    return body.column(0).to_pylist()


def _content(name: str, file: str) -> bytes:
    try:
        return base64.b64decode(file, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not an image file in base64") from error


@contextmanager
def _opened(name: str, content: bytes) -> "Iterator[PIL.Image.Image]":
    """The image of a file whose head has been read. Raises InputError, also for what is found wrong with it within."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as found:
            yield found
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not an image file ({', '.join(FORMATS)})") from error


def _size(name: str, content: bytes) -> tuple[int, int]:
    """Width and height of an image file."""
    with _opened(name, content) as found:
        if found.width * found.height > MOST_PIXELS:
            raise InputError(f"{name}: {found.width} x {found.height} pixels; at most 16 million are allowed")
        return found.size


def _scaled(name: str, content: bytes, shape: tuple[int, int, int]) -> "Tensor":
    """An image file as the network takes it: (channels, height, width) of uint8."""
    import torch
    from PIL import Image

    channels, height, width = shape
    with _opened(name, content) as found:
        if found.mode in ("I", "F"):
            raise InputError(f"{name}: its values have 32 bits; an image of 8 or 16 bits per channel is needed")
        if found.mode.startswith("I;16"):  # which Pillow would clip at 255
            found = Image.fromarray((np.asarray(found) >> 8).astype(np.uint8))
        image = found.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).contiguous()
