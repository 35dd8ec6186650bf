"""The tab of language models: a prompt, its sampled answers and their spread; a text, and how it looks to the model."""

from collections.abc import Sequence
from html import escape
from typing import Any

from serving.console_calls import Endpoints
from serving.console_figures import eigenvalues_figure
from serving.console_page import answering, cards, drawn, introduction, number, paragraph, share, table, tiles, waiting
from serving.send import Hallucination, Score

PROMPTS = ["The river Thames flows through", "Robert Boulter is an English", *(
    example["prompt"] for example in Hallucination.examples.values() if "prompt" in example
)]  # fmt: skip
TEXTS = [text for example in Score.examples.values() for text in (example.get("texts") or [example["text"]])]
FLAGS = {
    "all-answers-empty": "All sampled answers are empty: the score says nothing.",
    "some-answers-empty": "Some sampled answers are empty.",
    "identical-answers": "All sampled answers are the same.",
}


def language_tab(endpoints: Endpoints) -> None:
    """Lays the tab out."""
    import gradio as gr

    if endpoints.serves("hallucination"):
        gr.HTML(
            introduction(
                "Ask the model", "It answers a prompt several times. Answers that spread far hint at an invention."
            )
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, max_lines=6, elem_id="prompt")
            with gr.Column(scale=1, min_width=280):
                samples = gr.Slider(2, 32, 10, step=1, label="Sampled answers", elem_id="samples")
        gr.Examples([[text] for text in PROMPTS], prompt, label="Examples")
        button = gr.Button("Ask", variant="primary", elem_id="ask-hallucination")
        answer = gr.HTML(
            waiting("Ask, and the answers, their score and its eigenvalues appear here."), elem_id="hallucination"
        )

        @answering
        def asked(prompt: str, samples: float) -> str:
            body = {"prompt": prompt, "samples": int(samples), "explain": True}
            return _detection(endpoints.ask("hallucination", body)["results"][0])

        gr.on([button.click, prompt.submit], asked, [prompt, samples], answer, queue=False, api_visibility="private")
    if endpoints.serves("score"):
        gr.HTML(introduction("Score texts", "How surprising a text is to the model; one text on each line."))
        texts = gr.Textbox("\n".join(TEXTS[1:]), label="Texts", lines=3, max_lines=12, elem_id="texts")
        button = gr.Button("Score", variant="primary", elem_id="ask-score")
        scores = gr.HTML(waiting("Score, and a card for each text appears here."), elem_id="score")

        @answering
        def scored(texts: str) -> str:
            lines = [line for line in texts.splitlines() if line.strip()] or [texts]
            return _scores(lines, endpoints.ask("score", {"texts": lines})["results"])

        button.click(scored, texts, scores, queue=False, api_visibility="private")


def _detection(found: dict[str, Any]) -> str:
    risk = found["risk"]
    named = [paragraph(FLAGS[flag]) for flag in found["flags"]]
    samples = "".join(f"<li>{escape(text.strip()) or '<em>(empty)</em>'}</li>" for text in found["samples"])
    error = f"± {number(found['standard_error'])}" if found["standard_error"] else found["method"]
    picture = drawn(
        eigenvalues_figure(found["eigenvalues"]),
        "Eigenvalues of the answers' covariance: the more of them are large, the further the answers spread.",
    )
    return (
        tiles(
            ("risk of a hallucination", "not known" if risk is None else share(risk), found["no_risk"] or "calibrated"),
            ("EigenScore", number(found["eigenscore"]), "larger: wider spread"),
            ("EES", number(found["ees"]), error),
        )
        + "".join(named)
        + f"<h3>Greedy answer</h3><p>{escape((found['answer'] or '').strip()) or '<em>(empty)</em>'}</p>"
        + f'<div class="figures"><div><h3>Sampled answers</h3><ol>{samples}</ol></div>{picture}</div>'
    )


def _scores(texts: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    return cards(
        *(
            paragraph(text if len(text) <= 200 else f"{text[:200]} ...")
            + table(
                [
                    ("tokens", score["tokens"]),
                    ("perplexity", "beyond numbers" if score["perplexity"] is None else score["perplexity"]),
                    ("entropy of a token, nats", score["token_entropy"]),
                    ("energy in sensitive coordinates", _energy(score["sensitive_energy"])),
                ]
            )
            for text, score in zip(texts, found, strict=True)
        )
    )


def _energy(found: float | None) -> str:
    return "there are none" if found is None else share(found)
