"""The console's first page: what is deployed, from which artifact, how good it is, and what is not deployed."""

from html import escape
from typing import Any

from serving.app import ENDPOINTS
from serving.console_calls import Endpoints
from serving.console_page import cards, heading, page, paragraph, table

MADE_BY = {"farms": "prism run farms-prune"}  # where the job is not called like the model
MOST_METRICS = 6


def overview(endpoints: Endpoints) -> str:
    """The page, as it is now."""
    told = endpoints.about(endpoints.served)
    absent = [name for name in ENDPOINTS if not endpoints.serves(name)]
    parts = [
        heading("Deployed"),
        paragraph("Each answers at its own address; the tabs above ask them what you enter there.", quiet=True),
        cards(*(_card(name, endpoints.served[name], told[name]) for name in told)),
    ]
    if absent:
        parts += [heading("Not deployed"), cards(*map(_absent, absent))]
    return page(*parts)


def making(name: str) -> str:
    """The command that trains and registers what an endpoint serves."""
    model = ENDPOINTS[name].model
    return MADE_BY.get(model, f"prism run {model}")


def _card(name: str, reference: str, told: dict[str, Any] | str) -> str:
    if isinstance(told, str):
        state = '<span class="badge warn">no answer</span>'
        return f"<h3>{escape(name)} {state}</h3>{paragraph(told)}"
    metrics = list(told["metrics"].items())
    rows = [(key.replace("_", " "), value) for key, value in metrics[:MOST_METRICS]]
    more = (
        f"<details><summary>{len(metrics) - MOST_METRICS} more metrics</summary>"
        f"{table((key.replace('_', ' '), value) for key, value in metrics[MOST_METRICS:])}</details>"
        if len(metrics) > MOST_METRICS
        else ""
    )
    made = told["created"][:16].replace("T", " ")
    return (
        f'<h3>{escape(name)} <span class="badge">ready</span></h3>'
        f"{paragraph(told['summary'])}"
        f"<p><code>{escape(reference)}</code></p>"
        f'<p class="quiet">version {escape(told["version"])} of {escape(made)}, '
        f'<a href="/{escape(name)}/docs">its API</a></p>'
        f"{table(rows)}{more}"
    )


def _absent(name: str) -> str:
    return (
        f'<h3>{escape(name)} <span class="badge off">not deployed</span></h3>'
        f"{paragraph(ENDPOINTS[name].summary)}"
        f"<p><code>{escape(making(name))}</code> trains and registers a model, "
        f"<code>prism console</code> then serves its champion.</p>"
    )
