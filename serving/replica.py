"""The Ray Serve deployment behind every endpoint: one process, one loaded model, one call of it at a time."""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

import ray
from fastapi import FastAPI
from pydantic import BaseModel

from cluster.registry import follows
from library.errors import InputError
from serving.app import ENDPOINTS, open_host
from serving.batcher import Batcher, Ticket
from serving.endpoint import Abandoned, answer_batch, check_cost
from serving.gate import one_line_each
from serving.memory import keep_freed_memory
from serving.metrics import Meter
from serving.problems import Gone, Late, Overloaded
from serving.routes import Update, application
from serving.settings import EndpointArgs
from serving.updates import Follower, Loaded, load, load_proven

LOG = logging.getLogger("ray.serve")
FAILED_CALLS = 3  # unexpected failures in a row after which Serve replaces the replica


class Replica:
    """Loads the artifact of `args`, then answers requests in batches; `args.artifact` is a reference, never None.

    The model runs in a thread of its own, so that the event loop stays free for health checks and for requests that
    are refused. When the reference is an alias that comes to mean another artifact, that takes over between two
    batches. Raises ArtifactError or InputError when the artifact cannot be served.
    """

    def __init__(self, args: EndpointArgs, token_digest: str | None):
        keep_freed_memory()
        LOG.addFilter(one_line_each)
        kind = ENDPOINTS[args.endpoint]
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.args, self.token_digest = args, token_digest
        if token_digest is None and (host := open_host()):
            LOG.warning("%s needs no token, and listens on %s: set PRISM_TOKEN or token_file", kind.name, host)
        self.current = load(kind, args.artifact, device)
        self.meter = Meter(kind.name, kind.score_bounds)
        self.request_cost = args.request_cost or kind.request_cost
        self.pending = self.failed_calls = 0
        self.batcher = Batcher(
            self._answer,
            limit=max(args.batch_cost or kind.batch_cost, self.request_cost),
            wait_s=args.batch_wait_s,
            name=kind.name,
        )
        self.follower = None
        if args.update_period_s and follows(args.artifact):
            self.follower = Follower(
                args.artifact,
                load=partial(load_proven, kind, args.artifact, device),
                current=lambda: self.current.artifact.version,
                take=self._take,
                told=self.meter.update,
                period_s=args.update_period_s,
            )
            self.follower.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return application(self, self.token_digest)

    def accept(self, request: BaseModel, *, wants_progress: bool = False) -> Ticket:
        """Let a request wait for its answer. Raises InputError, TooLarge or Overloaded."""
        cost = self.current.endpoint.cost(request)
        check_cost(self.current.endpoint, cost, self.request_cost)
        if self.pending >= self.args.max_pending:
            raise Overloaded(f"{self.pending} requests are waiting; retry after a moment")
        self.pending += 1
        ticket = Ticket(request, cost, wants_progress=wants_progress)
        ticket.answer.add_done_callback(self._left)
        self.batcher.put(ticket)
        return ticket

    async def answer(self, ticket: Ticket) -> BaseModel:
        """The response to an accepted request. Raises InputError, Late, Gone, or what the model raised.

        Its place in the batch is given up after the time limit, or when who waits for it here is cancelled.
        """
        timer = ticket.loop.call_later(ticket.left(self.args.timeout_s), ticket.expire)
        try:
            outcome = await ticket.answer
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            if ticket.expired:
                text = f"no answer within {self.args.timeout_s:g} seconds; ask for less, or retry later"
                raise Late(text) from None
            raise Gone("the client has gone away") from None
        finally:
            timer.cancel()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def not_ready(self) -> str | None:
        """Why no request should come here now; None when it may."""
        if self.failed_calls >= FAILED_CALLS:
            return f"the last {self.failed_calls} calls of the model failed"
        if self.pending >= self.args.max_pending:
            return f"{self.pending} requests are waiting"
        return None

    def limits(self) -> dict[str, int | float | str]:
        """What a request may ask for."""
        return {
            "request_cost": self.request_cost,
            "cost_unit": self.current.endpoint.cost_unit,
            "max_body_bytes": self.args.max_body_bytes,
            "timeout_s": self.args.timeout_s,
            "max_pending": self.args.max_pending,
            **self.current.endpoint.limits(),
        }

    def check_health(self) -> None:
        """Serve calls this, and replaces a replica that raises."""
        if self.failed_calls >= FAILED_CALLS:
            raise RuntimeError(f"the last {self.failed_calls} calls of the model failed")

    def update(self) -> Update:
        """Whether a new artifact would be taken, and which one was not."""
        refused = self.follower.refused if self.follower else None
        return Update(reference=self.args.artifact, followed=self.follower is not None, refused=refused)

    def close(self) -> None:
        """End the threads."""
        self.batcher.close()
        if self.follower:
            self.follower.stop()

    def _take(self, new: Loaded) -> None:
        self.current = new
        self.failed_calls = 0

    def _left(self, _: asyncio.Future) -> None:
        self.pending -= 1

    def _answer(self, batch: Sequence[Ticket]) -> None:
        """Answer a batch, in the model's thread; each group of it gets its answers as soon as it has been called."""
        loop, model = batch[0].loop, self.current
        began = time.perf_counter()
        for places, outcomes in answer_batch(model.endpoint, [ticket.request for ticket in batch], batch):
            ended = time.perf_counter()
            tickets = [batch[place] for place in places]
            for ticket in tickets:
                ticket.model, ticket.batch, ticket.began, ticket.ended = model.label, len(places), began, ended
            loop.call_soon_threadsafe(self._finish, tickets, outcomes)
            if not isinstance(outcomes[0], Abandoned):
                self._measure(model, tickets, outcomes)
            began = time.perf_counter()

    def _measure(self, model: Loaded, tickets: Sequence[Ticket], outcomes: Sequence[BaseModel | Exception]) -> None:
        waits = [ticket.began - ticket.arrived for ticket in tickets]
        first = tickets[0]
        self.meter.call(waits, first.ended - first.began, len(tickets), sum(ticket.cost for ticket in tickets))
        for outcome in outcomes:
            if not isinstance(outcome, Exception):
                self.meter.scores(model.endpoint.scores(outcome), model.label)

    def _finish(self, tickets: Sequence[Ticket], outcomes: Sequence[BaseModel | Exception]) -> None:
        told = [outcome for outcome in outcomes if not isinstance(outcome, Abandoned)]
        broken = [isinstance(outcome, Exception) and not isinstance(outcome, InputError) for outcome in told]
        if told:
            self.failed_calls = self.failed_calls + 1 if all(broken) else 0
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            ticket.finish(outcome)
