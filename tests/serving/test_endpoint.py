"""Requests that share calls of the model, and what the request bodies of SeND's endpoints allow."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from library.errors import InputError
from library.send.detector import HallucinationDetector
from serving.app import ENDPOINTS
from serving.client import example
from serving.endpoint import answer_batch
from serving.send import Hallucination, HallucinationRequest, Score, ScoreRequest


class Halver:
    """Halves even numbers; groups them by their hundreds, and keeps the calls it was asked for."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def group(self, request: int) -> int:
        return request // 100

    def answer(self, requests: list[int]) -> list[int]:
        self.calls.append(list(requests))
        for number in requests:
            if number % 2:
                raise InputError(f"number: {number} is odd")
            if number == 666:
                raise RuntimeError("the model broke")
        return [number // 2 for number in requests]


def test_one_call_for_each_group_and_answers_in_the_order_of_the_requests():
    halver = Halver()
    assert list(answer_batch(halver, [2, 104, 6, 108])) == [([0, 2], [1, 3]), ([1, 3], [52, 54])]
    assert halver.calls == [[2, 6], [104, 108]]


def test_only_the_request_at_fault_gets_the_exception():
    halver = Halver()
    outcomes = [None] * 9
    for places, found in answer_batch(halver, [2, 4, 7, 8, 10, 12, 14, 666, 16]):
        for place, outcome in zip(places, found, strict=True):
            outcomes[place] = outcome
    assert [o for o in outcomes if isinstance(o, int)] == [1, 2, 4, 5, 6, 7, 8]
    assert str(outcomes[2]) == "number: 7 is odd"
    assert isinstance(outcomes[7], RuntimeError)
    assert halver.calls[-1] == [666]  # a group of its own
    assert len(halver.calls[:-1]) == 1 + 2 * 3  # two halves per level on the way to the one of eight at fault


@pytest.fixture(scope="module")
def hallucination(send_artifact) -> Hallucination:
    return Hallucination.load(send_artifact, "cpu")


def test_requests_of_one_group_get_what_they_get_alone(hallucination):
    requests = [
        HallucinationRequest(prompt="Two and two", seed=3),
        HallucinationRequest(prompts=["Paris is", "A", "B"]),
    ]
    assert len({hallucination.group(request) for request in requests}) == 1
    together = hallucination.answer(requests)
    for request, answer in zip(requests, together, strict=True):
        [alone] = hallucination.answer([request])
        assert len(alone.results) == len(answer.results) == len(request.texts())
        for a, b in zip(alone.results, answer.results, strict=True):
            assert (a.answer, a.samples, a.flags) == (b.answer, b.samples, b.flags)
            assert a.eigenscore == pytest.approx(b.eigenscore, abs=1e-4)


def test_what_is_answered_is_what_the_library_finds(hallucination, send_artifact):
    detector = HallucinationDetector.from_artifact(send_artifact)
    [found] = detector.detect(["Paris is"], seed=5, explain=True)
    [response] = hallucination.answer([HallucinationRequest(prompt="Paris is", seed=5, explain=True)])
    [answer] = response.results
    assert (answer.answer, tuple(answer.samples), answer.eigenscore) == (found.answer, found.samples, found.eigenscore)
    assert (answer.ees, answer.standard_error, answer.method) == (found.ees, found.ees_standard_error, found.method)
    assert answer.risk == pytest.approx((answer.eigenscore + 5) / 10)
    assert (tuple(answer.eigenvalues), answer.no_risk) == (found.eigenvalues, None)


def test_settings_that_differ_need_calls_of_their_own(hallucination):
    bodies = [{}, {"samples": 4}, {"top_k": None}, {"explain": True}, {"alpha": 0.5}, {"layer": 1}]
    groups = {hallucination.group(HallucinationRequest(prompt="a", **body)) for body in bodies}
    groups.add(hallucination.group(HallucinationRequest(embeddings=[[1.0, 2.0], [2.0, 1.0]])))
    assert len(groups) == len(bodies) + 1


def test_cost_counts_tokens_with_the_models_own_number_of_samples_and_length(hallucination):
    assert hallucination.cost(HallucinationRequest(prompt="a")) == 5 * (1 + 6)
    assert hallucination.cost(HallucinationRequest(prompts=["a", "é", "c"], samples=9, max_new_tokens=2)) == 10 * 10
    assert hallucination.cost(HallucinationRequest(prompt="x" * 1000)) == 5 * (256 + 6)  # no more than fit
    assert hallucination.cost(HallucinationRequest(embeddings=[[1.0] * 640] * 30)) == 30 * 640 // 64
    assert hallucination.cost(HallucinationRequest(embeddings=[[1.0, 2.0], [2.0, 1.0]])) == 1
    score = Score(SimpleNamespace(), "v")
    assert score.cost(ScoreRequest(texts=["a", "é"])) == 3


@pytest.mark.parametrize("error", ["prompts[0]: empty", "prompts[10]: empty", "layer: 9 is not there"])
def test_errors_name_the_field_of_the_request(error):
    def detect(*_, **__):
        raise InputError(error)

    endpoint = Hallucination(SimpleNamespace(detect=detect), "v")
    with pytest.raises(InputError) as single:
        endpoint.answer([HallucinationRequest(prompt="a")])
    assert str(single.value) == error.replace("prompts[0]", "prompt")
    with pytest.raises(InputError) as several:
        endpoint.answer([HallucinationRequest(prompts=["a"])])
    assert str(several.value) == error


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "give one of prompt, prompts and embeddings, not none"),
        ({"prompt": "a", "prompts": ["b"]}, "not prompt and prompts"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"] * 65}, "prompts"),
        ({"prompt": "a", "samples": 1}, "samples"),
        ({"prompt": "a", "samples": "3"}, "samples"),
        ({"prompt": "a", "samples": True}, "samples"),
        ({"prompt": "a", "temperature": 0}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 1.01}, "top_p"),
        ({"prompt": "a", "alpha": float("inf")}, "alpha"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "layer": "first"}, "layer"),
        ({"prompt": "a", "convention": "outside"}, "convention"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"embeddings": [[1.0, 2.0]]}, "embeddings"),
        ({"embeddings": [[1.0], [2.0]]}, "embeddings"),
        ({"embeddings": [[1.0, float("nan")], [2.0, 1.0]]}, "embeddings"),
        ({"embeddings": [[1.0, 2.0], [2.0, 1.0]], "samples": 4}, "samples: no meaning for embeddings"),
    ],
)
def test_bad_requests_are_refused_with_their_field(body, complaint):
    with pytest.raises(ValidationError, match=complaint):
        HallucinationRequest(**body)


def test_top_k_may_be_null_and_that_is_a_setting():
    assert HallucinationRequest(prompt="a", top_k=None).changes() == {"top_k": None}
    assert HallucinationRequest(prompt="a").changes() == {}


@pytest.mark.parametrize("body", [{}, {"text": "a", "texts": ["b"]}, {"text": ""}, {"texts": [1]}])
def test_score_takes_one_of_text_and_texts(body):
    with pytest.raises(ValidationError):
        ScoreRequest(**body)


def test_every_example_is_a_valid_request_and_the_first_is_asked():
    for name, endpoint in ENDPOINTS.items():
        for body in endpoint.examples.values():
            endpoint.Request.model_validate(body)
        assert example(name) == next(iter(endpoint.examples.values()))
