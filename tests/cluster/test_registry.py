"""Runs, models, versions and aliases: embedded, on a server, shared by processes, and broken."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import prism
from cluster import probe, registry
from cluster.connection import ROOT
from cluster.ports import free_port
from cluster.registry_session import SETTINGS
from library.artifact import open_artifact
from library.errors import ArtifactError, InputError, PrismError

CONFIG = {"seed": 1, "recipe": {"lr": 0.001, "name": "pythia", "empty": {}, "sizes": [1, 2]}, "long": "x" * 9000}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a real MLflow server that keeps artifacts for its clients."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers=1", f"--port={port}"]
    command += [f"--backend-store-uri=sqlite:///{folder}/server.db", f"--artifacts-destination={folder}/artifacts"]
    environment = os.environ | SETTINGS | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            probe.web_service(uri, what="model registry")
            break
        except PrismError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield uri
    process.terminate()
    process.wait()


@pytest.fixture(params=["embedded", "server"])
def either(request, monkeypatch) -> str:
    """Each kind of registry."""
    if request.param == "embedded":
        request.getfixturevalue("ready_registry")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    return request.param


def test_a_run_and_its_model_from_start_to_alias(either, make_artifact, private_home, capfd):
    first, second = make_artifact(1), make_artifact(2)
    run = registry.start_run("send", CONFIG)
    for step, loss in enumerate((2.5, 1.25, math.nan)):
        registry.log_metrics(run, {"loss": loss, "rate@k": 1.0}, step)
    assert registry.register(first.path, "pythia", run=run, aliases=["champion"]) == 1
    registry.finish_run(run)
    assert registry.register(second.path, "pythia") == 2
    assert registry.register(first.path, "pythia", aliases=["old"]) == 1  # the same content keeps its version

    for artifact in (first, second):
        shutil.rmtree(artifact.path)
    for reference, expected in {
        "models:/pythia@champion": first,
        "models:/pythia/1": first,
        "models:/pythia/2": second,
        "models:/pythia/latest": second,
        "models:/pythia": second,
    }.items():
        path = registry.resolve(reference, kind="send")
        assert open_artifact(path).version == expected.version
        assert path.is_relative_to(private_home)
        assert registry.resolve(reference) == path

    assert not registry.crown_first("pythia", 2)  # version 1 is it
    registry.set_alias("pythia", "champion", 2)
    assert open_artifact(registry.resolve("models:/pythia@champion")).version == second.version
    assert registry.list_models() == ["pythia"]
    newest, oldest = registry.list_versions("pythia")
    assert (newest.version, newest.aliases, newest.artifact) == (2, ("champion",), second.version)
    assert (oldest.version, oldest.aliases, oldest.run) == (1, ("old",), run.id)
    assert (oldest.kind, oldest.metrics) == ("send", {"loss": 1.5})

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=run.registry)
    recorded = client.get_run(run.id)
    assert recorded.info.status == "FINISHED"
    assert {"seed": "1", "recipe.lr": "0.001", "recipe.name": "pythia", "recipe.sizes": "[1, 2]"}.items() <= (
        recorded.data.params.items()
    )
    history = [metric.value for metric in client.get_metric_history(run.id, "loss")]
    assert history[:2] == [2.5, 1.25]
    assert math.isnan(history[2])
    assert "rate_k" in recorded.data.metrics
    config = client.download_artifacts(run.id, "config.json", str(private_home))
    with open(config, encoding="utf-8") as stream:
        assert json.load(stream) == CONFIG
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


WORKERS = """
import os, sys
import mlflow
from cluster import registry

def work(number, folder, same):
    run = registry.start_run("send", {"number": number})
    for step in range(5):
        registry.log_metrics(run, {"loss": float(number)}, step)
    version = registry.register(folder, "pythia", run=run, aliases=[f"worker-{number}"])
    print(number, version, registry.register(same, "twin"), flush=True)
    registry.finish_run(run)

*folders, same = sys.argv[1:]
children = []
for number, folder in enumerate(folders):
    child = os.fork()
    if not child:
        work(number, folder, same)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""


def test_four_processes_at_once_on_a_fresh_home(make_artifact, private_home):
    folders = [str(make_artifact(seed).path) for seed in (0, 1, 2, 3, 99)]
    assert not private_home.exists()
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, *folders],
        env=os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = sorted(tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert [worker for worker, _, _ in lines] == [0, 1, 2, 3]
    numbers = [(number, twin) for _, number, twin in lines]
    assert sorted(number for number, _ in numbers) == [1, 2, 3, 4]
    assert [twin for _, twin in numbers] == [1, 1, 1, 1]  # one content, one version
    assert not [path.name for path in private_home.iterdir() if path.suffix == ".tmp"]
    for i, (number, _) in enumerate(numbers):
        path = registry.resolve(f"models:/pythia@worker-{i}")
        assert open_artifact(path).recipe["seed"] == i
        assert [v.version for v in registry.list_versions("pythia") if f"worker-{i}" in v.aliases] == [number]


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_a_registry_that_is_down_loses_nothing(port, request, make_artifact, monkeypatch, ready_registry):
    artifact = make_artifact()
    uri = f"http://127.0.0.1:{request.getfixturevalue(port)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(PrismError) as caught:
        registry.register(artifact.path, "pythia")
    assert time.monotonic() - start < 15
    message = str(caught.value)
    assert uri in message
    assert f"the artifact is safe at {artifact.path}: retry with `prism registry push {artifact.path}`" in message
    assert "\n" not in message
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert registry.register(artifact.path, "pythia") == 1


def test_a_server_that_is_no_registry_is_one_line(web_port, make_artifact, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{web_port}")
    with pytest.raises(PrismError, match=r"the model registry at http://127.0.0.1:\d+ failed: .*404") as caught:
        registry.register(make_artifact().path, "pythia")
    assert "\n" not in str(caught.value)


def test_a_password_in_the_address_lets_in_and_is_never_shown(
    server: str, web_port: int, closed_port: int, ssh_port: int, make_artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def secret(address: str) -> str:
        return address.replace("://", "://admin:s3cret@")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret(server))
    registry.finish_run(registry.start_run("send", {"seed": 1}))
    local = "http://127.0.0.1"
    for address in (f"{local}:{web_port}", f"{local}:{closed_port}", f"{local}:{ssh_port}", local, f"{local}:abc"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", secret(address))
        with pytest.raises(PrismError, match=re.escape(f"{address} ") + f"|{re.escape(address)}:") as caught:
            registry.register(make_artifact().path, "pythia")
        assert not re.search(r"admin|s3cret|\n", str(caught.value)), address


@pytest.mark.parametrize("address", ["http://127.0.0.1:abc", "http://:80", "http://admin:s3/cret@host", "https://[::1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is no address of a model registry: allowed is http://HOST:PORT") as refused:
        probe.web_service(address, what="model registry")
    assert "s3" not in str(refused.value)


def test_a_service_that_speaks_another_protocol_is_one_line(ssh_port: int) -> None:
    with pytest.raises(PrismError, match="the port is open but does not speak HTTP") as caught:
        probe.web_service(f"http://127.0.0.1:{ssh_port}", what="model registry")
    assert "\n" not in str(caught.value)


def test_a_model_without_versions_is_listed_and_shown(
    make_artifact: Any, ready_registry: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a process leaves that is killed between the model and its first version."""
    from mlflow import MlflowClient

    registry.register(make_artifact().path, "pythia")
    MlflowClient(registry_uri=registry.location()).create_registered_model("empty")
    assert prism.main(["registry", "list", "--json"]) == 0
    said = capfd.readouterr()
    listed = json.loads(said.out)
    assert (listed["empty"], len(listed["pythia"])) == ([], 1)
    assert re.search(r"empty +0 +none", said.err)
    assert prism.main(["registry", "show", "empty", "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == []
    assert "empty (no versions)" in said.err


def test_a_run_of_an_embedded_registry_is_not_made_up_elsewhere(tmp_path):
    run = registry.Run("0" * 32, f"sqlite:///{tmp_path}/other/registry.db")
    with pytest.raises(PrismError, match="MLFLOW_TRACKING_URI must name a server"):
        registry.log_metrics(run, {"loss": 1.0}, 1)
    assert not (tmp_path / "other").exists()


def test_corrupt_artifacts_are_refused(make_artifact, ready_registry):
    artifact = make_artifact()
    assert registry.register(artifact.path, "pythia") == 1
    kept = registry.resolve("models:/pythia/1") / "weights.safetensors"
    for file in (artifact.path / "weights.safetensors", kept):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match="corrupt"):
        registry.register(artifact.path, "other")
    with pytest.raises(ArtifactError, match="corrupt"):
        registry.resolve("models:/pythia/1")
    with pytest.raises(ArtifactError, match="corrupt"):
        registry.resolve(artifact.path)
    with pytest.raises(ArtifactError, match=r"there is no artifact\.json"):
        registry.register(artifact.path.parent, "other")
    assert registry.list_models() == ["pythia"]


def test_another_artifact_in_a_version_s_place_is_refused(make_artifact, ready_registry):
    registry.register(make_artifact(1).path, "pythia")
    kept = registry.resolve("models:/pythia/1")
    shutil.rmtree(kept)
    shutil.copytree(make_artifact(2).path, kept)
    with pytest.raises(ArtifactError, match="not the artifact that was registered as pythia 1"):
        registry.resolve("models:/pythia/1")


def test_references_outside_the_registry(make_artifact, private_home):
    from cluster import storage

    artifact = make_artifact()
    assert registry.resolve(artifact.path, kind="send") == artifact.path
    with pytest.raises(ArtifactError, match="of 'send', not of 'hawq'"):
        registry.resolve(artifact.path, kind="hawq")
    uri = "memory://bucket/shelf/model"
    storage.upload_folder(artifact.path, uri, last="artifact.json")
    path = registry.resolve(uri)
    assert path.is_relative_to(private_home)
    assert open_artifact(path).version == artifact.version
    assert registry.resolve(uri) == path
    storage.upload_folder(make_artifact(7).path, uri, last="artifact.json")
    assert open_artifact(registry.resolve(uri)).recipe["seed"] == 7
    storage.remove("memory://bucket/shelf")


def test_unknown_names_say_what_there_is(make_artifact, request):
    assert registry.list_models() == []
    with pytest.raises(PrismError, match="nothing was registered there yet"):
        registry.resolve("models:/pythia")
    request.getfixturevalue("ready_registry")
    assert registry.list_models() == []
    for seed in range(3):
        registry.register(make_artifact(seed).path, "pythia", aliases=["champion"])
    for reference, message in {
        "models:/pythias": "no model 'pythias' is registered; registered are pythia",
        "models:/pythia@best": "no alias 'best'; it has champion",
        "models:/pythia/9": "no version 9; it has 1-3",
        "models:/pythia/": "is not understood; allowed are",
        "models:pythia": "is not understood; allowed are",
    }.items():
        with pytest.raises(InputError, match=message):
            registry.resolve(reference)
    with pytest.raises(InputError, match="no version 4"):
        registry.set_alias("pythia", "champion", 4)
    with pytest.raises(InputError, match="no model 'hawq'"):
        registry.list_versions("hawq")
    for alias in ("latest", "v2", "a b", ""):
        with pytest.raises(InputError, match="allowed are letters"):
            registry.register(make_artifact(0).path, "pythia", aliases=[alias])
    for name in ("", "a/b", "a:b", "it's", "-a"):
        with pytest.raises(InputError, match="allowed are letters"):
            registry.register(make_artifact(0).path, name)
