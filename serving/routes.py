"""The HTTP routes of one endpoint and the page that documents them."""

import asyncio
from typing import Annotated, Any, Literal, Protocol

from fastapi import Body, FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import payloads
from serving.batcher import Ticket
from serving.endpoint import has_steps
from serving.gate import TICKET, Gate
from serving.metrics import Meter
from serving.problems import EXPECTED, MEANINGS, Problem, handle_problems, problem_of, problem_response, request_id
from serving.settings import EndpointArgs
from serving.streams import ANSWERS, cancelled_on_disconnect, event_stream, wants_events
from serving.updates import Loaded, Refusal

BINARY = {"type": "string", "format": "binary"}
LARGE = 1 << 18  # bytes of a body that is read beside the event loop


class Update(BaseModel):
    """Whether the model changes when its alias is moved."""

    reference: str = Field(description="What is served.")
    followed: bool = Field(description="Whether a new meaning of the reference is taken over.")
    refused: Refusal | None = Field(description="A new artifact that was not taken; null when there is none.")


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
    update: Update
    limits: dict[str, int | float | str]


class Health(BaseModel):
    """Whether the process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether the model takes requests now."""

    status: Literal["ready"] = "ready"
    model: str


class Service(Protocol):
    """What the routes need from the replica that runs them. `current` may change between two requests."""

    current: Loaded
    args: EndpointArgs
    meter: Meter

    def accept(self, request: BaseModel, *, wants_progress: bool = False) -> Ticket: ...

    async def answer(self, ticket: Ticket) -> BaseModel: ...

    def not_ready(self) -> str | None: ...

    def limits(self) -> dict[str, int | float | str]: ...

    def update(self) -> Update: ...


def application(service: Service, token_digest: str | None) -> FastAPI:
    """The FastAPI application of a replica."""
    endpoint = type(service.current.endpoint)
    app = FastAPI(
        title=f"Prism: {endpoint.name}",
        summary=endpoint.summary,
        version=service.current.artifact.version,
        redoc_url=None,
    )
    handle_problems(app)
    app.add_middleware(Gate, service=service, token_digest=token_digest, predict=_predictor(service))
    guarded = [Security(HTTPBearer(auto_error=False))] if token_digest else []  # for the page: Gate does the checking
    refused = (401,) if token_digest else ()
    examples = {name: {"value": value} for name, value in endpoint.examples.items()}

    async def predict(body: Annotated[endpoint.Request, Body(openapi_examples=examples)]) -> BaseModel:
        raise NotImplementedError  # for the page; Gate hands requests to `_predictor`

    app.router.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        response_model=endpoint.Response,
        responses={200: ANSWERS} | _problems(*refused, 413, 415, 422, 429, 500, 503),
        dependencies=guarded,
        summary=endpoint.summary,
        openapi_extra={"requestBody": {"content": {kind: {"schema": BINARY} for kind in endpoint.media}}},
    )

    @app.get(
        "/info",
        responses=_problems(*refused),
        dependencies=guarded,
        summary="The artifact, its recipe and metrics, and the limits.",
    )
    async def info() -> Info:
        artifact = service.current.artifact
        return Info(
            endpoint=endpoint.name,
            summary=endpoint.summary,
            version=artifact.version,
            limits=service.limits(),
            update=service.update(),
            **artifact.manifest.model_dump(include={"kind", "created", "recipe", "metrics", "data", "versions"}),
        )

    @app.get("/healthz", summary="Whether the process answers.")
    async def healthz() -> Health:
        return Health()

    @app.get("/readyz", responses=_problems(503), response_model=Ready, summary="Whether requests are taken now.")
    async def readyz(request: Request) -> Ready | Response:
        reason = service.not_ready()
        if reason is not None:
            return problem_response(request_id(request), 503, reason, retry_after="1")
        return Ready(model=service.current.artifact.version)

    return app


def _predictor(service: Service) -> ASGIApp:
    """What answers `POST /predict`: the body is read as what it says it is, and the answer is written once.

    It stands beside the router, which with FastAPI's own layers costs more than all of this.
    """
    endpoint = type(service.current.endpoint)
    steps = has_steps(service.current.endpoint)

    async def respond(scope: Scope, receive: Receive) -> Response:
        content = await _body(receive)
        headers = Headers(scope=scope)
        query = QueryParams(scope["query_string"]) if scope["query_string"] else {}
        arguments = (endpoint, headers.get("content-type"), query, content)
        if len(content) > LARGE:
            asked = await asyncio.to_thread(payloads.read, *arguments)
        else:
            asked = payloads.read(*arguments)
        events = wants_events(headers)
        ticket = scope[TICKET] = service.accept(asked, wants_progress=events)
        if events:
            return await event_stream(service.answer(ticket), ticket, Request(scope, receive))
        if not steps:
            return _json(await service.answer(ticket))
        async with cancelled_on_disconnect(ticket, receive):
            return _json(await service.answer(ticket))

    async def predict(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await respond(scope, receive)
        except EXPECTED as error:
            response = problem_of(request_id(Request(scope)), error)
        await response(scope, receive, send)

    return predict


async def _body(receive: Receive) -> bytes:
    """The whole body. Raises ClientDisconnect."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type=payloads.JSON)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}
