"""The tab of weight matrices: the density of a matrix's spectrum with its fitted tail."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from library.errors import InputError
from serving.arrays import npy
from serving.console_calls import Endpoints
from serving.console_figures import tail_figure
from serving.console_page import answering, drawn, figures, introduction, number, tiles, waiting

GAUSS, HEAVY, OWN, LAYER = (
    "untrained (simulated, Gaussian)",
    "heavy tail (simulated, Pareto)",
    "my file",
    "a layer of the model",
)
EXAMPLE_SHAPE = (256, 384)
VERDICTS = {
    "heavier-tailed": "heavier tail",
    "like-untrained": "like untrained",
    "lighter-tailed": "lighter tail",
}


def weights_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    gr.HTML(
        introduction(
            "Is a weight matrix trained?",
            "The eigenvalues of trained weights have a heavier tail than those of random ones; how heavy, is alpha.",
        )
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            source = gr.Radio([GAUSS, HEAVY, OWN, LAYER], value=HEAVY, label="Matrix", elem_id="matrix")
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="NumPy file (.npy)", file_types=[".npy"], height=140, visible=False, elem_id="npy")
            layer = gr.Textbox(
                label="Name of the layer", visible=False, elem_id="layer", placeholder="a wrong one lists some"
            )
    button = gr.Button("Measure", variant="primary", elem_id="ask-spectrum")
    answer = gr.HTML(waiting("Measure, and the density of its eigenvalues appears here."), elem_id="spectrum")

    def chosen(source: str) -> tuple[Any, Any]:
        return gr.update(visible=source == OWN), gr.update(visible=source == LAYER)

    @answering
    def measured(source: str, path: str | None, name: str | None) -> str:
        return _spectrum(endpoints.ask("spectrum", _given(source, path, (name or "").strip()) | {"rule": "median"}))

    source.change(chosen, source, [file, layer], queue=False, api_visibility="private", show_progress="hidden")
    button.click(measured, [source, file, layer], answer, queue=False, api_visibility="private")


def example(source: str) -> np.ndarray:
    """A simulated matrix: independent entries with a Gaussian's tail, or with that of a power law."""
    random = np.random.default_rng(0)
    if source == GAUSS:
        return random.standard_normal(EXAMPLE_SHAPE, dtype=np.float32)
    signs = random.choice([-1.0, 1.0], EXAMPLE_SHAPE)
    return (signs * random.pareto(2.5, EXAMPLE_SHAPE)).astype(np.float32)


def read_matrix(path: Path) -> bytes:
    """The content of a NumPy file of one matrix; the file's own objects are never made. Raises InputError otherwise."""
    found = npy(path.read_bytes(), path.name)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InputError(f"{path.name}: one matrix of numbers is needed")
    return _npy(found if found.dtype.kind == "f" else found.astype(np.float64))


def _given(source: str, path: str | None, name: str) -> dict[str, str]:
    if source == LAYER:
        if not name:
            raise InputError("name a layer of the model that the endpoint spectrum serves")
        return {"layer": name}
    if source == OWN and path is None:
        raise InputError("choose a NumPy file (.npy) that holds one matrix")
    content = read_matrix(Path(path)) if source == OWN else _npy(example(source))
    return {"npy": base64.b64encode(content).decode()}


def _npy(matrix: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, matrix, allow_pickle=False)
    return content.getvalue()


def _spectrum(found: dict[str, Any]) -> str:
    histogram = found["histogram"]
    windows = f"{found['windows']} windows of {found['window_rows']} x {found['window_columns']}"
    return tiles(
        ("verdict", VERDICTS[found["verdict"]], "by alpha, beyond its error"),
        ("alpha", f"{found['alpha']:.2f} ± {found['standard_error']:.1g}", "smaller: heavier tail"),
        ("alpha of an untrained one", f"{found['mp_alpha']:.2f}", "Marchenko and Pastur"),
        ("largest eigenvalue", number(found["spectral_norm"]), f"stable rank {number(found['stable_rank'])}"),
    ) + figures(
        drawn(
            tail_figure(histogram["edges"], histogram["counts"], found["alpha"], found["mp_alpha"]),
            f"{found['n_eigenvalues']:,} eigenvalues of {windows}, of {found['rows']} x {found['columns']}; "
            "the tail is fitted above their median.",
        )
    )
