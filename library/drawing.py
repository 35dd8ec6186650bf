"""What all pictures have in common: no window is opened, and frames are open above and to the right."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> "Figure":
    """A figure of that many inches, apart from pyplot and its global state.

    >>> blank(6, 4).get_size_inches().tolist()
    [6.0, 4.0]
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def open_frame(axis: "Axes") -> None:
    """Take away the upper and the right line of an axis."""
    axis.spines[["top", "right"]].set_visible(False)
