"""The figures of SPE's reproduction: changes of encodings over changes of graphs, and errors of counting."""

from typing import TYPE_CHECKING

from library.drawing import blank, open_frame
from library.spe.study import ARMS, CUTS, DOMAIN_ARMS, ENCODERS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "SPE": "#D55E00",
    "SignNet": "#0072B2",
    "BasisNet": "#009E73",
    "eigenvectors": "#8a8a8a",
    "PEG-8": "#8a8a8a",
    "no encoding": "#222222",
    "SPE, phi = 1": "#E69F00",
    "SPE, mean": "#CC79A7",
}
LENGTHS = (3, 4, 5, 6)


def overview(noise: "pd.DataFrame", counts: "pd.DataFrame") -> "Figure":
    """The picture of the method: changes under noise, and errors of counting."""
    drawn = blank(9.6, 3.8)
    left, right = drawn.subplots(1, 2)
    _noise(left, noise)
    _counting(right, counts)
    return drawn


def noise_figure(noise: "pd.DataFrame") -> "Figure":
    """Relative change of the encodings over the distance of the Laplacians, all seeds."""
    drawn = blank(7.2, 4.2)
    _noise(drawn.subplots(), noise)
    return drawn


def deletion_figure(deletion: "pd.DataFrame") -> "Figure":
    """How many molecules change by how much, a curve per encoder."""
    drawn = blank(7.2, 3.8)
    axis = drawn.subplots()
    for name in ENCODERS:
        change = deletion[deletion["encoder"] == name]["change"].sort_values()
        share = [(place + 1) / len(change) for place in range(len(change))]
        axis.plot(change, share, color=COLOURS[name], label=name)
    axis.set_xscale("log")
    axis.set_xlabel("relative change of the encodings when one bond is taken away")
    axis.set_ylabel("share of the molecules")
    axis.legend(frameon=False)
    open_frame(axis)
    return drawn


def counting_figure(counts: "pd.DataFrame") -> "Figure":
    """Normalised test error by length and encoding, a point per seed."""
    drawn = blank(7.6, 4.2)
    _counting(drawn.subplots(), counts)
    return drawn


def domains_figure(domains: "pd.DataFrame") -> "Figure":
    """Test AUROC on known and on other scaffolds and sizes, a line per seed."""
    drawn = blank(7.6, 3.6)
    for axis, cut in zip(drawn.subplots(1, len(CUTS), sharey=True), CUTS, strict=True):
        for place, arm in enumerate(DOMAIN_ARMS):
            own = domains[(domains["cut"] == cut) & (domains["encoding"] == arm)]
            shift = 0.06 * (place - 1.5)
            for row, (inside, outside) in enumerate(zip(own["inside"], own["outside"], strict=True)):
                label = arm if row == 0 else None
                axis.plot([shift, 1 + shift], [inside, outside], "o-", ms=4, lw=0.8, color=COLOURS[arm], label=label)
        axis.set_xticks([0, 1], [f"known {cut}s", f"other {cut}s"])
        axis.set_xlim(-0.35, 1.35)
        open_frame(axis)
    drawn.axes[0].set_ylabel("test AUROC")
    drawn.axes[0].legend(frameon=False, fontsize=8)
    return drawn


def _noise(axis: "Axes", noise: "pd.DataFrame") -> None:
    for name in ENCODERS:
        for place, (_, rows) in enumerate(noise[noise["encoder"] == name].groupby("seed")):
            rows = rows.sort_values("distance")
            label = name if place == 0 else None
            axis.plot(rows["distance"], rows["change"], "o-", ms=3, lw=0.9, color=COLOURS[name], label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("distance of the Laplacians, Frobenius")
    axis.set_ylabel("relative change of the encodings")
    axis.legend(frameon=False, loc="lower right", fontsize=8)
    open_frame(axis)


def _counting(axis: "Axes", counts: "pd.DataFrame") -> None:
    step = 0.8 / len(ARMS)
    for place, arm in enumerate(ARMS):
        own = counts[counts["encoding"] == arm]
        for group, length in enumerate(LENGTHS):
            values, x = own[f"cycles{length}"], group + (place - (len(ARMS) - 1) / 2) * step
            axis.plot([x] * len(values), values, "o", ms=4, color=COLOURS[arm], label=arm if group == 0 else None)
            axis.hlines(values.mean(), x - step / 2.5, x + step / 2.5, color=COLOURS[arm], lw=2)
    axis.set_yscale("log")
    axis.set_xticks(range(len(LENGTHS)), [f"{length}-cycles" for length in LENGTHS])
    axis.set_ylabel("normalised test error")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    open_frame(axis)
