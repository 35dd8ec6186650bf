"""The endpoint `molecule` over real HTTP: what the library finds, progress, pictures, and bodies refused."""

import base64
import json
import threading
from collections.abc import Iterator

import httpx
import pytest

from library.artifact import Artifact
from library.diffspectra.generation import Elucidator
from library.diffspectra.measured import Recording
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling
from library.recipe import fit
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.molecule import MoleculeSearch
from serving.molecule_examples import ETHANOL
from serving.threads import in_steps

SMALL = {"samples": 3, "steps": 4}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    recipe = DiffSpectraRecipe(steps=2, batch_size=4, most_atoms=9, modality_dropout=0.3, condition_dropout=0.0)
    return fit(recipe, path=tmp_path_factory.mktemp("diffspectra") / "artifact")


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"molecule": str(artifact.path)}, port=free_port) as served:
        yield served


def post(served: Served, **request: object) -> httpx.Response:
    return httpx.post(f"{served.url}/molecule/predict", timeout=120, trust_env=False, **request)


def test_what_the_library_finds_comes_back(served, artifact):
    elucidator = Elucidator.from_artifact(artifact)
    query = elucidator.query(
        {name: Recording(**one) for name, one in ETHANOL.items()}, formula={"C": 2, "H": 6, "O": 1}
    )
    [found] = elucidator.find([query], Sampling(**SMALL))
    answer = ask("molecule", {"spectra": ETHANOL, "formula": "C2H6O", **SMALL}, served.url)
    assert answer["model"] == artifact.version
    assert answer["failures"] == found.failures
    assert answer["validity"] == pytest.approx(1 - sum(found.failures.values()) / 3)
    assert [one["smiles"] for one in answer["candidates"]] == [one.smiles for one in found.candidates]
    assert answer["spectra"] == ["uv", "ir", "raman"]
    assert answer["picture"] is None


def test_a_candidate_is_told_with_its_geometry(served, artifact):
    """A network of two steps finds no molecule: a sample of one carbon and four hydrogens is built by hand."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    from library.diffspectra.ranking import rank
    from library.diffspectra.sdf import structure_of
    from serving.molecule import _molecule

    methane = Chem.AddHs(Chem.MolFromSmiles("C"))
    AllChem.EmbedMolecule(methane, randomSeed=1)
    [candidate] = rank([structure_of(methane)]).candidates
    told = _molecule(candidate)
    assert (told.smiles, told.score, sorted(told.elements)) == ("C", 1.0, ["C", "H", "H", "H", "H"])
    assert len(told.positions) == 5
    assert [order for _, _, order in told.bonds] == [1, 1, 1, 1]


@pytest.mark.parametrize("subset", [["ir"], ["uv", "raman"]])
def test_any_subset_of_spectra_is_read_and_drawn(served, subset):
    body = {"spectra": {name: ETHANOL[name] for name in subset}, "atoms": 9, "picture": True, **SMALL}
    answer = ask("molecule", body, served.url)
    assert answer["spectra"] == subset
    assert base64.b64decode(answer["picture"]).startswith(b"\x89PNG")


def test_units_change_nothing(served):
    """The same UV-Vis spectrum over wavelengths in nm, from long to short."""
    volts = ETHANOL["uv"]["x"]
    nm = {"x": [1239.841984 / x for x in volts], "y": ETHANOL["uv"]["y"], "axis": "nm"}
    answers = [ask("molecule", {"spectra": {"uv": uv}, "atoms": 9, **SMALL}, served.url) for uv in (ETHANOL["uv"], nm)]
    assert answers[0] == answers[1]


def test_progress_is_shown_and_the_answer_is_last(served):
    headers = {"Accept": "text/event-stream"}
    body = {"spectra": ETHANOL, "atoms": 9, **SMALL}
    text = post(served, json=body, headers=headers).text
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    assert [event["event"] for event in events] == ["progress"] * 4 + ["result"]
    assert [json.loads(event["data"])["done"] for event in events[:-1]] == [1, 2, 3, 4]
    assert json.loads(events[-1]["data"]) == ask("molecule", body, served.url)


IR = ETHANOL["ir"]
BAD = {
    "nothing": ({"spectra": {}}, "spectra"),
    "another spectrum": ({"spectra": {"nmr": IR}}, "spectra.nmr"),
    "no values": ({"spectra": {"ir": {"x": [1, 2]}}}, "spectra.ir.y"),
    "lengths": ({"spectra": {"ir": {**IR, "y": [1, 2]}}}, "spectra.ir"),
    "zeros": ({"spectra": {"ir": {**IR, "y": [0] * len(IR["y"])}}}, "spectra.ir"),
    "a unit of another": ({"spectra": {"raman": {**IR, "axis": "nm"}}}, "spectra.raman"),
    "an axis that turns back": ({"spectra": {"ir": {**IR, "x": [*IR["x"][:-1], 600]}}}, "spectra.ir"),
    "half of it missing": ({"spectra": {"ir": {"x": [500, 800, 900], "y": [0, 1, 0]}}}, "spectra.ir"),
    "no formula": ({"spectra": ETHANOL, "formula": "C2H6o"}, "formula"),
    "another element": ({"spectra": ETHANOL, "formula": "CCl4"}, "formula"),
    "too many atoms": ({"spectra": ETHANOL, "formula": "C20H42"}, "atoms"),
    "two sizes": ({"spectra": ETHANOL, "formula": "C2H6O", "atoms": 9}, "body"),
    "no samples": ({"spectra": ETHANOL, "samples": 0}, "samples"),
    "guidance that was not learned": ({"spectra": ETHANOL, "atoms": 9, "guidance": 2.0}, "guidance"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_name_their_field(served, name):
    body, field = BAD[name]
    response = post(served, json=body)
    assert response.status_code == 422, response.text
    assert field in [entry["field"] for entry in response.json()["fields"]], response.text


def test_too_much_work_is_413(served):
    response = post(served, json={"spectra": ETHANOL, "atoms": 9, "samples": 256, "steps": 1000})
    assert response.status_code == 413
    assert "256000 passes" in response.json()["error"]


def test_the_examples_are_bodies():
    for body in MoleculeSearch.examples.values():
        MoleculeSearch.Request.model_validate_json(json.dumps(body))


def test_closing_ends_the_work_at_its_next_step():
    ended = []

    def work(told):
        try:
            for step in range(1_000_000):
                told(step, 1_000_000)
        finally:
            ended.append(step)

    steps = in_steps(work)
    next(steps)
    steps.close()
    assert len(ended) == 1
    assert ended[0] < 999_999


def test_what_the_work_raises_is_raised():
    def work(told):
        told(1, 2)
        raise ValueError("broken")

    steps = in_steps(work)
    next(steps)
    with pytest.raises(ValueError, match="broken"):
        next(steps)


def test_all_work_goes_through_one_thread_that_is_not_the_caller():
    def work(told):
        told(1, 1)
        return threading.get_ident()

    threads = set()
    for _ in range(20):
        steps = in_steps(work)
        next(steps)
        with pytest.raises(StopIteration) as end:
            next(steps)
        threads.add(end.value.value)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
