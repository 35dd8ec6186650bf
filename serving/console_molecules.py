"""The tab of molecules: is one anomalous, and why; what is its property; where is each atom in its graph."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.molecules import Molecule
from serving.console_calls import Endpoints
from serving.console_figures import encodings_figure, energy_figure, spectrum_figure
from serving.console_page import (
    answering,
    captioned,
    drawn,
    error,
    figures,
    introduction,
    number,
    page,
    paragraph,
    section,
    share,
    tiles,
    waiting,
)
from serving.spe import ASPIRIN, CAFFEINE

MOLECULES = {
    "aspirin": ASPIRIN,
    "caffeine": CAFFEINE,
    "ethanol": "CCO",
    "zidovudine": "CC1=CN(C(=O)NC1=O)C2CC(C(O2)CO)N=[N+]=[N-]",
    "biphenyl": "c1ccccc1-c1ccccc1",
}
MOST_CURVES = 4  # kinds of atoms whose curve is shown: the most frequent ones
WIDTH, HEIGHT = 380, 260  # of a drawing
MOST_ATOMS, MOST_LETTERS, MOST_LINES = 200, 1000, 500  # RDKit holds up everybody's page while it reads and draws
LONGEST_LINE = 80  # characters, in a MOL file
TOO_LARGE = (
    f"the molecule is too large to be shown here; at most {MOST_ATOMS} heavy atoms, {MOST_LETTERS} characters of "
    f"SMILES or {MOST_LINES} lines of a file are taken"
)


def molecules_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    gr.HTML(introduction("Look at a molecule", "Type a SMILES, choose one, or upload a MOL or SDF file."))
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            smiles = gr.Textbox(ASPIRIN, label="SMILES", max_lines=3, elem_id="smiles")
            gr.Examples(
                [[text] for text in MOLECULES.values()], smiles, label="Examples", example_labels=list(MOLECULES)
            )
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="MOL or SDF file", file_types=[".sdf", ".mol"], height=140, elem_id="molfile")
    button = gr.Button("Look", variant="primary", elem_id="ask-molecule")
    answer = gr.HTML(waiting("Look, and what the endpoints say of the molecule appears here."), elem_id="molecule")

    @answering
    def looked(smiles: str) -> str:
        return _looked(endpoints, smiles.strip())

    def uploaded(path: str | None) -> tuple[Any, Any]:
        if path is None:
            return gr.skip(), gr.skip()
        try:
            return smiles_of_file(Path(path)), waiting("The file is read. Look at it now.")
        except InputError as problem:
            return gr.skip(), page(error(str(problem)))

    gr.on([button.click, smiles.submit], looked, smiles, answer, queue=False, api_visibility="private")
    file.change(uploaded, file, [smiles, answer], queue=False, api_visibility="private")


def smiles_of_file(path: Path) -> str:
    """The first molecule of a MOL or SDF file. Raises InputError for a file that holds none, or too large a one."""
    from rdkit import Chem, rdBase

    try:
        with path.open(encoding="utf-8") as stream:
            block, end, _ = stream.read(LONGEST_LINE * MOST_LINES).partition("\nM  END")
            whole = end or not stream.read(1)
    except UnicodeDecodeError as problem:
        raise InputError("the file is not a MOL or SDF file: it is not text") from problem
    if not whole or block.count("\n") > MOST_LINES:
        raise InputError(TOO_LARGE)
    with rdBase.BlockLogs():
        found = Chem.MolFromMolBlock(block + end)
    if found is None or not found.GetNumAtoms():
        raise InputError("the file is not a MOL or SDF file with a valid molecule")
    return Chem.MolToSmiles(Chem.RemoveHs(found))


def drawing(smiles: str, weights: Sequence[float] | None) -> str:
    """A molecule as SVG; with weights, the atoms' discs are the stronger the larger theirs."""
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    canvas = rdMolDraw2D.MolDraw2DSVG(WIDTH, HEIGHT)
    canvas.drawOptions().useBWAtomPalette()
    canvas.drawOptions().clearBackground = False
    canvas.drawOptions().fixedBondLength = 45  # at most: a small molecule is not blown up
    chosen: dict[int, tuple[float, float, float]] = {}
    if weights is not None:
        most = max(map(abs, weights)) or 1.0
        for atom, weight in enumerate(weights):
            faint = 1 - abs(weight) / most
            chosen[atom] = (0.84 + 0.16 * faint, 0.37 + 0.63 * faint, faint)  # from the figures' orange to white
    rdMolDraw2D.PrepareAndDrawMolecule(
        canvas, Chem.MolFromSmiles(smiles), highlightAtoms=list(chosen), highlightAtomColors=chosen, highlightBonds=[]
    )
    canvas.FinishDrawing()
    return canvas.GetDrawingText().partition("?>")[2]


def _looked(endpoints: Endpoints, smiles: str) -> str:
    if len(smiles) > MOST_LETTERS:
        raise InputError(TOO_LARGE)
    molecule = Molecule.from_smiles(smiles)
    if len(molecule) > MOST_ATOMS:
        raise InputError(TOO_LARGE)
    parts = []
    if endpoints.serves("graph-anomaly"):
        parts.append(section("Is it anomalous?", lambda: _anomaly(endpoints, smiles, molecule)))
    else:
        parts.append(figures(captioned(drawing(smiles, None), f"{len(molecule)} heavy atoms")))
    if endpoints.serves("graph-property"):
        parts.append(section("What is its property?", lambda: _property(endpoints, smiles)))
    if endpoints.serves("graph-encoding"):
        parts.append(section("Where are its atoms?", lambda: _encoding(endpoints, smiles, molecule)))
    return "".join(parts)


def _anomaly(endpoints: Endpoints, smiles: str, molecule: Molecule) -> str:
    graph = {"kinds": list(molecule.symbols), "edges": molecule.edges.T.tolist()}
    found = endpoints.ask("graph-anomaly", {"graphs": [graph], "explain": True})["results"][0]
    told = found["explanation"]
    frequent = [kind for kind, _ in Counter(molecule.symbols).most_common() if kind in told["accumulated_energy"]]
    curves = [
        drawn(
            energy_figure(kind, told["points"], told["accumulated_energy"][kind]),
            f"Energy of the signal of {kind} atoms up to each eigenvalue. {_rank(told['rayleigh_percentile'][kind])}",
        )
        for kind in frequent[:MOST_CURVES]
    ]
    return (
        tiles(
            ("anomalous", share(found["anomaly_probability"]), "calibrated probability"),
            ("decision", "anomalous" if found["is_anomalous"] else "normal", f"from {share(found['threshold'])} on"),
            ("heavy atoms", number(len(molecule)), f"{molecule.edges.shape[1]} bonds"),
        )
        + (paragraph("It has no bonds: its spectrum says nothing.") if found["without_edges"] else "")
        + figures(
            captioned(drawing(smiles, told["node_scores"]), "The stronger an atom's colour, the more it counts."),
            *curves,
        )
    )


def _rank(percentile: float | None) -> str:
    if percentile is None:
        return "No training molecule has such atoms."
    return f"Its Rayleigh quotient is above that of {percentile:.0f} % of normal molecules."


def _property(endpoints: Endpoints, smiles: str) -> str:
    answer = endpoints.ask("graph-property", {"graphs": [{"smiles": smiles}], "explain": True})
    found = answer["properties"][0]
    told = found["explanation"]
    predicted = [(name.replace("_", " "), number(value), answer["unit"]) for name, value in found["prediction"].items()]
    several = sum(size > 1 for size in told["multiplicities"])
    return tiles(
        *predicted, ("eigenspaces used", number(len(told["multiplicities"])), f"{several} of several dimensions")
    ) + figures(
        drawn(spectrum_figure(told["eigenvalues"]), "Eigenvalues of the molecule's normalised Laplacian that are used.")
    )


def _encoding(endpoints: Endpoints, smiles: str, molecule: Molecule) -> str:
    found = endpoints.ask("graph-encoding", {"graphs": [{"smiles": smiles}]})["graphs"][0]
    return figures(
        drawn(
            encodings_figure(found["encodings"], molecule.symbols),
            "Stable positional encodings: atoms in like places have like rows, whatever the eigenvectors' signs.",
        )
    )
