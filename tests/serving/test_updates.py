"""New artifacts under continuous requests: promoted, rolled back, refused; none fails or is answered wrongly."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest

import prism
from cluster.registry import list_versions, register, resolve, roll_back, set_alias
from library.artifact import Artifact
from library.errors import ArtifactError, InputError, PrismError
from serving import updates
from serving.replica import Replica
from serving.settings import EndpointArgs
from serving.updates import Follower, Loaded

BODY = {"text": "The river Thames flows through London."}
ALIAS = "models:/send@champion"


@pytest.fixture
def versions(ready_registry, send_artifact, rewritten, tmp_path) -> list[Artifact]:
    """Two models that answer differently, registered as versions 1 and 2; 1 is the champion."""
    halved = {name: 0.5 * tensor for name, tensor in send_artifact.weights().items()}
    other = rewritten(send_artifact, tmp_path / "other", weights=halved)
    for number, artifact in enumerate((send_artifact, other), 1):
        assert register(artifact.path, "send") == number
    set_alias("send", "champion", 1)
    return [send_artifact, other]


@pytest.fixture
def url(ray_cluster, versions, served_here) -> Iterator[str]:
    """Where the champion of `score` answers."""
    replica = Replica(EndpointArgs(endpoint="score", artifact=ALIAS, update_period_s=0.1), None)
    with served_here(replica) as address:
        yield address


class Load:
    """Asks all the time, in two threads, while it lasts; keeps every response."""

    def __init__(self, url: str):
        self.url, self.responses, self.going = url, [], True
        self.threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self):
        with httpx.Client(timeout=30) as client:
            while self.going:
                self.responses.append(client.post(f"{self.url}/predict", json=BODY))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.going = False
        for thread in self.threads:
            thread.join()

    def wait_for(self, version: str) -> None:
        deadline = time.monotonic() + 60
        while not self.responses or self.responses[-1].json()["model"] != version:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_promoting_and_rolling_back_swap_models_without_a_failed_or_wrong_answer(url, versions, capsys):
    first, second = (artifact.version for artifact in versions)
    with Load(url) as load:
        load.wait_for(first)
        assert prism.main(["registry", "promote", "send", "2"]) == 0
        load.wait_for(second)
        assert prism.main(["registry", "rollback", "send"]) == 0
        load.wait_for(first)
    assert {response.status_code for response in load.responses} == {200}
    answers = {}
    for response in load.responses:
        body = response.json()
        assert response.headers["x-prism-model"] == f"send/{body['model']}"
        answers.setdefault(body["model"], set()).add(round(body["results"][0]["perplexity"], 2))
    assert answers.keys() == {first, second}
    assert all(len(found) == 1 for found in answers.values())  # each model has one answer to one question
    assert answers[first] != answers[second]
    assert "models:/send@champion is version 1 again" in capsys.readouterr().out


def test_a_corrupt_new_artifact_is_refused_and_the_old_one_stays(url, versions, heard, capsys, monkeypatch):
    monkeypatch.setattr(updates, "LOG", heard.logger)
    first, second = (artifact.version for artifact in versions)
    weights = resolve("models:/send/2") / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    weights.write_bytes(content)
    assert prism.main(["registry", "promote", "send", "2"]) == 2  # found before anybody could serve it
    assert "is corrupt" in capsys.readouterr().err
    with Load(url) as load:
        load.wait_for(first)
        set_alias("send", "champion", 2)  # by another way
        deadline = time.monotonic() + 30
        while (refused := httpx.get(f"{url}/info").json()["update"]["refused"]) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        count = len(load.responses)
        while len(load.responses) < count + 5:
            time.sleep(0.01)
    assert refused["version"] == second
    assert "is corrupt: its SHA-256" in refused["reason"]
    assert {(response.status_code, response.json()["model"]) for response in load.responses} == {(200, first)}
    assert httpx.get(f"{url}/info").json()["version"] == first
    assert any("refused" in line for line in heard.lines)
    set_alias("send", "champion", 1)
    time.sleep(0.5)
    assert httpx.get(f"{url}/info").json()["update"] == {"reference": ALIAS, "followed": True, "refused": None}


def test_what_was_refused_is_tried_again_only_after_a_while_and_a_silent_registry_changes_nothing(
    monkeypatch, send_artifact, heard
):
    meant = ["old"]
    tried, taken, told = [], [], []

    def look_up(_):
        if isinstance(meant[0], Exception):
            raise meant[0]
        return meant[0]

    def load():
        tried.append(meant[0])
        if meant[0] == "broken":
            raise KeyError("layer.7")
        return Loaded(None, send_artifact)

    monkeypatch.setattr(updates, "artifact_version", look_up)
    monkeypatch.setattr(updates, "LOG", heard.logger)
    follower = Follower(ALIAS, load=load, current=lambda: "old", take=taken.append, period_s=1, told=told.append)
    for meant[0] in ("old", "broken", "broken", PrismError("no way"), PrismError("no way"), "broken"):
        follower.look()
    assert (tried, taken, told) == (["broken"], [], ["refused"])
    assert follower.refused.reason == "it cannot be loaded or used"  # nothing of the inside
    assert sum("no way" in line for line in heard.lines) == 1
    monkeypatch.setattr(updates, "RETRY_S", 0.0)
    follower.look()
    meant[0] = "good"
    follower.look()
    assert (tried, len(taken), told) == (["broken", "broken", "good"], 1, ["refused", "refused", "taken"])
    assert follower.refused is None


def test_rolling_back_goes_through_what_the_alias_meant(versions):
    with pytest.raises(InputError, match="has meant version 1 alone"):
        roll_back("send", "champion")
    for number in (2, 2, 1, 2):
        set_alias("send", "champion", number)
    assert [roll_back("send", "champion") for _ in range(3)] == [1, 2, 1]
    assert [version.version for version in list_versions("send") if "champion" in version.aliases] == [1]
    with pytest.raises(InputError, match="has no alias 'other'; it has champion"):
        roll_back("send", "other")
    with pytest.raises(InputError, match="no model 'sand' is registered"):
        roll_back("sand", "champion")


def test_a_foreign_artifact_does_not_become_a_replica(ray_cluster, ready_registry, send_artifact, rewritten, tmp_path):
    register(rewritten(send_artifact, tmp_path / "farms", kind="farms").path, "send", aliases=["champion"])
    with pytest.raises(ArtifactError, match="'farms', not of 'send'"):
        Replica(EndpointArgs(endpoint="score", artifact=ALIAS), None)
