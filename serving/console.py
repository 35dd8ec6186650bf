"""The web console: a Serve application of its own that asks the endpoints beside it, and shows their answers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, PositiveInt

from library.errors import PrismError
from serving.app import ENDPOINTS, Served, champion
from serving.console_calls import Endpoints
from serving.console_overview import overview
from serving.console_page import CSS, TITLE, page, theme, waiting
from serving.console_tabs import TABS
from serving.settings import token_digest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks
    from ray.serve import Application

NAME = "console"
ICON = (
    '<link rel="icon" href="data:image/svg+xml,'
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path d='M8 2 15 14H1z' fill='%230072B2'/></svg>\">"
)
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # nothing is asked of other hosts


class ConsoleArgs(BaseModel, frozen=True, extra="forbid"):
    """What the console can be told, in `args` of an application as well."""

    url: str = "http://127.0.0.1:8000"
    """Where the endpoints answer, as seen from the cluster's machines."""
    endpoints: dict[str, str] = Field(default_factory=lambda: {n: champion(e) for n, e in ENDPOINTS.items()})
    """Endpoints that are deployed, with the artifact reference of each."""
    token_file: str | None = None
    """File that holds the endpoints' bearer token; None is the token in PRISM_TOKEN, and without one none is needed."""
    most_upload_bytes: PositiveInt = 6_000_000
    """Largest file that is taken; in base64 it must not pass the endpoints' `max_body_bytes`."""


def build(args: ConsoleArgs) -> "Application":
    """The Serve application of the console, for the route /: what belongs to no endpoint.

    With a token people log in by it, under any name. One replica: a session lives in its memory.
    """
    from ray import serve

    deployment = serve.deployment(
        serve.ingress()(Console),
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=256,  # every open page holds one
        graceful_shutdown_timeout_s=2,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": QUIET}},
    )
    return deployment.bind(args, token_digest(args.token_file))


class Console:
    """The deployment: the page, mounted in an ASGI application."""

    def __init__(self, args: ConsoleArgs, digest: str | None):
        self.endpoints = Endpoints(args.url, args.endpoints, digest)
        self.most_upload_bytes = args.most_upload_bytes
        self.folder = TemporaryDirectory(prefix="prism-console-")
        os.environ["GRADIO_TEMP_DIR"] = self.folder.name  # what is uploaded; read where Gradio is imported

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return application(self.endpoints, self.most_upload_bytes)

    def __del__(self) -> None:
        self.folder.cleanup()


def application(endpoints: Endpoints, most_upload_bytes: int) -> "FastAPI":
    """The ASGI application: the console at its root."""
    import gradio as gr
    from fastapi import FastAPI

    app = FastAPI(title="Prism: console", docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        app,
        blocks(endpoints),
        path="/",
        auth=endpoints.log_in if endpoints.token_digest else None,
        auth_message="Any name, and the endpoints' token as password.",
        theme=theme(),
        head=f"{ICON}<style>{CSS}</style>",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=most_upload_bytes,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )


def blocks(endpoints: Endpoints) -> "Blocks":
    """The page: an overview, and the tabs of what is deployed."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400)) as found:
        gr.HTML(
            page("<h1>Prism</h1>", '<p class="quiet">Spectral deep learning: what is deployed here, to be tried.</p>')
        )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Overview"):
                first = gr.HTML(waiting("Asking the endpoints ..."), elem_id="overview")
            for tab in TABS:
                if any(map(endpoints.serves, tab.endpoints)):
                    with gr.Tab(tab.title):
                        tab.lay_out(endpoints)
        found.load(
            lambda: overview(endpoints), None, first, queue=False, api_visibility="private", show_progress="hidden"
        )
    return found


@contextmanager
def serve_console(served: Served) -> Iterator[str]:
    """Deploy the console beside endpoints that are deployed, and take it away at the end; its address.

    Raises PrismError when it does not start.
    """
    from ray import serve

    args = ConsoleArgs(url=served.url, endpoints=served.endpoints)
    try:
        serve.run(build(args), name=NAME, route_prefix="/")
    except RuntimeError as error:
        serve.delete(NAME)
        raise PrismError(f"the console does not start: {str(error).strip().splitlines()[-1]}") from error
    try:
        yield served.url
    finally:
        serve.delete(NAME)
