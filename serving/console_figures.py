"""The figures that the console draws from endpoints' answers, in the manner of the reproductions'."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from library.drawing import blank, open_frame
from serving.console_page import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


WIDE = 30  # ratio of largest to smallest from which an axis is logarithmic


def eigenvalues_figure(values: Sequence[float]) -> "Figure":
    """Bars of eigenvalues, falling; logarithmic, because they span orders of magnitude."""
    drawn, axis = _panel()
    axis.bar(range(1, len(values) + 1), values, color=BLUE, width=0.7)
    if 0 < min(values) < max(values) / WIDE:
        axis.set_yscale("log")
    axis.set(xlabel="rank", ylabel="eigenvalue")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return drawn


def energy_figure(kind: str, points: Sequence[float], curve: Mapping[str, Sequence[float]]) -> "Figure":
    """The accumulated energy of one kind of atom beside that of training normals."""
    drawn, axis = _panel()
    axis.fill_between(points, curve["normal_low"], curve["normal_high"], color=GREY, alpha=0.25, lw=0)
    axis.plot(points, curve["normal_mean"], color=GREY, lw=1.4, label="normal ones, 5 to 95 %")
    axis.plot(points, curve["graph"], color=ORANGE, lw=1.8, label="this molecule")
    axis.set(xlim=(0, 2), ylim=(-0.03, 1.03), xlabel="eigenvalue of the Laplacian")
    axis.set_ylabel(f"share of energy, {kind} atoms")
    _legend(axis)
    return drawn


def encodings_figure(rows: Sequence[Sequence[float]], symbols: Sequence[str]) -> "Figure":
    """A heat map of the atoms' encodings, a row for each atom."""
    drawn, axis = _panel()
    values = np.asarray(rows, dtype=np.float64)
    most = float(np.abs(values).max()) or 1.0
    picture = axis.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    if len(symbols) <= 40:
        axis.set_yticks(range(len(symbols)), symbols, fontsize=7)
    axis.set(xlabel="coordinate of the encoding", ylabel="atom")
    axis.grid(visible=False)
    drawn.colorbar(picture, ax=axis, shrink=0.9)
    return drawn


def bands_figure(modality: str, intensities: Sequence[float]) -> "Figure":
    """A UV-Vis, IR or Raman spectrum on the grid of its modality."""
    from library.diffspectra.lines import UNITS, grid

    drawn, axis = _panel()
    places = grid(modality).numpy()
    axis.plot(places, intensities, color=BLUE, lw=1.2)
    axis.set(xlim=places[[-1, 0] if modality == "ir" else [0, -1]], ylim=(0, None))
    axis.set(xlabel=UNITS[modality].replace("cm-1", "cm⁻¹"), ylabel="intensity", yticks=[])
    return drawn


def spectrum_figure(eigenvalues: Sequence[float]) -> "Figure":
    """Eigenvalues of a graph's Laplacian as stems."""
    drawn, axis = _panel()
    axis.vlines(range(1, len(eigenvalues) + 1), 0, eigenvalues, color=BLUE, lw=1.5)
    axis.plot(range(1, len(eigenvalues) + 1), eigenvalues, "o", color=BLUE, ms=4)
    axis.set(xlabel="rank", ylabel="eigenvalue of the Laplacian")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return drawn


def tail_figure(edges: Sequence[float], counts: Sequence[int], alpha: float, mp_alpha: float) -> "Figure":
    """Eigenvalues in bins of their logarithm, and the power law of exponent `alpha` above their median.

    Of n eigenvalues above the threshold m, a bin from a to b should hold n ((a/m)^(1 - alpha) - (b/m)^(1 - alpha)).
    """
    drawn, axis = _panel(4.8, 3.2)
    ends, found = 10.0 ** np.asarray(edges), np.asarray(counts, dtype=np.float64)
    axis.stairs(found, ends, fill=True, color=BLUE, alpha=0.35, label="eigenvalues")
    start = median_of_bins(edges, counts)
    above = np.concatenate([[start], ends[ends > start]])
    tail = found.sum() / 2
    width = np.log10(ends[1] / ends[0])
    for exponent, colour, style, name in ((alpha, ORANGE, "-", "fitted"), (mp_alpha, GREY, "--", "untrained")):
        beyond = (above / start) ** (1 - exponent)
        expected = tail * (beyond[:-1] - beyond[1:]) * width / np.log10(above[1:] / above[:-1])
        middle = np.sqrt(above[1:] * above[:-1])
        axis.plot(middle, expected, style, color=colour, lw=1.8, label=f"{name}: alpha {exponent:.2f}")
    axis.set(xscale="log", yscale="log", ylim=(0.6, 2 * max(found.max(), 1)))
    axis.set(xlabel="eigenvalue", ylabel="eigenvalues in a bin")
    _legend(axis)
    return drawn


def median_of_bins(edges: Sequence[float], counts: Sequence[int]) -> float:
    """The median of what a histogram of log10 values counts, even within its bin.

    >>> median_of_bins([0, 1, 2], [1, 1])
    10.0
    """
    gathered = np.concatenate([[0.0], np.cumsum(counts)])
    return float(10 ** np.interp(gathered[-1] / 2, gathered, edges))


def bits_figure(layers: Sequence[str], bits: Sequence[int]) -> "Figure":
    """The bits of every layer's weights, first layer on top."""
    drawn, axis = _panel(4.4, max(2.2, 0.24 * len(layers) + 0.7))
    bars = axis.barh(range(len(layers)), bits, color=BLUE, height=0.7)
    axis.bar_label(bars, padding=3, fontsize=8)
    axis.set_yticks(range(len(layers)), [_short(name) for name in layers], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="bits", xlim=(0, max(bits) * 1.12))
    return drawn


def classes_figure(probabilities: Mapping[str, float]) -> "Figure":
    """The probability of each class, likeliest on top; at most ten."""
    drawn, axis = _panel(4.4, 3.0)
    best = sorted(probabilities.items(), key=lambda item: -item[1])[:10]
    colours = [ORANGE] + [BLUE] * (len(best) - 1)
    axis.barh(range(len(best)), [value for _, value in best], color=colours, height=0.7)
    axis.set_yticks(range(len(best)), [_short(name) for name, _ in best], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(0, 1))
    return drawn


def frontier_figure(
    points: Sequence[tuple[float, float]], cost: float, omega: float, limit: float, unit: str
) -> "Figure":
    """Costs and sensitivities that no other setting beats, and the chosen one."""
    drawn, axis = _panel(4.4, 3.0)
    costs, omegas = zip(*points, strict=True)
    axis.step(costs, omegas, where="post", color=BLUE, lw=1.5, label="frontier")
    axis.plot(cost, omega, "o", color=ORANGE, ms=7, label="chosen")
    axis.axvline(limit, color="black", lw=0.8, ls=":", label="budget")
    if min(omegas) > 0:
        axis.set_yscale("log")
    axis.set(xlabel=f"cost, {unit}", ylabel="sensitivity Omega")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 5), useMathText=True)
    _legend(axis)
    return drawn


def weather_figure(times: Sequence[datetime], columns: Mapping[str, Sequence[float]], seen: int) -> "Figure":
    """Temperature, humidity and rain; what lies behind the first `seen` rows is the forecast."""
    drawn, axis = _panel(4.8, 3.0)
    axis.plot(times, columns["temperature"], color=ORANGE, lw=1.6, label="temperature, °C")
    axis.plot(times, columns["rain"], color=BLUE, lw=1.2, label="rain, mm/h")
    axis.set_ylabel("°C, mm/h")
    other = axis.twinx()
    other.plot(times, columns["humidity"], color=GREEN, lw=1.2, label="humidity, %")
    other.set(ylim=(0, 105), ylabel="%")
    other.spines[["top"]].set_visible(False)
    other.grid(visible=False)
    _split(axis, times[seen - 1])
    lines = [*axis.get_lines()[:2], *other.get_lines()]
    _legend(axis, lines)
    return drawn


def forecast_figure(
    before: Sequence[datetime], seen: Mapping[str, Any] | None, after: Sequence[datetime], ahead: Mapping[str, Any]
) -> "Figure":
    """A quantity up to now, when it is known, and to come, each with its interval."""
    drawn, axis = _panel(4.8, 3.0)
    for times, curve, colour, name in ((before, seen, GREY, "so far"), (after, ahead, ORANGE, "forecast")):
        if curve is not None:
            axis.fill_between(times, curve["lower"], curve["upper"], color=colour, alpha=0.2, lw=0)
            axis.plot(times, curve["mean"], color=colour, lw=1.8, label=name)
    axis.set_ylabel(f"{ahead['name']}, {ahead['unit']}".rstrip(", "))
    low, high = min(ahead["lower"]), max(ahead["upper"])
    if 0 < low < high / WIDE:
        axis.set_yscale("log")
    _split(axis, before[-1])
    _legend(axis)
    return drawn


def _split(axis: "Axes", now: datetime) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    axis.axvline(now, color="black", lw=0.8, ls=":")
    locator = AutoDateLocator(minticks=3, maxticks=6)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _legend(axis: "Axes", lines: "Sequence[Line2D] | None" = None) -> None:
    """Above the axes, where it hides nothing."""
    options = {"frameon": False, "fontsize": 8, "ncols": 3, "handlelength": 1.4, "columnspacing": 1.2}
    given = {} if lines is None else {"handles": list(lines)}
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.1, **given, **options)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-22:]}"


def _panel(width: float = 4.4, height: float = 2.9) -> "tuple[Figure, Axes]":

    drawn = blank(width, height)
    axis = drawn.subplots()
    open_frame(axis)
    axis.set_axisbelow(True)
    axis.grid(color="#e6e6e6", lw=0.8)
    axis.tick_params(labelsize=8)
    return drawn, axis
