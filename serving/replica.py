"""The Ray Serve deployment behind every endpoint: one process, one loaded model, one call of it at a time."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from cluster.registry import resolve
from library.artifact import open_artifact
from library.errors import InputError
from serving.app import ENDPOINTS
from serving.endpoint import answer_batch, check_cost
from serving.problems import Late, Overloaded
from serving.routes import application
from serving.settings import EndpointArgs

FAILED_CALLS = 3  # unexpected failures in a row after which Serve replaces the replica


@dataclass(frozen=True)
class Job:
    """A request that waits for its batch, and what it costs."""

    request: BaseModel
    cost: int


def batch_cost(jobs: Sequence[Job]) -> int:
    """What requests cost together."""
    return sum(job.cost for job in jobs)


class Replica:
    """Loads the artifact of `args`, then answers requests in batches; `args.artifact` is a reference, never None.

    The model runs in a thread of its own, so that the event loop stays free for health checks and for requests that
    are refused. Raises ArtifactError or InputError when the artifact cannot be served.
    """

    def __init__(self, args: EndpointArgs, token_digest: str | None):
        kind = ENDPOINTS[args.endpoint]
        self.args, self.token_digest = args, token_digest
        self.artifact = open_artifact(resolve(args.artifact, kind=kind.kind), verify=False)  # resolve has verified it
        self.endpoint = kind.load(self.artifact, "cuda" if ray.get_gpu_ids() else "cpu")
        self.request_cost = args.request_cost or kind.request_cost
        self.pending = self.failed_calls = 0
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix=kind.name)
        self._batched = serve.batch(
            max_batch_size=max(args.batch_cost or kind.batch_cost, self.request_cost),
            batch_wait_timeout_s=args.batch_wait_s,
            batch_size_fn=batch_cost,
        )(self._answer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return application(self, self.token_digest)

    async def predict(self, request: BaseModel) -> BaseModel:
        """The response to a request. Raises InputError, Overloaded, Late, or what the model raised."""
        cost = self.endpoint.cost(request)
        check_cost(self.endpoint, cost, self.request_cost)
        if self.pending >= self.args.max_pending:
            raise Overloaded(f"{self.pending} requests are waiting; retry after a moment")
        self.pending += 1
        try:
            outcome = await asyncio.wait_for(self._batched(Job(request, cost)), self.args.timeout_s)
        except TimeoutError:
            raise Late(f"no answer within {self.args.timeout_s:g} seconds; ask for less, or retry later") from None
        finally:
            self.pending -= 1
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
            "cost_unit": self.endpoint.cost_unit,
            "max_body_bytes": self.args.max_body_bytes,
            "timeout_s": self.args.timeout_s,
            "max_pending": self.args.max_pending,
            **self.endpoint.limits(),
        }

    def check_health(self) -> None:
        """Serve calls this, and replaces a replica that raises."""
        if self.failed_calls >= FAILED_CALLS:
            raise RuntimeError(f"the last {self.failed_calls} calls of the model failed")

    async def _answer(self, jobs: list[Job]) -> list[Any]:
        requests = [job.request for job in jobs]
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self.model_thread, answer_batch, self.endpoint, requests)
        broken = [isinstance(outcome, Exception) and not isinstance(outcome, InputError) for outcome in outcomes]
        self.failed_calls = self.failed_calls + 1 if all(broken) else 0
        return outcomes
