"""The forecaster keeps scikit-learn's conventions, streams what it predicts, closes loops, and comes back bit-equal."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import TimeSeriesSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from library.artifact import open_artifact, write_artifact
from library.errors import ArtifactError, InputError
from library.qrc import forecaster
from library.qrc.closed_loop import Residuals
from library.qrc.esn import EchoState
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir
from library.qrc.nowcast import FLOOR, Curves, Nowcast, loss_from_rates
from library.qrc.recipe import QrcRecipe
from library.qrc.reservoir import QuantumReservoir
from library.qrc.tasks import mackey_glass, multi_scale
from library.qrc.trained import load_forecaster, save_forecaster

SMALL = HybridReservoir(
    members=(QuantumReservoir(qubits=3, sigma=0.3), QuantumReservoir(qubits=2, sigma=1.0)), layer=EchoState(units=8)
)


def data(series: int = 2, time: int = 160) -> tuple[np.ndarray, np.ndarray]:
    x, y = multi_scale(time, series=series, taus=(2.0, 6.0))
    wave = torch.sin(torch.arange(time) / 7).expand(series, -1)
    return torch.stack([x, wave], -1).numpy(), torch.stack([y, y.roll(3, 1) + wave], -1).numpy()


@pytest.fixture(scope="module")
def fitted() -> Forecaster:
    return Forecaster(SMALL, washout=30, closed_loop=True, skip=True).fit(*data())


def test_conventions_of_scikit_learn():
    x, y = data(series=1, time=300)
    plain = Forecaster(EchoState(units=12), washout=20)
    assert clone(plain).get_params() == plain.get_params()
    assert plain.set_params(washout=25).washout == 25
    pipeline = make_pipeline(StandardScaler(), Forecaster(EchoState(units=12), washout=20))
    scores = cross_val_score(pipeline, x[0], y[0, :, 0], cv=TimeSeriesSplit(3))
    assert scores.shape == (3,)
    assert scores[-1] > 0.5
    assert pipeline.fit(x[0], y[0, :, 0]).predict(x[0]).shape == (300,)
    with pytest.raises(NotFittedError):
        plain.predict(x)


def test_forms_of_series_come_back_as_they_went_in(fitted):
    x, y = data()
    assert fitted.predict(x).shape == y.shape
    assert np.abs(fitted.predict(x[0]) - fitted.predict(x)[0]).max() < 1e-9
    ragged = fitted.predict([x[0], x[1, :70]])
    assert [part.shape for part in ragged] == [(160, 2), (70, 2)]
    assert np.abs(ragged[1] - fitted.predict(x)[1, :70]).max() < 1e-9
    both = Forecaster(SMALL, washout=30).fit([x[0], x[1, :70]], [y[0], y[1, :70]])
    assert both.score([x[0], x[1, :70]], [y[0], y[1, :70]]) > 0.8
    assert Forecaster(SMALL, washout=30).fit(x, y[..., 0]).predict(x).shape == (2, 160)


def test_a_fit_is_the_ridge_on_standardised_features_after_the_washout():
    x, y = data()
    model = Forecaster(SMALL, alphas=[1e-3], washout=30, start="reset").fit(x, y)
    scaled = torch.from_numpy((x - x.min((0, 1))) / np.ptp(x, (0, 1)))
    features = SMALL.drive(scaled)[0][:, 30:].reshape(-1, SMALL.width).numpy()
    targets = y[:, 30:].reshape(-1, 2)
    z = (features - features.mean(0)) / features.std(0)
    weights = np.linalg.solve(z.T @ z + 1e-3 * len(z) * np.eye(z.shape[1]), z.T @ (targets - targets.mean(0)))
    assert np.abs(model.predict(x)[:, 30:].reshape(-1, 2) - (z @ weights + targets.mean(0))).max() < 1e-8


def test_a_stream_gives_what_the_whole_series_does(fitted):
    x, _ = data()
    whole = fitted.predict(x)
    state = fitted.begin(2)
    for step in range(5):
        found, state = fitted.advance(x[:, step : step + 1], state)
        assert np.abs(found[:, 0].numpy() - whole[:, step]).max() < 1e-10
    found, state = fitted.advance(x[:, 5:], state)
    assert np.abs(found.numpy() - whole[:, 5:]).max() < 1e-10


def test_what_is_predicted_begins_in_a_state_of_training(fitted):
    x, y = data()
    reset = Forecaster(SMALL, washout=30, closed_loop=True, skip=True, start="reset").fit(x, y)
    first = [np.abs(model.predict(x)[:, :5] - y[:, :5]).max() for model in (fitted, reset)]
    assert first[0] < first[1] / 2
    assert np.abs(fitted.predict(x) - reset.predict(x))[:, 60:].max() < 0.05
    assert torch.equal(reset.begin(2), SMALL.start(2))
    low, high = y.min(), y.max()
    assert float(fitted.bounded(torch.full((1, 4), 1e9, dtype=torch.float64))[0, 0]) < high + (high - low)


def test_the_typical_state_is_of_rows_that_were_given(monkeypatch):
    """Series of unequal lengths are padded; the padding is neither a stretch of training nor part of the check."""
    x, y = data()
    whole = Forecaster(EchoState(units=8), washout=60).fit(x[:1], y[:1])
    padded = Forecaster(EchoState(units=8), washout=60, scale=False)
    shown = []
    drive = EchoState.drive
    monkeypatch.setattr(EchoState, "drive", lambda *args: shown.append(args[1]) or drive(*args))
    padded.fit([x[0], x[1, :90], x[1, :40]], [y[0], y[1, :90], y[1, :40]])
    rows = {tuple(row) for part in (x[0], x[1, :90]) for row in part.clip(*padded.clip).tolist()}
    windows = shown[-1]
    assert windows.shape == (16, 60, 2)
    assert {tuple(row) for row in windows.flatten(0, 1).tolist()} <= rows
    assert (windows[:, 1:] != windows[:, :-1]).any(-1).all()
    first = Forecaster(EchoState(units=8), washout=60)
    first.fit([x[0], x[0, :40]], [y[0], y[0, :40]])
    assert torch.equal(first.typical_, whole.typical_)


def test_the_check_before_use_is_of_the_longest_series(monkeypatch):
    x, y = data()
    checked = []
    monkeypatch.setattr(forecaster, "check_echo_state", lambda made, inputs, washout: checked.append(inputs))
    model = Forecaster(QuantumReservoir(qubits=2), washout=60).fit([x[1, :70], x[0]], [y[1, :70], y[0]])
    assert torch.equal(checked[0], model.scaled(torch.from_numpy(x[0])))


def test_a_stream_that_repeats_the_first_row_itself_gives_what_the_whole_series_does():
    x, y = data(1)
    model = Forecaster(EchoState(units=8), washout=30, repeats=2).fit(x, y)
    _, state = model.advance(x[:, [0, 0]], model.begin(1))
    assert np.abs(model.advance(x, state)[0].numpy() - model.predict(x)).max() < 1e-10
    with pytest.raises(InputError, match=r"the state has shape \(1, 3\)"):
        model.advance(x, torch.zeros(1, 3))


def test_validation_series_choose_alpha_and_lend_their_residuals():
    x, y = data(series=3)
    model = Forecaster(SMALL, washout=30).fit(x[:2], y[:2], validation=(x[2:], y[2:]))
    errors = []
    for alpha in model.alphas:
        one = Forecaster(SMALL, alphas=[alpha], washout=30).fit(x[:2], y[:2])
        errors.append(((one.predict(x[2:]) - y[2:])[:, 30:] ** 2).mean((0, 1)))
    assert model.readout_.alpha.tolist() == [model.alphas[i] for i in np.argmin(errors, 0)]
    residuals = (y[2:] - model.predict(x[2:]))[0, 30:]
    assert np.abs(model.residuals_.rows.numpy() - residuals).max() < 1e-10
    lower, upper = model.predict_interval(x[2:], 0.9)
    assert ((lower <= y[2:]) & (y[2:] <= upper))[:, 30:].mean() == pytest.approx(0.9, abs=0.02)


def test_a_closed_loop_is_predictions_fed_back(fitted):
    x, _ = data()
    found = fitted.forecast(x[:, :60], 4)
    rows = x[:, :60].copy()
    for step in range(4):
        outputs = fitted.readout_(fitted._driven(fitted.scaled(torch.from_numpy(rows)), None))[:, -1, 2:]
        following = fitted.unscaled(outputs.clamp(*fitted.clip))
        rows = np.concatenate([rows, following[:, None].numpy()], 1)
        assert np.abs(fitted.predict(rows)[:, -1] - found.mean[:, step]).max() < 1e-9
    known = fitted.forecast(x[:, :60], 20, future=x[:, 60:80])
    assert np.abs(known.mean - fitted.predict(x[:, :80])[:, 60:]).max() < 1e-9
    again = [fitted.forecast(x[0, :60], 10, paths=30, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(again[0].lower, again[1].lower)
    assert not np.array_equal(again[0].lower, again[2].lower)
    assert again[0].mean.shape == (10, 2)
    assert (again[0].lower <= again[0].upper).all()


def test_an_autonomous_series_is_forecast_far():
    wave = mackey_glass(2200)[0].numpy()
    model = Forecaster(EchoState(units=200, leak=0.8, input_scale=1.0, spectral_radius=1.1), washout=100)
    found = model.fit(wave[:2000]).forecast(wave[1700:2000], 40)
    assert np.abs(found.mean[:, 0] - wave[2000:2040]).max() < 0.1 * wave.std()
    assert model.score(wave[1700:]) > 0.999


def test_bootstrap_paths_are_stretches_of_residuals():
    rows = torch.arange(50, dtype=torch.float64)[:, None]
    drawn = Residuals(rows, torch.tensor([30, 50])).paths(200, 40, torch.Generator().manual_seed(0)) + rows.mean()
    steps = drawn[:, 1:, 0] - drawn[:, :-1, 0]
    assert (steps == 1).double().mean() > 0.85
    assert (steps[drawn[:, :-1, 0] == 29] == 1).double().mean() < 0.1  # across the end of a series only by chance
    assert set(drawn.flatten().tolist()) <= set(range(50))


def test_an_artifact_gives_the_same_bits(fitted, tmp_path):
    x, _ = data()
    artifact = save_forecaster(fitted, tmp_path / "a", metrics={"nrmse": 0.5}, data="none", about={"task": "test"})
    again = load_forecaster(open_artifact(artifact.path, kind="qrc"))
    assert np.array_equal(again.predict(x), fitted.predict(x))
    pair = [model.forecast(x[:, :50], 12, paths=20) for model in (fitted, again)]
    for name in ("mean", "lower", "upper"):
        assert np.array_equal(getattr(pair[0], name), getattr(pair[1], name))
    assert artifact.recipe["task"] == "test"
    assert not list(tmp_path.rglob("*.pkl"))
    stacked = SMALL.model_copy(update={"wiring": "stacked"})
    model = Forecaster(stacked, washout=30).fit(*data())
    artifact = save_forecaster(model, tmp_path / "b", metrics={}, data="none")
    assert np.array_equal(load_forecaster(artifact).predict(x), model.predict(x))


def test_all_that_was_learned_moves_to_another_device(fitted):
    model = copy.deepcopy(fitted)
    assert model.to("meta").device == "meta"

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        return [one for each in vars(value).values() for one in tensors(each)] if hasattr(value, "__dict__") else []

    found = tensors(model)
    assert len(found) == 9
    assert {one.device.type for one in found} == {"meta"}


def test_foreign_artifacts_are_refused(fitted, tmp_path):
    artifact = save_forecaster(fitted, tmp_path / "a", metrics={}, data="none")
    weights = artifact.weights()
    for number, (recipe, arrays) in enumerate(
        [({}, weights), (artifact.recipe, {}), (artifact.recipe, weights | {"weights": torch.zeros(3, 4)})]
    ):
        broken = write_artifact(
            tmp_path / str(number), kind="qrc", recipe=recipe, weights=arrays, metrics={}, data="none"
        )
        with pytest.raises(ArtifactError):
            load_forecaster(broken)


X, Y = data()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.fit(X[:, :20], Y[:, :20]), "washout 30 leaves 0 of 40 rows"),
        (lambda m: m.fit(X, Y[:, :-1]), "a row for each is needed"),
        (lambda m: m.fit(X * np.nan, Y), r"X: 640 values are not finite, the first in series 0, row 0"),
        (lambda m: m.fit(X * 0, Y), "channel 0 is constant"),
        (lambda m: m.fit("abc", Y), "X: not numbers"),
        (lambda m: m.fit(np.zeros((2, 0, 1)), Y), "none of them 0"),
        (lambda m: m.fit(X, Y).predict(X[..., :1]), "1 channels; 2 were learned"),
        (lambda m: m.fit(X, Y).forecast(X, 5), "future: this forecaster did not learn next inputs"),
        (lambda m: m.fit(X, Y).forecast(X, 5, future=X[:, :3]), r"future: \(2, 3\) series and rows; needed \(2, 5\)"),
        (lambda m: m.fit(X, Y).forecast(X, 0), "horizon 0"),
        (lambda m: m.fit(X, Y).score(X, Y * 0), "constant"),
        (lambda m: m.fit(X, Y, features=torch.zeros(2, 160, 3)), "features have shape"),
        (lambda m: m.set_params(clip=(1, 0)).fit(X, Y), "clip"),
        (lambda m: m.set_params(choose="aic").fit(X, Y), "loo or gcv, typical or reset"),
        (lambda m: m.set_params(washout=-1).fit(X, Y), "at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(Forecaster(EchoState(units=5), washout=30))


def test_a_recipe_gives_each_member_its_own_or_the_shared_value():
    recipe = QrcRecipe(sigma=(0.2, 0.4), measured=(1, 2), scale=(0.7,), units=6, wiring="stacked")
    reservoir = recipe.reservoir(3)
    assert [member.sigma for member in reservoir.members] == [0.2, 0.4]
    assert [member.measured_qubits for member in reservoir.members] == [1, 2]
    assert {member.scale for member in reservoir.members} == {0.7}
    assert [member.seed for member in reservoir.members] == [300, 301]
    assert recipe.forecaster(3).reservoir == reservoir
    fed = QrcRecipe(mode=("feedback",), sigma=(1.0,), feedback=(0.1, 1.0, 2.0), units=0).reservoir()
    assert [member.measured_qubits for member in fed.members] == [4, 4, 4]
    members = (QuantumReservoir(kind="ising", measured=2, seed=7), QuantumReservoir(mode="feedback", qubits=3, reps=1))
    assert QrcRecipe.of(members, units=0).reservoir().members == members
    with pytest.raises(InputError, match="cannot say"):
        QrcRecipe.of([QuantumReservoir(pairs="line")])
    for wrong in (
        {"sigma": (0.1, 0.2), "scale": (1.0, 1.0, 1.0)},
        {"measured": (4,)},
        {"units": 0, "wiring": "stacked"},
    ):
        with pytest.raises(ValidationError):
            QrcRecipe(**wrong)


def test_finite_shots_are_a_ridge_and_show_the_inputs_to_the_read_out():
    recipe = QrcRecipe(sigma=(0.3,), qubits=(3,), units=0, shots=400, washout=30)
    x, y = data()
    model = recipe.forecaster().fit(x, y)
    exact = recipe.model_copy(update={"shots": None}).forecaster().fit(x, y)
    assert model.skip
    assert not exact.skip
    features = recipe.reservoir().drive(model.scaled(torch.from_numpy(x)))[0][:, 30:].flatten(0, 1)
    floor = float(((1 - features.square().mean(0)) / 400 / features.var(0)).median())
    assert float(model.readout_.alpha.min()) >= min(floor, 1.0) > 1e-4
    assert float(exact.readout_.alpha.min()) < floor
    assert np.array_equal(model.predict(x), model.predict(x))


def test_tasks_keep_places_apart_and_units_right():
    task = Nowcast(hours=60)
    x, y = task.series(("EWR", "JFK"))
    assert x.shape == (2, 60, 4)
    assert y.shape == (2, 60, 1)
    assert float(loss_from_rates(torch.full((3, 1), np.log10(1 + FLOOR), dtype=torch.float64))[-1]) == pytest.approx(
        3 * 0.335520
    )
    with pytest.raises(ValidationError, match="a station is for"):
        Nowcast(train=("EWR",), validation=("EWR",))
    train, test = Curves(curves=9, points=30, primed=10, horizon=5).series(0)
    assert (train.shape, test.shape) == ((6, 30, 1), (3, 30, 1))
    assert float(train.max()) == 1
    assert (train.diff(dim=1) >= 0).all()
    with pytest.raises(ValidationError, match="exceed"):
        Curves(points=100)


def test_a_reservoir_that_has_not_forgotten_its_start_is_refused_before_use():
    x, y = data(1)
    slow = Forecaster(QuantumReservoir(qubits=3, sigma=0.02, scale=0.1, bias=0.0), washout=40)
    with pytest.raises(InputError, match=r"after a washout of 40 steps features still depend on the start, by 0\.\d+"):
        slow.fit(x, y)
    assert slow.set_params(reservoir=QuantumReservoir(qubits=3, sigma=1.0)).fit(x, y).score(x, y) < 1
