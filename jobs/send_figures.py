"""The figures of SeND's reproduction, each drawn from the table of its claim."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.send_claims import AUROCS
from library.drawing import blank, open_frame
from library.send.study import ARMS, RANDOM, RESAMPLED, SENSITIVE
from library.send.timing import EES, EXACT, OFFICIAL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # Okabe and Ito's, told apart by people who see colours differently
    SENSITIVE: "#D55E00",
    RANDOM: "#8a8a8a",
    "largest mean square": "#E69F00",
    "largest variance over texts": "#56B4E9",
    "largest variance over answers": "#009E73",
    "plain": "#0072B2",
    "SeND": "#D55E00",
    "random dropout": "#8a8a8a",
    OFFICIAL: "#8a8a8a",
    EXACT: "#0072B2",
    EES: "#D55E00",
}


def overview(effects: "pd.DataFrame", times: "pd.DataFrame") -> "Figure":
    """The picture of the method: how much more than chance each choice lowers EigenScore, and what the score costs."""
    drawn = blank(9.6, 3.7)
    left, right = drawn.subplots(1, 2)
    mean = effects.groupby(["choice", "fraction"])[["change", "deviation"]].mean()
    chance = mean.loc[RANDOM]
    percent, spread = 100 * chance.index.to_numpy(), 2 * (chance["deviation"] / chance["change"]).abs()
    left.fill_between(
        percent, 1 - spread, 1 + spread, color=COLOURS[RANDOM], alpha=0.3, lw=0, label="random, ±2 deviations"
    )
    for choice in ("largest variance over answers", "largest mean square", SENSITIVE):
        ratio = mean.loc[choice]["change"] / chance["change"]
        left.plot(percent, ratio, color=COLOURS[choice], marker="o", ms=4, lw=1.8, label=choice)
    left.axhline(1, color=COLOURS[RANDOM], lw=1.2)
    left.set_ylim(top=left.get_ylim()[1] + 0.25)
    left.set_xlabel("coordinates dropped (%)")
    left.set_ylabel("times a random set's effect")
    left.set_title("Fall of EigenScore when coordinates are dropped", loc="left")
    left.legend(frameon=False, loc="upper right", fontsize=9)
    _times(right, times, along="K", title="Time of one score")
    return drawn


def effects_figure(effects: "pd.DataFrame") -> "Figure":
    """Claim A: a bar per choice and fraction; the random one with the deviation between its sets."""
    drawn = blank(9.6, 3.9)
    axis = drawn.subplots()
    fixed = effects[~effects["choice"].str.endswith(RESAMPLED)]
    fractions = sorted(fixed["fraction"].unique())
    choices = [name for name in COLOURS if name in set(fixed["choice"])]
    width = 0.8 / len(choices)
    for i, choice in enumerate(choices):
        rows = fixed[fixed["choice"] == choice].groupby("fraction")
        change = rows["change"].mean()
        spread = rows["deviation"].mean() if choice == RANDOM else rows["change"].std().fillna(0)
        place = np.arange(len(fractions)) + (i - (len(choices) - 1) / 2) * width
        axis.bar(place, change, 0.92 * width, color=COLOURS[choice], label=choice)
        axis.errorbar(place, change, 2 * spread, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
    axis.set_xticks(range(len(fractions)), [f"{100 * fraction:g} %" for fraction in fractions])
    axis.set_xlabel("coordinates dropped")
    axis.set_ylabel("change of EigenScore")
    axis.legend(frameon=False, loc="lower left")
    axis.set_title("bars: ±2 deviations, between the sets for random, between seeds for the others", loc="left")
    return drawn


def training_figure(epochs: "pd.DataFrame", window: int) -> "Figure":
    """Claim B: curves over epochs, mean over seeds, with the seeds' range; nothing is dropped in the first window."""
    drawn = blank(9.6, 5.6)
    panels = {
        "eigenscore": "EigenScore, mask removed",
        "eigenscore_masked": "EigenScore under the mask (artefact)",
        "loss": "held-out loss, mask removed (nats)",
        "entropy": "next-token entropy, mask removed (nats)",
    }
    for axis, (name, title) in zip(drawn.subplots(2, 2).flat, panels.items(), strict=True):
        for arm in ARMS:
            label = "random dropout" if arm == "random" else arm
            values = epochs[epochs["arm"] == arm].groupby("epoch")[name]
            mean = values.mean()
            axis.fill_between(mean.index, values.min(), values.max(), color=COLOURS[label], alpha=0.15, lw=0)
            axis.plot(mean.index, mean, color=COLOURS[label], marker="o", ms=3, lw=1.6, label=label)
        axis.axvline(window + 0.5, color="black", lw=0.8, ls=":")
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch (right of the dots: a mask in force)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    drawn.axes[2].legend(frameon=False, loc="lower left")
    return drawn


def times_figure(times: "pd.DataFrame") -> "Figure":
    """Claim C: seconds of each form against the width d and against the number of answers K."""
    drawn = blank(9.6, 3.7)
    left, right = drawn.subplots(1, 2, sharey=True)
    _times(left, times, along="d", title="")
    _times(right, times, along="K", title="")
    right.get_legend().remove()
    return drawn


def areas_figure(areas: "pd.DataFrame") -> "Figure":
    """Claim D: the area under the ROC curve of each score and seed, with two standard errors."""
    drawn = blank(9.6, 2.8)
    axis = drawn.subplots()
    scores = list(areas["score"].unique())
    for place, score in enumerate(scores):
        rows = areas[areas["score"] == score]
        offsets = place + np.linspace(-0.15, 0.15, len(rows)) if len(rows) > 1 else [place]
        axis.errorbar(
            rows["auroc"], offsets, xerr=2 * rows["standard_error"], fmt="o", color="#0072B2", ms=5, capsize=3
        )
    axis.axvline(0.5, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(scores)), [AUROCS[score] for score in scores])
    axis.set_ylim(len(scores) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel("AUROC for a hallucinated continuation, ±2 standard errors; a point per seed")
    return drawn


def _times(axis: "Axes", times: "pd.DataFrame", *, along: str, title: str) -> None:
    """One sweep of the table: all sizes that share the other dimension with the most rows."""
    other = "d" if along == "K" else "K"
    fixed = times[other].mode()[0]
    rows = times[times[other] == fixed].sort_values(along)
    for name in (OFFICIAL, EXACT, EES):
        axis.plot(rows[along], rows[name], color=COLOURS[name], marker="o", ms=4, lw=1.8, label=name)
    axis.set(xscale="log", yscale="log", ylabel="seconds, one thread")
    axis.set_xticks(rows[along], map(str, rows[along]))
    axis.minorticks_off()
    axis.set_xlabel({"K": f"answers K (width d = {fixed})", "d": f"width d (answers K = {fixed})"}[along])
    axis.set_title(title, loc="left")
    axis.legend(frameon=False)


def tidy(figures: "Sequence[Figure]") -> None:
    """One look for all: no box, a light grid along the values, letters that a README's width leaves readable."""
    for drawn in figures:
        for axis in drawn.axes:
            open_frame(axis)
            axis.set_axisbelow(True)
            axis.grid(axis="y", color="#e6e6e6", lw=0.8)
            axis.title.set_fontsize(11)
