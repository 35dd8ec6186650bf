"""What every request passes first: its id, its token, its size; and on the way out the model's version.

Nothing of a body is read before the token has been checked, and nothing of an unexpected failure but the request's id
gets out.
"""

import hmac
import uuid
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.problems import LOG, problem_of, problem_response

OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")


class Gate:
    """ASGI middleware around the application of one endpoint.

    `token_digest` is the SHA-256 of the token that all but the paths in OPEN need, None when none is needed.
    """

    def __init__(self, app: ASGIApp, *, version: str, token_digest: str | None, max_body_bytes: int):
        self.app, self.version = app, version
        self.token_digest, self.max_body_bytes = token_digest, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        started = False
        named = "x-request-id" in headers  # Serve's proxy makes an id and sends it back, with or without the client's
        request_id = headers.setdefault("x-request-id", uuid.uuid4().hex)

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                outgoing = MutableHeaders(scope=message)
                outgoing["X-Prism-Model"] = self.version
                if not named:
                    outgoing["X-Request-Id"] = request_id
            await send(message)

        refusal = self._refusal(scope, headers, request_id)
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        try:
            await self.app(scope, self._limited(receive), answer)
        except Exception as error:
            LOG.exception("request %s failed unexpectedly", request_id)
            if started:
                raise
            await problem_of(request_id, error)(scope, receive, answer)

    def _refusal(self, scope: Scope, headers: Headers, request_id: str) -> ASGIApp | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.token_digest is not None and path not in OPEN and not self._knows_token(headers):
            text = "a valid token is needed: Authorization: Bearer TOKEN"
            return problem_response(request_id, 401, text, www_authenticate="Bearer")
        if int(headers.get("content-length", 0)) > self.max_body_bytes:
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
