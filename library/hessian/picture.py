"""The picture of a Hessian: bulk and outliers on one axis, their origin, and the layers that carry the curvature."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from library.drawing import blank, open_frame
from library.hessian.report import FLAT
from library.spectral.density import Quadrature
from library.spectral.smoothing import smoothed_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from library.hessian.report import HessianReport

BULK, OUTLIER, GAUSS_NEWTON = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's


def spectrum_figure(report: "HessianReport") -> "Figure":
    """Left: numbers of eigenvalues over their size, band of two standard errors. Right: the top, and the layers."""

    drawn = blank(11.0, 4.2)
    parts = drawn.subplot_mosaic([["spectrum", "top"], ["spectrum", "layers"]], width_ratios=[1.7, 1])
    draw_spectrum(parts["spectrum"], report.spectrum, report.parameters, report.largest, report.outliers.by_gap)
    draw_top(parts["top"], report)
    draw_layers(parts["layers"], report)
    for axis in parts.values():
        open_frame(axis)
        axis.tick_params(labelsize=8)
    return drawn


def draw_spectrum(axis: "Axes", spectrum: Quadrature, size: int, largest: float, outliers: int) -> None:
    """The density over asinh(lambda / (1e-3 lambda_max)): linear for flat directions, logarithmic for steep ones."""
    unit = FLAT * largest if largest > 0 else 1.0
    moved = Quadrature(
        torch.asinh(spectrum.nodes.double().cpu() / unit), spectrum.weights.double().cpu(), spectrum.exact
    )
    low, high = float(moved.nodes.min()), float(moved.nodes.max())
    points = torch.linspace(low - 0.6, high + 0.6, 1200, dtype=torch.float64)
    found = smoothed_density(moved, points, 0.08 if spectrum.exact else 0.16)
    centre, spread = size * found.value, 2 * size * found.standard_error.nan_to_num()
    floor = 0.1
    axis.fill_between(
        points, (centre - spread).clamp(min=floor), (centre + spread).clamp(min=floor), color=BULK, alpha=0.25, lw=0
    )
    axis.plot(points, centre.clamp(min=floor), color=BULK, lw=1.5)
    top = spectrum.nodes.amax(-2).sort(descending=True).values[:outliers].double().cpu()
    places = torch.asinh(top / unit)
    axis.plot(places, np.full(len(places), 1.6 * floor), "v", color=OUTLIER, ms=7, label=f"{len(places)} outliers")
    axis.axvspan(float(torch.asinh(torch.tensor(-1.0))), float(torch.asinh(torch.tensor(1.0))), color="0.93", zorder=0)
    axis.set_yscale("log")
    axis.set_ylim(bottom=floor)
    ticks = [sign * 10.0**power for sign in (-1, 1) for power in range(-3, 1)]
    shown = [0.0, *[t for t in ticks if low - 0.6 <= np.arcsinh(t * largest / unit) <= high + 0.6]]
    axis.set_xticks([float(np.arcsinh(t * largest / unit)) for t in shown], [f"{t:g}" for t in shown])
    axis.set_xlabel(f"eigenvalue / largest ({largest:.3g}); grey: flat directions", fontsize=9)
    axis.set_ylabel("eigenvalues per unit of the axis", fontsize=9)
    axis.set_title(
        f"{size} eigenvalues" + ("" if spectrum.exact else ", band: ±2 standard errors"), loc="left", fontsize=10
    )
    axis.legend(frameon=False, fontsize=9)


def draw_top(axis: "Axes", report: "HessianReport") -> None:
    """The largest eigenvalues of H with their residuals, and those of G."""
    values = report.top.values.double().cpu()
    rank = np.arange(1, len(values) + 1)
    axis.errorbar(rank, values, yerr=report.top.residuals.double().cpu(), fmt="o", ms=4, color=OUTLIER, label="Hessian")
    if report.gauss_newton is not None:
        other = report.gauss_newton.values.double().cpu()[: len(values)]
        axis.plot(np.arange(1, len(other) + 1), other, "_", ms=11, mew=2, color=GAUSS_NEWTON, label="Gauss-Newton")
    axis.axvline(report.outliers.by_gap + 0.5, color="0.5", lw=0.8, ls="--")
    axis.set_ylim(bottom=min(0.0, 1.1 * float(values.min())))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title("largest eigenvalues; dashed: the gap", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def draw_layers(axis: "Axes", report: "HessianReport") -> None:
    """Each layer's trace per parameter with two standard errors: the largest ten, in the model's order."""
    table = report.layers.table()
    chosen = table.loc[table["mean_trace"].abs().nlargest(10).sort_index().index]
    errors = 2 * (chosen["standard_error"] / chosen["parameters"]).fillna(0)
    axis.barh(chosen["layer"], chosen["mean_trace"], xerr=errors, color=BULK, height=0.7, error_kw={"lw": 0.9})
    axis.invert_yaxis()
    axis.xaxis.get_major_locator().set_params(nbins=4)
    axis.set_title("trace per parameter, by layer", loc="left", fontsize=10)
