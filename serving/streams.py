"""Answers as server-sent events: progress while it happens, then the response; and clients that go away.

A client that asks with `Accept: text/event-stream` gets, in this order:

    event: progress      data: a `Progress`, after each step of a slow answer; none from an endpoint without steps
    event: result        data: the response, the same as without streaming, last
    event: problem       data: instead of it a `Problem` with its `status`, when something failed after the first event

What is refused before the first step gets its plain status instead: 401, 413, 422, 429. While nothing happens, a
comment line every QUIET_S seconds keeps proxies from closing the connection.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.batcher import Ticket
from serving.problems import EXPECTED, LOG, problem_of, request_id

EVENTS = "text/event-stream"
QUIET_S = 10.0
ANSWERS = {
    "description": f"The answer; with `Accept: {EVENTS}` events of progress, then the answer as the last event.",
    "content": {EVENTS: {"schema": {"type": "string"}}},
}


def wants_events(headers: Headers) -> bool:
    """Whether the client asks for a stream of events."""
    return EVENTS in headers.get("accept", "")


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """While this lasts, the ticket is cancelled when its client disconnects. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def event_stream(answer: Coroutine[Any, Any, BaseModel], ticket: Ticket, request: Request) -> "EventStream":
    """The stream of a ticket that wants progress, once it has begun or nothing has happened for QUIET_S seconds.

    Raises what `answer` raises before that.
    """
    answering = asyncio.create_task(answer)
    first = asyncio.create_task(ticket.events.get())
    try:
        async with cancelled_on_disconnect(ticket, request.receive):
            await asyncio.wait({first}, timeout=QUIET_S)
            if first.done() and first.result() is None:
                await answering
    except BaseException:
        _stop(answering, first, ticket)
        raise
    return EventStream(answering, first, ticket, request_id(request))


class EventStream(Response):
    """The events of a ticket as a response; the ticket is cancelled when the client goes away."""

    def __init__(self, answering: asyncio.Task[BaseModel], first: asyncio.Task[Any], ticket: Ticket, identifier: str):
        super().__init__(None, 200, {"cache-control": "no-store", "x-accel-buffering": "no"}, EVENTS)
        del self.headers["content-length"]
        self.answering, self.next, self.ticket, self.identifier = answering, first, ticket, identifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""

        async def put(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            async with cancelled_on_disconnect(self.ticket, receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for text in self._events():
                    await put(text)
                await put(await self._last(), more=False)
        finally:
            _stop(self.answering, self.next, self.ticket)

    async def _events(self) -> AsyncIterator[str]:
        while True:
            await asyncio.wait({self.next}, timeout=QUIET_S)
            if not self.next.done():
                yield ": still waiting\n\n"
            elif (progress := self.next.result()) is None:
                return
            else:
                yield _event("progress", progress.model_dump_json())
                self.next = asyncio.create_task(self.ticket.events.get())

    async def _last(self) -> str:
        try:
            return _event("result", (await self.answering).model_dump_json())
        except Exception as error:
            if not isinstance(error, EXPECTED):
                LOG.error("request %s failed unexpectedly", self.identifier, exc_info=error)
            problem = problem_of(self.identifier, error)
            return _event("problem", json.dumps({"status": problem.status_code, **json.loads(problem.body)}))


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _stop(answering: asyncio.Task[Any], following: asyncio.Task[Any], ticket: Ticket) -> None:
    for part in (answering, following, ticket):  # the answer first: it is not to be told that its client is gone
        part.cancel()
