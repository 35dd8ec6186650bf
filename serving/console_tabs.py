"""Which tabs there are: one for each thing that a person can bring, and the endpoints that look at it."""

from collections.abc import Callable
from typing import NamedTuple

from serving.console_calls import Endpoints
from serving.console_images import images_tab
from serving.console_language import language_tab
from serving.console_molecules import molecules_tab
from serving.console_spectra import spectra_tab
from serving.console_weather import weather_tab
from serving.console_weights import weights_tab


class Tab(NamedTuple):
    """A tab: its title, the endpoints that it asks, and what lays it out. It is there when one of them is deployed."""

    title: str
    endpoints: tuple[str, ...]
    lay_out: Callable[[Endpoints], None]


TABS = (
    Tab("Language", ("hallucination", "score"), language_tab),
    Tab("Molecules", ("graph-anomaly", "graph-property", "graph-encoding"), molecules_tab),
    Tab("Spectra", ("molecule",), spectra_tab),
    Tab("Weights", ("spectrum",), weights_tab),
    Tab("Images", ("classify", "advise"), images_tab),
    Tab("Corrosion", ("corrosion",), weather_tab),
)
