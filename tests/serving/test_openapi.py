"""Schemathesis over what every endpoint says of itself: no request that its page allows, or nearly, gets a 5xx."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from serving.app import ENDPOINTS
from serving.replica import Replica
from serving.settings import EndpointArgs
from serving.trial import trial_artifacts

EXAMPLES = 12  # requests for each route and kind of body
LIMITS = {"timeout_s": 20.0, "max_body_bytes": 1 << 20, "request_cost": 20_000}  # a test, not a load


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the models are, once they are made."""
    return tmp_path_factory.mktemp("trial")


@pytest.fixture(scope="module")
def artifacts(folder) -> dict[str, str]:
    return trial_artifacts(ENDPOINTS, folder)


@contextlib.contextmanager
def running(name: str, artifact: str, served_here) -> Iterator[str]:
    replica = Replica(EndpointArgs(endpoint=name, artifact=artifact, **LIMITS), None)
    with served_here(replica) as url:
        yield url


def check(schema) -> int:
    """Ask what the schema allows and what it nearly allows; returns how many requests were sent."""
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case) -> None:
            nonlocal sent
            sent += 1
            response = case.call(timeout=60)
            assert response.status_code < 500 or response.status_code == 503, response.text
            assert "Traceback" not in response.text
            if response.status_code >= 400 and response.headers["content-type"] == "application/json":
                assert response.json().keys() == {"error", "fields", "request_id"}

        ask()
    return sent


@pytest.mark.parametrize("name", ENDPOINTS)
def test_no_request_that_the_page_allows_gets_a_5xx(name, artifacts, ray_cluster, served_here):
    with running(name, artifacts[name], served_here) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        assert check(schema) >= EXAMPLES
