"""The production configuration: valid, complete, and deployed as it is but for a token and small limits."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.registry import register
from library.errors import PrismError
from serving.app import ENDPOINTS, build
from serving.client import ask
from serving.ingress import ENVIRONMENT
from serving.settings import EndpointArgs

TOKEN = "correct-horse"


def read() -> dict:
    return yaml.safe_load((resources.files("serving") / "prism.yaml").read_text())


def test_every_endpoint_is_in_it_with_its_champion_on_this_machine_alone():
    config = ServeDeploySchema.model_validate(read())
    assert config.http_options.host == "127.0.0.1"
    assert config.controller_options.runtime_env == {"env_vars": ENVIRONMENT}
    assert [application.name for application in config.applications] == list(ENDPOINTS)
    for application in config.applications:
        args = EndpointArgs.model_validate(application.args)
        [deployment] = application.deployments
        assert application.route_prefix == f"/{application.name}"
        assert args.endpoint == deployment.name == application.name
        assert args.artifact == f"models:/{ENDPOINTS[args.endpoint].model}@champion"
        assert application.import_path == f"{build.__module__}:{build.__name__}"
        assert deployment.max_ongoing_requests > args.max_pending  # so that health checks get through
        assert deployment.graceful_shutdown_timeout_s > args.timeout_s
        assert config.http_options.request_timeout_s > args.timeout_s


@pytest.fixture(scope="module")
def url(shared_ray, send_artifact, empty_registry, free_port, tmp_path_factory) -> Iterator[str]:
    """Where the file's applications run: one with room for a single request, one without time to answer."""
    shared_ray.connection()
    home = tmp_path_factory.mktemp("home")
    shutil.copy(empty_registry, home)
    (home / "token").write_text(TOKEN)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRISM_HOME", str(home))
        register(send_artifact.path, "send", aliases=["champion"])
    config = read()
    config["http_options"]["port"] = free_port
    changes = {"hallucination": {"max_pending": 1}, "score": {"timeout_s": 1e-6}}
    config["applications"] = [found for found in config["applications"] if found["name"] in changes]
    for application in config["applications"]:
        application["runtime_env"] = {"env_vars": {"PRISM_HOME": str(home)}}
        application["args"] |= {"token_file": str(home / "token"), **changes[application["name"]]}
    serve.start(http_options=config["http_options"], controller_options=config["controller_options"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    deadline = time.monotonic() + 240
    while not all(found.status == "RUNNING" for found in serve.status().applications.values()):
        failed = [found.message for found in serve.status().applications.values() if found.status == "DEPLOY_FAILED"]
        assert not failed
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield f"http://127.0.0.1:{free_port}"
    serve.shutdown()


def test_the_champion_answers_who_has_the_token(url, send_artifact):
    answer = ask("hallucination", {"prompt": "Paris is"}, url, token=TOKEN)
    assert answer["model"] == send_artifact.version
    with pytest.raises(PrismError, match="needs a token: set PRISM_TOKEN"):
        ask("hallucination", {"prompt": "Paris is"}, url, token="wrong")
    for path in ("/predict", "/info"):
        assert httpx.request("POST" if path == "/predict" else "GET", f"{url}/score{path}").status_code == 401
    assert httpx.get(f"{url}/score/readyz").status_code == 200


def test_more_requests_than_there_is_room_for_get_429_and_a_time_to_retry(url):
    def post(number: int) -> httpx.Response:
        body = {"prompt": "Paris is", "seed": number, "max_new_tokens": 60}
        return httpx.post(
            f"{url}/hallucination/predict", json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )

    with ThreadPoolExecutor(12) as threads:
        responses = list(threads.map(post, range(12)))
    assert {response.status_code for response in responses} == {200, 429}
    refused = [response for response in responses if response.status_code == 429]
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert refused[0].json()["error"] == "1 requests are waiting; retry after a moment"


def test_no_answer_in_time_is_503(url):
    with pytest.raises(PrismError, match=r"answered 503: no answer within 1e-06 seconds; .* \(request [\w-]+\)"):
        ask("score", {"text": "some words"}, url, token=TOKEN)
