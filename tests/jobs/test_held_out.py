"""What is measured of a finished run's artifact, in a task of the cluster."""

import pytest
import torch

from cluster import registry
from jobs.held_out import measured
from jobs.report import Report
from library.artifact import write_artifact
from library.errors import InputError
from library.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def report(tmp_path):
    content = {"recipe": {}, "weights": {"w": torch.ones(1)}, "metrics": {}, "data": ""}
    artifact = write_artifact(tmp_path / "a", kind="toy", **content)
    return Report(job="toy", config={}, artifact=str(artifact.path))


def test_the_artifact_is_looked_for_where_the_work_is(report, monkeypatch):
    monkeypatch.setattr(registry, "resolve", None)  # of this process; the task has a process of its own
    assert measured(report, lambda artifact, recipe: artifact, Recipe(steps=1, batch_size=1)) == report.artifact


def test_a_refusal_of_the_work_is_its_one_line(report):
    def refuse(artifact, recipe):
        raise InputError("data: there is no such set")

    def fail(artifact, recipe):
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(InputError) as caught:
        measured(report, refuse, Recipe(steps=1, batch_size=1))
    assert str(caught.value) == "data: there is no such set"
    with pytest.raises(Exception, match="toy: measuring the artifact on test samples failed") as caught:
        measured(report, fail, Recipe(steps=1, batch_size=1))
    assert str(caught.value).endswith("(RuntimeError: first line)")
