"""`prism run qrc` on Ray: tasks give what the library gives, the best seed is registered, tables are learned from."""

import numpy as np
import pandas as pd
import pytest

from jobs.qrc import QrcJob
from library.artifact import open_artifact
from library.errors import InputError
from library.qrc.nowcast import Curves, Nowcast
from library.qrc.recipe import QrcRecipe
from library.qrc.schema import MEASURED, Schema
from library.qrc.tasks import nrmse
from library.qrc.trained import load_forecaster

SMALL = QrcRecipe(qubits=(3,), sigma=(0.3, 1.0), units=6, washout=60)
pytestmark = pytest.mark.ray


def job(tmp_path, **changes: object) -> QrcJob:
    settings = {"recipe": SMALL, "nowcast": Nowcast(hours=500), "seeds": (0, 1), "storage": str(tmp_path), "name": "r"}
    return QrcJob(**(settings | changes))


@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_tasks_give_what_the_library_gives_and_the_best_seed_is_registered(tmp_path):
    asked = job(tmp_path, recipe=SMALL.model_copy(update={"wiring": "stacked"}))
    report = asked.run()
    task = asked.nowcast
    parts = {name: task.series(getattr(task, name)) for name in ("train", "validation", "test")}
    rows = report.tables["seeds"].set_index("seed")
    for seed in asked.seeds:
        model = asked.recipe.forecaster(seed, closed_loop=True).set_params(start="reset")
        model.fit(*parts["train"], validation=parts["validation"])
        found = {n: nrmse(*(x[:, 60:] for x in (_tensor(model.predict(parts[n][0])), parts[n][1]))) for n in parts}
        assert rows.loc[seed, "validation_nrmse"] == pytest.approx(found["validation"], rel=1e-6)
        assert rows.loc[seed, "test_nrmse"] == pytest.approx(found["test"], rel=1e-6)
    assert report.metrics["best_seed"] == rows["validation_nrmse"].idxmin()
    assert report.metrics["test_nrmse"] == pytest.approx(rows["test_nrmse"].mean())
    assert 0.5 < report.metrics["test_coverage"] < 1
    assert report.registered == "models:/qrc/1"
    artifact = open_artifact(report.artifact, kind="qrc")
    again = load_forecaster(artifact)
    best = asked.recipe.forecaster(int(report.metrics["best_seed"]), closed_loop=True)
    best.fit(*parts["train"], validation=parts["validation"])
    assert np.abs(again.predict(parts["test"][0]) - best.predict(parts["test"][0])).max() < 1e-6
    assert [row["reservoir"] for row in artifact.recipe["time_scales"]] == ["member 0", "member 1", "layer"]
    assert Schema.of(artifact).target.simulated
    with pytest.raises(InputError, match="a run 'r' exists"):
        asked.run()


@pytest.mark.usefixtures("ray_cluster", "ready_registry")
def test_courses_and_tables(tmp_path):
    curves = Curves(curves=12, points=40, primed=20, horizon=10)
    fed = QrcRecipe(mode=("feedback",), qubits=(3,), sigma=(1.0,), feedback=(0.5, 1.5), units=5)
    report = job(tmp_path, task="closed-loop", curves=curves, recipe=fed, seeds=(0,)).run()
    assert report.metrics["test_nrmse"] < report.metrics["persistence_test_nrmse"]
    assert load_forecaster(open_artifact(report.artifact)).loops

    hours = np.arange(400)
    generator = np.random.default_rng(0)
    for name in "abc":
        humidity = 60 + 30 * np.sin(hours / 9 + generator.uniform(0, 6)) * generator.uniform(0.7, 1, 400)
        loss = np.cumsum(np.maximum(humidity - 60, 0)) * 1e-4
        loss = np.where(hours % 5 == 0, loss, np.nan)
        pd.DataFrame({"time": hours, "humidity_percent": humidity, "mass_loss_g_m2": loss}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    tables = tuple(str(tmp_path / f"{name}.csv") for name in "abc")
    report = job(tmp_path, table=tables, name="t", seeds=(0,)).run()
    assert report.metrics["test_nrmse"] < 0.9
    assert Schema.of(open_artifact(report.artifact)) == Schema(inputs=("humidity",), step=1.0, target=MEASURED)
    pd.read_csv(tables[0]).iloc[:300].to_csv(tmp_path / "short.csv", index=False)
    unequal = job(tmp_path, table=(str(tmp_path / "short.csv"), *tables), name="w", seeds=(0,)).run()
    assert unequal.metrics["test_nrmse"] < unequal.metrics["linear_test_nrmse"]
    alone = job(tmp_path, table=tables[:1], name="u", seeds=(0,)).run()
    assert any("cut in time" in note for note in alone.notes)
    for changes, message in (
        ({"table": tables[:2]}, "one file, or at least three"),
        ({"table": ("nowhere.csv",)}, "nowhere.csv cannot be read"),
        ({"inputs": ("humidity",)}, "they are chosen of tables"),
        ({"table": tables, "task": "closed-loop"}, "task closed-loop: it is of simulated courses"),
        ({"table": tables, "inputs": ("wind",)}, "there is no column wind_m_s"),
        ({"table": tables[:1], "recipe": SMALL.model_copy(update={"washout": 300})}, "washout 300 leaves"),
    ):
        with pytest.raises(InputError, match=message):
            job(tmp_path, name="v", **changes).run()


def _tensor(values: np.ndarray):
    import torch

    return torch.from_numpy(values)
