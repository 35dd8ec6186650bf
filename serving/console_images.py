"""The tab of images: the class that the quantised network sees, and the bits that its layers have or should have."""

import base64
import io
from typing import TYPE_CHECKING, Any

from library.errors import InputError
from serving.console_calls import Endpoints
from serving.console_figures import bits_figure, classes_figure, frontier_figure
from serving.console_page import answering, drawn, figures, introduction, number, paragraph, share, tiles, waiting

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = (0, 3, 4, 5, 7, 11)  # of the shipped test images
FIRST, BLACK = "Bag", "black canvas"
SIDE = 280  # of the canvas
BUDGETS = {"size of the weights": ("size", "bits"), "bit operations": ("bops", "bit operations")}


def images_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    if endpoints.serves("classify"):
        gr.HTML(
            introduction(
                "What does an image show?",
                "Take a test image, upload one, or take the black canvas and draw on it.",
            )
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                image = gr.ImageEditor(
                    _choices()[FIRST],
                    label="Image",
                    type="pil",
                    image_mode="RGB",
                    format="png",
                    sources=["upload"],
                    transforms=[],
                    layers=False,
                    brush=gr.Brush(default_size=16, colors=["#ffffff", "#8a8a8a", "#000000"], color_mode="fixed"),
                    canvas_size=(SIDE, SIDE),
                    fixed_canvas=True,
                    height=420,
                    elem_id="image",
                )
            with gr.Column(scale=1, min_width=280):
                picked = gr.Radio(list(_choices()), value=FIRST, label="Test images", elem_id="picked")
                button = gr.Button("Classify", variant="primary", elem_id="ask-classify")
        answer = gr.HTML(waiting("Classify, and the class and the network's bits appear here."), elem_id="classify")

        @answering
        def classified(image: dict[str, Any] | None) -> str:
            body = {"image": _png(image), "explain": True}
            return _classes(endpoints.ask("classify", body))

        def picks(name: str) -> Any:
            return _choices()[name]

        picked.select(picks, picked, image, queue=False, api_visibility="private", show_progress="hidden")
        button.click(classified, image, answer, queue=False, api_visibility="private")
    if endpoints.serves("advise"):
        gr.HTML(
            introduction("Which bits should the layers have?", "The least sensitive choice within a budget, proven.")
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                budget = gr.Radio(list(BUDGETS), value=next(iter(BUDGETS)), label="Budget", elem_id="budget")
            with gr.Column(scale=1, min_width=280):
                fraction = gr.Slider(0.25, 1, 0.375, step=0.025, label="Share of 8 bits everywhere", elem_id="fraction")
        button = gr.Button("Advise", variant="primary", elem_id="ask-advise")
        advice = gr.HTML(waiting("Ask for advice, and the bits of each layer appear here."), elem_id="advise")

        @answering
        def advised(budget: str, fraction: float) -> str:
            kind, unit = BUDGETS[budget]
            return _advice(endpoints.ask("advise", {"budget": kind, "fraction": fraction}), unit)

        button.click(advised, [budget, fraction], advice, queue=False, api_visibility="private")


def _choices() -> "dict[str, Image]":
    """A black canvas to draw on, and a few shipped test images by their class."""
    from PIL import Image

    from library.images import load_images

    data = load_images()
    found = {BLACK: Image.new("RGB", (SIDE, SIDE), "black")}
    for i in EXAMPLES:
        shipped = Image.fromarray(data.test.pixels[i, 0].numpy()).convert("RGB")
        found[data.classes[int(data.test.labels[i])]] = shipped.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return found


def _png(edited: dict[str, Any] | None) -> str:
    found = None if edited is None else edited["composite"]
    if found is None:
        raise InputError("choose an image, upload one, or draw one")
    content = io.BytesIO()
    found.convert("RGB").save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()


def _classes(answer: dict[str, Any]) -> str:
    found = answer["results"][0]
    mean = sum(answer["bits"].values()) / len(answer["bits"])
    return tiles(
        ("it shows", found["label"], "likeliest class"),
        ("probability", share(found["probability"]), "calibrated"),
        ("bits of a layer", number(mean), f"mean over {len(answer['bits'])} layers"),
    ) + figures(
        drawn(classes_figure(found["probabilities"]), "Calibrated probability of each class."),
        drawn(bits_figure(list(answer["bits"]), list(answer["bits"].values())), "Bits of each layer's weights."),
    )


def _advice(found: dict[str, Any], unit: str) -> str:
    stable = found["stability"]
    return (
        tiles(
            ("sensitivity Omega", number(found["omega"]), f"none is below {number(found['lower_bound'])}"),
            ("cost", number(found["cost"]), f"{unit}, of {number(found['limit'])} allowed"),
            ("stable", "not known" if stable is None else share(stable), "traces that choose the same"),
        )
        + "".join(paragraph(warning, quiet=True) for warning in found["warnings"])
        + figures(
            drawn(bits_figure(found["layers"], found["bits"]), "Bits that each layer should have."),
            drawn(
                frontier_figure(found["frontier"], found["cost"], found["omega"], found["limit"], unit),
                "Settings that no other beats in both cost and sensitivity.",
            ),
        )
    )
