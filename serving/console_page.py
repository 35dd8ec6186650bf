"""How the console looks: its theme and style sheet, and the pieces that answers are shown with."""

import base64
import io
import logging
from collections.abc import Callable, Iterable
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any

from library.errors import PrismError

if TYPE_CHECKING:
    from gradio.themes import Base
    from matplotlib.figure import Figure

LOG = logging.getLogger("ray.serve")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"  # Okabe and Ito's, as in all figures
TITLE = "Prism"
CSS = """
.gradio-container {max-width: 1080px !important; margin: 0 auto !important; padding: 0 1rem !important}
.gradio-container, .gradio-container .main, .gradio-container .wrap {min-width: 0 !important}
.gradio-container {width: 100%}
.gradio-container .main {padding: 1rem 0 !important}
.gradio-container .html-container, .gradio-container .tabitem {padding: 0 !important}
.gradio-container button.primary {max-width: 16rem}
.gradio-container .tabs {gap: .75rem}
@media (max-width: 640px) {
  .gradio-container {padding: 0 .75rem !important}
  .gradio-container button.primary {max-width: none}
  #tabs button[role=tab], #tabs .tab-container button {padding: .4rem .45rem; font-size: .85rem}
}
.prism {font-size: 1rem; line-height: 1.5; color: var(--body-text-color); overflow-wrap: anywhere}
.prism h1 {font-size: 1.6rem; font-weight: 650; margin: 0; letter-spacing: -.01em}
.prism h2 {font-size: 1.15rem; font-weight: 600; margin: 1.5rem 0 .4rem}
.prism > h2:first-child {margin-top: .5rem}
.prism h3 {font-size: 1rem; font-weight: 600; margin: 1rem 0 .25rem}
.prism p {margin: .25rem 0 .5rem; max-width: 46rem}
.prism .quiet {color: var(--body-text-color-subdued)}
.prism code {font-size: .88em; padding: .1em .35em; border-radius: 4px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); white-space: normal}
.prism .tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; margin: .5rem 0}
.prism .tile, .prism .card {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .7rem .9rem;
  background: var(--background-fill-primary)}
.prism .tile span {display: block; font-size: .85rem; color: var(--body-text-color-subdued)}
.prism .tile strong {display: block; font-size: 1.35rem; font-weight: 620; line-height: 1.3}
.prism .cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: .75rem}
.prism .card h3 {margin: 0 0 .2rem}
.prism .card p {margin: .2rem 0; font-size: .92rem}
.prism .card table {margin-top: .4rem}
.prism .figures {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: .75rem;
  margin: .75rem 0; align-items: start}
.prism figure {margin: 0; border: 1px solid var(--border-color-primary); border-radius: 10px; background: #fff;
  padding: .6rem .6rem .4rem; max-width: 660px; min-width: 0}
.prism figure img, .prism figure svg {display: block; width: 100%; height: auto; margin: 0 auto}
.prism figcaption {font-size: .85rem; line-height: 1.4; color: #4b5563; padding: .3rem .2rem 0}
.prism table, .prism tbody, .prism tr {border: 0 !important}
.prism table {border-collapse: collapse; width: 100%; font-size: .9rem; margin: .25rem 0 !important}
.prism td {text-align: left; padding: .25rem .5rem .25rem 0 !important; vertical-align: top; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important}
.prism tr:last-child td {border-bottom: 0 !important}
.prism td.number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  padding-right: 0 !important}
.prism a {margin: 0 !important; padding: 0 !important}
.prism ol {margin: .25rem 0; padding-left: 1.9rem}
.prism li {margin: .15rem 0 !important}
.prism .error {border-left: 4px solid #D55E00; padding: .5rem .8rem; border-radius: 4px; max-width: none;
  background: var(--background-fill-secondary)}
.prism .waiting {border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 1.2rem; max-width: none;
  text-align: center; color: var(--body-text-color-subdued)}
.prism .badge {display: inline-block; font-size: .78rem; font-weight: 600; padding: .05rem .5rem; border-radius: 99px;
  color: #fff; background: #00775a; vertical-align: .1em}
.prism .badge.off {background: #6b7280}
.prism .badge.warn {background: #b34700}
.prism details {margin: .4rem 0}
.prism summary {cursor: pointer; font-size: .9rem}
"""


def theme() -> "Base":
    """System fonts alone, so that nothing is loaded from elsewhere, and the figures' blue."""
    from gradio import themes

    fonts = [themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")]
    mono = [themes.Font(name) for name in ("ui-monospace", "Menlo", "monospace")]
    return themes.Base(primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=mono).set(
        button_primary_background_fill=BLUE,
        button_primary_background_fill_hover="#005a8e",
        button_primary_background_fill_dark=BLUE,
        button_primary_text_color="white",
        body_text_color_subdued="#5b6472",
        body_text_color_subdued_dark="#a3acb9",
        block_radius="10px",
        block_border_width="1px",
        block_shadow="none",
        slider_color=BLUE,
    )


def page(*parts: str) -> str:
    """Pieces of HTML as the value of one component."""
    return f'<div class="prism">{"".join(parts)}</div>'


def waiting(text: str) -> str:
    """What stands where an answer will be."""
    return page(f'<p class="waiting">{escape(text)}</p>')


def error(text: str) -> str:
    """An endpoint's one line."""
    return f'<p class="error" role="alert">{escape(" ".join(text.split()))}</p>'


def section(title: str, action: Callable[[], str]) -> str:
    """A titled part of an answer; when its endpoint gives none, its line stands there and the other parts stay."""
    try:
        return heading(title) + action()
    except PrismError as problem:
        return heading(title) + error(str(problem))


def answering(action: Callable[..., str]) -> Callable[..., str]:
    """The action of a button: its answer, or the line that says why there is none."""

    @wraps(action)
    def shown(*values: Any) -> str:
        try:
            return page(action(*values))
        except PrismError as problem:
            return page(error(str(problem)))
        except Exception:
            LOG.exception("the console failed to show an answer")
            return page(error("an unexpected failure; the server's log has it"))

    return shown


def paragraph(text: str, *, quiet: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=quiet' if quiet else ''}>{escape(text)}</p>"


def heading(text: str) -> str:
    """A section's title."""
    return f"<h2>{escape(text)}</h2>"


def introduction(title: str, text: str) -> str:
    """What a part of a tab is for, above its inputs."""
    return page(heading(title), paragraph(text, quiet=True))


def tiles(*found: tuple[str, str, str]) -> str:
    """Numbers side by side, each a label, a value and a remark (which may be empty)."""
    parts = (
        f'<div class="tile"><span>{escape(label)}</span><strong>{escape(value)}</strong>'
        f"{f'<span>{escape(remark)}</span>' if remark else ''}</div>"
        for label, value, remark in found
    )
    return f'<div class="tiles">{"".join(parts)}</div>'


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Names and their values, a text or a number each."""
    lines = (
        f'<tr><td>{escape(name)}</td><td class="number">'
        f"{number(value) if isinstance(value, int | float) else escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def cards(*found: str) -> str:
    """Boxes side by side where there is room."""
    return f'<div class="cards">{"".join(f"<div class=card>{content}</div>" for content in found)}</div>'


def figures(*found: str) -> str:
    """Figures side by side where there is room, one below another on a phone."""
    return f'<div class="figures">{"".join(found)}</div>'


def drawn(figure: "Figure", caption: str) -> str:
    """A figure as a vector picture, sharp at every width; its caption is also read to those who cannot see it."""
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    data = base64.b64encode(content.getvalue()).decode()
    return captioned(f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">', caption)


def captioned(picture: str, caption: str) -> str:
    """A picture that is HTML already, with a caption."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def number(value: float) -> str:
    """A number as a person reads it.

    >>> number(0.12345), number(999.7), number(12345.6), number(3)
    ('0.123', '1,000', '12,346', '3')
    """
    if value == int(value) or abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(value: float) -> str:
    """A probability in per cent; none is rounded to certainty.

    >>> share(0.734).split(), share(0.0004).split(), share(0.9996).split()
    (['73', '%'], ['0.04', '%'], ['>', '99', '%'])
    """
    if 0.995 <= value < 1:
        return ">\u00a099\u00a0%"
    if 0 < value < 0.0001:
        return "<\u00a00.01\u00a0%"
    return f"{100 * value:.2g}\u00a0%" if value < 1 else "100\u00a0%"
