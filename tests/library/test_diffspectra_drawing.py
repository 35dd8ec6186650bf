"""Candidates are drawn under the spectra that they answer."""

import io

import pytest
import torch
from PIL import Image

from library.diffspectra.data import Collate, load_molecules
from library.diffspectra.drawing import MOST_DRAWN, candidates_figure, png
from library.diffspectra.ranking import rank
from library.errors import InputError


def test_the_first_candidates_stand_under_the_spectra_and_the_truth_is_framed() -> None:
    data = load_molecules()
    samples = [data.atoms.structure(i) for i in (700, 700, 700, 705, 711, 720, 731, 745, 760)]
    ranking = rank(samples)
    spectra = {name: x[0] for name, x in Collate()([data.part("test")[0]], torch.zeros(1).long()).spectra.items()}
    figure = candidates_figure(spectra, ranking.candidates, truth=ranking.candidates[0].smiles)
    above, below = figure.subfigs
    assert [axes.get_title() for axes in above.axes] == ["UV-Vis", "IR", "Raman"]
    assert above.axes[1].get_xlim() == (4000, 500)
    drawn = [axes for axes in below.axes if axes.images]
    assert [axes.get_title().splitlines()[0] for axes in drawn] == [c.smiles for c in ranking.candidates[:MOST_DRAWN]]
    assert drawn[0].get_title().endswith("33% of samples")
    assert [axes.spines["top"].get_visible() for axes in drawn] == [True] + [False] * (MOST_DRAWN - 1)
    image = Image.open(io.BytesIO(png(figure)))
    assert image.format == "PNG"
    assert min(image.size) > 300
    alone = candidates_figure({"ir": spectra["ir"]}, [])
    assert len(alone.axes) == 1
    with pytest.raises(InputError, match="no spectra to draw"):
        candidates_figure({}, ranking.candidates)
