"""The figures of `prism reproduce qrc`."""

from typing import TYPE_CHECKING

from jobs.qrc_claims import (
    CONTROL,
    GREEDY,
    HYBRID,
    MEMORYLESS,
    SIMPLE,
    STACKED,
    TRIPLES,
    equal_network,
    hybrid_network,
)
from library.drawing import blank, open_frame
from library.qrc.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS = {"quantum": "#0072B2", "ESN": "#8a8a8a", "hybrid": "#D55E00", "other": "#c8c8c8"}


def overview(nowcast: "pd.DataFrame", study: Study) -> "Figure":
    """The picture of the method: an onion's eigenvalues, and the errors of the models that are compared."""
    import torch

    from library.qrc.channel import channel_spectrum
    from library.qrc.figures import draw_disk
    from library.qrc.reservoir import QuantumReservoir

    drawn = blank(10.0, 4.2)
    disk, errors = drawn.subplots(1, 2, width_ratios=[1, 1.5])
    still = {"qubits": study.qubits, "pairs": "line", "scale": 0.2, "bias": -0.1}
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    draw_disk(disk, [channel_spectrum(QuantumReservoir(sigma=sigma, **still), half) for sigma in (0.1, 0.3, 1.0)])
    disk.set_title("Memory modes at sigma 0.1 (blue), 0.3 (orange), 1 (green)", loc="left", fontsize=10)
    keep = [MEMORYLESS, SIMPLE, CONTROL, TRIPLES, GREEDY, equal_network(study), hybrid_network(study), STACKED, HYBRID]
    _models(errors, nowcast[nowcast["model"].isin(keep)])
    errors.set_title("Nowcast of simulated corrosion, a point per seed", loc="left", fontsize=10)
    return drawn


def spectra_figure(qubits: int, seeds: "Sequence[int]") -> "Figure":
    """How the knobs move eigenvalues and time scales: the circuits of the table that stands beside it."""
    from library.qrc.figures import knobs_figure
    from library.qrc.reservoir import QuantumReservoir

    return knobs_figure(QuantumReservoir(qubits=qubits, pairs="line"), seeds=seeds)


def models_figure(table: "pd.DataFrame", *, median: bool = False) -> "Figure":
    """Test error of each model, a point per seed and a line at their mean, or median."""
    drawn = blank(8.4, 0.32 * table["model"].nunique() + 0.9)
    _models(drawn.subplots(), table, median=median)
    return drawn


def scales_figure(table: "pd.DataFrame") -> "Figure":
    """The same for each task, on a logarithmic axis where errors differ by more than ten times."""
    from matplotlib.ticker import NullFormatter

    drawn = blank(11.0, 0.32 * table["model"].nunique() + 1.1)
    tasks = table["task"].unique()
    for axis, task in zip(drawn.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        _models(axis, table[table["task"] == task])
        errors = table[table["task"] == task]["nrmse"]
        if errors.max() > 10 * errors.min():
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(task, loc="left", fontsize=9)
    return drawn


def shots_figure(table: "pd.DataFrame") -> "Figure":
    """Error over shots, a line per input scale, with and without the inputs shown to the read-out."""
    drawn = blank(7.2, 3.8)
    axis = drawn.subplots()
    part = table[table["model"] != MEMORYLESS]
    counts = sorted(part["shots"].dropna().unique())
    places = [*range(len(counts)), len(counts)]
    for colour, scale in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), sorted(part["scale"].unique()), strict=False
    ):
        for inputs, style in ((False, ":"), (True, "-")):
            own = part[(part["scale"] == scale) & (part["inputs"] == inputs)]
            means = [own[own["shots"] == count]["nrmse"].mean() for count in counts]
            means.append(own[own["shots"].isna()]["nrmse"].mean())
            label = f"a = {scale:g}{', inputs shown' if inputs else ''}"
            axis.plot(places, means, ls=style, marker="o", ms=4, color=colour, label=label)
    linear = table[table["model"] == MEMORYLESS]["nrmse"].mean()
    axis.axhline(linear, color="0.5", lw=0.9)
    axis.text(len(counts), linear, "linear, no memory", ha="right", va="bottom", fontsize=8)
    axis.set_xticks(places, [*(f"{count:.0f}" for count in counts), "exact"])
    axis.set(xlabel="shots per step and reservoir", ylabel="test NRMSE")
    open_frame(axis)
    axis.legend(frameon=False, fontsize=8)
    return drawn


def _models(axis: "Axes", table: "pd.DataFrame", *, median: bool = False) -> None:
    models = list(dict.fromkeys(table["model"]))
    for place, model in enumerate(reversed(models)):
        values = table[table["model"] == model]["nrmse"]
        colour = LAYERS[_sort(model)]
        axis.plot(values, [place] * len(values), "o", ms=4, color=colour, alpha=0.7)
        axis.vlines(values.median() if median else values.mean(), place - 0.3, place + 0.3, color=colour, lw=2)
    axis.set_yticks(range(len(models)), [model.partition(": greedy")[0] for model in reversed(models)], fontsize=8)
    axis.set_xlabel("test NRMSE")
    axis.grid(axis="x", color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    open_frame(axis)


def _sort(model: str) -> str:
    if model.startswith(("hybrid", "ESN")):
        return model.split()[0].strip(",")
    if model.startswith("onion ESN"):
        return "ESN"
    return "other" if model.startswith(("linear", "persistence")) else "quantum"
