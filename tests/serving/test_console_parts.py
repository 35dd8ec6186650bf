"""What the console does without a browser: logging in, reading files, its table of tabs, and its figures."""

from hashlib import sha256

import numpy as np
import pytest
from fastapi.testclient import TestClient

from jobs import JOBS
from library.errors import InputError, PrismError
from serving import console_calls
from serving.app import ENDPOINTS
from serving.console import ConsoleArgs, application
from serving.console_calls import Endpoints
from serving.console_figures import median_of_bins, tail_figure
from serving.console_molecules import smiles_of_file
from serving.console_overview import making
from serving.console_page import answering, error, section, table
from serving.console_tabs import TABS
from serving.console_weather import SEEN, request
from serving.console_weights import GAUSS, HEAVY, example, read_matrix
from serving.corrosion_bodies import CorrosionRequest

TOKEN = "correct-horse"
DIGEST = sha256(TOKEN.encode()).hexdigest()


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
    with TestClient(application(endpoints)) as client:
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
    with TestClient(application(endpoints)) as client:
        page = client.get("/").text
        assert "Score texts" in page
        assert "Look at a molecule" not in page
        assert "fonts.googleapis.com" not in page + client.get("/theme.css").text


def test_an_endpoint_that_does_not_answer_says_why():
    told = Endpoints("http://127.0.0.1:9", {}).about(["score"])
    assert "refused" in told["score"]


def test_the_arguments_name_every_champion_unless_told_otherwise():
    assert ConsoleArgs().endpoints == {name: f"models:/{found.model}@champion" for name, found in ENDPOINTS.items()}


def test_an_error_is_one_line_and_other_parts_stay():
    def refuse(*_: str) -> str:
        raise PrismError("score: text:\n <too short>")

    line = error("score: text: <too short>")
    assert "&lt;too short&gt;" in line
    assert answering(refuse)("a").count(line) == 1
    assert section("Part", refuse) == f"<h2>Part</h2>{line}"


def test_numbers_in_tables_are_rounded_and_texts_are_escaped():
    assert table([("<a>", 0.12345)]) == '<table><tr><td>&lt;a&gt;</td><td class="number">0.123</td></tr></table>'


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
    for name, content in {"objects.npy": np.array([{}]), "text.npy": None}.items():
        if content is None:
            (tmp_path / name).write_text("no")
        else:
            np.save(tmp_path / name, content, allow_pickle=True)
        with pytest.raises(InputError, match=f"{name} is not a NumPy file of numbers"):
            read_matrix(tmp_path / name)


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


@pytest.mark.parametrize(("day", "horizon"), [(5, 6), (355, 96)])
def test_the_weather_is_a_body_that_the_endpoint_takes(day, horizon):
    body, times = request("JFK", day, horizon)
    found = CorrosionRequest.model_validate(body)
    assert len(found.series[0].time) == SEEN
    assert len(found.future[0].time) == horizon
    assert times == sorted(set(times))
    assert times[0].year == 2013
