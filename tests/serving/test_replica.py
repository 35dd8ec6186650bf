"""A replica in this process: batches by cost, limits, and what makes it unhealthy."""

import asyncio
import threading

import pytest

from library.errors import ArtifactError, InputError
from serving.app import ENDPOINTS
from serving.problems import Late, Overloaded
from serving.replica import FAILED_CALLS, Replica
from serving.send import Score, ScoreRequest, ScoreResponse
from serving.settings import EndpointArgs


class Recorder(Score):
    """Answers at once, keeps the calls, and can be held up or broken."""

    calls: list[list[int]]
    go: threading.Event

    @classmethod
    def load(cls, artifact, device):
        endpoint = cls(None, artifact.version)
        endpoint.calls, endpoint.go, endpoint.broken = [], threading.Event(), False
        endpoint.go.set()
        return endpoint

    def answer(self, requests):
        self.calls.append([len(request.text) for request in requests])
        self.go.wait(30)
        if self.broken:
            raise RuntimeError("the device is gone")
        return [ScoreResponse(model=request.text, results=[]) for request in requests]

    def limits(self):
        return {}


def texts(*lengths: int) -> list[ScoreRequest]:
    return [ScoreRequest(text="x" * length) for length in lengths]


@pytest.fixture
def replica(ray_cluster, send_artifact, monkeypatch):
    """Makes a replica of the recorder with the given limits; call it inside the event loop."""
    monkeypatch.setitem(ENDPOINTS, "score", Recorder)
    made = []

    def make(**args) -> Replica:
        made.append(Replica(EndpointArgs(endpoint="score", artifact=str(send_artifact.path), **args), None))
        return made[-1]

    yield make
    for replica in made:
        replica.current.endpoint.go.set()
        replica.close()


async def predict(replica: Replica, request: ScoreRequest) -> ScoreResponse:
    return await replica.answer(replica.accept(request))


async def outcomes(replica: Replica, requests: list[ScoreRequest]) -> list:
    return await asyncio.gather(*(predict(replica, request) for request in requests), return_exceptions=True)


def test_requests_that_come_together_share_one_call_and_each_gets_its_own_answer(replica):
    async def run():
        service = replica()
        answers = await outcomes(service, texts(*range(1, 17)))
        return service.current.endpoint.calls, [len(answer.model) for answer in answers]

    assert asyncio.run(run()) == ([list(range(1, 17))], list(range(1, 17)))


def test_batches_are_filled_by_cost(replica):
    async def run():
        service = replica(request_cost=10, batch_cost=10, batch_wait_s=0.1)
        answers = await outcomes(service, texts(6, 4, 6, 4, 10))
        return service.current.endpoint.calls, [len(answer.model) for answer in answers]

    calls, lengths = asyncio.run(run())
    assert calls[0] == [6, 4]
    assert all(sum(call) <= 10 for call in calls)
    assert sorted(cost for call in calls for cost in call) == [4, 4, 6, 6, 10]
    assert lengths == [6, 4, 6, 4, 10]


def test_a_request_that_costs_too_much_is_refused_before_the_model(replica):
    async def run():
        service = replica(request_cost=10)
        return await outcomes(service, texts(11)), service.current.endpoint.calls

    [refusal], calls = asyncio.run(run())
    assert isinstance(refusal, InputError)
    assert str(refusal) == "body: 11 bytes of text are asked for; one request may ask for at most 10"
    assert calls == []


def test_a_full_replica_refuses_more_and_says_that_it_is_not_ready(replica):
    async def run():
        service = replica(max_pending=2)
        service.current.endpoint.go.clear()
        waiting = [asyncio.ensure_future(predict(service, request)) for request in texts(1, 2)]
        await asyncio.sleep(0)
        [third], reason = await outcomes(service, texts(3)), service.not_ready()
        service.check_health()  # full is not broken
        service.current.endpoint.go.set()
        return third, reason, await asyncio.gather(*waiting), service.not_ready()

    third, reason, answers, after = asyncio.run(run())
    assert isinstance(third, Overloaded)
    assert reason == "2 requests are waiting"
    assert [answer.model for answer in answers] == ["x", "xx"]
    assert after is None


def test_an_answer_that_takes_too_long_is_given_up_while_the_loop_stays_free(replica):
    async def run():
        service = replica(timeout_s=0.2)
        service.current.endpoint.go.clear()
        [late] = await outcomes(service, texts(1))
        pending = service.pending
        service.current.endpoint.go.set()
        return late, pending, await outcomes(service, texts(5))

    late, pending, [answer] = asyncio.run(run())
    assert isinstance(late, Late)
    assert (pending, answer.model) == (0, "xxxxx")


def test_a_model_that_keeps_failing_makes_the_replica_unhealthy(replica):
    async def run():
        service = replica()
        service.current.endpoint.broken = True
        for _ in range(FAILED_CALLS - 1):
            await outcomes(service, texts(1))
            service.check_health()
        await outcomes(service, texts(1))
        with pytest.raises(RuntimeError, match=f"last {FAILED_CALLS} calls"):
            service.check_health()
        reason = service.not_ready()
        service.current.endpoint.broken = False
        await outcomes(service, texts(1))
        service.check_health()
        return reason, service.not_ready()

    reason, after = asyncio.run(run())
    assert "calls of the model failed" in reason
    assert after is None


def test_artifacts_that_cannot_be_served_are_refused_when_the_replica_starts(
    ray_cluster, send_artifact, rewritten, tmp_path
):
    other = rewritten(send_artifact, tmp_path / "other", kind="farms")
    torn = rewritten(send_artifact, tmp_path / "torn", weights={})
    for artifact, complaint in ((other, "'farms', not of 'send'"), (torn, "torn")):
        with pytest.raises(ArtifactError, match=complaint):
            Replica(EndpointArgs(endpoint="score", artifact=str(artifact.path)), None)
