"""The commands of the documents are run as they are written, in a shell, by a user with an empty home.

That is `make walk`; `make test` only plans what needs GPUs, and sees that no command is left out. Flags behind the
commands make them small. They run on the four nodes of `prism cluster local --nodes 4`, but for those that
serve, which start their own Ray.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from cluster.ports import free_port
from cluster.registry import crown_first, register
from jobs import flags, job_class
from jobs.commands import RunOptions
from jobs.plan import plan
from jobs.plan_devices import device
from jobs.training import TrainingJob
from library.artifact import Artifact, open_artifact, write_artifact
from serving.trial import trial_artifacts
from tests.test_house import written_commands

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--tokenizer bytes --lm pythia-tiny --steps 4 --epoch-steps 2 --window 2 --batch-size 4 --context 24 "
    "--tracking-texts 4 --prompts 2 --prompt-tokens 4 --calibration-cases 4 --answers.samples 3 "
    "--answers.max-new-tokens 3"
)
SEND = f"--corpus truthfulqa {TINY}"
SWEEP = re.sub("--", "--base.", SEND)
LANGUAGE = "--corpus truthfulqa --context 24"
SPECTRUM = "--analysis.samples 8 --analysis.steps 4 --analysis.probes 1 --analysis.top 2"
HAWQ = "--classifier.steps 20 --classifier.train-images 512 --steps 4 --probe-images 32 --probes 4"

RUN = {  # in the order in which a reader would type them
    "prism run send": SEND,
    "prism run send --steps 600 --workers 2 --engine zero2 --name mine": SEND,
    "prism run send --selection none --register-as send-plain": SEND,
    "prism run send --corpus /data/my.csv --text-column body": TINY,
    "prism run send --name mine --resume": "",
    "prism run send --config ~/.prism/runs/mine/job.json --name b": "",
    "prism registry show send": "",
    "prism run hawq --fraction 0.375": HAWQ,
    "prism run hawq-lm --fraction 0.5 --workers 2": f"{LANGUAGE} --steps 2 --batch-size 4 --validation-blocks 4 "
    "--probe-blocks 4 --probes 2",
    "prism run farms --model models:/send@champion": "",
    "prism run farms-prune --model models:/send@champion --workers 2": f"{LANGUAGE} --calibration 8 --evaluation 8",
    "prism run hessian --artifact models:/send@champion --workers 2": SPECTRUM,
    "prism run qrc": "--seeds 0 --hours 600 --units 4",
    "prism run qrc --task closed-loop --mode feedback --sigma 1 --feedback 0.1 1 2 --units 20": "--seeds 0 --curves 12",
    "prism run rqgnn --data hiv --steps 1000": "--steps 3",
    "prism run rqgnn-features --source hiv --out features": "",
    "prism run spe --data zinc12k --workers 2": "--steps 3 --batch-size 8 --train-graphs 32",
    "prism run spe --data mine.csv --target-columns logS --cut scaffold": "--steps 3 --batch-size 8",
    "prism run spe-eigenpairs --source molecules.parquet --out eigenpairs": "",
    "prism run tokenize --source 'data/*.parquet' --out tokens": "--vocab-size 300",
    "prism tune send --samples 8 --base.steps 240 --base.epoch-steps 40 --name sweep": f"{SWEEP} --samples 2",
    "prism tune send --resume sweep --samples 16": "--samples 3",
    "prism run send --config ~/.prism/searches/sweep/best.json --steps 1000": "--steps 4",
    "prism cluster render": "--check",
    "prism cluster render --config mine.json --out deployment": "",
    "prism cluster render --config mine.json --out deployment --check": "",
    "prism plan send --lm EleutherAI/pythia-12b --batch-size 1024 --workers 64 --gpu h100": "",
    "prism plan send --lm EleutherAI/pythia-1b --workers 8 --gpu h100 --precision bf16 --batch-size 1024 "
    "--context 2048": "",
    "prism plan pythia --gpu h100 --workers 64": "",
    "prism plan papers": "",
    "prism run hawq --model resnet50-published": "",
    "prism run qrc --table coupons-a.csv coupons-b.csv coupons-c.csv": "--seeds 0 --units 4 --washout 10",
    "prism tune hawq --samples 24": f"{re.sub('--', '--base.', HAWQ)} --samples 1",
    "prism tune qrc --samples 8 --most-qubits 12": "--samples 1 --batch 4 --hours 600 --rungs 200 400 --washout 50 "
    "--candidates 2 --refinements 2 --fresh-seeds 1 --pool.qubits 3 3",
    "prism run diffspectra-sample --out DIR": "--limit 1 --samples 2 --steps 3",
    "prism registry promote rqgnn 7": "",
    "prism registry rollback rqgnn": "",
    "prism submit -- prism run send --workers 2": SEND,
    "prism submit --name long --env HF_TOKEN --detach -- prism run send --workers 2": SEND,
    "prism submit --follow long": "",
    "prism submit --stop long": "",
    "prism submit --address http://127.0.0.1:8265 -- prism run send --workers 4": SEND,
}
SERVED = {  # what serves, and who asks it
    "prism serve hallucination score &": [
        "prism ask hallucination --example",
        'prism ask hallucination --data \'{"prompt": "The river Thames flows through", "samples": 10, '
        '"explain": true}\'',
        'prism ask hallucination --data \'{"prompt": "Adelaide Procter was an English poet and", "samples": 10}\'',
        'prism ask score --data \'{"text": "The river Thames flows through London ."}\'',
    ],
    "prism serve hallucination score --replicas 2": ["prism ask score --example"],
    "prism serve spectrum --artifact spectrum=models:/farms/3": [],
    "prism serve": [],
    "prism console": [],
    "prism console hallucination score": [],
    "prism console --artifact classify=models:/hawq/2 --port 8010": [],
}
ELSEWHERE = {  # the test that runs it
    "make demo": "test_prism.py::test_demo_goes_the_whole_way_and_leaves_nothing_running",
    "make test": "test_written_commands.py::test_every_command_is_run",  # among the others
    "prism cluster local --nodes 4": "test_written_commands.py::user",
    "prism cluster local --nodes 3": "test_prism.py::test_a_local_cluster_is_gone_after_an_interrupt",
    "prism run diffspectra-simulate --source molecules.smi --out lines.npz": "jobs/test_diffspectra_simulate.py::test_"
    "molecules_are_simulated_once_and_failures_set_aside",
}
ALIKE = {  # differs in a number or a name from one that is run
    "prism run send --steps 300 --workers 2": "prism run send --steps 600 --workers 2 --engine zero2 --name mine",
    "prism run hawq-lm --lm models:/send@champion": "prism run hawq-lm --fraction 0.5 --workers 2",
    "prism run hessian --artifact PLACE": "prism run hessian --artifact models:/send@champion --workers 2",
}
BEYOND_A_LAPTOP = "--gpu", "ray://", "prism cluster up", "prism cluster status", "prism cluster down"
MACHINES = [
    line for line in written_commands() if not line.startswith("prism plan") and any(b in line for b in BEYOND_A_LAPTOP)
]


class User:
    """Somebody with an empty home, a folder with data of their own, and a cluster; types commands."""

    def __init__(self, folder: Path, address: str, dashboard: str) -> None:
        self.folder, self.dashboard = folder, dashboard
        self.settings = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PRISM_"))}
        self.settings |= {
            "HOME": str(folder / "home"),
            "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache/huggingface")),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_TOKEN": "none",
            "RAY_API_SERVER_ADDRESS": dashboard,
        }
        self.on_cluster = {"RAY_ADDRESS": address}

    def meant(self, command: str) -> str:
        """The command with the user's own places in it."""
        places = {
            "/data/my.csv": "my.csv",
            "http://127.0.0.1:8265": self.dashboard,
        }
        for written, own in places.items():
            command = command.replace(written, own)
        return command

    def types(self, command: str, *, alone: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command; `alone` without the cluster."""
        settings = self.settings | ({} if alone else self.on_cluster)
        return subprocess.run(
            ["bash", "-c", self.meant(command)],
            cwd=self.folder,
            env=settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def starts(self, command: str, log: Path) -> "subprocess.Popen[str]":
        """Start a command that runs until it is interrupted, in a Ray of its own."""
        with log.open("w") as said:
            return subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.settings,
                stdout=said,
                stderr=said,
                text=True,
            )


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user with data, whose `prism cluster local --nodes 4` runs in another terminal."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "home").mkdir()
    own_data(folder)
    someone = User(folder, "", "")
    log = folder / "cluster.log"
    cluster = someone.starts("prism cluster local --nodes 4", log)
    try:
        found = until(
            lambda: re.search(r"--address (\S+:\d+)\n.*--address (http://\S+)", log.read_text()), cluster, log
        )
        yield User(folder, found[1], found[2])
    finally:
        cluster.send_signal(signal.SIGINT)
        cluster.wait(timeout=60)


def until(look, process: "subprocess.Popen[str]", log: Path):
    """What `look` finds, while the process lives."""
    deadline = time.monotonic() + 180
    while not (found := look()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    return found


def own_data(folder: Path) -> None:
    """What the documents say that a user may have."""
    texts = [f"Rivers run to the sea, and the sea is never full, said number {i}." for i in range(60)]
    pd.DataFrame({"body": texts}).to_csv(folder / "my.csv", index=False)
    (folder / "data").mkdir()
    pd.DataFrame({"text": texts}).to_parquet(folder / "data" / "a.parquet")
    rings = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCCC1", "c1ccoc1", "C1CCNCC1", "c1ccsc1", "C1CC1")
    smiles = ["C" * (i + 1) + ring for ring in rings for i in range(6)]
    molecules = pd.DataFrame({"smiles": smiles, "logS": np.linspace(0, -5, len(smiles))})
    molecules.to_csv(folder / "mine.csv", index=False)
    molecules[["smiles"]].to_parquet(folder / "molecules.parquet")
    hours = pd.date_range("2024-01-01", periods=300, freq="h")
    for k, name in enumerate("abc"):
        noise = np.random.default_rng(k)
        series = {
            "time": hours,
            "temperature_C": 15 + 8 * np.sin(np.arange(300) / 24) + noise.normal(size=300),
            "humidity_percent": 70 + 20 * np.cos(np.arange(300) / 24) + noise.normal(size=300),
        }
        loss = np.cumsum(noise.uniform(size=300)) * 0.01
        pd.DataFrame(series | {"mass_loss_g_m2": loss}).to_csv(folder / f"coupons-{name}.csv", index=False)
    description = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (folder / "mine.json").write_text(description[1])


@pytest.fixture(scope="module")
def registered(user: User, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Versions of models that the documents speak of, in the user's registry."""
    folder = tmp_path_factory.mktemp("artifacts")
    versions = {"hallucination": 1, "spectrum": 3, "classify": 2, "graph-anomaly": 7, "molecule": 1}
    models = ("send", "farms", "hawq", "rqgnn", "diffspectra")
    places = trial_artifacts(versions, folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRISM_HOME", str(user.folder / "home" / ".prism"))
        for model, (endpoint, count) in zip(models, versions.items(), strict=True):
            for number in range(1, count + 1):
                version = register(other_version(places[endpoint], number, folder).path, model)
                assert version == number
                crown_first(model, version)


def other_version(place: str, number: int, folder: Path) -> Artifact:
    """The same model with another metric."""
    artifact = open_artifact(place)
    return write_artifact(
        folder / f"{artifact.kind}-{number}",
        kind=artifact.kind,
        recipe=artifact.recipe,
        weights=artifact.iter_weights(),
        metrics={**artifact.metrics, "number": float(number)},
        data=artifact.manifest.data,
        arrays=artifact.arrays(),
        texts={name: artifact.text(name) for name in artifact.manifest.files if not name.endswith(".safetensors")},
    )


def test_every_command_is_run() -> None:
    asked = [ask for asks in SERVED.values() for ask in asks]
    known = [*RUN, *SERVED, *asked, *ELSEWHERE, *ALIKE, *MACHINES]
    assert sorted(known) == sorted(written_commands())
    assert RUN.keys() >= set(ALIKE.values())
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("command", [line for line in MACHINES if "prism run" in line])
def test_what_needs_other_machines_can_be_planned(command: str) -> None:
    name, *rest = command.partition("prism run ")[2].split()
    job, _ = flags.parse_job(job_class(name), RunOptions, rest, prog=f"prism run {name}")
    assert isinstance(job, TrainingJob)
    assert plan(job, device("h100", cpus=1)).hours > 0


@pytest.mark.walk
@pytest.mark.parametrize("command", RUN)
def test_it_runs(command: str, user: User, registered: None) -> None:
    done = user.types(f"{command} {RUN[command]}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.walk
@pytest.mark.parametrize("command", SERVED)
def test_it_serves_until_it_is_interrupted(command: str, user: User, registered: None, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    server = user.starts(f"{command.removesuffix('&')} --port {port}", log)
    try:
        until(lambda: f"http://127.0.0.1:{port}" in log.read_text(), server, log)
        for ask in SERVED[command]:
            asked = user.types(f"{ask} --url http://127.0.0.1:{port}", alone=True)
            assert asked.returncode == 0, asked.stderr
            assert json.loads(asked.stdout)["results"]
        if "console" in command:
            assert httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True, trust_env=False).status_code == 200
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=120)
    assert server.returncode == 130, log.read_text()
