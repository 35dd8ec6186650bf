"""The command line for real: verbs, exit statuses, one line for every error, JSON, and what is left behind."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prism
from cluster import Connection
from cluster.ports import free_port
from jobs import flags
from jobs.commands import readable
from library.artifact import open_artifact

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--corpus truthfulqa --tokenizer bytes --lm pythia-tiny --steps 4 --epoch-steps 2 --window 2 --batch-size 4 "
    "--context 24 --tracking-texts 4 --prompts 2 --prompt-tokens 4 --calibration-cases 0 "
    "--answers.samples 3 --answers.max-new-tokens 3"
)


class Ran:
    """What a command line did: exit status, standard output, and the lines of standard error."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err.splitlines()

    def problem(self) -> str:
        """The one line that says what was wrong; progress before it is left out."""
        said = [line for line in self.err if not re.match(r"prism: (joined|started) Ray", line)]
        assert len(said) == 1, self.err
        assert said[0].startswith("prism: ")
        assert not self.out
        return said[0]


@pytest.fixture
def run_prism(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process."""

    def run(*args: Any) -> Ran:
        capfd.readouterr()
        status = prism.main([str(arg) for arg in args])
        return Ran(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """PRISM_HOME after `prism run send --json` in a process of its own, and what that showed."""
    home = tmp_path_factory.mktemp("home")
    return home, in_a_process(home, "run", "send", *TINY, "--name", "first", "--json")


def in_a_process(home: Path, *args: str, **settings: str) -> Ran:
    environment = {**os.environ, "PRISM_HOME": str(home), **settings}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "prism", *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_help_names_every_verb(run_prism: Any) -> None:
    shown = run_prism("--help")
    assert shown.status == 0
    assert [line.split("  ")[1] for line in shown.out.splitlines()[2:]] == [f"prism {verb}" for verb in prism.VERBS]


@pytest.mark.parametrize("verb", prism.VERBS)
def test_every_verb_explains_itself(verb: str, run_prism: Any) -> None:
    shown = run_prism(*verb.split(), "--help")
    assert shown.status == 0
    assert len(shown.out.splitlines()) > 2
    assert not shown.err


def test_list_as_json(run_prism: Any) -> None:
    listed = run_prism("list", "--json")
    offers = {(offer["verb"], offer["name"]) for offer in json.loads(listed.out)["offers"]}
    assert {("run", "send"), ("tune", "send"), ("serve, ask", "hallucination"), ("reproduce", "send")} <= offers


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sing", "no verb 'sing'; there are list, run"),
        ("registry sing", "registry list"),
        ("run", "name a job"),
        ("run sand", "no job 'sand'; there are send"),
        ("run send --stps 3", "--stps, 3; did you mean --steps INT"),
        ("run send --steps many", "--steps: invalid literal for int() with base 10: 'many'; expected --steps INT"),
        ("run send --steps", "'--steps'"),
        ("run send --steps 0", "--steps: should be greater than 0, not 0"),
        ("run send --drop-fraction 1", "--drop-fraction: should be less than 1, not 1.0"),
        ("run send --drop-fraction 0", "--drop-fraction: should be greater than 0, not 0.0"),
        ("run send --answers.samples 1", "--answers.samples: should be greater than or equal to 2, not 1"),
        ("run send --window 1 --context 1", "--context: .*; --window: .*"),
        ("run send --engine zero9", "'zero9'.*'ddp', 'fsdp', 'zero1', 'zero2', 'zero3'"),
        ("run send --workers 3 2", "least number of workers, 3, is above the greatest, 2"),
        ("run send --ees-threshold 0 --prompts 0", "EES is not measured with prompts=0"),
        ("run send --name ../up", "--name: .*not '../up'"),
        ("run send --config nowhere.json", "nowhere.json cannot be read: No such file"),
        ("run send --config prism.py", "prism.py is not JSON"),
        ("run send --address nonsense", "allowed are local, auto, HOST:PORT and ray://HOST:PORT"),
        ("tune", "name a space"),
        ("tune sand", "'sand'; there are send"),
        ("tune send --samples 0", "--samples: should be greater than 0"),
        ("tune send --base.drop-fraction 2", "--base.drop-fraction: should be less than 1, not 2.0"),
        ("tune send --base.answers.samples 1", "--base.answers.samples: should be greater than or equal to 2"),
        ("reproduce", "name a method"),
        ("reproduce sand", "'sand'; there are send"),
        ("serve lies", "no endpoint 'lies'; there are hallucination, score"),
        ("serve", "no model has a champion yet"),
        ("serve --artifact hallucination", "give ENDPOINT=REFERENCE"),
        ("serve hallucination --artifact hallucination=nowhere", "nowhere: there is no artifact.json"),
        ("ask", "ENDPOINT"),
        ("ask lies", "no endpoint 'lies'"),
        ("ask score --data nowhere.json", "nowhere.json cannot be read"),
        ('ask score --data {"text":', "--data is not JSON"),
        ("ask score --data {} --example", "--example and --data"),
        ("registry push tests", "no artifact at .*tests: there is no artifact.json"),
        ("registry promote send one", "VERSION: invalid literal"),
        ("demo --steps 0", "--steps 0"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    line: str, says: str, run_prism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ran = run_prism(*line.split())
    assert re.search(says if re.search(r"\.\*", says) else re.escape(says), ran.problem())
    assert ran.status == 2


@pytest.mark.parametrize("setting", [{"COLUMNS": "40"}, {"PYTHONIOENCODING": "ascii"}], ids=["narrow", "ascii"])
def test_a_poor_terminal_does_not_break_the_line(setting: dict[str, str], private_home: Path) -> None:
    ran = in_a_process(private_home, "run", "send", "--engine", "zero9", **setting)
    assert "prism: invalid choice 'zero9' for argument '--engine'. " in ran.problem()
    assert "'ddp', 'fsdp', 'zero1', 'zero2', 'zero3'" in ran.problem()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--lm pythia-9000b", "pythia-9000b"),
        ("--corpus {folder}/texts.csv --text-column body", "body"),
        ("--corpus {folder}/empty.csv", "empty.csv"),
        ("--corpus {folder}/short.csv --tokenizer bytes --context 500", "500"),
        ("--workers 64 --batch-size 64", "64 workers of 1 CPU do not fit: the cluster has 4 CPU"),
        ("--workers 3 --batch-size 2", "batch_size 2 is less than the 3 workers"),
        ("--resume --name ghost", "there is no run 'ghost'"),
        ("--resume", "resume needs the name"),
    ],
)
def test_a_job_that_cannot_start_says_why(
    line: str, says: str, run_prism: Any, ray_cluster: Connection, ready_registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.csv").write_text("text\n" + "Rivers run to the sea.\n" * 40)
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "short.csv").write_text("text\n" + "Rivers run.\n" * 12)
    ran = run_prism("run", "send", *TINY[4:], *line.format(folder=tmp_path).split())
    assert says in ran.problem()
    assert ran.status == 2
    runs = ready_registry.parent / "runs"
    assert not runs.exists() or not list(runs.iterdir())


@pytest.mark.ray
def test_a_place_that_cannot_be_written_is_named(
    run_prism: Any, ray_cluster: Connection, ready_registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ran = run_prism("run", "send", *TINY, "--storage", tmp_path / "file" / "runs")
    assert str(tmp_path / "file") in ran.problem()
    assert ran.status == 2


@pytest.mark.ray
def test_run_trains_registers_and_prints_one_object(trained: tuple[Path, Ran], run_prism: Any) -> None:
    _, ran = trained
    assert ran.status == 0, ran.err
    summary = json.loads(ran.out)  # nothing else is on standard output
    assert summary["job"] == "send"
    assert summary["registered"] == "models:/send/1"
    assert summary["metrics"]["steps"] == 4
    assert open_artifact(summary["artifact"]).recipe["steps"] == 4
    assert Path(summary["folder"], "report.json").is_file()
    assert any("step 4/4" in line for line in ran.err)
    assert not [line for line in ran.err if "Traceback" in line or "WARNING" in line]


@pytest.mark.ray
def test_a_record_repeats_its_run_to_the_bit(
    trained: tuple[Path, Ran], run_prism: Any, ray_cluster: Connection, ready_registry: Path
) -> None:
    run = trained[0] / "runs" / "first"
    job, report = (flags.load_record(str(run / record)) for record in ("job.json", "report/report.json"))
    assert job.items() <= report.items()
    again = run_prism("run", "--config", run / "report" / "report.json", "--name", "again", "--json")
    assert again.status == 0, again.err
    first = open_artifact(run / "artifact").manifest
    second = open_artifact(ready_registry.parent / "runs" / "again" / "artifact").manifest
    assert second.recipe == first.recipe
    assert second.files == first.files
    assert second.metrics == first.metrics


@pytest.mark.ray
def test_a_resumed_run_keeps_its_recipe_without_being_told(
    trained: tuple[Path, Ran], run_prism: Any, ray_cluster: Connection, ready_registry: Path
) -> None:
    shutil.copytree(trained[0] / "runs" / "first", ready_registry.parent / "runs" / "first")
    gone_on = run_prism("run", "send", "--name", "first", "--resume", "--json")
    assert gone_on.status == 0, gone_on.err
    assert json.loads(gone_on.out)["metrics"]["steps"] == 4
    changed = run_prism("run", "send", "--name", "first", "--resume", "--steps", "9")
    assert "started with another recipe (steps differ)" in changed.problem()
    assert changed.status == 2


def test_a_record_is_checked_like_flags(trained: tuple[Path, Ran], run_prism: Any, tmp_path: Path) -> None:
    home, _ = trained
    content = json.loads((home / "runs" / "first" / "job.json").read_text())
    file = tmp_path / "job.json"
    file.write_text(json.dumps(content | {"job": "tokenize"}))
    assert "a record of job 'tokenize', not of 'send'" in run_prism("run", "send", "--config", file).problem()
    file.write_text(json.dumps(content | {"recipe": content["recipe"] | {"steps": -1, "tempo": 3}}))
    problem = run_prism("run", "send", "--config", file).problem()
    assert "recipe.steps: should be greater than 0, not -1" in problem
    assert "recipe.tempo" in problem
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "job"}))
    assert "name a job" in run_prism("run", "--config", file).problem()


@pytest.mark.ray
def test_registry_verbs(trained: tuple[Path, Ran], run_prism: Any, ready_registry: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained[0] / "runs" / "first" / "artifact", tmp_path / "artifact")
    assert "nothing is registered" in run_prism("registry", "list").out
    pushed = run_prism("registry", "push", folder, "--json")
    assert json.loads(pushed.out) == {"name": "send", "version": 1, "alias": None, "champion": True}
    assert run_prism("registry", "push", folder, "--name", "mine", "--alias", "trial").status == 0
    assert json.loads(run_prism("registry", "push", folder, "--json").out)["champion"] is False  # it is already
    assert run_prism("registry", "promote", "mine", 1).status == 0
    shown = json.loads(run_prism("registry", "show", "mine", "--json").out)
    assert [(version["version"], version["aliases"]) for version in shown] == [(1, ["champion", "trial"])]
    assert json.loads(run_prism("registry", "list", "--json").out).keys() == {"send", "mine"}
    missing = run_prism("registry", "promote", "mine", 7)
    assert "model mine has no version 7; it has 1" in missing.problem()
    assert (
        "no model 'other' is registered; registered are mine, send" in run_prism("registry", "show", "other").problem()
    )
    assert missing.status == 2

    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    corrupt = run_prism("registry", "push", folder)
    assert "weights.safetensors is corrupt" in corrupt.problem()
    assert corrupt.status == 2
    weights.write_bytes(content[:-8])
    assert "truncated" in run_prism("registry", "push", folder).problem()


@pytest.mark.ray
def test_a_port_in_use_is_named(trained: tuple[Path, Ran], run_prism: Any, ray_cluster: Connection) -> None:
    artifact = trained[0] / "runs" / "first" / "artifact"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = run_prism("serve", "score", "--artifact", f"score={artifact}", "--port", port)
    assert f"port {port} of 127.0.0.1 is in use" in ran.problem()
    assert ran.status == 2


def wait_for_metric(addresses: list[str], name: str, labels: dict[str, str], *wanted: float) -> float:
    """Until the one node shows one of these values, and which: Ray exports every few seconds."""
    (address,) = addresses
    line = re.compile(rf"^{name}{{(.*)}} ([\d.e+]+)$", re.MULTILINE)
    deadline = time.monotonic() + 180
    shown: list[str] = []
    while not set(wanted) & set(map(float, shown)):
        assert time.monotonic() < deadline, (name, labels, shown)
        time.sleep(1)
        found = line.findall(httpx.get(address, trust_env=False).text)
        shown = [value for own, value in found if labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', own)).items()]
    return min(set(wanted) & set(map(float, shown)))


@pytest.mark.ray
def test_serve_stays_until_terminated_and_ask_gets_its_answer(trained: tuple[Path, Ran], run_prism: Any) -> None:
    home, _ = trained
    port = str(free_port())
    with started(home, "serve", "score", "--port", port, "--json") as server:
        served = json.loads(server.stdout.readline())
        url = f"http://127.0.0.1:{port}"
        metrics = served.pop("metrics")
        assert served == {"url": url, "endpoints": {"score": "models:/send@champion"}, "left_out": {}}
        asked = run_prism("ask", "score", "--data", '{"text": "Rivers run to the sea."}', "--url", served["url"])
        assert asked.status == 0, asked.err
        assert json.loads(asked.out)["results"][0]["perplexity"] > 1
        assert run_prism("ask", "score", "--example", "--url", served["url"]).status == 0
        refused = run_prism("ask", "score", "--data", '{"text": 3}', "--url", served["url"])
        assert "text" in refused.problem()
        assert refused.status == 2
        good = {"endpoint": "score", "status": "200"}
        wait_for_metric(metrics, "ray_prism_requests_total", {"endpoint": "score", "status": "422"}, 1)
        early = wait_for_metric(metrics, "ray_prism_requests_total", good, 1, 2)  # Ray may lose what came at its start
        for _ in range(2):
            assert run_prism("ask", "score", "--example", "--url", served["url"]).status == 0
        wait_for_metric(metrics, "ray_prism_requests_total", good, early + 2)
        wait_for_metric(metrics, "ray_prism_model_seconds_count", {"endpoint": "score"}, 3, 4)
        below = ended(server, signal.SIGTERM)
    assert server.returncode == 130
    assert not below
    nobody = run_prism("ask", "score", "--url", served["url"])
    assert f"nothing answers at {served['url']}; start the endpoint with `prism serve score`" in nobody.problem()
    assert nobody.status == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_readable_answer_is_the_same_json_with_lists_of_numbers_on_a_line(answer: Any) -> None:
    assert json.loads(readable(answer)) == answer
    assert readable({"counts": [1, 2.5, -3e-9]}).count("\n") == 2


@pytest.mark.ray
def test_a_local_cluster_is_gone_after_an_interrupt(private_home: Path) -> None:
    with started(private_home, "cluster", "local", "--nodes", "2", "--cpus-per-node", "1") as cluster:
        assert "2 nodes, 2 CPUs" in cluster.stdout.readline()
        below = ended(cluster, signal.SIGINT)
    assert cluster.returncode == 130
    assert not below


@pytest.mark.ray
def test_demo_goes_the_whole_way_and_leaves_nothing_running(private_home: Path, ready_registry: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    ran = in_a_process(private_home, "demo", "--steps", "6", "--json")
    assert ran.status == 0, ran.err
    shown = json.loads(ran.out)
    assert shown["arms"].keys() == {"SeND", "plain"}
    for arm in shown["arms"].values():
        assert {"validation_loss", "eigenscore", "ees"} <= arm["metrics"].keys()
    assert shown["arms"]["SeND"]["registered"] == "models:/send/1"
    assert {"answer", "samples", "eigenscore"} <= shown["answer"].keys()
    assert any("EigenScore" in line and "seconds" in line for line in ran.err)
    mine = [process for process in psutil.process_iter(["pid", "environ"]) if process.pid not in before]
    home = str(private_home)
    assert not [p.pid for p in mine if (p.info["environ"] or {}).get("PRISM_HOME") == home]


CRASHING_EXIT = """
import ctypes, prism

def dispatched(args):
    print("begun")
    {does}

prism._dispatch = dispatched
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
prism.entry()
"""


@pytest.mark.parametrize(
    ("does", "status", "said"),
    [("raise KeyboardInterrupt", 130, "prism: interrupted\n"), ("return 0", -signal.SIGABRT, "")],
)
def test_an_interrupted_command_leaves_out_the_exit_handlers_of_c(does: str, status: int, said: str) -> None:
    code = CRASHING_EXIT.format(does=does)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "begun\n", said)


def test_what_is_unexpected_is_kept_and_summed_up(
    run_prism: Any, monkeypatch: pytest.MonkeyPatch, private_home: Path
) -> None:
    def burst(_: Any) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(prism.VERBS, "list", burst)
    ran = run_prism("list")
    assert ran.status == 1
    assert "unexpected RuntimeError: two lines; the traceback is in" in ran.problem()
    [kept] = (private_home / "tracebacks").iterdir()
    assert str(kept) in ran.problem()
    assert "in burst" in kept.read_text()


class started:
    """A command line in a process group of its own, as a terminal starts it; killed when the block ends."""

    def __init__(self, home: Path, *args: str) -> None:
        environment = {**os.environ, "PRISM_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the block ends
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prism", *args],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "subprocess.Popen[str]":
        return self.process

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with self.said:
            self.said.seek(0)
            if error is not None:
                error.add_note(f"its exit status is {self.process.returncode}, and it said:\n{self.said.read()}")


def ended(process: "subprocess.Popen[str]", by: signal.Signals) -> list[psutil.Process]:
    """Send the signal, wait for the end, and return what the process had started that still runs."""
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    process.send_signal(by)
    process.wait(timeout=120)
    deadline = time.monotonic() + 20
    while (alive := [child for child in below if child.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
