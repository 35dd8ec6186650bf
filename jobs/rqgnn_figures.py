"""The figures of RQGNN's reproduction: areas by network and set, energy curves of both classes."""

from typing import TYPE_CHECKING

from library.drawing import blank, open_frame
from library.rqgnn.study import ARMS, CANDIDATES, REGRESSIONS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"RQGNN": "#D55E00", "control": "#009E73", "same": "#0072B2", "without": "#0072B2", "logistic": "#8a8a8a"}
SETS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a")
CLASSES = ((0, "normal", "#0072B2"), (1, "anomalous", "#D55E00"))


def overview(results: "pd.DataFrame", curves: "pd.DataFrame") -> "Figure":
    """The picture of the method: energy curves of one kind of atom, and what every network reaches on one set."""
    drawn = blank(10.4, 4.0)
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.1))
    kind = curves["kind"].iloc[0]
    _curves(left, curves[curves["kind"] == kind])
    left.set_title(f"energy of the signal of {kind} atoms", loc="left", fontsize=10)
    left.set_xlabel("eigenvalue of the normalised Laplacian")
    left.set_ylabel("accumulated share of energy")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    name = results["set"].iloc[-1]
    _areas(right, results[results["set"] == name])
    right.set_title(f"test AUC on {name}", loc="left", fontsize=10)
    return drawn


def networks_figure(results: "pd.DataFrame") -> "Figure":
    """Test AUC of every network, a panel per set, a point per seed."""
    sets = list(results["set"].unique())
    drawn = blank(11.5, 4.6)
    order = [arm for arm in (*ARMS, *REGRESSIONS) if arm in set(results["arm"])]
    for axis, name in zip(drawn.subplots(1, len(sets), sharey=True, squeeze=False).flat, sets, strict=True):
        _areas(axis, results[results["set"] == name], order)
        axis.set_title(name, loc="left", fontsize=10)
    return drawn


def curves_figure(curves: "pd.DataFrame", name: str) -> "Figure":
    """Mean accumulated energy of both classes with the middle half of the graphs, a panel per kind of atom."""
    kinds = list(dict.fromkeys(curves["kind"]))
    drawn = blank(11.0, 3.2)
    drawn.suptitle(f"{name}, training graphs", x=0.01, ha="left", fontsize=10)
    for axis, kind in zip(drawn.subplots(1, len(kinds), sharey=True, squeeze=False).flat, kinds, strict=True):
        _curves(axis, curves[curves["kind"] == kind])
        axis.set_title(f"{kind} atoms", loc="left", fontsize=10)
    drawn.axes[0].set_ylabel("accumulated share of energy")
    drawn.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    drawn.supxlabel("eigenvalue of the normalised Laplacian", fontsize=10)
    return drawn


def default_figure(results: "pd.DataFrame") -> "Figure":
    """How far the default is above the other candidates on validation graphs: a point per set and seed, the mean and
    two standard errors."""
    drawn = blank(8.0, 2.9)
    axis = drawn.subplots()
    default, *others = CANDIDATES
    table = results.pivot_table("validation_auc", ["set", "seed"], "arm")
    sets = list(dict.fromkeys(results["set"]))
    for place, other in enumerate(others):
        leads = 100 * (table[default] - table[other]).dropna()
        for shift, (name, marker) in enumerate(zip(sets, "osD^v", strict=False)):
            own = leads[leads.index.get_level_values("set") == name]
            height = [place + 0.14 * (shift - (len(sets) - 1) / 2)] * len(own)
            axis.plot(own, height, marker, ms=4, color=SETS[shift], label=name if place == 0 else None)
        error = 2 * leads.std(ddof=1) / len(leads) ** 0.5 if len(leads) > 1 else 0.0
        axis.errorbar(leads.mean(), place, xerr=error, fmt="|", color="0.25", ms=16, lw=1.5, zorder=0)
    axis.axvline(0, color="0.7", lw=1)
    axis.set_yticks(range(len(others)), [f"minus {other}" for other in others], fontsize=8)
    axis.set_ylim(len(others) - 0.5, -0.5)
    axis.set_xlabel("validation AUC of the default minus the other's, points")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    open_frame(axis)
    return drawn


def _curves(axis: "Axes", curves: "pd.DataFrame") -> None:
    for label, name, colour in CLASSES:
        own = curves[curves["label"] == label]
        axis.fill_between(own["point"], own["low"], own["high"], color=colour, alpha=0.15, lw=0)
        axis.plot(own["point"], own["mean"], color=colour, lw=1.5, label=f"{name} ({own['graphs'].iloc[0]} graphs)")
    axis.set_xlim(0, 2)
    open_frame(axis)


def _areas(axis: "Axes", results: "pd.DataFrame", order: "list[str] | None" = None) -> None:
    arms = order or list(dict.fromkeys(results["arm"]))
    for place, arm in enumerate(arms):
        own = results[results["arm"] == arm]["auc"]
        colour = COLOURS.get(arm.replace(":", ",").split(",")[0].split(" ")[0], "0.25")
        if len(own):
            axis.plot(own, [place] * len(own), "o", ms=3.5, color=colour)
            axis.plot([own.mean()] * 2, [place - 0.3, place + 0.3], color=colour, lw=1.8)
    axis.set_yticks(range(len(arms)), arms, fontsize=8)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_xlabel("test AUC")
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    open_frame(axis)
