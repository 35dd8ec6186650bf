"""The endpoints of SeND over real HTTP on Ray Serve: answers, batches, refusals, noise, and a killed replica."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import serve

from library.errors import InputError, PrismError
from library.send.detector import HallucinationDetector
from serving.app import ENDPOINTS, Served, serve_endpoints
from serving.client import ask

NAMES = ("hallucination", "score")
PROMPTS = [f"Question number {number} is" for number in range(16)]


@pytest.fixture(scope="module")
def served(shared_ray, send_artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    folder = str(send_artifact.path)
    with serve_endpoints(artifacts={"hallucination": folder, "score": folder}, port=free_port) as served:
        yield served


@pytest.fixture(scope="module")
def client(served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        yield client


def test_the_answer_is_what_the_library_finds(served, send_artifact):
    detector = HallucinationDetector.from_artifact(send_artifact)
    [found] = detector.detect([PROMPTS[0]], seed=3, samples=5, explain=True)
    answer = ask("hallucination", {"prompt": PROMPTS[0], "seed": 3, "samples": 5, "explain": True}, served.url)
    [result] = answer["results"]
    assert answer["model"] == send_artifact.version
    assert (result["answer"], result["samples"]) == (found.answer, list(found.samples))
    assert result["eigenvalues"] == pytest.approx(found.eigenvalues, rel=1e-5)
    assert (result["eigenscore"], result["ees"]) == pytest.approx((found.eigenscore, found.ees), rel=1e-5)
    assert (result["risk"], result["no_risk"]) == (None, "the calibration holds for samples=4")
    [result] = ask("hallucination", {"prompt": PROMPTS[0]}, served.url)["results"]
    assert result["risk"] == pytest.approx((result["eigenscore"] + 5) / 10)
    assert (result["eigenvalues"], result["no_risk"], result["method"]) == (None, None, "exact")


def test_embeddings_and_texts_are_scored(served, send_artifact):
    detector = HallucinationDetector.from_artifact(send_artifact)
    embeddings = [[0.9, 0.1, 0.0], [0.8, 0.3, 0.1], [0.1, 0.9, 0.4]]
    [result] = ask("hallucination", {"embeddings": embeddings, "convention": "svd"}, served.url)["results"]
    [found] = detector.detect_embeddings([embeddings], convention="svd")
    assert result["eigenscore"] == pytest.approx(found.eigenscore)
    results = ask("score", {"texts": PROMPTS[:3]}, served.url)["results"]
    for result, score in zip(results, detector.score(PROMPTS[:3]), strict=True):
        assert result["tokens"] == score.tokens
        assert result["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
        assert result["token_entropy"] == pytest.approx(score.token_entropy, rel=1e-4)
        assert result["sensitive_energy"] == pytest.approx(score.sensitive_energy, rel=1e-4)


def test_sixteen_at_once_get_what_each_gets_alone_even_beside_a_bad_one(client):
    bodies = [{"prompt": prompt, "seed": i, "samples": 3 + i % 2} for i, prompt in enumerate(PROMPTS)]
    bodies[5] = {"prompt": "x" * 5000}

    def post(body):
        return client.post("/hallucination/predict", json=body)

    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(post, bodies))
    for body, response in zip(bodies, together, strict=True):
        alone = post(body)
        assert response.status_code == alone.status_code == (422 if body is bodies[5] else 200)
        if response.status_code == 200:
            [a], [b] = response.json()["results"], alone.json()["results"]
            assert (a["answer"], a["samples"]) == (b["answer"], b["samples"])
            assert a["eigenscore"] == pytest.approx(b["eigenscore"], abs=1e-4)


def test_info_health_and_ids(client, send_artifact):
    for name in NAMES:
        info = client.get(f"/{name}/info").json()
        assert (info["endpoint"], info["kind"], info["version"]) == (name, "send", send_artifact.version)
        assert info["recipe"] == json.loads(json.dumps(send_artifact.recipe))
        assert info["metrics"] == send_artifact.metrics
        assert info["limits"]["positions"] == 256
        assert client.get(f"/{name}/healthz").json() == {"status": "ok"}
        ready = client.get(f"/{name}/readyz", headers={"X-Request-Id": "mine"})
        assert ready.json() == {"status": "ready", "model": send_artifact.version}
        assert ready.headers.get_list("x-request-id") == ["mine"]
        assert ready.headers["x-prism-model"] == f"send/{send_artifact.version}"
    made = [client.post("/score/predict", json={}).headers.get_list("x-request-id") for _ in range(2)]
    assert [len(ids) for ids in made] == [1, 1]
    assert made[0] != made[1]


def test_a_request_has_one_line_in_the_log_and_none_on_stderr(client):
    logs = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs")
    ids = [f"line-{place}-{os.getpid()}" for place in range(3)]
    for name, body in zip(ids, ({"text": "some words"}, {}, {"text": "others"}), strict=True):
        client.post("/score/predict", json=body, headers={"X-Request-Id": name})

    def lines(pattern: str, name: str) -> list[str]:
        return [line for path in logs.glob(pattern) for line in path.read_text().splitlines() if name in line]

    deadline = time.monotonic() + 20
    while not lines("serve/replica_score*.log", ids[-1]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for name, status in zip(ids[:2], (200, 422), strict=True):
        [line] = lines("serve/replica_score*.log", name)
        assert f"POST score/predict {status} " in line
        assert lines("worker*", name) == []


def test_the_examples_of_the_page_work(client):
    for name in NAMES:
        page = client.get(f"/{name}/openapi.json").json()
        assert page["servers"] == [{"url": f"/{name}"}]
        content = page["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        assert len(content["examples"]) >= 2
        for example in content["examples"].values():
            response = client.post(f"/{name}/predict", json=example["value"])
            assert response.status_code == 200, response.text
        assert client.get(f"/{name}/docs").status_code == 200


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("hallucination", {"prompt": "a", "samples": 1}, "samples"),
        ("hallucination", {"prompt": "a", "layer": 77}, "layer"),
        ("hallucination", {"prompt": "a" * 3000}, "prompt"),
        ("hallucination", {"prompts": ["fine", "a" * 3000]}, "prompts[1]"),
        ("hallucination", {"embeddings": [[1, 2], [3]]}, "embeddings[1]"),
        ("hallucination", {"embeddings": [[1, 2, 3], [3, 4]]}, "embeddings"),
        ("hallucination", {"embeddings": [[1, 2], [3, 1e300]]}, "embeddings"),
        ("hallucination", {"embeddings": [[1, 2], [3, 4]], "top_k": 3}, "top_k"),
        ("score", {"text": "a"}, "text"),
        ("score", {"texts": ["some words", "b"]}, "texts[1]"),
        ("score", {"prompt": "a"}, "prompt"),
    ],
)
def test_bad_bodies_name_their_field(client, served, name, body, field):
    response = client.post(f"/{name}/predict", json=body)
    assert response.status_code == 422
    assert field in [entry["field"] for entry in response.json()["fields"]]
    with pytest.raises(InputError, match=f"{name}: .*{field.partition('[')[0]}"):
        ask(name, body, served.url)


def test_more_than_one_request_may_ask_for_is_413(client, served):
    body = {"prompts": ["a" * 200] * 64, "samples": 128}
    response = client.post("/hallucination/predict", json=body)
    assert response.status_code == 413
    assert response.json()["error"].startswith("body: ")
    with pytest.raises(InputError, match=r"hallucination: body: .* one request may ask for at most"):
        ask("hallucination", body, served.url)


def test_too_large_a_body_is_refused_and_other_paths_are_not_there(client, served):
    response = client.post("/score/predict", content=b" " * ((8 << 20) + 1))
    assert response.status_code == 413
    assert client.get("/score/predict").status_code == 405
    assert client.get("/score/nothing").status_code == 404
    with pytest.raises(PrismError, match=r"none is not served at .*; served there: hallucination, score"):
        ask("none", {}, served.url)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from([1e308, 2**70]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*sorted(ENDPOINTS["hallucination"].Request.model_fields), "text", "texts", "more"]
MUTATED = st.builds(
    lambda base, changes: base | changes,
    st.sampled_from([{"prompt": "a"}, {"prompts": ["a", "b"]}, {"text": "a b"}, {"embeddings": [[1, 2], [2, 1]]}, {}]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
BODIES = st.binary(max_size=60) | (VALUES | MUTATED).map(lambda value: json.dumps(value).encode())


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=BODIES, name=st.sampled_from(NAMES))
def test_no_body_whatever_gets_a_5xx(client, body, name):
    response = client.post(f"/{name}/predict", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 422)
    assert "Traceback" not in response.text
    if response.status_code == 422:
        assert response.json()["fields"]


def test_health_answers_while_the_model_works(client):
    heavy = {"prompts": PROMPTS[:4], "samples": 15, "max_new_tokens": 60, "top_k": None}
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(client.post, "/hallucination/predict", json=heavy)
        answered = 0
        while not working.done():
            assert client.get("/hallucination/healthz").status_code == 200
            answered += not working.done()
    assert working.result().status_code == 200
    assert answered


def replica_pids(name: str) -> list[int]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    return [replica["pid"] for replica in details["applications"][name]["deployments"][name]["replicas"]]


def test_a_killed_replica_is_replaced_and_nobody_hangs_or_gets_a_wrong_answer(client):
    body = {"prompt": PROMPTS[1], "seed": 1}
    before = client.post("/hallucination/predict", json=body).json()["results"][0]["samples"]
    [killed] = replica_pids("hallucination")
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            response = client.post("/hallucination/predict", json=body, timeout=30)
        except httpx.RemoteProtocolError:  # was in flight
            continue
        if response.status_code == 200:
            break
        assert response.status_code in (500, 503), response.text
    assert response.json()["results"][0]["samples"] == before
    [replaced] = replica_pids("hallucination")
    assert replaced != killed


def test_whoever_waits_is_told_when_an_endpoint_is_taken_away(served):
    serve.delete("score")
    with pytest.raises(PrismError, match="no longer deployed: score"):
        served.wait()
