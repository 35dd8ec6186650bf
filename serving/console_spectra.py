"""The tab of spectra: those of an unknown molecule, and the candidates that the network draws for them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from serving.console_calls import Endpoints
from serving.console_figures import bands_figure
from serving.console_molecules import drawing
from serving.console_page import (
    answering,
    captioned,
    drawn,
    figures,
    introduction,
    number,
    paragraph,
    share,
    tiles,
    waiting,
)

MOLECULES = 12
MOST_ATOMS = 10
SPECTRA = {"UV-Vis": "uv", "IR": "ir", "Raman": "raman"}
TITLES = {name: title for title, name in SPECTRA.items()}
TOLD = {"nothing more": None, "how many atoms it has": "atoms", "its formula": "formula"}


class Unknown(NamedTuple):
    """A molecule of the shipped test set: its spectra on their grids, and what it is."""

    spectra: dict[str, list[float]]
    smiles: str
    formula: str
    atoms: int


def spectra_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    gr.HTML(
        introduction(
            "Which molecule has these spectra?",
            "The spectra are simulated, of molecules that no training has seen. The network draws molecules that fit; "
            "those that it draws most often come first.",
        )
    )
    names = [f"unknown {place + 1}" for place in range(MOLECULES)]
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            which = gr.Dropdown(names, value=names[0], label="Spectra of", elem_id="unknown")
            read = gr.CheckboxGroup(list(SPECTRA), value=list(SPECTRA), label="The network sees", elem_id="modalities")
        with gr.Column(scale=1, min_width=280):
            told = gr.Radio(list(TOLD), value="its formula", label="It is told", elem_id="told")
            samples = gr.Slider(4, 64, 16, step=4, label="Molecules to draw", elem_id="draws")
    button = gr.Button("Find it", variant="primary", elem_id="ask-spectra")
    answer = gr.HTML(waiting("Find it, and the spectra and candidates appear here."), elem_id="spectra")

    @answering
    def found(which: str, read: list[str], told: str, samples: float) -> str:
        unknown = unknowns()[names.index(which)]
        chosen = {SPECTRA[name]: unknown.spectra[SPECTRA[name]] for name in read}
        return _found(endpoints.ask("molecule", request(unknown, chosen, TOLD[told], int(samples))), unknown, chosen)

    button.click(found, [which, read, told, samples], answer, queue=False, api_visibility="private")


@lru_cache(maxsize=1)
def unknowns() -> tuple[Unknown, ...]:
    """Molecules of the shipped test set, small ones, each with its three spectra."""
    import torch

    from library.diffspectra.data import Collate, load_molecules
    from library.diffspectra.formulas import formula_text
    from library.diffspectra.lines import MODALITIES

    data = load_molecules()
    numbers = [int(one) for one in data.parts["test"] if int(data.sizes[one]) <= MOST_ATOMS][:MOLECULES]
    signals = [{name: read(one) for name, read in data.signals.items()} for one in numbers]
    spectra = Collate(MODALITIES).intensities(signals, torch.tensor(numbers))
    return tuple(
        Unknown(
            {name: [round(value, 3) for value in rows[place].tolist()] for name, rows in spectra.items()},
            data.smiles[one],
            formula_text(data.atoms.structure(one).formula()),
            int(data.sizes[one]),
        )
        for place, one in enumerate(numbers)
    )


def request(unknown: Unknown, spectra: dict[str, list[float]], told: str | None, samples: int) -> dict[str, Any]:
    """The body that asks for candidates of some of a molecule's spectra."""
    known = {} if told is None else {told: getattr(unknown, told)}
    values = {name: {"y": y, "absolute": True} for name, y in spectra.items()}
    return {"spectra": values, "samples": samples, "candidates": 6} | known


def _found(answer: dict[str, Any], unknown: Unknown, spectra: dict[str, Sequence[float]]) -> str:
    candidates = answer["candidates"]
    place = next((rank for rank, one in enumerate(candidates, 1) if one["smiles"] == unknown.smiles), None)
    pictures = [
        captioned(
            drawing(one["smiles"], None),
            f"{rank}. {one['smiles']}: {share(one['score'])} of what was drawn"
            + (", and right" if rank == place else ""),
        )
        for rank, one in enumerate(candidates, 1)
    ]
    return (
        tiles(
            ("whole molecules", share(answer["validity"]), "of what was drawn"),
            ("candidates", number(len(candidates)), "at most 6 are shown"),
            ("the right one", "not among them" if place is None else f"number {place}", ""),
        )
        + "".join(paragraph(warning, quiet=True) for warning in answer["warnings"])
        + figures(
            *(drawn(bands_figure(name, spectra[name]), f"Its {TITLES[name]} spectrum.") for name in spectra),
            captioned(drawing(unknown.smiles, None), f"What it is: {unknown.smiles}, {unknown.formula}."),
        )
        + figures(*pictures)
    )
