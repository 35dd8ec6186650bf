"""Heavy-tailedness of every layer of a model, with and without the bias of the layers' shapes."""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, PositiveInt, ValidationError
from torch import Tensor

from library.errors import InputError
from library.farms.layers import Layer, Source, find_layers
from library.farms.windows import Grid, block_spectra, ladder, slice_spectra, window_grid, window_spectra
from library.spectral.marchenko_pastur import MarchenkoPastur
from library.spectral.tails import LowerBound, Rule, TailFit, fit_tail, hill_scan, squared_singular_values

if TYPE_CHECKING:
    import pandas as pd

SKETCH = 41  # log10 eigenvalues at equal steps of their rank, from the least to the largest, draw a spectrum
LEAST_EIGENVALUES = 5  # a layer with fewer is left out, as published
STALLED = 0.95  # more windows are of no use where they leave this much of the error


class Settings(BaseModel, frozen=True, extra="forbid"):
    """How a layer's spectrum is taken and its tail fitted. `Settings.language_models()` is the paper's for pruning."""

    method: Literal["farms", "plain"] = "farms"
    """Windows of one shape (farms), or the whole matrix (plain)."""
    window: int = Field(2000, ge=8)
    """Rows of a window; at most the shorter side of the layer. Convolutions have windows of their own."""
    ratio: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Columns over rows of a window (Q)."""
    ops: int = Field(15, ge=2)
    """Windows per dimension; at most so many with a tolerance."""
    step: PositiveInt | None = None
    """Distance of neighbouring windows, instead of a number of them."""
    tolerance: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Take more windows only until the standard error of alpha is below this."""
    rule: Rule = "median"
    """Where the tail begins: at the median, near the histogram's peak (fixfinger), or at the best fit (ks)."""
    position: float = Field(2.0, gt=1)
    """The median rule's tail begins at eigenvalue N / position."""
    lower_bound: LowerBound = "log"
    """Of fixfinger: log is as published, linear as meant."""
    floor: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Eigenvalues at or below this are left out (1e-5 as published, where zeros are filtered)."""

    @classmethod
    def language_models(cls, **changes: Any) -> "Settings":
        """The paper's for pruning LLMs: windows of 2000 x 2000, 15 per dimension, the fixfinger rule."""
        return cls(**({"window": 2000, "ops": 15, "rule": "fixfinger"} | changes))

    @classmethod
    def image_classifiers(cls, **changes: Any) -> "Settings":
        """The paper's for learning rates of image classifiers: windows of 100 x 100, 9 per dimension, the median."""
        return cls(**({"window": 100, "ops": 9, "rule": "median"} | changes))


class Spectrum(NamedTuple):
    """Eigenvalues of a layer, float64 (positions, windows, eigenvalues). Windows are pooled, positions averaged.

    Linear layers have one position, and as many windows as the grid. Convolutions have a position for each block down
    their slices (one when plain), and a window for each place of the kernel.
    """

    values: Tensor
    grid: Grid | None
    window: tuple[int, int]

    def fit(self, settings: Settings) -> TailFit:
        """The tail of each position's pooled eigenvalues, every field of shape (positions,)."""
        return fit_tail(
            self.values.flatten(1),
            settings.rule,
            position=settings.position,
            lower_bound=settings.lower_bound,
            floor=settings.floor,
        )

    def standard_error(self, fit: TailFit) -> float:
        """The standard error of alpha over the windows, or over the positions.

        One window says nothing about others: it is then that of so many draws of a power law. Else, with alpha_w the
        exponent of window w at the pooled tail's share of its eigenvalues, K_vw the share of window w that lies in v
        too, and W windows: sqrt(sum_vw K_vw (alpha_v - mean)(alpha_w - mean)) / W. K is a product of triangular
        kernels, hence positive semi-definite; for windows that do not overlap this is deviation / sqrt(W).
        """
        positions, windows, count = self.values.shape
        if positions > 1:
            return float(fit.alpha.std() / math.sqrt(positions))
        if self.grid is None or windows == 1:
            return float(fit.sampling_error[0])
        share = float(fit.tail[0]) / (windows * count)
        start = min(count - 2, count - round(count * share))
        alphas = hill_scan(self.values[0])[:, start]
        deviations = torch.where(torch.isfinite(alphas), alphas - alphas[torch.isfinite(alphas)].mean(), 0.0)
        rows, columns = (shared.to(deviations.device) for shared in self.grid.overlaps())
        placed = deviations.unflatten(0, (len(rows), len(columns)))
        variance = (placed * (rows @ placed @ columns)).sum()
        return float(variance.clamp(min=0).sqrt() / windows)


def analyze(source: Source, settings: Settings | None = None, **changes: Any) -> "pd.DataFrame":
    """The spectrum of every linear and convolutional layer of a model, one row each, in the order of `find_layers`.

    source     a torch module (transformers' models among them), a state by name, a safetensors file or a folder of
               them, an artifact; weights are read one layer at a time
    settings   windows and threshold rule; `changes` are its fields, as in analyze(model, method="plain", rule="ks")

    Columns, with alpha, its error and mp_alpha next to the name: layer, kind, rows, columns, slices, parameters; alpha
    (larger: a lighter tail, less trained), standard_error, D (distance from a power law), xmin and tail (where the
    tail begins, how many eigenvalues it has),
    num_evals and windows, window_rows and window_columns; mp_alpha (the median rule's alpha of an untrained layer,
    by Marchenko and Pastur, for the shape of the windows); spectral_norm (largest eigenvalue), norm (their sum),
    stable_rank (norm / spectral_norm), norm_stable_rank (that per eigenvalue), alpha_weighted (alpha log10
    spectral_norm), log_norm, log_spectral_norm, log_alpha_norm (log10 sum lambda^alpha), entropy (of the eigenvalues'
    shares, over its largest value), zero_fraction, and warning: why alpha is missing. Eigenvalues are squared singular
    values; those of windows are pooled, those of a convolution's positions averaged. Names as in WeightWatcher mean
    what they mean there.

    Raises InputError for what is no model, settings that are refused, weights that are quantised, on the meta device
    or not finite (naming the layer), and a model without layers.

    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 64))
    >>> analyze(model, window=32)[["layer", "rows", "columns", "windows"]].values.tolist()
    [['0', 64, 128, 225], ['1', 64, 64, 225]]
    """
    import pandas as pd

    chosen = checked(settings, changes)
    return pd.DataFrame([analyze_layer(layer, chosen) for layer in find_layers(source)])


def checked(settings: Settings | None, changes: dict[str, Any]) -> Settings:
    """Settings with some fields changed. Raises InputError that names the field which is refused."""
    if not isinstance(settings, Settings | None):
        raise InputError(f"settings must be Settings, got {type(settings).__name__}; fields go by name: window=100")
    try:
        return Settings.model_validate((settings or Settings()).model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@torch.no_grad()
def analyze_layer(layer: Layer, settings: Settings, *, sketch: bool = False) -> dict[str, Any]:
    """The row of one layer, as `analyze` describes it; with `sketch` also `log_quantiles`, see `SKETCH`."""
    row: dict[str, Any] = dict.fromkeys(FIRST) | {
        "layer": layer.name,
        "kind": layer.kind,
        "rows": layer.shape[0],
        "columns": layer.shape[1],
        "slices": math.prod(layer.shape[2:]),
        "parameters": layer.parameters,
    }
    weight = layer.load()
    try:
        spectrum, fit, error = measure(weight, settings)
    except InputError as reason:
        row |= dict.fromkeys(MEASURES, math.nan) | {"num_evals": 0, "windows": 0, "warning": str(reason)}
        return row | ({"log_quantiles": []} if sketch else {})
    row |= _measures(spectrum, fit, error, settings) | {"warning": ""}
    if sketch:
        values = spectrum.values.flatten().sort().values
        places = torch.linspace(0, 1, SKETCH, dtype=torch.float64, device=values.device) * (len(values) - 1)
        row["log_quantiles"] = values[places.long()].clamp(min=1e-300).log10().tolist()
    return row


def measure(weight: Tensor, settings: Settings) -> tuple[Spectrum, TailFit, float]:
    """Spectrum, tail and standard error of one weight, (rows, columns) or (out, in, *kernel), on its device.

    With a tolerance the number of windows per dimension grows until the standard error is below it, or no longer
    falls. Raises InputError when there are fewer than 5 eigenvalues above the floor, or no tail can be fitted.
    """
    if weight.ndim != 2 or settings.method == "plain":
        spectrum = plain_spectrum(weight) if settings.method == "plain" else _blocks(weight, settings)
        fit = _fit(spectrum, settings)
        return spectrum, fit, spectrum.standard_error(fit)
    adaptive = settings.tolerance is not None and settings.step is None
    before = math.inf
    for ops in ladder(settings.ops) if adaptive else [settings.ops]:
        grid = window_grid(
            tuple(weight.shape), window=settings.window, ratio=settings.ratio, ops=ops, step=settings.step
        )
        spectrum = Spectrum(window_spectra(weight, grid)[None], grid, (grid.rows, grid.columns))
        fit = _fit(spectrum, settings)
        error = spectrum.standard_error(fit)
        if grid.count == 1 or (adaptive and (error <= settings.tolerance or error > STALLED * before)):
            break
        before = error
    return spectrum, fit, error


def plain_spectrum(weight: Tensor) -> Spectrum:
    """The eigenvalues of the whole matrix; of a convolution those of all slices together."""
    values = squared_singular_values(weight)[None] if weight.ndim == 2 else slice_spectra(weight)
    return Spectrum(values[None], None, tuple(weight.shape[:2]))


def _blocks(weight: Tensor, settings: Settings) -> Spectrum:
    short = min(weight.shape[:2])
    sides = (short, int(short * settings.ratio)) if settings.ratio <= 1 else (int(short / settings.ratio), short)
    return Spectrum(block_spectra(weight, settings.ratio), None, sides)


def _fit(spectrum: Spectrum, settings: Settings) -> TailFit:
    kept = int((spectrum.values.flatten(1) > settings.floor).sum(-1).min())
    if kept < LEAST_EIGENVALUES:
        where = f"above {settings.floor:g}" if settings.floor else "that are not zero"
        raise InputError(f"{kept} eigenvalues {where}; at least {LEAST_EIGENVALUES} are needed")
    return spectrum.fit(settings)


FIRST = ("layer", "alpha", "standard_error", "mp_alpha")  # what a narrow terminal shows of a row
MEASURES = (
    "alpha",
    "standard_error",
    "D",
    "xmin",
    "tail",
    "num_evals",
    "windows",
    "window_rows",
    "window_columns",
    "mp_alpha",
    "spectral_norm",
    "norm",
    "stable_rank",
    "norm_stable_rank",
    "alpha_weighted",
    "log_norm",
    "log_spectral_norm",
    "log_alpha_norm",
    "entropy",
    "zero_fraction",
)


def _measures(spectrum: Spectrum, fit: TailFit, error: float, settings: Settings) -> dict[str, Any]:
    values = spectrum.values.flatten(1)
    largest, total = values.amax(-1), values.sum(-1)
    shares = values / total[:, None]
    count = values.shape[-1]
    logs = (values / largest[:, None]).pow(fit.alpha[:, None]).sum(-1).log10() + fit.alpha * largest.log10()
    means = {
        "alpha": fit.alpha,
        "D": fit.ks_distance,
        "xmin": fit.threshold,
        "tail": fit.tail.double(),
        "spectral_norm": largest,
        "norm": total,
        "stable_rank": total / largest,
        "norm_stable_rank": total / largest / count,
        "alpha_weighted": fit.alpha * largest.log10(),
        "log_norm": total.log10(),
        "log_spectral_norm": largest.log10(),
        "log_alpha_norm": logs,
        "entropy": -torch.special.xlogy(shares, shares).sum(-1) / math.log(count),
        "zero_fraction": 1 - fit.positive / count,
    }
    found = {name: float(value.mean()) for name, value in means.items()}
    rows, columns = spectrum.window
    found |= {
        "standard_error": error,
        "num_evals": values.numel(),
        "windows": spectrum.values.shape[0] * spectrum.values.shape[1],
        "window_rows": rows,
        "window_columns": columns,
        "mp_alpha": MarchenkoPastur.of_shape(rows, columns).hill_alpha(settings.position),
    }
    return {name: found[name] for name in MEASURES}
