"""A run's curves as a table and as a figure."""

from typing import TYPE_CHECKING

from library.drawing import blank, open_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]


def table(curves: Curves) -> "pd.DataFrame":
    """One row per step, one column per metric; empty where a metric was not taken."""
    import pandas as pd

    frame = pd.DataFrame({name: pd.Series(dict(points)) for name, points in curves.items()})
    return frame.rename_axis("step").reset_index()


def figure(curves: Curves, *, title: str) -> "Figure":
    """The loss and its validation in one panel, every further metric in its own."""

    apart = [name for name in curves if name not in ("loss", "validation_loss", "epoch", "ees_standard_error")]
    panels = ["loss", *apart]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = blank(4.2 * columns, 2.8 * rows)
    axes = drawn.subplots(rows, columns, squeeze=False).flat
    for axis, name in zip(axes, panels, strict=False):
        for part in ("loss", "validation_loss") if name == "loss" else (name,):
            points = curves.get(part, [])
            few = len(points) < 30
            axis.plot(
                *zip(*points, strict=True), marker="o" if few else None, ms=3, lw=1.2, label=part
            ) if points else None
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        open_frame(axis)
        if name == "loss" and "validation_loss" in curves:
            axis.legend(["training", "validation"], fontsize=8, frameon=False)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    drawn.suptitle(title, fontsize=10)
    return drawn
