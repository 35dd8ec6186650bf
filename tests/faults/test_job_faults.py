"""Real faults around a job: its driver, a trial, the registry, the disk, signals at any moment, clocks and hashes."""

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import jobs
from jobs import spaces
from jobs.checkpoint import Checkpoint, complete
from jobs.launch import launch
from jobs.search import Journal
from jobs.tuning import TuneJob
from library.artifact import open_artifact, write_artifact
from library.errors import InputError, PrismError
from tests.faults.runs import at_step, driver, job, same, state

ROOT = Path(__file__).resolve().parents[2]


def test_a_driver_killed_at_once_leaves_what_resumes_exactly(tmp_path: Path, undisturbed: Path) -> None:
    process = driver(tmp_path, "run", "start")
    at_step(tmp_path / "run", 20, process.kill).join()
    assert process.wait(60) == -signal.SIGKILL
    process.communicate()
    assert 20 <= Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).step < 60
    again = driver(tmp_path, "run", "resume")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    same(state(undisturbed, "run"), state(tmp_path, "run"))


@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_killed_trial_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spaces.SPACES, "toy", spaces.SearchEntry("tests.jobs.toy_space", "toy"))
    monkeypatch.setitem(jobs.JOBS, "toy", jobs.JobEntry("toy", "tests.jobs.toy:ToyJob", "a toy"))
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for record in Journal(str(tmp_path / "s")).records:
                if record.state == "running" and 4 <= max(record.curve, default=0) <= 12:
                    killed.extend(_trials())
                    for pid in killed:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    base = {"recipe": {"steps": 18, "samples": 32, "slow": 0.2}, "checkpoint_every": 2, "evaluate_every": 2}
    search = TuneJob(space="toy", base=base, samples=2, concurrent=1, storage=str(tmp_path), name="s")
    report = search.run()
    watcher.join()
    assert killed, "no trial died"
    records = Journal(str(tmp_path / "s")).records
    assert [record.number for record in records] == [0, 1]
    assert {record.state for record in records} <= {"finished", "stopped"}, records
    assert report.artifact is not None


def _trials() -> list[int]:
    """The processes of the trials that run."""
    from ray._private.state import actors

    alive = (actor for actor in actors().values() if actor["State"] == "ALIVE")
    return [actor["Pid"] for actor in alive if "Trial" in actor["ActorClassName"] or "Func" in actor["ActorClassName"]]


@pytest.fixture
def locked(ready_registry: Path) -> Iterator[Path]:
    """The registry's database, locked by somebody else until the test ends."""
    with sqlite3.connect(ready_registry, isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield ready_registry
        holder.rollback()


@pytest.mark.usefixtures("ray_cluster")
def test_a_registry_locked_by_somebody_costs_no_training(tmp_path: Path, locked: Path) -> None:
    report = launch(job(tmp_path, "run", 1))
    assert report.registered is None
    assert any("prism registry push" in note for note in report.notes), report.notes
    assert open_artifact(report.artifact).kind == "toy"
    assert Checkpoint(complete(tmp_path / "run" / "checkpoints")[0]).step == 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, which only root can make."""
    place = tmp_path / "small"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_a_disk_that_fills_up_stops_the_run_whole_and_it_goes_on_later(tmp_path: Path, small_disk: Path) -> None:
    launch(job(tmp_path, "calm"))
    filler = small_disk / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"0" * 4096)

    watcher = at_step(small_disk / "run", 20, fill)
    with pytest.raises(PrismError, match=r"the disk is full.*is safe; go on with: prism run toy --name run --resume"):
        launch(job(small_disk, "run", slow=0.05))
    watcher.join()
    step = Checkpoint(complete(small_disk / "run" / "checkpoints")[0]).step
    assert 20 <= step < 60
    filler.unlink()
    launch(job(small_disk, "run", slow=0.05, resume=True))
    same(state(tmp_path, "calm"), state(small_disk, "run"))


def test_a_disk_that_is_too_small_for_an_artifact_is_named_and_nothing_is_left(small_disk: Path) -> None:
    weights = {"w": torch.ones(1 << 20)}
    for further in ({"weights": weights}, {"weights": {}, "arrays": weights}):
        with pytest.raises(InputError, match=r"cannot write .*artifact: the disk is full"):
            write_artifact(small_disk / "artifact", kind="toy", recipe={}, metrics={}, data="none", **further)
    assert not list(small_disk.iterdir())


RUN = ["run", "send", "--corpus", "truthfulqa", "--tokenizer", "bytes", "--lm", "pythia-tiny", "--steps", "400"]
RUN += ["--epoch-steps", "2", "--window", "2", "--batch-size", "4", "--context", "24", "--prompts", "0"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [0.0, 0.2, 3.0, 8.0])  # importing, starting Ray, its workers; or later
def test_a_signal_at_any_moment_of_the_start_ends_it_in_one_line(
    private_home: Path, moment: float, kind: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "prism", *RUN, "--name", "run"], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    while not any("_json" in mapped.path for mapped in psutil.Process(process.pid).memory_maps()):
        time.sleep(0.001)  # Python itself is starting; this is the first library that the command loads
    time.sleep(moment)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(kind)
    _, err = process.communicate(timeout=120)
    early = -kind if kind == signal.SIGTERM else 130  # before the command is there to say anything
    assert process.returncode in (0, 130, early), err  # 0: it trained already, saved, and said how to go on
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("prism: ")]) <= 3, err
    _, alive = psutil.wait_procs(children, timeout=150)  # Ray's agents notice by themselves
    assert not alive, [child.name() for child in alive]


IN_THE_LOCK = """
import logging, os, signal, sys, threading, time
from jobs.commands import interruptible

def stop(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "_releaseLock":
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIG{kind})

with interruptible():
    try:
        sys.setprofile(stop)
        if os.fork() == 0:
            os._exit(0)
        assert sys.getprofile() is None, "logging was not asked"
        time.sleep(60)
    except KeyboardInterrupt:
        other = threading.Thread(target=logging.getLogger, args=("another",), daemon=True)
        other.start()
        other.join(10)
        print("locked" if other.is_alive() else "free")
"""


@pytest.mark.skipif(not hasattr(logging, "_releaseLock"), reason="newer Pythons fork without logging's functions")
@pytest.mark.parametrize("kind", ["INT", "TERM"])
def test_a_signal_during_a_fork_is_neither_swallowed_nor_locks_the_loggers(kind: str) -> None:
    code = IN_THE_LOCK.replace("{kind}", kind)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.stdout, done.stderr) == ("free\n", "")


def test_clock_locale_and_hash_seed_change_nothing(tmp_path: Path) -> None:
    code = "import sys; from library.recipe import fit; from tests.jobs.toy import ToyRecipe; "
    code += "print(fit(ToyRecipe(steps=5, dropout=0.2), path=sys.argv[1]).manifest.files)"
    contents = set()
    for number, (zone, seed, locale) in enumerate([("UTC", "0", "C"), ("Pacific/Apia", "77", "C.UTF-8")]):
        settings = os.environ | {"TZ": zone, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(tmp_path / str(number))]
        done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=True)
        contents.add(done.stdout)
    assert len(contents) == 1
