"""What every request passes first: its id, its token, its size; and on the way out the model's version and a log line.

Nothing of a body is read before the token has been checked, and nothing of an unexpected failure but the request's id
gets out.
"""

import hmac
import logging
import time
import uuid
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.problems import LOG, problem_of, problem_response

if TYPE_CHECKING:
    from serving.batcher import Ticket
    from serving.routes import Service

OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")
TICKET = "prism.ticket"  # where a request's scope holds its ticket
LONGEST_ID = 128


def one_line_each(record: logging.LogRecord) -> bool:
    """A filter that leaves out Serve's line for a request: the gate writes one that says more, and not to stderr."""
    return not getattr(record, "serve_access_log", False) or hasattr(record, "endpoint")


class Gate:
    """ASGI middleware around the application of one endpoint.

    `predict` answers `POST /predict`, the application everything else. `token_digest` is the SHA-256 of the token that
    all but the paths in OPEN need, None when none is needed.
    """

    def __init__(self, app: ASGIApp, *, service: "Service", token_digest: str | None, predict: ASGIApp):
        self.app, self.service, self.token_digest, self.predict = app, service, token_digest, predict
        self.max_body_bytes = service.args.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = MutableHeaders(scope=scope)
        status = 0
        given = headers.get("x-request-id", "")
        named = (
            0 < len(given) <= LONGEST_ID and given.isprintable()
        )  # Serve's proxy makes one, and sends it back itself
        request_id = given if named else uuid.uuid4().hex
        if not named:
            headers["x-request-id"] = request_id
        wanted = scope["method"] == "POST" and self._path(scope) == "/predict"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-prism-model", self._model(scope).encode("latin-1"))]
                if not named:
                    own.append((b"x-request-id", request_id.encode("latin-1")))
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            refusal = self._refusal(scope, headers, request_id)
            if refusal is not None:
                await refusal(scope, receive, answer)
                return
            await (self.predict if wanted else self.app)(scope, self._limited(receive), answer)
        except Exception as error:
            LOG.exception("request %s failed unexpectedly", request_id)
            if status:
                raise
            await problem_of(request_id, error)(scope, receive, answer)
        finally:
            self._record(scope, request_id, status or 499, time.perf_counter() - began)

    def _model(self, scope: Scope) -> str:
        """The model that answered, or that would have."""
        ticket = scope.get(TICKET)
        return ticket.model if ticket is not None and ticket.model else self.service.current.label

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Count the request, and write a line for it with what is known of its way."""
        path = self._path(scope)
        if path in OPEN:
            return
        path = quote(path[:200], errors="replace")  # in one line, whatever a client made up
        model, name = self._model(scope), self.service.args.endpoint
        self.service.meter.request(status, model)
        fields = {
            "request_id": request_id,
            "endpoint": name,
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "model": model,
        }
        ticket: Ticket | None = scope.get(TICKET)
        if ticket is not None:
            fields |= ticket.record()
        values = (scope["method"], name, path[1:], status, fields["ms"])  # Serve puts the request's id before it
        LOG.info("%s %s/%s %s %s ms", *values, extra={"serve_access_log": True, "log_to_stderr": False, **fields})

    @staticmethod
    def _path(scope: Scope) -> str:
        return scope["path"].removeprefix(scope.get("root_path", ""))

    def _refusal(self, scope: Scope, headers: Headers, request_id: str) -> ASGIApp | None:
        path = self._path(scope)
        if self.token_digest is not None and path not in OPEN and not self._knows_token(headers):
            text = "a valid token is needed: Authorization: Bearer TOKEN"
            return problem_response(request_id, 401, text, www_authenticate="Bearer")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            return problem_response(request_id, 413, self._too_large())
        return None

    def _knows_token(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = sha256(token.strip().encode("latin-1")).hexdigest()
        return hmac.compare_digest(presented, self.token_digest) and scheme.lower() == "bearer"

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts: a body in chunks has no length to look at."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes; split the request"
