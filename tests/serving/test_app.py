"""Choosing what to serve and refusing to, before anything is deployed; and endpoints that do not start."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import serve

from cluster.registry import register, resolve
from library.errors import ArtifactError, InputError, PrismError
from serving import app
from serving.app import ENDPOINTS, build, open_host, serve_endpoints
from serving.ingress import REPLICA_PORTS, prepare
from serving.replica import Replica
from serving.settings import EndpointArgs


def test_what_is_served_follows_from_the_names_and_the_artifacts(ready_registry, send_artifact, rewritten, tmp_path):
    assert app._chosen(["score", "score"], {}) == ({"score": "models:/send@champion"}, {})
    assert app._chosen(None, {"score": "a"}) == ({"score": "a"}, {})
    assert app._chosen(["hallucination", "score"], {"score": "a"}) == (
        {"hallucination": "models:/send@champion", "score": "a"},
        {},
    )
    with pytest.raises(InputError, match="no model has a champion yet"):
        app._chosen(None, {})
    register(send_artifact.path, "send")
    with pytest.raises(InputError, match="no model has a champion yet"):
        app._chosen(None, {})
    register(send_artifact.path, "send", aliases=["champion"])
    register(rewritten(send_artifact, tmp_path / "farms", kind="farms").path, "farms")
    corrupt = rewritten(send_artifact, tmp_path / "corrupt", kind="rqgnn").path
    register(corrupt, "rqgnn", aliases=["champion"])
    weights = resolve("models:/rqgnn@champion") / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    chosen, left_out = app._chosen(None, {})
    assert list(chosen) == [name for name, endpoint in ENDPOINTS.items() if endpoint.model == "send"]
    assert left_out.keys() == ENDPOINTS.keys() - chosen.keys()
    assert left_out["spectrum"] == "model farms has no champion; see prism registry promote"
    assert "is corrupt: its SHA-256" in left_out["graph-anomaly"]
    assert left_out["corrosion"] == "no model qrc is registered"


def test_wrong_names_and_artifacts_are_refused_before_ray_is_joined(
    ready_registry, send_artifact, rewritten, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.connect", lambda *_: pytest.fail("joined Ray"))
    register(rewritten(send_artifact, tmp_path / "farms", kind="farms").path, "farms", aliases=["champion"])
    corrupt = rewritten(send_artifact, tmp_path / "corrupt").path
    weights = corrupt / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for arguments, kind, line in [
        ((["nothing"],), InputError, "there is no endpoint 'nothing'; there are hallucination, score"),
        (([],), InputError, "no endpoint named"),
        ((["score"], {"hallucination": "a"}), InputError, "artifact given for hallucination, which is not among"),
        ((["score"],), InputError, "no model 'send' is registered; registered are farms"),
        ((None, {"score": "models:/farms@champion"}), ArtifactError, "an artifact of 'farms', not of 'send'"),
        ((None, {"score": str(tmp_path / "none")}), ArtifactError, "no artifact at"),
        ((None, {"score": str(corrupt)}), ArtifactError, "is corrupt: its SHA-256"),
    ]:
        with pytest.raises(kind, match=line):
            serve_endpoints(*arguments)


def test_a_port_in_use_is_refused_before_anything_is_deployed(ray_cluster, send_artifact):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PrismError, match=f"port {port} of 127.0.0.1 is in use; choose another with --port"):
            serve_endpoints(["score"], {"score": str(send_artifact.path)}, port=port)
    with pytest.raises(InputError, match="port 70000: allowed are 1 to 65535"):
        serve_endpoints(["score"], {"score": str(send_artifact.path)}, port=70000)
    assert not serve.status().proxies


def test_an_endpoint_that_cannot_load_its_model_says_why_and_leaves_nothing(
    ray_cluster, send_artifact, rewritten, tmp_path, free_port, capfd
):
    torn = rewritten(send_artifact, tmp_path / "torn", weights={}).path  # whole as files, but not as a model
    with pytest.raises(PrismError) as raised:
        serve_endpoints(["score"], {"score": str(torn)}, port=free_port)
    assert str(raised.value).startswith("endpoint score does not start: ")
    assert str(torn) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not serve.status().applications
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) != 0
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def running(monkeypatch) -> dict[str, SimpleNamespace]:
    """The applications of a cluster that somebody else started, by name, in place of a real one; `score` is there."""
    applications = {"score": SimpleNamespace(status="RUNNING")}
    connection = SimpleNamespace(address="10.0.0.1:6379", started=False, cpus=4.0, unless_gone=lambda call: call())
    for name, found in {
        "cluster.connect": lambda _: connection,
        "ray.is_initialized": lambda: True,
        "ray.serve.status": lambda: SimpleNamespace(applications=dict(applications)),
        "ray.serve.delete": lambda name, **_: applications.pop(name, None),
        "ray.serve.shutdown": applications.clear,
        "cluster.registry.resolve": lambda *_, **__: None,
        "serving.app.prepare": lambda *_: None,
        "serving.app._start_serve": lambda *_, **__: False,
        "serving.app._application": lambda *_: None,
        "ray.serve.RunTarget": lambda _, name, **__: name,
        "ray.serve.run_many": lambda names, **_: applications.update(dict.fromkeys(names, RUNS)),
    }.items():
        monkeypatch.setattr(name, found)
    return applications


RUNS = SimpleNamespace(status="RUNNING")
FAILED = SimpleNamespace(status="DEPLOY_FAILED", message="torn", deployments={})


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_ran_before_a_failed_serve_still_runs(running, monkeypatch):
    artifacts = dict.fromkeys(("score", "hallucination"), "folder")
    with monkeypatch.context() as changed:
        changed.setenv("PRISM_TOKEN", "my secret")
        with pytest.raises(InputError, match="PRISM_TOKEN holds no token"):
            serve_endpoints(artifacts=artifacts)
    for failing in ("_application", "_deploy"):
        with monkeypatch.context() as changed:
            changed.setattr(app, failing, interrupted)
            with pytest.raises(KeyboardInterrupt):
                serve_endpoints(artifacts=artifacts)
        assert list(running) == ["score"]
    monkeypatch.setattr("ray.serve.run_many", lambda names, **_: running.update({"hallucination": FAILED}))
    with pytest.raises(PrismError, match="endpoint hallucination does not start"):
        serve_endpoints(artifacts=artifacts)
    assert list(running) == ["score"]


def test_what_is_served_is_taken_away_also_when_it_ran_before(running):
    running["spectrum"] = RUNS
    with serve_endpoints(artifacts=dict.fromkeys(("score", "hallucination"), "folder")):
        assert running.keys() == {"score", "hallucination", "spectrum"}
    assert list(running) == ["spectrum"]


@pytest.mark.parametrize("others", [["spectrum"], []])
def test_serve_goes_on_while_others_have_endpoints_in_it(running, monkeypatch, caplog, others):
    monkeypatch.setattr("serving.app._start_serve", lambda *_, **__: True)
    ended = []
    monkeypatch.setattr("ray.serve.shutdown", lambda: ended.append(True))
    monkeypatch.setattr("serving.app.Served._wait_for_the_port", lambda _: None)
    with serve_endpoints(artifacts={"score": "folder"}):
        running |= dict.fromkeys(others, RUNS)
    assert (list(running), ended) == (others, [] if others else [True])
    assert ("goes on: others have deployed spectrum since" in caplog.text) == bool(others)


@pytest.mark.parametrize(
    ("host", "found"),
    [("127.0.0.1", None), ("localhost", None), ("::1", None), ("0.0.0.0", "0.0.0.0"), ("head-1", "head-1")],
)
def test_a_replica_without_a_token_warns_where_others_reach_it(monkeypatch, heard, host, found):
    running = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: running)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr("serving.replica.load", lambda *_: SimpleNamespace())
    monkeypatch.setattr("serving.replica.LOG", heard.logger)
    assert open_host() == found
    for digest in (None, "0" * 64):
        heard.lines.clear()
        Replica(EndpointArgs(endpoint="score", artifact="folder", update_period_s=0), digest).close()
        warned = f"score needs no token, and listens on {found}: set PRISM_TOKEN or token_file" in heard.lines
        assert warned == (found is not None and digest is None)


def test_the_builder_refuses_what_it_cannot_serve(ready_registry, send_artifact, tmp_path):
    with pytest.raises(InputError, match="there is no endpoint 'nothing'"):
        build(EndpointArgs(endpoint="nothing"))
    with pytest.raises(InputError, match="no model 'send' is registered"):
        build(EndpointArgs(endpoint="score"))
    empty = tmp_path / "token"
    empty.touch()
    with pytest.raises(InputError, match="holds no token"):
        build(EndpointArgs(endpoint="score", artifact=str(send_artifact.path), token_file=str(empty)))


@pytest.fixture
def no_ray_yet(monkeypatch) -> dict[str, str]:
    """The environment of a process that will start Ray."""
    monkeypatch.setattr("serving.ingress._runs", lambda: False)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr("os.environ", plain)
    return plain


def test_who_takes_requests_in_is_decided_before_ray_starts(ray_cluster, send_artifact, monkeypatch):
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--ingress fast is decided when Ray starts: set RAY_SERVE_ENABLE_HA_PROXY=1"):
        serve_endpoints(["score"], {"score": str(send_artifact.path)}, ingress="fast")
    before = dict(os.environ)
    prepare("proxy", None)
    prepare("auto", None)  # what this Ray was started with
    assert dict(os.environ) == before
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")  # as on the machines of a cluster that has it
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    prepare("haproxy", "10.0.0.1:6379")
    prepare("auto", "10.0.0.1:6379")
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in os.environ  # that of the cluster's machines is theirs
    with pytest.raises(InputError, match="--ingress proxy is decided when Ray starts: set RAY_SERVE_ENABLE_HA_PROXY=0"):
        prepare("proxy", "10.0.0.1:6379")


@pytest.mark.parametrize("asked", [{}, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}])
def test_a_ray_that_is_started_here_has_haproxy_with_files_and_ports_of_its_own(no_ray_yet, asked):
    no_ray_yet |= asked
    prepare("auto", None)
    first = dict(no_ray_yet)
    assert first["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert first["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("prism-haproxy")
    assert first["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "3"
    assert first["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == first["RAY_worker_niceness"] == "0"
    assert Path(first["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.stat().st_mode & 0o077 == 0  # nobody else's business
    prepare("auto", None)
    prepare("haproxy", None)
    assert no_ray_yet == first  # the same again
    no_ray_yet.clear()
    prepare("haproxy", None)
    files = ("HAPROXY_SOCKET_PATH", "HAPROXY_CONFIG_FILE_LOC", "HAPROXY_SERVER_STATE_FILE")
    ports = ("HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    own = [(first[name], no_ray_yet[name]) for name in (f"RAY_SERVE_{name}" for name in files + ports)]
    assert all(one != other for one, other in own)
    lowest, end = (int(first[name]) for name in REPLICA_PORTS)
    assert lowest > 30000
    assert end - lowest > 100
    no_ray_yet.clear()
    no_ray_yet[REPLICA_PORTS[0]] = "40000"  # who says so, has it
    prepare("haproxy", None)
    assert [no_ray_yet.get(name) for name in REPLICA_PORTS] == ["40000", None]


def test_without_haproxy_the_proxy_takes_requests(no_ray_yet, monkeypatch):
    no_ray_yet["RAY_SERVE_ENABLE_HA_PROXY"] = "0"  # who says so, has it
    prepare("auto", None)
    assert no_ray_yet["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    no_ray_yet.clear()
    monkeypatch.setattr("serving.ingress.find_spec", lambda _: None)
    prepare("auto", None)
    assert no_ray_yet == {"RAY_worker_niceness": "0"}
    prepare("fast", None)  # somebody may have a binary of their own
    assert no_ray_yet["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    prepare("proxy", "local")
    assert no_ray_yet["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
