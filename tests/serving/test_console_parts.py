"""What the console does without a browser: logging in, reading files, its table of tabs, and its figures."""

import base64
import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient

from jobs import JOBS
from library.errors import InputError, PrismError
from serving import console_calls
from serving.app import ENDPOINTS
from serving.console import Console, ConsoleArgs, application
from serving.console_calls import Endpoints
from serving.console_figures import median_of_bins, tail_figure
from serving.console_molecules import MOST_ATOMS, MOST_LETTERS, MOST_LINES, molecules_tab, smiles_of_file
from serving.console_overview import making
from serving.console_page import answering, error, number, section, share, table
from serving.console_tabs import TABS
from serving.console_weather import FIRST_DAY, LAST_DAY, SEEN, request, weather_tab
from serving.console_weights import GAUSS, HEAVY, example, read_matrix
from serving.corrosion_bodies import CorrosionRequest
from serving.settings import EndpointArgs

TOKEN = "correct-horse"
DIGEST = sha256(TOKEN.encode()).hexdigest()
HEADER = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }"


def npy_file(header: bytes) -> bytes:
    """A NumPy file of six numbers with that header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(48)


def laid_out(tab: Callable[[Endpoints], None], answers: Mapping[str, Any] | None = None) -> gr.Blocks:
    """A tab over endpoints that give these answers."""
    endpoints = Endpoints("http://127.0.0.1:9", answers or {})
    endpoints.ask = lambda name, body: answers[name]
    with gr.Blocks() as found:
        tab(endpoints)
    return found


def action(tab: gr.Blocks, name: str) -> Callable[..., str]:
    """What a button of the tab does."""
    [found] = {one.fn for one in tab.fns.values() if one.name == name}
    return found


def test_each_endpoint_of_the_table_exists_and_is_in_one_tab():
    named = [name for tab in TABS for name in tab.endpoints]
    assert len(named) == len(set(named))
    assert set(named) <= ENDPOINTS.keys()


@pytest.mark.parametrize("name", ENDPOINTS)
def test_the_command_that_makes_a_model_is_one_that_exists(name):
    program, verb, job = making(name).split()
    assert (program, verb) == ("prism", "run")
    assert job in JOBS
    assert JOBS[job].method == ENDPOINTS[name].model


def test_with_a_token_nothing_is_shown_before_the_login(monkeypatch):
    asked = []
    monkeypatch.setattr(console_calls, "ask", lambda *given, token: asked.append((*given, token)))
    endpoints = Endpoints("http://127.0.0.1:9", {"score": "models:/send@champion"}, DIGEST)
    with TestClient(application(endpoints, 1000)) as client:
        first = client.get("/config")
        assert first.status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert endpoints.token is None
        assert client.post("/login", data={"username": "me", "password": TOKEN}).status_code == 200
        assert client.get("/config").status_code == 200
    endpoints.ask("score", {"text": "a b"})
    assert asked == [("score", {"text": "a b"}, "http://127.0.0.1:9", TOKEN)]


def test_without_a_token_the_page_is_open_and_names_no_other_host_to_load_from():
    endpoints = Endpoints("http://127.0.0.1:9", {"score": "models:/send@champion"})
    assert not endpoints.log_in("me", "")
    with TestClient(application(endpoints, 1000)) as client:
        page = client.get("/").text
        assert "Score texts" in page
        assert "Look at a molecule" not in page
        assert "fonts.googleapis.com" not in page + client.get("/theme.css").text


def test_an_endpoint_that_does_not_answer_says_why():
    told = Endpoints("http://127.0.0.1:9", {}).about(["score"])
    assert "refused" in told["score"]


def test_the_arguments_name_every_champion_unless_told_otherwise():
    assert ConsoleArgs().endpoints == {name: f"models:/{found.model}@champion" for name, found in ENDPOINTS.items()}


def test_the_largest_file_fits_the_body_that_an_endpoint_takes():
    content = base64.b64encode(bytes(ConsoleArgs().most_upload_bytes + 128)).decode()
    body = json.dumps({"npy": content, "rule": "median"})
    assert len(body) <= EndpointArgs(endpoint="spectrum").max_body_bytes


def test_a_larger_file_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with TestClient(application(Endpoints("http://127.0.0.1:9", {}), 1000)) as client:
        status = {
            size: client.post("/gradio_api/upload", files={"files": ("a.npy", bytes(size))}).status_code
            for size in (1000, 1001)
        }
    assert status == {1000: 200, 1001: 413}


def test_the_files_of_a_console_are_in_its_own_folder_and_go_with_it(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    console = Console(ConsoleArgs(), None)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(gr.Blocks().GRADIO_CACHE) == folder
    (folder / "upload").mkdir()
    del console
    assert not folder.exists()


def test_an_error_is_one_line_and_other_parts_stay():
    def refuse(*_: str) -> str:
        raise PrismError("score: text:\n <too short>")

    line = error("score: text: <too short>")
    assert "&lt;too short&gt;" in line
    assert answering(refuse)("a").count(line) == 1
    assert section("Part", refuse) == f"<h2>Part</h2>{line}"


def test_numbers_in_tables_are_rounded_and_texts_are_escaped():
    assert table([("<a>", 0.12345)]) == '<table><tr><td>&lt;a&gt;</td><td class="number">0.123</td></tr></table>'


@pytest.mark.parametrize(("value", "shown"), [(999.4, "999"), (999.7, "1,000"), (-999.7, "-1,000"), (1000.4, "1,000")])
def test_numbers_near_a_thousand_have_no_power_of_ten(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 %"), (1e-9, "< 0.01 %"), (0.994, "99 %"), (0.996, "> 99 %"), (1, "100 %")]
)
def test_nothing_uncertain_is_shown_as_certain(value, shown):
    assert share(value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize("smiles", ["C" * (MOST_ATOMS + 1), "[CH2]" * (MOST_LETTERS // 5) + "C"])
def test_a_molecule_that_takes_long_to_draw_is_refused(smiles):
    looked = action(laid_out(molecules_tab), "looked")
    assert "too large to be shown here" in looked(smiles)
    assert "too large" not in looked("C" * MOST_ATOMS)


def test_a_file_is_read_as_far_as_a_small_molecule_goes(tmp_path):
    from rdkit import Chem

    block = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO"))
    (tmp_path / "many.sdf").write_text(f"{block}$$$$\n" * 1000)
    assert smiles_of_file(tmp_path / "many.sdf") == "CCO"
    (tmp_path / "large.mol").write_text(Chem.MolToMolBlock(Chem.MolFromSmiles("C" * (MOST_LINES // 2))))
    (tmp_path / "endless.mol").write_text(block.replace("M  END", "M  CHG  0\n" * 10_000))
    for name in ("large.mol", "endless.mol"):
        with pytest.raises(InputError, match="too large"):
            smiles_of_file(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no molecule", b"\n" * 9])
def test_a_file_without_a_molecule_is_refused(content, tmp_path):
    (tmp_path / "a.sdf").write_bytes(content)
    with pytest.raises(InputError, match="not a MOL or SDF file"):
        smiles_of_file(tmp_path / "a.sdf")


def test_matrices_are_read_without_their_objects(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(6, dtype=np.int16).reshape(2, 3))
    assert b"f8" in read_matrix(tmp_path / "whole.npy")[:128]
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    with pytest.raises(InputError, match=r"cube.npy: one matrix of numbers is needed"):
        read_matrix(tmp_path / "cube.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"objects.npy: an array of numbers is needed"):
        read_matrix(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no",
        b"PK\x03\x04 an archive",
        npy_file(HEADER.replace(b"(2, 3)", b"((2, 3")),
        npy_file(HEADER.replace(b"(2, 3)", b"(10000000, 10000000)")),
    ],
)
def test_a_file_that_is_no_array_is_refused_whatever_it_claims(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"^a.npy: "):
        read_matrix(tmp_path / "a.npy")


def test_the_examples_differ_in_their_tails():
    tails = {name: np.abs(example(name)).max() / example(name).std() for name in (GAUSS, HEAVY)}
    assert tails[GAUSS] < 6 < tails[HEAVY]


def test_the_median_of_bins_is_that_of_the_values_within_a_bin():
    values = np.sort(np.random.default_rng(0).pareto(1.5, 5001)) + 1
    counts, edges = np.histogram(np.log10(values), 60)
    found = np.log10(median_of_bins(edges, counts))
    assert abs(found - np.log10(values[2500])) < edges[1] - edges[0]


def test_the_fitted_tail_holds_as_many_eigenvalues_as_the_bins_do():
    alpha, bins = 2.5, 60
    values = (1 - np.random.default_rng(0).random(200_000)) ** (-1 / (alpha - 1))  # a power law from 1 on
    counts, edges = np.histogram(np.log10(values), bins)
    axis = tail_figure(edges, counts, alpha, 4.0).axes[0]
    fitted = next(line for line in axis.get_lines() if line.get_label().startswith("fitted"))
    middle, expected = fitted.get_data()
    for place, count in zip(middle[1:8], expected[1:8], strict=True):
        own = counts[np.searchsorted(edges, np.log10(place)) - 1]
        assert count == pytest.approx(own, rel=0.05)


@pytest.mark.parametrize(("day", "horizon"), [(FIRST_DAY, 6), (LAST_DAY, 96)])
def test_the_weather_is_a_body_that_the_endpoint_takes(day, horizon):
    body, times = request("JFK", day, horizon)
    found = CorrosionRequest.model_validate(body)
    assert len(found.series[0].time) == SEEN
    assert len(found.future[0].time) == horizon
    assert times == sorted(set(times))
    assert times[0].year == 2013


def test_each_day_that_can_be_chosen_begins_at_its_midnight():
    [day] = [found for found in laid_out(weather_tab).blocks.values() if found.elem_id == "day"]
    for chosen in range(day.minimum, day.maximum + 1):
        now = request("JFK", chosen, 6)[1][SEEN]
        assert (now.timetuple().tm_yday, now.hour) == (chosen, 0)


def test_a_loss_says_since_when():
    def curve(name: str, hours: int) -> dict[str, Any]:
        values = [1.0] * hours
        return {"name": name, "unit": "g/m2", "mean": values, "lower": values, "upper": values}

    result = {"nowcast": [curve("rate", SEEN)], "forecast": [curve("rate", 6), curve("loss", 6)], "warnings": []}
    answer = {"corrosion": {"results": [result], "simulated": False}}
    shown = action(laid_out(weather_tab, answer), "forecast")("Kennedy", 128, 6)
    assert shown.count("1 to 1, since 24 April") == 1
