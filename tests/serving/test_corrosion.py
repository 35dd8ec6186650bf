"""The endpoint `corrosion` over real HTTP: the library's numbers, streams, batches, and bodies that are refused."""

import copy
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch

from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.qrc.esn import EchoState
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir
from library.qrc.nowcast import FLOOR, Nowcast
from library.qrc.recipe import QrcRecipe
from library.qrc.schema import SIMULATED, Schema
from library.qrc.spectra import about, time_scales
from library.qrc.tasks import mackey_glass
from library.qrc.trained import load_forecaster, save_forecaster
from serving.app import Served, serve_endpoints
from serving.client import ask
from serving.corrosion import Corrosion

TASK = Nowcast(hours=700)
INPUTS = ("temperature", "humidity", "rain", "wind")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    model = QrcRecipe(qubits=(3,), sigma=(0.3, 1.0), units=8, washout=60).forecaster(closed_loop=True)
    x, y = TASK.series(("EWR",))
    model.fit(x, y, validation=TASK.series(("LGA",)))
    scales = time_scales(model.reservoir_, model.driving(x))
    told = about(Schema(inputs=INPUTS, step=1.0, target=SIMULATED), scales)
    return save_forecaster(model, tmp_path_factory.mktemp("qrc") / "a", metrics={}, data="none", about=told)


@pytest.fixture(scope="module")
def served(shared_ray, artifact, free_port) -> Iterator[Served]:
    shared_ray.connection()
    with serve_endpoints(artifacts={"corrosion": str(artifact.path)}, port=free_port) as served:
        yield served


def body(**changes: object) -> dict:
    return copy.deepcopy(Corrosion.examples["two days"]) | changes


def site(begin: int, end: int, **changes: object) -> dict:
    whole = Corrosion.examples["two days"]["series"][0]
    inputs = {name: values[begin:end] for name, values in whole["inputs"].items()}
    return {"time": whole["time"][begin:end], "inputs": inputs} | changes


def rates(answer: dict, number: int = 0) -> np.ndarray:
    return np.array(answer["results"][number]["nowcast"][0]["mean"])


@pytest.mark.ray
def test_answers_are_the_librarys(served, artifact):
    model = load_forecaster(artifact)
    answer = ask("corrosion", body(), served.url)
    whole = site(0, 48)["inputs"]
    rows = np.stack([np.log1p(whole[n]) if n == "rain" else np.array(whole[n]) for n in INPUTS], -1)
    expected = np.maximum(10 ** model.bounded(torch.from_numpy(model.predict(rows))).numpy()[:, 0] - FLOOR, 0)
    np.testing.assert_allclose(rates(answer), expected, rtol=1e-6)
    result = answer["results"][0]
    rate, loss = result["forecast"]
    ahead = model.forecast(rows, 24, paths=200)
    np.testing.assert_allclose(rate["mean"], np.maximum(10 ** ahead.mean[:, 0] - FLOOR, 0), rtol=1e-6)
    assert (rate["unit"], loss["unit"], answer["simulated"]) == ("A/m2", "g/m2", True)
    assert all(low <= high for low, high in zip(loss["lower"], loss["upper"], strict=True))
    assert loss["mean"] == sorted(loss["mean"])
    assert result["time"][0] == "2024-05-03T00:00:00+00:00"
    assert len(result["time"]) == 24
    assert "48 rows were shown" in result["warnings"][0]
    assert [scale["reservoir"] for scale in answer["time_scales"]] == ["member 0", "member 1", "layer"]
    assert all(scale["hours"] > 0 for scale in answer["time_scales"])
    assert answer["model"] == artifact.version
    for example in Corrosion.examples.values():
        assert ask("corrosion", example, served.url)["results"][0]["forecast"]


@pytest.mark.ray
def test_a_stream_of_single_rows_is_the_whole_series_and_its_state_does_not_grow(served):
    whole = ask("corrosion", body(horizon=12), served.url)
    answer = ask("corrosion", body(series=[site(0, 40)], horizon=0), served.url)
    lengths = set()
    for row in range(40, 48):
        state = answer["results"][0]["state"]
        lengths.add(len(state))
        answer = ask("corrosion", body(series=[site(row, row + 1, state=state)], horizon=12), served.url)
        np.testing.assert_allclose(rates(answer), rates(whole)[row : row + 1], rtol=1e-6)
    assert len(lengths) == 1
    for found, expected in zip(answer["results"][0]["forecast"], whole["results"][0]["forecast"], strict=True):
        for name in ("mean", "lower", "upper"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.ray
def test_batches_units_and_weather_forecasts(served):
    warm = {"temperature": "F", "humidity": "fraction", "rain": "in/h", "wind": "km/h"}
    change = {"temperature": lambda v: v * 9 / 5 + 32, "humidity": lambda v: v / 100, "rain": lambda v: v / 25.4}
    other = site(0, 48)
    other["inputs"] = {n: [change.get(n, lambda v: v * 3.6)(v) for v in c] for n, c in other["inputs"].items()}
    assert rates(ask("corrosion", body(series=[other], units=warm), served.url)) == pytest.approx(
        rates(ask("corrosion", body(), served.url)), rel=1e-6
    )
    several = ask("corrosion", body(series=[site(0, 48), site(3, 20), site(0, 48)]), served.url)
    assert rates(several, 0) == pytest.approx(rates(several, 2), rel=1e-9)
    assert rates(several, 1) == pytest.approx(rates(ask("corrosion", body(series=[site(3, 20)]), served.url)), rel=1e-9)
    hot = body(series=[site(0, 48)])
    hot["series"][0]["inputs"]["temperature"] = [60.0] * 48
    warnings = ask("corrosion", hot, served.url)["results"][0]["warnings"]
    assert any(text.startswith("temperature: 48 of 48 rows outside the training range") for text in warnings)


def broken(path: str, value: object) -> dict:
    """The example with one place changed: `series.0.inputs.wind.3`, say."""
    made = body()
    *steps, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = made
    for step in steps:
        place = place[step]
    if value is None and isinstance(place, dict):
        del place[last]
    else:
        place[last] = value
    return made


TIMES = site(0, 48)["time"]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "series: Field required"),
        (broken("units.temperature", "furlong"), "units: temperature in 'furlong'; there are C, F, K"),
        (broken("units.rain", None), "units: rain has none; there are mm/h, in/h"),
        (
            broken("series.0.time", [*TIMES[:9], *TIMES[10:], "2024-05-03T00:00"]),
            "series[0]: time: gap after row 8, 2 hours",
        ),
        (broken("series.0.time", TIMES[::-1]), "series[0]: time: row 1 is not later than the row before"),
        (broken("series.0.time", ["soon"] * 48), "series[0]: time: neither ISO 8601 times nor numbers of hours"),
        (broken("series.0.time", TIMES[:30]), "series[0]: temperature has 48 values, time has 30"),
        (broken("series.0.inputs.wind.3", None), "series[0]: wind: row 3 is missing"),
        (broken("series.0.inputs.wind.3", float("nan")), "series[0]: wind: row 3 is missing or not finite"),
        (
            broken("series.0.inputs.humidity.5", 140.0),
            "series[0]: humidity: row 5 is 140 percent; possible are 0 to 100",
        ),
        (broken("series.0.inputs.temperature", [285.0] * 48), "is the unit right?"),
        (broken("series.0.inputs.wind", None), "series[0]: wind: missing; this model needs temperature"),
        (broken("series.0.inputs.pressure", [1.0] * 48), "series[0]: pressure: this model knows no such input"),
        (broken("series.0.inputs.wind", ["calm"] * 48), "series[0]"),
        (broken("horizon", 5000), "horizon"),
        (
            broken("series.0.time", [f"9999-12-{30 + i // 24}T{i % 24:02}:00Z" for i in range(48)]),
            "series[0]: time: rows and horizon must end before 9999-12-31 23:00",
        ),
        (
            broken("series.0.time", [70_389_500.0 + i for i in range(48)]),
            "series[0]: time: rows and horizon must end before 9999-12-31 23:00",
        ),
        (broken("level", 1.0), "level"),
        (broken("colour", "red"), "colour: there is no such field"),
        (broken("series.0.state", "AAAA"), "series[0]: state: not a state that this endpoint gave"),
        (broken("future", [site(0, 24)]), "future[0]: time: row 1 is not later"),
        (broken("future", [site(0, 3), site(0, 3)]), "future: 2 sites, there are 1"),
    ],
)
def test_bad_bodies_name_their_field(served, content, says):
    place, headers = f"{served.url}/corrosion/predict", {"Content-Type": "application/json"}
    response = httpx.post(place, content=json.dumps(content), headers=headers, timeout=60, trust_env=False)
    assert response.status_code == 422, response.text
    problem = response.json()
    assert says in problem["error"]
    assert problem["fields"][0]["field"].split("[")[0] in {"series", "units", "future", "horizon", "level", "colour"}


@pytest.mark.ray
def test_states_that_do_not_go_on_are_refused(served):
    state = ask("corrosion", body(series=[site(0, 10)], horizon=0), served.url)["results"][0]["state"]
    flipped = ("B" if state[30] == "A" else "A").join((state[:30], state[31:]))
    for given, begin, says in (
        (flipped, 10, "state: damaged"),
        (state, 12, r"series\[0\]: time: gap after row 0, 3 hours where 1 "),
        (state, 9, "time: row 1 is not later"),
    ):
        with pytest.raises(InputError, match=says):
            ask("corrosion", body(series=[site(begin, begin + 2, state=given)], horizon=0), served.url)


def test_another_models_state_and_a_model_without_next_inputs_are_refused(artifact):
    first, second = (Corrosion(load_forecaster(artifact), Schema.of(artifact), [], v) for v in ("aa" * 6, "bb" * 6))
    request = Corrosion.Request.model_validate(body(series=[site(0, 10)], horizon=0))
    state = first.answer([request])[0].results[0].state
    again = Corrosion.Request.model_validate(body(series=[site(10, 12, state=state)], horizon=0))
    assert first.answer([again])
    with pytest.raises(InputError, match=r"series\[0\]: state: of model aaaaaaaaaaaa, this one is bbbbbbbbbbbb"):
        second.answer([again])
    first.forecaster.closed_loop = False
    with pytest.raises(InputError, match="future: this model needs a weather forecast"):
        first.answer([Corrosion.Request.model_validate(body(horizon=3))])


def test_any_other_fitted_series_is_forecast_from_itself(tmp_path):
    wave = mackey_glass(900)[0].numpy()
    reservoir = HybridReservoir(members=(EchoState(units=60, leak=0.8, input_scale=1.0),))
    model = Forecaster(reservoir).fit(wave[:800, None])
    told = about(Schema(inputs=("flow",), step=0.5), time_scales(model.reservoir_, model.driving(wave[:800, None])))
    saved = save_forecaster(model, tmp_path / "a", metrics={}, data="none", about=told)
    endpoint = Corrosion.load(saved, "cpu")
    series = [{"time": [0.5 * i for i in range(200)], "inputs": {"flow": wave[600:800].tolist()}}]
    request = Corrosion.Request.model_validate({"series": series, "units": {}, "horizon": 10})
    [found] = endpoint.answer([request])[0].results
    assert found.forecast[0].name == "flow"
    assert np.abs(np.array(found.forecast[0].mean) - wave[800:810]).max() < 0.1
    bare = save_forecaster(model, tmp_path / "b", metrics={}, data="none")
    with pytest.raises(ArtifactError, match="does not say what its series are"):
        Corrosion.load(bare, "cpu")
