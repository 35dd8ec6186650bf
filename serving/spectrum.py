"""The endpoint `spectrum`: the tails of weight matrices beside those of untrained ones, and Hessians of losses."""

import base64
import binascii
import io
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from library.errors import InputError
from serving.arrays import HEAD, npy, npy_shape
from serving.endpoint import ARROW, NPY, BulkRequest, Endpoint, Response, optional
from serving.farms import AllocationQuestion, AllocationResponse, allocated
from serving.hessian import SAMPLES, HessianQuestion, HessianResponse

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

    from library.artifact import Artifact
    from library.farms.layers import Layer
    from serving.hessian_answers import HessianAnswers

MOST_ENTRIES = 16 << 20
BINS = 60
CLEARLY = 2.0  # standard errors of alpha beyond which a tail differs from an untrained one's
FINITE = 3.0  # the exponent of an untrained window of shorter side n deviates by about FINITE (mp_alpha - 1) / n
MATRICES = ("matrix", "npy", "layer")
INPUTS = (*MATRICES, "hessian", "allocate")
BODY = "body"
PRODUCTS = 8192  # numbers that a window's eigenvalues multiply in about the time that an entry of the matrix may take
FLOATS = ("halffloat", "float", "double")  # as Arrow calls float16, float32 and float64
SETTINGS = ("method", "window", "ratio", "ops", "rule")
Row = Annotated[list[float], Field(min_length=1, max_length=65_536, fail_fast=True)]
EXAMPLE = [[round(math.sin(7 * i * i + 3 * j * j + i * j), 3) for j in range(12)] for i in range(16)]


def _npy(matrix: list[list[float]]) -> str:
    content = io.BytesIO()
    np.save(content, np.asarray(matrix, dtype=np.float16))
    return base64.b64encode(content.getvalue()).decode()


class SpectrumRequest(BulkRequest):
    """One of `matrix`, `npy` and `layer`, and how its spectrum is taken; or a question: `hessian`, `allocate`.

    What is left out is as the paper has it. A matrix may also be the body itself, as a NumPy file or as an Arrow
    table with a column of floats for each of its columns; the settings are in the query then.
    """

    matrix: list[Row] = optional(min_length=1, max_length=65_536, fail_fast=True, description="The matrix, row by row.")
    npy: str = optional(
        min_length=1, max_length=1 << 28, description="The matrix as a NumPy file (.npy) of floats, in base64."
    )
    layer: str = optional(min_length=1, max_length=1000, description="The name of one of the model's layers.")
    method: Literal["farms", "plain"] = optional(description="Windows of one shape (farms), or the whole matrix.")
    window: int = optional(ge=8, le=65_536, description="Rows of a window; at most the shorter side.")
    ratio: float = optional(gt=0, le=1000, description="Columns over rows of a window.")
    ops: int = optional(ge=2, le=32, description="Windows per dimension.")
    rule: Literal["median", "fixfinger", "ks"] = optional(description="Where the tail begins.")
    hessian: HessianQuestion = optional(
        description="The curvature of a small network's loss, or of the served model's."
    )
    allocate: AllocationQuestion = optional(description="How much to prune of each layer, from their exponents.")

    @model_validator(mode="after")
    def _one_matrix(self) -> Self:
        given = self.model_fields_set & set(INPUTS) | ({BODY} if self.bulk is not None else set())
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(INPUTS)}, not {' and '.join(sorted(given)) or 'none'}")
        if not given & {*MATRICES, BODY} and (stray := self.changes()):
            raise ValueError(f"{min(stray)}: is about the tail of a matrix, not about {min(given)}")
        if self.matrix is not None and len({len(row) for row in self.matrix}) > 1:
            raise ValueError("matrix: its rows differ in length")
        return self

    def source(self) -> str:
        """The field that the matrix comes in."""
        return next((name for name in MATRICES if name in self.model_fields_set), BODY)

    def changes(self) -> dict[str, Any]:
        """The settings that the request names."""
        return {name: getattr(self, name) for name in SETTINGS if name in self.model_fields_set}


class LogHistogram(BaseModel, frozen=True):
    """How many eigenvalues lie in each of equal bins of log10 lambda."""

    edges: list[float]
    counts: list[int]


class SpectrumResponse(Response):
    """What the spectrum shows. Eigenvalues are squared singular values, those of all windows together."""

    alpha: float = Field(description="Exponent of the tail by the chosen rule; larger is a lighter tail.")
    standard_error: float = Field(description="Of alpha: over the windows, or of as many draws of a power law.")
    ks_distance: float = Field(description="How far the tail is from a power law, 0 to 1.")
    median_alpha: float = Field(description="The exponent by the median rule, which mp_alpha is to be compared with.")
    mp_alpha: float = Field(description="That of an untrained matrix of the windows' shape (Marchenko and Pastur).")
    verdict: Literal["heavier-tailed", "like-untrained", "lighter-tailed"] = Field(
        description="median_alpha beside mp_alpha: apart by more than two standard errors and what chance does to an "
        "untrained window of that size, 3 (mp_alpha - 1) / shorter side; or not."
    )
    rows: int
    columns: int
    aspect_ratio: float = Field(description="Longer over shorter side.")
    windows: int
    window_rows: int
    window_columns: int
    n_eigenvalues: int
    zero_fraction: float = Field(description="Share of the eigenvalues that are zero; they take no part.")
    spectral_norm: float = Field(description="The largest eigenvalue.")
    stable_rank: float = Field(description="Sum of the eigenvalues over the largest, per window.")
    histogram: LogHistogram


class Spectrum(Endpoint):
    """The spectra of matrices, of a model's layers, and of Hessians."""

    name = "spectrum"
    summary = (
        "Is a layer trained? The tail of its spectrum beside an untrained one's. How does a loss curve? Its Hessian."
    )
    kind = None
    model = "farms"
    Request = SpectrumRequest
    Response = SpectrumResponse | HessianResponse | AllocationResponse
    examples = {  # noqa: RUF012 - read only
        "matrix": {"matrix": EXAMPLE, "window": 8, "ops": 4},
        "npy": {"npy": _npy(EXAMPLE), "method": "plain", "rule": "ks"},
        "hessian": {
            "hessian": {
                "network": {"weights": [[[1.0, -0.5], [0.5, 1.0], [-1.0, 0.3]], [[1.0, 0.2, -0.4], [-0.7, 0.6, 0.9]]]},
                "inputs": [[0.5, 1.0], [-1.0, 0.2], [0.3, -0.8], [1.2, 0.4]],
                "targets": [0, 1, 1, 0],
                "what": ["exact", "top", "trace"],
            }
        },
        "allocate": {"allocate": {"alphas": [2.1, 3.4, 4.0], "parameters": [4096, 4096, 16384], "sparsity": 0.5}},
    }
    media = (NPY, ARROW)
    score_bounds = tuple(step / 4 for step in range(4, 41))
    cost_unit = (
        f"entries of the matrix (or windows x rows x columns x shorter side / {PRODUCTS}), or "
        f"parameters x products with the Hessian (x samples / {SAMPLES})"
    )
    request_cost = MOST_ENTRIES
    batch_cost = MOST_ENTRIES

    def __init__(
        self, layers: "Sequence[Layer]", version: str, hessian: "HessianAnswers | None" = None, without: str = ""
    ):
        """`without` says why there are no layers."""
        self.layers, self.version = {layer.name: layer for layer in layers}, version
        self.hessian, self.without = hessian, without

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.farms.layers import find_layers
        from serving.hessian_answers import HessianAnswers

        try:
            layers, without = find_layers(artifact), ""
        except InputError as error:  # its matrices are packed, or it has none; other questions can be answered
            layers, without = [], str(error)
        return cls(layers, artifact.version, HessianAnswers(artifact, device), without)

    @classmethod
    def read(cls, body: "np.ndarray | pyarrow.Table", settings: dict[str, Any]) -> SpectrumRequest:
        return SpectrumRequest.model_validate(settings, context=_checked(BODY, _stacked(body)))

    def scores(self, response: SpectrumResponse | HessianResponse | AllocationResponse) -> list[float]:
        return [response.alpha] if isinstance(response, SpectrumResponse) else []

    def cost(self, request: SpectrumRequest) -> int:
        if request.hessian is not None:
            network = request.hessian.network
            size = self.hessian.parameters if network is None else network.parameters()
            return request.hessian.cost(size)
        if request.allocate is not None:
            return len(request.allocate.alphas)
        return _cost_of_windows(request, self._shape(request))

    def group(self, request: SpectrumRequest) -> Hashable:
        return id(request)  # each is a batch of windows of its own

    def answer(
        self, requests: Sequence[SpectrumRequest]
    ) -> list[SpectrumResponse | HessianResponse | AllocationResponse]:
        return [self._answer(request) for request in requests]

    def limits(self) -> dict[str, int]:
        largest = max((layer.parameters for layer in self.layers.values()), default=0)
        return {"layers": len(self.layers), "largest_layer": largest, "parameters": self.hessian.parameters}

    def _answer(self, request: SpectrumRequest) -> SpectrumResponse | HessianResponse | AllocationResponse:
        if request.hessian is not None:
            return self.hessian.answer(request.hessian, self.version)
        if request.allocate is not None:
            return allocated(request.allocate, self.version)
        return self._response(request)

    def _response(self, request: SpectrumRequest) -> SpectrumResponse:
        from library.farms.analysis import checked, measure
        from library.spectral.marchenko_pastur import MarchenkoPastur
        from library.spectral.tails import log_histogram

        weight = self._weight(request)
        settings = checked(None, request.changes())
        try:
            spectrum, fit, error = measure(weight, settings)
            median = spectrum.fit(checked(settings, {"rule": "median"}))
            pooled = spectrum.values.flatten()
            histogram = log_histogram(pooled, BINS)
        except InputError as reason:
            raise InputError(f"{request.source()}: {reason}") from reason
        mp_alpha = MarchenkoPastur.of_shape(*spectrum.window).hill_alpha()
        windows = spectrum.values.shape[0] * spectrum.values.shape[1]
        sides = sorted(weight.shape[:2])
        median_alpha = float(median.alpha.mean())
        median_error = error if settings.rule == "median" else spectrum.standard_error(median)
        return SpectrumResponse(
            model=self.version,
            alpha=float(fit.alpha.mean()),
            standard_error=error,
            ks_distance=float(fit.ks_distance.mean()),
            median_alpha=median_alpha,
            mp_alpha=mp_alpha,
            verdict=_verdict(
                median_alpha - mp_alpha, CLEARLY * median_error + FINITE * (mp_alpha - 1) / min(spectrum.window)
            ),
            rows=weight.shape[0],
            columns=weight.shape[1],
            aspect_ratio=sides[1] / sides[0],
            windows=windows,
            window_rows=spectrum.window[0],
            window_columns=spectrum.window[1],
            n_eigenvalues=pooled.numel(),
            zero_fraction=float((pooled == 0).double().mean()),
            spectral_norm=float(pooled.max()),
            stable_rank=float(pooled.sum() / pooled.max() / windows),
            histogram=LogHistogram(edges=histogram.edges.tolist(), counts=histogram.counts.long().tolist()),
        )

    def _shape(self, request: SpectrumRequest) -> tuple[int, ...]:
        if request.layer is not None:
            layer = self.layers.get(request.layer)
            return layer.shape if layer is not None else (0, 0)
        if request.matrix is not None:
            return len(request.matrix), len(request.matrix[0])
        if request.bulk is not None:
            return request.bulk.shape
        shape = npy_shape(_from_base64(request.npy[: 4 * -(-HEAD // 3)]), "npy")
        return shape if len(shape) == 2 else (0, 0)  # what is no matrix is refused when it is decoded

    def _weight(self, request: SpectrumRequest) -> "Tensor":
        import torch

        if request.layer is not None:
            if not self.layers:
                raise InputError(f"layer: the served model has none to read: {self.without}")
            if request.layer not in self.layers:
                some = ", ".join(list(self.layers)[:3])
                raise InputError(f"layer: {request.layer!r} is none of the model's {len(self.layers)}, such as {some}")
            return self.layers[request.layer].load()
        if request.matrix is not None:
            return torch.tensor(request.matrix, dtype=torch.float64)
        given, matrix = (BODY, request.bulk) if request.bulk is not None else ("npy", _decoded(request.npy))
        found = torch.from_numpy(np.array(matrix, order="C"))  # a copy: what came is read only
        if not torch.isfinite(found).all():
            raise InputError(f"{given}: it has entries that are not finite")
        return found


def _cost_of_windows(request: SpectrumRequest, shape: tuple[int, ...]) -> int:
    """The entries of a weight of that shape, or the work of its windows' eigenvalues in `PRODUCTS` where it is more."""
    from library.farms.analysis import checked
    from library.farms.windows import window_grid

    settings, entries, short = checked(None, request.changes()), math.prod(shape), min(shape[:2])
    products = entries * short  # of the whole matrix, and of the blocks of a convolution, which do not overlap
    if len(shape) == 2 and settings.method == "farms" and short:
        try:
            grid = window_grid(shape, window=settings.window, ratio=settings.ratio, ops=settings.ops)
        except InputError as error:
            raise InputError(f"{request.source()}: {error}") from error
        products = grid.count * grid.rows * grid.columns * min(grid.rows, grid.columns)
    return max(1, entries, products // PRODUCTS)


def _decoded(text: str) -> np.ndarray:
    return _checked("npy", npy(_from_base64(text), "npy"))


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("npy: not a NumPy file of numbers in base64") from error


def _checked(name: str, found: np.ndarray) -> np.ndarray:
    if found.dtype.kind != "f" or found.itemsize > 8 or found.ndim != 2:
        about = f"{found.dtype} of {found.ndim} dimensions"
        raise InputError(f"{name}: a matrix of float16, float32 or float64 is needed, this is {about}")
    return found


def _stacked(body: "np.ndarray | pyarrow.Table") -> np.ndarray:
    """The matrix whose columns are those of a table."""
    if isinstance(body, np.ndarray):
        return body
    for name, column in zip(body.column_names, body.columns, strict=True):
        if column.null_count:
            raise InputError(f"{BODY}: column {name[:64]} has missing entries")
        if str(column.type) not in FLOATS:
            raise InputError(f"{BODY}: column {name[:64]} is of {column.type}; a matrix has {', '.join(FLOATS)}")
    return np.stack([column.to_numpy() for column in body.columns], axis=1)


def _verdict(difference: float, margin: float) -> Literal["heavier-tailed", "like-untrained", "lighter-tailed"]:
    if abs(difference) <= margin:
        return "like-untrained"
    return "heavier-tailed" if difference < 0 else "lighter-tailed"
