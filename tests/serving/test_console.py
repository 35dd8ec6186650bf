"""The console in a real browser, over real endpoints on Ray Serve: every tab answers, and nothing else happens."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By

from cluster.registry import register
from library.artifact import Artifact
from library.diffspectra.recipe import DiffSpectraRecipe
from library.hawq.recipe import HawqRecipe
from library.images.recipe import ClassifierRecipe
from library.qrc.nowcast import Nowcast
from library.qrc.recipe import QrcRecipe
from library.qrc.schema import SIMULATED, Schema
from library.qrc.spectra import about, time_scales
from library.qrc.trained import save_forecaster
from library.recipe import fit
from library.rqgnn import RqgnnRecipe
from library.spe.recipe import SpeRecipe
from library.spe.settings import Backbone, Encoding
from serving.app import ENDPOINTS
from tests.serving.console_browser import ACTIONS, DESKTOP, PHONE, Browser, browser, missing

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = "graph-encoding"
INPUTS = ("temperature", "humidity", "rain", "wind")
CLASSIFIER = ClassifierRecipe(steps=10, batch_size=64, train_images=1000, validation_fraction=0.03)
DIFFSPECTRA = DiffSpectraRecipe(steps=1, batch_size=4, most_atoms=9, modality_dropout=0.3, condition_dropout=0.0)
SPE = SpeRecipe(
    steps=2,
    batch_size=8,
    train_graphs=16,
    encoding=Encoding(eigenpairs=8, width=4, channels=2, rho_layers=1, rho_hidden=8, mlp_hidden=8),
    backbone=Backbone(layers=1, hidden=8),
)
HOSTILE = '<img src="http://example.org/x.png"> ${1 + 1} {{value}}'

pytestmark = [pytest.mark.ray, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def champions(send_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A small artifact for each model; `spectrum` takes the language model's matrices."""
    folder = tmp_path_factory.mktemp("champions")
    weights = fit(CLASSIFIER, path=folder / "classifier", device="cpu").path
    hawq = HawqRecipe(
        classifier=CLASSIFIER, weights=str(weights), steps=2, batch_size=32, probe_images=32, probe_batch=32, probes=4
    )
    return {
        "send": send_artifact,
        "farms": send_artifact,
        "hawq": fit(hawq, path=folder / "hawq", device="cpu"),
        "rqgnn": fit(RqgnnRecipe(steps=4, batch_size=256, hidden=16, depth=4), path=folder / "rqgnn"),
        "spe": fit(SPE, path=folder / "spe"),
        "diffspectra": fit(DIFFSPECTRA, path=folder / "diffspectra"),
        "qrc": forecaster(folder / "qrc"),
    }


def forecaster(path: Path) -> Artifact:
    task = Nowcast(hours=700)
    model = QrcRecipe(qubits=(3,), sigma=(0.3, 1.0), units=8, washout=60).forecaster(closed_loop=True)
    x, y = task.series(("EWR",))
    model.fit(x, y, validation=task.series(("LGA",)))
    told = about(Schema(inputs=INPUTS, step=1.0, target=SIMULATED), time_scales(model.reservoir_, model.driving(x)))
    return save_forecaster(model, path, metrics={"nrmse": 0.5}, data="none", about=told)


@pytest.fixture(scope="module")
def url(champions, empty_registry, free_port, tmp_path_factory) -> Iterator[str]:
    """Where `prism console` runs, as a person starts it; Ctrl-C ends it, and it leaves nothing."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(empty_registry, home)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRISM_HOME", str(home))
        for name, artifact in champions.items():
            register(artifact.path, name, aliases=["champion"])
    log = home / "console.log"
    names = [name for name in ENDPOINTS if ENDPOINTS[name].model in champions and name != LEFT_OUT]
    command = [sys.executable, "-m", "prism", "console", *names, "--port", str(free_port), "--address", "local"]
    with log.open("w") as output:
        running = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PRISM_HOME": str(home)}, stdout=output, stderr=subprocess.STDOUT
        )
    line = f"open http://127.0.0.1:{free_port} in a browser"
    deadline = time.monotonic() + 400
    try:
        while line not in log.read_text():
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{free_port}/"
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130, log.read_text()
    finally:
        running.terminate()  # nothing where it has ended already


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


@pytest.fixture
def page(chrome: Chrome, url: str) -> Iterator[Browser]:
    """The console on a desktop. Whatever a test did, nothing went wrong in the browser, or to another host."""
    yield from opened(chrome, url, DESKTOP)


@pytest.fixture
def phone(chrome: Chrome, url: str) -> Iterator[Browser]:
    """The same on a phone."""
    yield from opened(chrome, url, PHONE)


def opened(chrome: Chrome, url: str, size: tuple[int, int]) -> Iterator[Browser]:
    found = Browser(chrome, url, size)
    yield found
    assert found.complaints() == []
    assert found.foreign_requests() == set()


def error(answer) -> str:
    """The one line that stands where an answer would."""
    [line] = answer.find_elements(By.CSS_SELECTOR, ".error")
    return line.text


def test_the_first_page_says_what_is_deployed_and_what_is_not(page, champions):
    assert page.tabs() == ["Overview", *ACTIONS]
    cards = {card.text.split()[0]: card.text for card in page.one("overview").find_elements(By.CSS_SELECTOR, ".card")}
    assert cards.keys() == ENDPOINTS.keys()
    for name, endpoint in ENDPOINTS.items():
        if name == LEFT_OUT or endpoint.model not in champions:
            assert "not deployed" in cards[name]
            assert f"prism run {endpoint.model}" in cards[name]
            continue
        artifact = champions[endpoint.model]
        assert cards[name].startswith(f"{name} ready")
        assert f"models:/{endpoint.model}@champion" in cards[name]
        assert f"version {artifact.version}" in cards[name]
        assert next(iter(artifact.metrics)).replace("_", " ") in cards[name]
    assert page.too_wide() <= 0


@pytest.mark.parametrize("tab", ACTIONS)
def test_every_tab_answers_on_a_phone_and_fits_it(phone, tab):
    answers = phone.ask(tab)
    for found in answers.values():
        assert not found.find_elements(By.CSS_SELECTOR, ".error"), found.text
    assert phone.too_wide() <= 0
    pictures = [picture for found in answers.values() for picture in found.find_elements(By.CSS_SELECTOR, "figure img")]
    assert all(picture.get_attribute("naturalWidth") != "0" for picture in pictures)
    assert pictures


def test_prompts_are_answered_and_texts_are_shown_as_they_are(page):
    page.open("Language")
    page.fill("prompt", "Robert Boulter is an")
    page.press("ask-hallucination")
    found = page.answer("hallucination")
    assert len(found.find_elements(By.CSS_SELECTOR, "ol li")) == 10
    assert "EigenScore" in found.text
    page.fill("texts", f"{HOSTILE}\nThe river Thames flows.")
    page.press("ask-score")
    scores = page.answer("score")
    assert HOSTILE in scores.text
    assert not scores.find_elements(By.TAG_NAME, "img")
    assert len(scores.find_elements(By.CSS_SELECTOR, ".card")) == 2


def test_what_an_endpoint_refuses_is_its_one_line(page):
    page.open("Language")
    page.fill("prompt", "")
    page.press("ask-hallucination")
    assert error(page.answer("hallucination")).startswith("hallucination: prompt: ")
    page.open("Molecules")
    page.fill("smiles", "C1CC")
    page.press("ask-molecule")
    assert "'C1CC' is " in error(page.answer("molecule"))


def test_a_molecule_comes_from_a_file(page, tmp_path):
    from rdkit import Chem

    (tmp_path / "ethanol.sdf").write_text(Chem.MolToMolBlock(Chem.MolFromSmiles("CCO")) + "$$$$\n")
    page.open("Molecules")
    page.upload("molfile", tmp_path / "ethanol.sdf")
    page.until(lambda: page.value("smiles") == "CCO", "the SMILES of the file")
    page.press("ask-molecule")
    found = page.answer("molecule")
    page.until(lambda: "heavy atoms\n3" in found.text, "the molecule of the file")
    assert "penalised logp" in found.text
    assert found.find_elements(By.CSS_SELECTOR, "figure svg")


def test_a_matrix_comes_from_a_file_that_holds_no_objects(page, tmp_path):
    page.open("Weights")
    page.choose("matrix", "my file")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    page.upload("npy", tmp_path / "objects.npy")
    page.until(lambda: "objects" in page.text("npy"), "the name of the file")
    page.press("ask-spectrum")
    assert error(page.answer("spectrum")) == "objects.npy: an array of numbers is needed, this is one of |O"


def test_a_layer_of_the_model_is_measured_by_its_name(page, champions):
    page.open("Weights")
    page.choose("matrix", "a layer of the model")
    page.fill("layer", "none such")
    page.press("ask-spectrum")
    assert "is none of the model's" in error(page.answer("spectrum"))


def test_an_image_is_drawn(page):
    page.open("Images")
    page.choose("picked", "black canvas")
    time.sleep(1)
    page.press("ask-classify")
    blank = page.answer("classify").find_element(By.CSS_SELECTOR, "figure img").get_attribute("src")
    canvas = page.driver.find_element(By.CSS_SELECTOR, "#image canvas")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    strokes = ActionChains(page.driver)
    strokes.move_to_element_with_offset(canvas, -60, -30).click_and_hold().move_by_offset(120, 60).release()
    strokes.perform()
    time.sleep(1)
    page.press("ask-classify")

    def redrawn() -> bool:
        found = page.one("classify").find_elements(By.CSS_SELECTOR, "figure img")
        return bool(found) and found[0].get_attribute("src") != blank

    page.until(redrawn, "another answer")
