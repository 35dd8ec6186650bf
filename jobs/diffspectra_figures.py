"""The figures of DiffSpectra's reproduction: what spectra tell, learning curves, and a spectrum with its candidates."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.diffspectra.closed_set import OTHER, OWN
from library.diffspectra.study import ARMS, SPECTRA
from library.drawing import blank, open_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(ARMS, ("#6a4c93", "#c1440e", "#1a7f72", "#222222", "#8a8a8a", "#E69F00"), strict=True))
LOSSES = {"position": "positions", "atom": "elements, charges", "bond": "bonds", "count": "number of atoms"}
SMOOTHED = 20  # steps of training that a curve averages over


def overview(bars: "pd.DataFrame", arms: "pd.DataFrame") -> "Figure":
    """The picture of the method: what spectra tell, and the losses of networks that differ in one thing."""
    drawn = blank(10, 3.8)
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.5))
    _bars(left, bars)
    _losses(right, arms)
    return drawn


def spectra_figure(bars: "pd.DataFrame") -> "Figure":
    """What kernel ridge regression reads off some or all of the spectra."""
    drawn = blank(6.4, 3.8)
    _bars(drawn.subplots(), bars)
    return drawn


def losses_figure(arms: "pd.DataFrame") -> "Figure":
    """Losses on held-out molecules, each in units of the mean of `all`, a point per seed."""
    drawn = blank(7.6, 4)
    _losses(drawn.subplots(), arms)
    return drawn


def curves_figure(curves: "pd.DataFrame") -> "Figure":
    """The loss in training by step, a mean over the last steps and over seeds."""
    drawn = blank(7.6, 4)
    axis = drawn.subplots()
    for arm in ARMS:
        own = curves[curves["arm"] == arm].groupby("step")["loss"].mean()
        smoothed = own.rolling(SMOOTHED, min_periods=1).mean()
        axis.plot(smoothed.index, smoothed, color=COLOURS[arm], label=arm, lw=1.2)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(f"training loss, mean of {SMOOTHED} steps")
    axis.legend(frameon=False, fontsize=8)
    open_frame(axis)
    return drawn


def answers_figure(right: Mapping[str, float]) -> "Figure":
    """Accuracies that right answers and their mirror images get."""
    drawn = blank(6.4, 2.8)
    axis = drawn.subplots()
    names = {
        "paper_smiles": "released, SMILES",
        "paper_inchikey": "released, InChIKey",
        "constitution": "constitution",
        "stereo": "and stereo up to one mirror",
    }
    for place, (name, label) in enumerate(names.items()):
        axis.barh(place, right[name], color="#8a8a8a" if name.startswith("paper") else "#1a7f72", height=0.6)
        axis.text(right[name] + 0.01, place, f"{right[name]:.1%}", va="center", fontsize=9)
        axis.text(0.01, place, label, va="center", fontsize=9, color="white")
    axis.set(xlim=(0, 1.1), yticks=[], xlabel="accuracy of right answers and their mirror images")
    axis.invert_yaxis()
    open_frame(axis)
    return drawn


def closed_set_figure(answers: "pd.DataFrame") -> "Figure":
    """Shares of samples and molecules that are right, by the own and by another's spectra, a point per seed."""
    from matplotlib.ticker import PercentFormatter

    drawn = blank(6.4, 3.2)
    axis = drawn.subplots()
    names = {"formula": "formula right,\nof samples", "constitution": "constitution right,\nof samples"}
    names |= {"found": "found,\nof molecules"}
    for shift, way, colour in ((-0.15, OWN, "#1a7f72"), (0.15, OTHER, "#8a8a8a")):
        own = answers[answers["asked"] == way]
        for place, name in enumerate(names):
            label = None if place else f"asked by {way.replace('own', 'their own')}"
            axis.bar(place + shift, own[name].mean(), width=0.28, color=colour, label=label)
            axis.plot([place + shift] * len(own), own[name], "o", ms=3.5, color="#222222")
    axis.set_xticks(range(len(names)), names.values())
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(frameon=False)
    open_frame(axis)
    return drawn


def shown_figure(shown: Mapping[str, Any]) -> "Figure":
    """A spectrum and the candidates that were found for it."""
    import torch

    from library.diffspectra.data import load_molecules
    from library.diffspectra.drawing import candidates_figure
    from library.diffspectra.ranking import Candidate

    structure = load_molecules().atoms.structure(shown["number"])
    candidates = [Candidate(smiles, count, score, None, structure, ()) for smiles, count, score in shown["candidates"]]
    spectra = {name: torch.tensor(values) for name, values in shown["spectra"].items()}
    title = f"simulated spectra of {shown['truth']}, which was not trained on"
    return candidates_figure(spectra, candidates, truth=shown["truth"], title=title)


def _bars(axis: "Axes", bars: "pd.DataFrame") -> None:
    names = {"auc": "functional groups,\narea", "composition": "composition\nright", "atoms": "number of atoms\nright"}
    for place, spectra in enumerate(SPECTRA):
        own = bars[bars["spectra"] == spectra].iloc[0]
        x = [group + (place - 1.5) * 0.2 for group in range(len(names))]
        axis.bar(x, [own[name] for name in names], width=0.19, color=COLOURS[spectra], label=spectra)
    axis.set_xticks(range(len(names)), names.values(), fontsize=8)
    axis.set(ylim=(0, 1), ylabel="of test molecules, kernel ridge")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    open_frame(axis)


def _losses(axis: "Axes", arms: "pd.DataFrame") -> None:
    step = 0.8 / len(ARMS)
    for group, name in enumerate(LOSSES):
        unit = arms[arms["arm"] == "all"][name].mean()
        for place, arm in enumerate(ARMS):
            values, x = arms[arms["arm"] == arm][name] / unit, group + (place - (len(ARMS) - 1) / 2) * step
            axis.plot([x] * len(values), values, "o", ms=4, color=COLOURS[arm], label=None if group else arm)
            axis.hlines(values.mean(), x - step / 2.5, x + step / 2.5, color=COLOURS[arm], lw=2)
    axis.axhline(1, color="#cccccc", lw=0.8, zorder=0)
    axis.set_xticks(range(len(LOSSES)), LOSSES.values())
    axis.set(ylabel="held-out loss, that with all spectra is 1")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    open_frame(axis)
