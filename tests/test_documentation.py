"""What the documents say is done as they say it: the method of docs/adding-a-method.md is built, trained, served."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "adding-a-method.md"
BLOCK = re.compile(r"```(python|markdown)\n# ([\w/.]+)(?:, (in|at) (the )?(\w+))?\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^prism .*$", re.MULTILINE)


class Copy(NamedTuple):
    """A copy of the repository with the guide's method in it, and a home of its own."""

    folder: Path
    home: Path

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        return kept | {"PRISM_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def python(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *args],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )


def commands(verb: str) -> list[str]:
    """The arguments of the guide's command with that verb."""
    (line,) = [line for line in COMMAND.findall(GUIDE.read_text()) if line.startswith(f"prism {verb} ")]
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The repository's files, the guide's files, and the guide's lines in the tables."""
    copy = Copy(tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("home"))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("docs/results"):
            (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy.folder / name)
    for _, place, where, _, table, text in BLOCK.findall(GUIDE.read_text()):
        file = copy.folder / place
        if not where:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            continue
        starts = {"at": r"^from serving\.spectrum .*\n", "in": rf"^{table}\b.*[{{(]\n(?:    endpoint.*\n.*\(\n)?"}
        changed, times = re.subn(
            starts[where], lambda found, text=text: found[0] + text, file.read_text(), flags=re.MULTILINE
        )
        assert times == 1, (place, table)
        file.write_text(changed)
    return copy


def test_pages_are_what_their_sources_say() -> None:
    done = subprocess.run(
        [sys.executable, "docs/pages.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
    links = [
        (document, link)
        for document in documents
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
        if not (document.parent / link).exists()
    ]
    assert documents
    assert not links


def test_the_faults_that_are_promised_are_tested() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    files = set(re.findall(r"`((?:faults|jobs|cluster)/test_\w+\.py)`", text))
    assert len(files) >= 6
    assert not [file for file in files if not (ROOT / "tests" / file).exists()]


def test_the_guides_method_passes_its_own_tests_and_the_style(built: Copy) -> None:
    for check in (("pytest", "-q", "tests/library/test_texture.py"), ("doctest", "library/texture/recipe.py")):
        done = built.python(*check)
        assert done.returncode == 0, done.stdout
    places = ("library/texture", "jobs/texture.py", "tune_spaces/texture.py", "serving/texture.py")
    for check in (("check",), ("format", "--check")):
        done = built.python("ruff", *check, *places, "tests/library/test_texture.py")
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def trained(built: Copy) -> dict[str, Any]:
    """What the guide's training reports."""
    done = built.python("prism", *commands("run"), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_guides_method_is_listed_trained_and_searched(built: Copy, trained: dict[str, Any]) -> None:
    offers = json.loads(built.python("prism", "list", "--json").stdout)["offers"]
    verbs = {offer["verb"] for offer in offers if offer["name"] == "texture"}
    assert verbs == {"run", "tune", "serve, ask"}
    assert trained["metrics"]["validation_accuracy"] > 0.3  # of ten classes
    searched = built.python("prism", *commands("tune"), "--json")
    assert searched.returncode == 0, searched.stderr


def test_the_guides_endpoint_answers(built: Copy, served: int) -> None:
    asked = built.python("prism", *commands("ask"), "--url", f"http://127.0.0.1:{served}", "--json")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert sum(answer["probabilities"]) == pytest.approx(1)


@pytest.fixture
def served(built: Copy, trained: dict[str, Any]) -> Iterator[int]:
    """The port at which the guide's endpoint is served."""
    port = free_port()
    command = [sys.executable, "-m", "prism", *commands("serve"), "--port", str(port)]
    log = (built.home / "serve.log").open("w")
    server = subprocess.Popen(command, cwd=built.folder, env=built.environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 180
    while f":{port}/texture" not in (said := Path(log.name).read_text()):
        assert server.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.5)
    yield port
    server.terminate()
    assert server.wait(120) == 130


def test_every_benchmark_is_on_the_page():
    page = (ROOT / "docs" / "performance.md").read_text()
    files = [file for file in (ROOT / "benchmarks").glob("[!_]*.py") if 'if __name__ == "__main__"' in file.read_text()]
    assert len(files) > 5
    for file in files:
        assert f"\n## {file.stem}\n" in page, file.stem


def test_naming_a_benchmark_keeps_the_others_parts_of_the_same_machine_and_day(tmp_path):
    from benchmarks.__main__ import head, kept

    page = tmp_path / "performance.md"
    assert kept(page) == {}
    page.write_text(f"{head()}\n\n## one\n\nFirst.\n\n```\n1\n```\n\n## two\n\nSecond.\n")
    assert kept(page) == {"one": "## one\n\nFirst.\n\n```\n1\n```", "two": "## two\n\nSecond."}
    page.write_text(page.read_text().replace("Machine: ", "Machine: another "))
    assert kept(page) == {}
