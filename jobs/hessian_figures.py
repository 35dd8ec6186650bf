"""The figures of the Hessian experiments, each drawn from what the grid found."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.hessian_grid import EXPERIMENTS, Findings, Grid, estimate_table, network_table
from library.drawing import blank, open_frame
from library.hessian.basins import LINES
from library.hessian.picture import BULK, GAUSS_NEWTON, OUTLIER, draw_spectrum
from library.hessian.study import Measured
from library.spectral.density import Quadrature

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8a8a"
SHADES = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")


def figures(grid: Grid, found: Findings, experiments: Sequence[str] = EXPERIMENTS) -> "dict[str, Figure]":
    """A figure per experiment, by its name."""
    drawers = {
        "spectrum": spectrum_figure,
        "growth": growth_figure,
        "classes": classes_figure,
        "separability": separability_figure,
        "gauss-newton": gauss_newton_figure,
        "batches": batches_figure,
        "estimates": estimates_figure,
    }
    return {name: drawers[name](grid, found) for name in experiments}


def overview(grid: Grid, found: Findings) -> "Figure":
    """The picture of the method: a trained network's spectrum, and the number of outliers against that of classes."""
    drawn, (left, right) = _figure(10.4, 3.9, 2, ratios=(1.7, 1))
    _spectrum(left, found.of([grid.base])[0])
    _counts(right, grid, found)
    return _tidy(drawn)


def spectrum_figure(grid: Grid, found: Findings) -> "Figure":
    """E1: the ordered eigenvalues before and after training, and the spectrum after it."""
    drawn, (left, right) = _figure(10.4, 3.9, 2, ratios=(1, 1.7))
    for moment, colour in (("start", GREY), ("end", OUTLIER)):
        for i, one in enumerate(found.of([grid.base], moment)):
            share = np.arange(1, len(one.eigenvalues) + 1) / len(one.eigenvalues)
            label = {"start": "before training", "end": "after training"}[moment] if i == 0 else None
            left.plot(share, one.eigenvalues, color=colour, lw=1.2, label=label)
    left.set_yscale("symlog", linthresh=1e-3)
    left.set_xlabel("index / number of eigenvalues")
    left.set_ylabel("eigenvalue")
    left.legend(frameon=False)
    _spectrum(right, found.of([grid.base])[0])
    return _tidy(drawn)


def growth_figure(grid: Grid, found: Findings) -> "Figure":
    """E2: ordered eigenvalues of growing networks on the same data, over the index and over its share."""
    drawn, (left, right) = _figure(10.4, 3.9, 2)
    for colour, cell in zip(_shades(len(grid.hidden)), grid.cells("growth"), strict=True):
        one = found.of([cell])[0]
        falling = one.eigenvalues[::-1]
        shown = 2 * cell.classes + 6
        left.plot(np.arange(1, shown + 1), falling[:shown], "o-", ms=3, lw=1, color=colour, label=f"{len(falling)}")
        right.plot(np.arange(1, len(falling) + 1) / len(falling), falling, lw=1.4, color=colour)
    left.axvline(grid.base.classes + 0.5, color="0.5", lw=0.8, ls="--")
    left.set_xlabel("index from the top (dashed: number of classes)")
    left.set_ylabel("eigenvalue")
    left.legend(frameon=False, title="parameters")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_xlabel("index / number of parameters")
    return _tidy(drawn)


def classes_figure(grid: Grid, found: Findings) -> "Figure":
    """E3: outliers by the largest gap against the number of classes; and the top of the spectra."""
    drawn, (left, right) = _figure(10.4, 3.9, 2)
    _counts(left, grid, found)
    plain = [cell for cell in grid.cells("classes") if cell.batch is None]
    for colour, cell in zip(_shades(len(plain)), plain, strict=True):
        falling = found.of([cell])[0].eigenvalues[::-1][: 2 * cell.classes + 3]
        right.plot(np.arange(1, len(falling) + 1), falling, "o-", ms=3, lw=1, color=colour, label=f"{cell.classes}")
        right.axvline(cell.classes + 0.5, color=colour, lw=0.8, ls="--")
    right.set_yscale("log")
    right.set_xlabel("index from the top (dashed: number of classes)")
    right.set_ylabel("eigenvalue")
    right.legend(frameon=False, title="classes")
    return _tidy(drawn)


def separability_figure(grid: Grid, found: Findings) -> "Figure":
    """E4: the top of the spectra for clusters of growing spread, and the share of flat directions."""
    drawn, (left, right) = _figure(10.4, 3.9, 2)
    for colour, cell in zip(_shades(len(grid.spreads)), grid.cells("separability"), strict=True):
        falling = found.of([cell])[0].eigenvalues[::-1][: 2 * cell.classes + 6]
        left.plot(np.arange(1, len(falling) + 1), falling, "o-", ms=3, lw=1, color=colour, label=f"{cell.spread:g}")
    left.axvline(grid.base.classes + 0.5, color="0.5", lw=0.8, ls="--")
    left.set_xlabel("index from the top (dashed: number of classes)")
    left.set_ylabel("eigenvalue")
    left.legend(frameon=False, title="spread of a cluster")
    rows = network_table(found.of(grid.cells("separability"))).groupby("spread")
    shown = (("kth", "eigenvalue k", OUTLIER), ("next", "eigenvalue k + 1", GREY), ("flat_share", "flat share", BULK))
    for name, label, colour in shown:
        mean, spread = rows[name].mean(), rows[name].std().fillna(0)
        level = mean / mean.iloc[0], spread / mean.iloc[0]
        right.errorbar(mean.index, *level, marker="o", ms=4, capsize=3, color=colour, label=label)
    right.legend(frameon=False, loc="lower left")
    right.set_ylim(bottom=0)
    right.set_xlabel("spread of a cluster")
    right.set_ylabel("relative to the least spread")
    return _tidy(drawn)


def gauss_newton_figure(grid: Grid, found: Findings) -> "Figure":
    """E5: the largest eigenvalues of H, of its Gauss-Newton part and of the gradients' covariance."""
    cells = grid.cells("gauss-newton")
    drawn, axes = _figure(3.6 * len(cells), 3.7, len(cells))
    for axis, cell in zip(axes, cells, strict=True):
        one = found.of([cell])[0]
        index = np.arange(1, len(one.gauss_newton) + 1)
        axis.plot(index, one.eigenvalues[::-1][: len(index)], "o", ms=5, color=OUTLIER, label="Hessian")
        axis.plot(index, one.gauss_newton, "_", ms=11, mew=2, color=GAUSS_NEWTON, label="Gauss-Newton")
        axis.plot(index, one.covariance, "x", ms=4, color=GREY, label="gradient covariance")
        axis.set_yscale("log")
        axis.set_xlabel("index from the top")
        axis.set_title(f"{cell.data}, {len(one.eigenvalues)} parameters", loc="left")
    axes[0].legend(frameon=False)
    return _tidy(drawn)


def batches_figure(grid: Grid, found: Findings) -> "Figure":
    """E6: the training loss on the lines between the ends of the runs, a curve per seed, with its chord."""
    drawn, axes = _figure(3.6 * len(LINES), 3.6, len(LINES))
    for axis, name in zip(axes, LINES, strict=True):
        for colour, basin in zip(_shades(len(found.basins)), found.basins, strict=True):
            line = basin.lines[name]
            axis.plot(line.positions, line.losses, color=colour, lw=1.6, label=f"seed {basin.seed}")
            axis.plot([0, 1], [line.losses[0], line.losses[-1]], color=colour, lw=0.8, ls=":")
        axis.set_title(textwrap.fill(name, 30), loc="left")
        axis.set_xlabel("place on the line (dots: chord)")
    axes[0].set_ylabel("training loss")
    axes[0].legend(frameon=False)
    return _tidy(drawn)


def estimates_figure(grid: Grid, found: Findings) -> "Figure":
    """Distance of estimated densities from the exact spectrum over Lanczos steps, for each number of probes."""
    rows = estimate_table(found.estimates)
    drawn, axes = _figure(3.6 * len(grid.probes), 3.6, len(grid.probes))
    for axis, (count, part) in zip(axes, rows.groupby("probes"), strict=True):
        for name, label, colour in (("plain", "plain", GREY), ("deflated", "outliers taken out", OUTLIER)):
            values = part.groupby("steps")[name]
            mean, spread = values.mean(), values.std().fillna(0)
            axis.errorbar(mean.index, mean, spread, marker="o", ms=4, capsize=3, color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(grid.lanczos_steps, list(map(str, grid.lanczos_steps)))
        axis.set_xlabel("Lanczos steps")
        axis.set_title(f"{count} probe{'s' if count > 1 else ''}", loc="left")
    limits = [bound for axis in axes for bound in axis.get_ylim()]
    for axis in axes:
        axis.set_ylim(min(limits), max(limits))
    axes[0].set_ylabel("distance / largest eigenvalue")
    axes[0].legend(frameon=False)
    return _tidy(drawn)


def _spectrum(axis: "Axes", one: Measured) -> None:
    values = torch.from_numpy(one.eigenvalues.copy())
    rule = Quadrature(values[None], torch.full_like(values[None], 1 / len(values)), exact=True)
    draw_spectrum(axis, rule, len(values), float(values[-1]), int(one.metrics["outliers_by_gap"]))


def _counts(axis: "Axes", grid: Grid, found: Findings) -> None:
    table = network_table(found.of(grid.cells("classes")))
    reach = [0, max(grid.classes) * 1.1]
    axis.plot(reach, reach, color="0.5", lw=0.8, ls="--", label="as many as classes")
    shift = 0.015 * max(grid.classes)
    kinds = (
        (table["batch"] == 0, "gradient descent", OUTLIER, "o", -shift),
        (table["batch"] > 0, "stochastic", BULK, "s", shift),
    )
    for chosen, label, colour, marker, aside in kinds:
        rows = table[chosen].groupby("classes")["outliers_by_gap"]
        mean = rows.mean()
        places = mean.index.to_numpy() + aside
        axis.errorbar(places, mean, rows.std().fillna(0), fmt=marker, ms=5, capsize=3, color=colour, label=label)
    axis.set_xlabel("classes in the data")
    axis.set_ylabel("outliers above the largest gap")
    axis.legend(frameon=False)


def _shades(count: int) -> list[str]:
    return [SHADES[i % len(SHADES)] for i in range(count)]


def _figure(
    width: float, height: float, columns: int, ratios: Sequence[float] | None = None
) -> "tuple[Figure, list[Axes]]":

    drawn = blank(width, height)
    axes = drawn.subplots(1, columns, width_ratios=ratios, squeeze=False)
    return drawn, list(axes[0])


def _tidy(drawn: "Figure") -> "Figure":
    for axis in drawn.axes:
        open_frame(axis)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(10)
    return drawn
