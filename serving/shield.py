"""Middleware of Serve's proxies: requests of a replica that dies are asked again, and no client sees Serve's inside.

Answers of a replica carry X-Prism-Model and pass untouched. For a replica that was lost, Serve's proxy ends without a
word, which its web server turns into a bare 500. Predictions change nothing, so they are sent again instead, up to
RETRIES times: to another replica, or to the one that takes its place. What still fails is told to retry, in the words
of every other refusal: 503 with Retry-After. So are requests that found no replica for NOBODY_S seconds, or a proxy
that has just started and does not know its paths yet. An event stream that had begun ends with its event `problem`;
any other answer that had begun is cut.

Ray calls `middlewares` in each proxy that has `ingress.ENVIRONMENT`: `serve_endpoints` and `serving/prism.yaml` give
that to Serve's controller, from which the proxies have it.
"""

import asyncio
import json
import logging
from http import HTTPStatus
from types import TracebackType
from typing import Self

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.problems import problem_response

LOG = logging.getLogger("ray.serve")
RETRIES = 4
PAUSE_S = 0.1
NOBODY_S, LOOK_S = 15.0, 3.0
MOST_KEPT = 64 << 20  # bytes of a body that can be sent again
ROUTES = "/-/routes"
LOST = "the model's process was lost; retry after a moment"
NOBODY = "no process serves this model now; retry after a moment"
STARTING = "the server is starting; retry after a moment"
WORDS = {  # of Serve itself, by its status: ours and what we say
    408: (503, "no answer within the server's time limit; ask for less, or retry later"),
    429: (429, "too many requests are waiting; retry after a moment"),
    503: (503, NOBODY),
}


def middlewares() -> list[Middleware]:
    """What a proxy puts around itself."""
    return [Middleware(Shield)]


class Shield:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        body = _Kept(receive)
        again = RETRIES if scope["method"] in ("GET", "HEAD") or scope["path"].endswith("/predict") else 0
        for attempt in range(again + 1):
            answer = _Answer(send)
            async with _Patience(self.app, scope["path"], answer) as patience:
                await self.app(scope | {"headers": list(scope["headers"])}, body.again(), answer)
            if answer.finished or body.gone:
                return
            if answer.begun or answer.held or patience.over or not body.whole:
                break
            LOG.warning("the replica of %s was lost in attempt %d of %d", scope["path"], attempt + 1, again + 1)
            if attempt < again:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        await self._end(scope, answer, NOBODY if patience.over else LOST)

    async def _end(self, scope: Scope, answer: "_Answer", reason: str) -> None:
        """Tell the client how it ended when its replica did not."""
        identifier = answer.headers.get("x-request-id") or Headers(scope=scope).get("x-request-id", "none")
        if answer.begun:
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                told = {"status": 503, "error": LOST, "fields": [], "request_id": identifier}
                last = f"event: problem\ndata: {json.dumps(told)}\n\n".encode()
                await answer.send({"type": "http.response.body", "body": last, "more_body": False})
            return
        status, wait = 503, "1"
        if answer.held:
            status, wait = answer.held[0]["status"], answer.headers.get("retry-after", "1")
            if status == HTTPStatus.NOT_FOUND:
                if await self._knows_its_paths(scope):
                    for message in answer.held:
                        await answer.send(message)
                    return
                status, reason = 503, STARTING
            else:
                status, reason = WORDS[status]
        problem = problem_response(identifier, status, reason, retry_after=wait, x_request_id=identifier)
        await problem(scope, _nothing, answer.send)

    async def _knows_its_paths(self, scope: Scope) -> bool:
        """Whether the proxy has been told by its controller what is served where."""
        answer = _Answer(_nowhere)
        about = {"path": ROUTES, "raw_path": ROUTES.encode(), "method": "GET", "query_string": b""}
        await self.app(scope | about | {"headers": []}, _nothing, answer)
        return answer.status == HTTPStatus.OK


class _Kept:
    """A request's body, which can be received again from its beginning."""

    def __init__(self, receive: Receive):
        self.receive = receive
        self.messages: list[Message] = []
        self.size = 0
        self.whole = True  # what was received is kept
        self.gone = False  # the client is

    def again(self) -> Receive:
        """`receive` from the beginning."""
        place = 0

        async def replayed() -> Message:
            nonlocal place
            if place < len(self.messages):
                place += 1
                return self.messages[place - 1]
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                return message
            self.size += len(message.get("body", b""))
            if self.whole and self.size <= MOST_KEPT:
                self.messages.append(message)
                place += 1
            else:
                self.whole = False
                self.messages.clear()
            return message

        return replayed


class _Answer:
    """`send` that notes what became of an answer, and holds back what Serve itself says.

    begun, finished     whether its first message went out, and its last
    held                a refusal of Serve's own, which was not sent
    """

    def __init__(self, send: Send):
        self.send = send
        self.headers = Headers()
        self.status = 0
        self.begun = self.finished = False
        self.held: list[Message] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.headers, self.status = Headers(raw=message["headers"]), message["status"]
            if self._of_serve():
                self.held.append(message)
                return
            self.begun = True
        elif self.held:
            self.held.append(message)
            return
        elif message["type"] == "http.response.body":
            self.finished = not message.get("more_body", False)
        await self.send(message)

    def _of_serve(self) -> bool:
        plain = self.headers.get("content-type", "").startswith("text/plain")
        return plain and "x-prism-model" not in self.headers and self.status in (HTTPStatus.NOT_FOUND, *WORDS)


class _Patience:
    """While this lasts, the task is cancelled when no replica has served the path for NOBODY_S seconds."""

    def __init__(self, app: ASGIApp, path: str, answer: _Answer):
        self.app, self.path, self.answer = app, path, answer
        self.waited, self.over = 0.0, False

    async def __aenter__(self) -> Self:
        self.task, self.loop = asyncio.current_task(), asyncio.get_running_loop()
        self.timer = self.loop.call_later(LOOK_S, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.timer.cancel()
        return self.over and self.task.uncancel() == 0 and kind in (None, asyncio.CancelledError)

    def _look(self) -> None:
        if self.answer.begun:
            return
        self.waited = 0.0 if _served(self.app, self.path) else self.waited + LOOK_S
        if self.waited >= NOBODY_S:
            self.over = True
            self.task.cancel()
        else:
            self.timer = self.loop.call_later(LOOK_S, self._look)


def _served(app: ASGIApp, path: str) -> bool:
    """Whether a replica lives behind the path, as Serve's router sees it: Ray 2.60 has no public word for that."""
    try:
        _, handle, _ = app._app.proxy_router.match_route(path)
        router = handle._router._asyncio_router._request_router
    except (AttributeError, TypeError):  # another Ray, or nothing is known of the path
        return True
    return router is not None and bool(router.curr_replicas)


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _nowhere(_: Message) -> None:
    pass
