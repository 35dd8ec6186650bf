"""The examples in docstrings give what stands under them."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("library", "tune_spaces", "jobs", "serving")  # those of the floor `cluster` start Ray, as its own tests do
PLACES = [str(file.relative_to(ROOT)) for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]


def docstrings(place: str) -> dict[str, str]:
    """By name, those in a file that hold examples; decorated functions too, which doctest alone does not find."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse((ROOT / place).read_text())) if isinstance(node, kinds)]
    found = {getattr(node, "name", place): ast.get_docstring(node) or "" for node in nodes}
    return {name: text for name, text in found.items() if ">>> " in text and "+SKIP" not in text}


@pytest.mark.parametrize("place", [place for place in PLACES if docstrings(place)])
def test_examples_give_what_they_say(place: str) -> None:
    module = importlib.import_module(place.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    runner = doctest.DocTestRunner()
    for name, text in docstrings(place).items():
        runner.run(doctest.DocTestParser().get_doctest(text, dict(vars(module)), name, place, 0))
    found = runner.summarize()
    assert found.attempted > 0
    assert found.failed == 0
