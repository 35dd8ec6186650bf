"""`prism cluster local`, `prism submit` and `prism cluster render` for real: jobs, their logs and exit statuses."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import prism
from cluster import render
from cluster.submit import Jobs, _token, entrypoint, environment
from jobs import flags, job_class
from jobs.cluster_commands import SubmitOptions
from jobs.commands import RunOptions
from jobs.plan_command import PAPERS, SUITE, trainings
from library.errors import InputError, PrismError

ROOT = Path(__file__).resolve().parents[2]
TINY = shlex.split(
    "prism run send --corpus truthfulqa --tokenizer bytes --lm pythia-tiny --steps 4 --epoch-steps 2 --window 2 "
    "--batch-size 4 --context 24 --tracking-texts 4 --prompts 0 --calibration-cases 0 --workers 2 --name sent"
)


class Local:
    """A running `prism cluster local --nodes 3`, its dashboard, and a folder for what its jobs leave."""

    def __init__(self, process: subprocess.Popen[str], home: Path, said: str) -> None:
        self.process, self.home, self.said = process, home, said
        self.address = re.search(r"joined Ray at (\S+):", said)[1]
        self.dashboard = re.search(r"--address (http://\S+)", said)[1]

    def submit(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`prism submit` in a process of its own."""
        command = [sys.executable, "-m", "prism", "submit", "--address", self.dashboard, *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def local(shared_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    shared_ray.stop()
    home = tmp_path_factory.mktemp("home")
    settings = os.environ | {"PRISM_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        settings.pop(name, None)
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody has it already
            other.bind(("127.0.0.1", 8265))
            other.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "prism", "cluster", "local", "--nodes", "3", "--cpus-per-node", "1"],
            cwd=ROOT,
            env=settings,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("stop:"):
                break
    try:
        yield Local(process, home, "".join(lines))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_it_says_what_there_is_and_how_to_use_it(local: Local) -> None:
    assert local.said.startswith("joined Ray at ")
    assert not local.dashboard.endswith(":8265")  # which another process had
    assert "3 nodes, 3 CPUs" in local.said
    for way in ("prism run send --workers 2 --address ", "prism submit --address ", "ray start --address "):
        assert way in local.said


def test_a_submitted_training_runs_on_several_nodes_and_leaves_its_artifact(local: Local) -> None:
    done = local.submit("--name", "train", "--json", "--", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {"job": "train", "status": "SUCCEEDED", "exit_status": 0}
    assert "registered models:/send/1" in done.stderr
    assert (local.home / "runs" / "sent" / "artifact" / "artifact.json").is_file()


def test_the_exit_status_and_the_log_are_the_commands_own(local: Local) -> None:
    refused = local.submit("--", "prism", "run", "sand")
    assert refused.returncode == 2
    assert "prism: there is no job 'sand'" in refused.stdout
    assert refused.stderr.splitlines()[-1].endswith(
        "FAILED, exit status 2: Job entrypoint command failed with exit code 2"
    )


def test_a_folder_and_variables_go_along_and_a_job_is_stopped(local: Local, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, time\nprint('hello', os.environ['WHOM'], flush=True)\ntime.sleep(600)\n"
    )
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "left.txt").write_text("not sent")
    listing = "python -c \"import os; print(sorted(os.listdir('.')))\""
    seen = local.submit("--working-dir", str(tmp_path), "--", "sh", "-c", listing)
    assert "['script.py']" in seen.stdout
    started = local.submit(
        *(
            "--working-dir",
            str(tmp_path),
            "--env",
            "WHOM=you",
            "--name",
            "slow",
            "--detach",
            "--",
            "python",
            "script.py",
        )
    )
    assert (started.returncode, started.stdout) == (0, "slow\n")
    again = local.submit("--name", "slow", "--", "true")
    assert again.returncode == 2
    assert "there is a job of that name already" in again.stderr
    jobs = Jobs(local.dashboard)
    log = jobs.follow("slow")
    assert "hello you" in next(text for text in log if "hello" in text)
    assert local.submit("--stop", "slow").returncode == 0
    assert "".join(log) == ""
    assert jobs.ended("slow") == "STOPPED"
    assert not jobs.stop("slow")
    followed = local.submit("--follow", "slow")
    assert followed.returncode == 130
    assert "hello you" in followed.stdout


def test_what_is_not_there_is_said_in_one_line(local: Local) -> None:
    for args, says in (
        (["--follow", "nobody"], "there is no job 'nobody'"),
        (["--working-dir", "nowhere", "--", "true"], "--working-dir nowhere: there is no such folder"),
    ):
        wrong = local.submit(*args)
        assert wrong.returncode == 2
        assert wrong.stderr.count("\n") == 1
        assert says in wrong.stderr


def test_ctrl_c_leaves_nothing_running(local: Local) -> None:
    """The last test of the cluster: it is stopped here."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if local.address in _command(path)]
    local.process.send_signal(signal.SIGINT)
    assert local.process.wait(60) == 130
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(PrismError, match="no dashboard"):
        Jobs(local.dashboard)


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


class WantsToken(BaseHTTPRequestHandler):
    """A dashboard that answers who sends its token, and knows no job."""

    token = "0123456789abcdef" * 4

    def _answer(self) -> None:
        known = any(self.token in value for value in self.headers.values())
        versions = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        status = 401 if not known else 200 if self.path.endswith(("version", "health")) else 404
        text = {401: "Unauthorized: Missing authentication token", 404: "no such job", 200: json.dumps(versions)}[
            status
        ]
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        ("f" * 64, "wants another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        (WantsToken.token, "no such job"),
    ],
)
def test_a_dashboard_of_this_machine_gets_the_token_of_its_user(tmp_path: Path, token: str, says: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WantsToken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    left = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = ["submit", "--address", f"http://127.0.0.1:{server.server_port}", "--stop", "x"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prism", *command],
            env=left | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.shutdown()
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_token_of_another_machines_cluster_is_not_guessed_and_the_environment_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Ray that this process starts later would read what was set there, and not be let in by its own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    file.write_text("secret\n")
    monkeypatch.setattr("cluster.submit.TOKEN", file)
    before = dict(os.environ)
    assert _token("http://127.0.0.1:8265") == _token("http://localhost:8265") == "secret"
    assert _token("http://head.example:8265") is None
    assert dict(os.environ) == before
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert _token("http://head.example:8265") == "secret"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert _token("http://127.0.0.1:8265") is None


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


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
