"""Ray's launcher behind `prism cluster up|status|down`: what is refused, and what is run on the machines."""

import os
import stat
from pathlib import Path

import pytest

import prism
from cluster import launcher, render
from cluster.description import read_description
from library.errors import InputError, PrismError

MINE = """{"name": "mine", "image": {"repository": "registry.invalid/prism"},
"onprem": {"head": "10.0.0.1", "workers": ["10.0.0.2"], "nfs": "10.0.0.9:/prism", "key": "~/.ssh/id"}}"""


@pytest.fixture
def onprem(tmp_path: Path) -> Path:
    """The on-premises file of a described cluster without the example's names."""
    (tmp_path / "mine.json").write_text(MINE)
    render.write(read_description(tmp_path / "mine.json"), tmp_path)
    return tmp_path / "onprem.yaml"


def test_names_mean_the_rendered_files_and_paths_themselves(onprem: Path) -> None:
    assert launcher.configuration("gcp") == render.FOLDER / "gcp.yaml"
    assert launcher.configuration(str(onprem)) == onprem
    with pytest.raises(InputError, match="there is no such file; give one, or aws, gcp, onprem"):
        launcher.configuration("azure")
    launcher.check(onprem)


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_the_examples_names_are_not_taken_for_real_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"still has the example's .*example\.com.*prism cluster render"):
        launcher.check(launcher.configuration(name))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("- 1\n", r"provider\.type is missing"),
        ("cluster_name: x\nprovider: {type: local}\n", "head_ip"),
        ("cluster_name: x\nprovider: {type: gcp, project_id: 3}\n", r"provider\.project_id: 3 is not of type"),
        ("cluster_name: x\nprovider: {type: nowhere}\n", "nowhere"),
    ],
)
def test_a_file_that_the_launcher_does_not_take_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=says) as refused:
        launcher.check(file)
    assert "\n" not in str(refused.value)


def test_a_missing_package_of_a_cloud_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "aws.yaml"
    file.write_text((render.FOLDER / "aws.yaml").read_text().replace("example.com", "invalid").replace("my-", "x"))
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="clusters of aws need boto3: pip install boto3"):
        launcher.check(file)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that lists what `ssh` and `rsync` were called with: stand-ins that reach no machine, and fail."""
    log = tmp_path / "called"
    for program in ("ssh", "rsync"):
        script = tmp_path / "bin" / program
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "{program} $@" >> {log}\nexit 1\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return log


def test_status_asks_the_head_and_a_failure_is_said(
    onprem: Path, recorded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No head runs there: Ray's launcher says so itself, and the command fails with status 1."""
    with pytest.raises(PrismError, match="`ray exec` failed with status"):
        launcher.status(str(onprem))
    capfd.readouterr()
    assert prism.main(["cluster", "status", str(onprem)]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("prism: `ray exec` failed")


def test_the_launchers_command_lines(onprem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(launcher.subprocess, "run", lambda command, check: ran.append(command) or Done)
    for line in ("up {} --yes", "up {}", "status {}", "down {} --yes"):
        assert prism.main(["cluster", *line.format(onprem).split()]) == 0
    said = [" ".join(command[3:]).replace(str(onprem), "FILE") for command in ran]
    assert said == [
        "up FILE --no-config-cache --yes",
        "up FILE --no-config-cache",
        "exec FILE ray status",
        "down FILE --yes",
    ]
    assert all(command[1:3] == ["-m", "ray.scripts.scripts"] for command in ran)
