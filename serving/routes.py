"""The HTTP routes of one endpoint and the page that documents them."""

from typing import Annotated, Any, Literal, Protocol

from fastapi import Body, FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from library.artifact import Artifact
from serving.batcher import Ticket
from serving.endpoint import Endpoint, has_steps
from serving.gate import Gate
from serving.problems import MEANINGS, Problem, handle_problems, problem_response, request_id
from serving.settings import EndpointArgs
from serving.streams import ANSWERS, cancelled_on_disconnect, event_stream, wants_events


class Info(BaseModel):
    """Which model answers, what made it, and what it allows."""

    endpoint: str
    summary: str
    kind: str = Field(description="The method that made the artifact.")
    version: str = Field(description="The artifact's version: twelve hexadecimal digits of its content.")
    created: str
    recipe: dict[str, Any] = Field(description="The complete configuration of its training.")
    metrics: dict[str, float] = Field(description="Of its evaluation.")
    data: str = Field(description="Fingerprint of the data it was trained on.")
    versions: dict[str, str] = Field(description="Libraries that wrote it.")
    limits: dict[str, int | float | str]


class Health(BaseModel):
    """Whether the process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether the model takes requests now."""

    status: Literal["ready"] = "ready"
    model: str


class Service(Protocol):
    """What the routes need from the replica that runs them."""

    endpoint: Endpoint
    artifact: Artifact
    args: EndpointArgs

    def accept(self, request: BaseModel, *, wants_progress: bool = False) -> Ticket: ...

    async def answer(self, ticket: Ticket) -> BaseModel: ...

    def not_ready(self) -> str | None: ...

    def limits(self) -> dict[str, int | float | str]: ...


def application(service: Service, token_digest: str | None) -> FastAPI:
    """The FastAPI application of a replica."""
    endpoint = service.endpoint
    app = FastAPI(
        title=f"Prism: {endpoint.name}",
        summary=endpoint.summary,
        version=endpoint.version,
        redoc_url=None,
    )
    handle_problems(app)
    app.add_middleware(
        Gate, version=endpoint.version, token_digest=token_digest, max_body_bytes=service.args.max_body_bytes
    )
    guarded = [Security(HTTPBearer(auto_error=False))] if token_digest else []  # for the page: Gate does the checking
    refused = (401,) if token_digest else ()
    steps = has_steps(endpoint)
    examples = {name: {"value": value} for name, value in endpoint.examples.items()}

    @app.post(
        "/predict",
        response_model=endpoint.Response,
        responses={200: ANSWERS} | _problems(*refused, 413, 422, 429, 500, 503),
        dependencies=guarded,
        summary=endpoint.summary,
    )
    async def predict(
        request: Request, body: Annotated[endpoint.Request, Body(openapi_examples=examples)]
    ) -> BaseModel | Response:
        events = wants_events(request.headers)
        ticket = service.accept(body, wants_progress=events)
        if events:
            return await event_stream(service.answer(ticket), ticket, request)
        if not steps:
            return await service.answer(ticket)
        async with cancelled_on_disconnect(ticket, request.receive):
            return await service.answer(ticket)

    @app.get(
        "/info",
        responses=_problems(*refused),
        dependencies=guarded,
        summary="The artifact, its recipe and metrics, and the limits.",
    )
    async def info() -> Info:
        manifest = service.artifact.manifest
        return Info(
            endpoint=endpoint.name,
            summary=endpoint.summary,
            version=endpoint.version,
            limits=service.limits(),
            **manifest.model_dump(include={"kind", "created", "recipe", "metrics", "data", "versions"}),
        )

    @app.get("/healthz", summary="Whether the process answers.")
    async def healthz() -> Health:
        return Health()

    @app.get("/readyz", responses=_problems(503), response_model=Ready, summary="Whether requests are taken now.")
    async def readyz(request: Request) -> Ready | Response:
        reason = service.not_ready()
        if reason is not None:
            return problem_response(request_id(request), 503, reason, retry_after="1")
        return Ready(model=endpoint.version)

    return app


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}
