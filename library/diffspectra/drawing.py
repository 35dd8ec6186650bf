"""A spectrum with its candidates: what was measured above, the structures below, best first."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from library.diffspectra.lines import MODALITIES, UNITS, grid
from library.diffspectra.ranking import Candidate
from library.drawing import blank, open_frame
from library.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"uv": "UV-Vis", "ir": "IR", "raman": "Raman"}
COLOURS = {"uv": "#6a4c93", "ir": "#c1440e", "raman": "#1a7f72"}
MOST_DRAWN = 6
PIXELS = 360  # of a structure's side


def candidates_figure(
    spectra: Mapping[str, Tensor], candidates: Sequence[Candidate], *, truth: str | None = None, title: str = ""
) -> "Figure":
    """Spectra as the network reads them, log10(1 + I), each (points,), and the first six candidates with their scores.

    The candidate that is the `truth`, a SMILES as candidates have it, is framed. Raises InputError for no spectra.
    """

    shown = [modality for modality in MODALITIES if modality in spectra]
    if not shown:
        raise InputError(f"there are no spectra to draw; there may be {', '.join(MODALITIES)}")
    drawn = list(candidates[:MOST_DRAWN])
    figure = blank(9, 5 if drawn else 2.8)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1)) if drawn else (figure, None)
    if title:
        figure.suptitle(title)
    for axes, modality in zip(np.atleast_1d(above.subplots(1, len(shown))), shown, strict=True):
        places = grid(modality).numpy()
        axes.plot(places, spectra[modality].cpu().numpy(), color=COLOURS[modality], linewidth=0.9)
        axes.set(title=TITLES[modality], xlabel=UNITS[modality].replace("cm-1", "cm⁻¹"), ylim=(0, None))
        axes.set_xlim(*places[[-1, 0] if modality == "ir" else [0, -1]])
        open_frame(axes)
    above.supylabel("log₁₀(1 + I)", fontsize="medium")
    if below is not None:
        for axes, candidate in zip(np.atleast_1d(below.subplots(1, max(3, len(drawn)))), drawn, strict=False):
            axes.imshow(_picture(candidate.smiles))
            axes.set_title(f"{candidate.smiles}\n{candidate.score:.0%} of samples", fontsize="small")
            right = candidate.smiles == truth
            for spine in axes.spines.values():
                spine.set(visible=right, color="#2a9d3a", linewidth=2)
        for axes in below.axes:
            axes.set(xticks=[], yticks=[])
            if not axes.images:
                axes.set_axis_off()
    return figure


def png(figure: "Figure", *, dots_per_inch: int = 110) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dots_per_inch)
    return content.getvalue()


def _picture(smiles: str) -> np.ndarray:
    """The structure of a SMILES, (PIXELS, PIXELS, 3)."""
    from PIL import Image
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    canvas = rdMolDraw2D.MolDraw2DCairo(PIXELS, PIXELS)
    canvas.drawOptions().fixedBondLength = 55
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, Chem.MolFromSmiles(smiles))
    canvas.FinishDrawing()
    return np.asarray(Image.open(io.BytesIO(canvas.GetDrawingText())).convert("RGB"))
