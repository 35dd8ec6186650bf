"""`prism submit` and `prism cluster render` as commands: what they write and refuse, and what the document says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import prism
from cluster import render
from cluster.submit import entrypoint, environment
from jobs import flags, job_class
from jobs.cluster_commands import SubmitOptions
from jobs.commands import RunOptions
from jobs.plan_command import PAPERS, SUITE, trainings
from library.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give one of a command after --, --follow NAME, --stop NAME"),
        (["--stop", "a", "--", "true"], "give one of"),
        (["--address", "head:6379", "--", "true"], "give the dashboard's, such as http://HOST:8265"),
        (["--env", "3x", "--", "true"], "--env 3x: give NAME=VALUE"),
    ],
)
def test_a_wrong_command_line_is_refused(args: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert prism.main(["submit", *args]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert says in line


def test_no_dashboard_is_said_in_one_line(closed_port: int, web_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert prism.main(["submit", "--address", f"http://127.0.0.1:{closed_port}", "--", "true"]) == 1
    assert "no dashboard of a Ray cluster at" in capfd.readouterr().err
    assert prism.main(["submit", "--address", f"http://127.0.0.1:{web_port}", "--", "true"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_commands_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert entrypoint(["prism", "list"], shipped=True) == "python -m prism list"
    assert entrypoint(["prism", "list"], shipped=False) == "prism list"
    assert entrypoint(["echo", "a b"], shipped=True) == "echo 'a b'"
    monkeypatch.setenv("HERE", "now")
    assert environment(["HERE", "A=b=c"]) == {"HERE": "now", "A": "b=c"}
    with pytest.raises(InputError, match="there is no such variable here"):
        environment(["NOT_HERE"])


def test_render_writes_checks_and_says_what_is_old(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["cluster", "render", "--out", str(tmp_path)]
    assert prism.main([*out, "--check"]) == 1
    assert "out of date" in capfd.readouterr().err
    assert prism.main([*out, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["written"] == list(render.rendered(render.ClusterDescription()))
    assert prism.main([*out, "--check"]) == 0
    (tmp_path / "gcp.yaml").write_text("cluster_name: other\n")
    capfd.readouterr()
    assert prism.main([*out, "--check"]) == 1
    assert f"out of date in {tmp_path}: gcp.yaml; run prism cluster render" in capfd.readouterr().err
    description = tmp_path / "mine.json"
    description.write_text('{"name": "mine"}')
    assert prism.main([*out, "--config", str(description)]) == 0
    assert yaml.safe_load((tmp_path / "aws.yaml").read_text())["cluster_name"] == "mine"


def documented() -> list[str]:
    """The command lines of `prism` in docs/cluster.md."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("prism ")]


@pytest.mark.parametrize("command", documented())
def test_the_commands_of_the_document_are_understood(command: str) -> None:
    """Down to their last flag; they are run by the other tests of this file, or the document says what they need."""
    args = shlex.split(command)[1:]
    if args[0] == "submit":
        flags.parse(SubmitOptions, args[1 : args.index("--")] if "--" in args else args[1:], prog="prism")
        args = shlex.split(command.partition(" -- ")[2])[1:]
    if not args:
        return
    verb = next(" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in prism.VERBS)
    rest = args[len(verb.split()) :]
    if isinstance(prism.VERBS[verb], type):
        flags.parse(prism.VERBS[verb], rest, prog="prism")
    elif verb == "plan":
        assert rest[0] in (SUITE, PAPERS, *trainings())
    else:
        flags.parse_job(job_class(rest[0]), RunOptions, rest[1:], prog="prism")


def test_the_document_names_files_that_there_are() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    places = re.findall(r"`((?:cluster|serving)/[\w./]+)`", text)
    assert places
    assert all((ROOT / place).exists() for place in places)
