"""The figures of HAWQ-V2's reproduction, each drawn from the table of its claim."""

from typing import TYPE_CHECKING

import numpy as np

from library.drawing import blank, open_frame
from library.hawq.study import FIRST, INVERSE, METHOD, PLAIN, RANDOM, UNIFORM, Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # Okabe and Ito's, told apart by people who see colours differently
    METHOD: "#D55E00",
    FIRST: "#0072B2",
    PLAIN: "#009E73",
    UNIFORM: "#56B4E9",
    INVERSE: "#E69F00",
    RANDOM: "#8a8a8a",
}


def overview(ranks: "pd.DataFrame", settings: "pd.DataFrame", study: Study) -> "Figure":
    """How well each metric ranks settings of one size, and the loss of what each chooses; a point per seed."""
    drawn = blank(9.6, 3.9)
    left, right = drawn.subplots(1, 2)
    mean = study.mean_bits[0]
    own = ranks[ranks["mean_bits"] == mean]
    _points(left, {name: own[own["metric"] == name]["spearman"] for name in (METHOD, FIRST, PLAIN, INVERSE)})
    left.set_xlabel("Spearman's correlation with the true loss")
    left.set_title(f"Ranking settings of {mean:g} bits per weight", loc="left", fontsize=11)
    own = settings[settings["mean_bits"] == mean]
    present = [name for name in (METHOD, FIRST, UNIFORM, RANDOM, INVERSE) if (own["choice"] == name).any()]
    _points(right, {name: own[own["choice"] == name]["loss"] for name in present})
    right.set_xscale("log")
    low, high = right.get_xlim()
    ticks = [tick for tick in (0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8) if low <= tick <= high]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.set_xlabel("test loss before fine-tuning")
    right.set_title("What each chooses", loc="left", fontsize=11)
    return drawn


def validity(checks: "pd.DataFrame") -> "Figure":
    """The true change of the loss against Omega / 2; between the dotted lines they agree within a factor of 4."""
    drawn = blank(5.6, 4.2)
    axis = drawn.subplots()
    for choice, rows in checks.groupby("choice"):
        axis.scatter(rows["predicted"], rows["true"].abs(), color=COLOURS[choice], label=choice, s=26)
    ends = np.array([checks["predicted"].min() / 2, checks["predicted"].max() * 2])
    for factor, style in ((1, "-"), (0.25, ":"), (4, ":")):
        axis.plot(ends, factor * ends, color="black", lw=0.8, ls=style)
    axis.set(xscale="log", yscale="log", xlabel="Omega / 2", ylabel="true change of the loss")
    axis.legend(frameon=False, fontsize=9)
    _tidy(axis)
    return drawn


def _points(axis: "Axes", groups: "dict[str, pd.Series]") -> None:
    for place, (name, values) in enumerate(groups.items()):
        offsets = place + (np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(len(values)))
        axis.scatter(values, offsets, color=COLOURS[name], s=24)
        axis.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=COLOURS[name], lw=2)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    _tidy(axis)


def _tidy(axis: "Axes") -> None:
    open_frame(axis)
    axis.set_axisbelow(True)
    axis.grid(axis="x" if axis.get_xscale() == "linear" else "both", color="#e6e6e6", lw=0.8)
