"""The figures of DiffSpectra's reproduction say what they show."""

import pandas as pd
import pytest

from jobs.diffspectra_figures import closed_set_figure
from library.diffspectra.closed_set import OTHER, OWN


def test_shares_stand_at_their_places_on_the_axis():
    rows = [{"asked": way, "formula": 0.19, "constitution": 0.04, "found": 0.11} for way in (OWN, OTHER)]
    axis = closed_set_figure(pd.DataFrame(rows)).axes[0]
    axis.figure.canvas.draw()
    for tick in axis.get_yticklabels():
        assert float(tick.get_text().rstrip("%")) == pytest.approx(100 * tick.get_position()[1])
