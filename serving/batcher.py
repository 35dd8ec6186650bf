"""Requests on their way to the model: who waits, in which batch, and how their answers come back.

One thread calls the model. While it does, requests gather; when it is free they become the next batch, in their order,
as many as `limit` of cost allows. So batches grow with the load and a lone request waits for nobody. Ray Serve's own
`serve.batch` cuts batches by time even while the model is busy; they queue as small as they were cut.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.endpoint import Progress

LOG = logging.getLogger("ray.serve")


class Ticket:
    """A request that waits for its answer, and what it costs. Made in the event loop.

    model, batch, began, ended     which model answered, with how many requests in one call, from when to when
    expired                        whether nobody waits any more because it took too long
    """

    def __init__(self, request: Any, cost: int, *, wants_progress: bool = False):
        self.request, self.cost = request, cost
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()
        self.events: asyncio.Queue[Progress | None] | None = asyncio.Queue() if wants_progress else None
        self.arrived = time.perf_counter()
        self.model, self.batch, self.began, self.ended = "", 0, 0.0, 0.0
        self.expired = False
        if self.events is not None:
            self.answer.add_done_callback(lambda _: self.events.put_nowait(None))  # after the last progress

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more; any thread may ask."""
        return self.answer.cancelled()

    def record(self) -> dict[str, int | float]:
        """What a log line says of its way: cost, batch, milliseconds before and in the call of the model."""
        if not self.ended:
            return {"cost": self.cost}
        waited, called = self.began - self.arrived, self.ended - self.began
        return {
            "cost": self.cost,
            "batch": self.batch,
            "queue_ms": round(1000 * waited, 2),
            "model_ms": round(1000 * called, 2),
        }

    def left(self, limit_s: float) -> float:
        """Seconds until it has waited for `limit_s`; at least 0."""
        return max(0.0, limit_s - (time.perf_counter() - self.arrived))

    def show(self, progress: Progress) -> None:
        """Put progress where the client's stream takes it from; any thread may call this."""
        if self.events is not None:
            self.loop.call_soon_threadsafe(self.events.put_nowait, progress)

    def finish(self, outcome: Any) -> None:
        """Give the outcome, a response or an exception, to who waits; in the event loop."""
        if not self.answer.done():
            self.answer.set_result(outcome)

    def cancel(self) -> None:
        """Nobody waits any more; in the event loop."""
        self.answer.cancel()

    def expire(self) -> None:
        """Likewise, because it took too long."""
        self.expired = self.answer.cancel()


class Batcher:
    """Gathers tickets and calls `run` with a batch of them in the model's thread, one batch at a time.

    limit    most that the tickets of a batch may cost together; one that costs more goes alone
    wait_s   how long a batch waits for as many as were in the one before: clients that come together, come again
    """

    def __init__(self, run: Callable[[Sequence[Ticket]], None], *, limit: int, wait_s: float, name: str):
        self.run, self.limit, self.wait_s = run, limit, wait_s
        self.waiting: deque[Ticket] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._company = 0
        self._work: asyncio.Task[None] | None = None

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait for its turn; in the event loop."""
        self.waiting.append(ticket)
        if self._work is None:
            self._work = ticket.loop.create_task(self._run_all())
            self._work.add_done_callback(self._ended)

    def close(self) -> None:
        """End the model's thread after its present batch."""
        self.thread.shutdown(wait=False)

    async def _run_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            if len(self.waiting) < self._company and sum(ticket.cost for ticket in self.waiting) < self.limit:
                await asyncio.sleep(self.wait_s)
            batch = self._take()
            self._company = len(batch)
            if not batch:
                continue
            try:
                await loop.run_in_executor(self.thread, self.run, batch)
            except Exception as error:
                LOG.exception("a batch failed outside the model")
                for ticket in batch:
                    ticket.finish(error)
            await asyncio.sleep(0)  # the answers go out, and what has come meanwhile is read

    def _take(self) -> list[Ticket]:
        """The next batch; tickets for which nobody waits are dropped."""
        batch: list[Ticket] = []
        cost = 0
        while self.waiting:
            ticket = self.waiting[0]
            if not ticket.gone:
                if batch and cost + ticket.cost > self.limit:
                    break
                batch.append(ticket)
                cost += ticket.cost
            self.waiting.popleft()
        return batch

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._work = None
        if self.waiting:  # one came while the task was ending
            self.put(self.waiting.pop())
