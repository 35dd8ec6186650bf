"""Forecasts by quantum reservoirs on Ray: a task per reservoir and seed drives, a task per seed fits and measures."""

import time
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat

from cluster import connect, storage
from jobs.folders import RUN, new_folder, root_of
from jobs.job import Job
from jobs.report import Report
from jobs.reproduce import gather
from library import files
from library.drawing import blank, open_frame
from library.errors import InputError
from library.qrc.nowcast import Curves, Nowcast
from library.qrc.recipe import QrcRecipe
from library.qrc.schema import MEASURED, SIMULATED, Schema
from library.qrc.series import mean_rates, read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from library.qrc.forecaster import Forecaster

COPIES = 2  # times that the first row is shown before a curve
RAW_ALPHA = 1e-6  # of curves: the ridge on features as they are, over all rows together
CURVE_CLIP = (-1.0, 2.0)


class Material(NamedTuple):
    """What is learned from and measured on: (X, y) of each part, y None for curves, and what the columns mean."""

    parts: dict[str, tuple[Any, Any]]
    schema: Schema
    fingerprint: str
    notes: list[str]


class QrcJob(Job, frozen=True, extra="forbid"):
    """Fit one configuration of reservoirs and read-out, with several seeds, and measure it on what it has not seen.

    By default it nowcasts the rate of simulated corrosion from the weather at one airport and is measured at another.
    The seed that is best on validation becomes the artifact; the means over seeds are reported beside it.
    """

    job: ClassVar[str] = "qrc"

    recipe: QrcRecipe = QrcRecipe()
    """Reservoirs, classical layer and read-out."""
    task: Literal["nowcast", "closed-loop"] = "nowcast"
    """The rate of corrosion from the weather so far, or the course of a loss from its own beginning."""
    table: tuple[str, ...] = ()
    """Your own CSV or Parquet files instead: the last is the test, the one before validation; one alone is cut."""
    inputs: tuple[str, ...] = ()
    """Inputs to take of the tables; none takes every quantity that is in the first."""
    nowcast: Nowcast = Nowcast()
    """Places and conditions of the nowcast."""
    curves: Curves = Curves()
    """Courses of the closed loop."""
    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Seeds of the reservoirs; a fit for each."""
    level: float = Field(0.8, gt=0, lt=1)
    """Share of values that intervals should hold; how many they do hold is measured."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Name of the run, and of its folder; None makes one from the time."""
    storage: str | None = None
    """Where runs are kept: a folder or URI. None: PRISM_HOME/runs."""
    register_as: str | None = None
    """Name in the model registry; None is qrc."""
    champion: bool = False
    """Let the endpoint serve this artifact from now on."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each task."""
    gpu: bool = False
    """One GPU for each task."""

    def leaves_artifact(self) -> bool:
        return True

    def run(self) -> Report:
        """Fit all seeds, measure them, and register the best one.

        Raises InputError for tables, tasks and recipes that do not fit together, before any work.
        """
        import pandas as pd

        from library.qrc.spectra import about, time_scales

        began = time.monotonic()
        material = self.material()
        connect()
        folder = self._folder()
        found = self._fitted(material)
        first = ("seed", "validation_nrmse", "test_nrmse")
        rows = [{"seed": seed, **found[f"seed {seed}"][1]} for seed in self.seeds]
        table = pd.DataFrame([{name: row[name] for name in first} | row for row in rows])
        best = min(self.seeds, key=lambda seed: (found[f"seed {seed}"][1]["validation_nrmse"], seed))
        model, own = found[f"seed {best}"]
        measured = table.drop(columns="seed")
        metrics = {name: float(value) for name, value in measured.mean().items()}
        if len(table) > 1:
            metrics |= {f"{name}_sd": float(table[name].std()) for name in ("validation_nrmse", "test_nrmse")}
        metrics |= {"best_seed": float(best), "best_test_nrmse": own["test_nrmse"]} | self._baselines(material)
        scales = time_scales(model.reservoir_, model.driving(material.parts["train"][0]))
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=metrics,
            tables={"seeds": table, "reservoirs": pd.DataFrame(scales)},
            figures={"test": sample_figure(model, material, self.level)},
            notes=[*material.notes, *_slow(scales, model.washout)],
        )
        told = about(material.schema, scales) | {"recipe": self.recipe.model_dump(mode="json"), "seed": best}
        report.artifact = _keep(model, own, material.fingerprint, told, folder)
        report.register(self.register_as or "qrc", champion=self.champion)
        report.seconds = time.monotonic() - began
        if storage.is_local(folder):
            report.folder = str(report.save(storage.local_path(folder) / "report"))
        return report

    def material(self) -> Material:
        """The data. Raises InputError that says which file, column and row does not fit."""
        if self.table and self.task == "closed-loop":
            raise InputError("task closed-loop: it is of simulated courses; tables are for the task nowcast alone")
        if self.table:
            return _from_tables(self.table, self.inputs)
        if self.inputs:
            raise InputError("inputs: they are chosen of tables; name the files with --table")
        about = self.nowcast if self.task == "nowcast" else self.curves
        note = "the corrosion is simulated, under the real weather of 2013 at three airports"
        key = sha256(about.model_dump_json().encode()).hexdigest()[:16]
        if self.task == "nowcast":
            parts = {name: self.nowcast.series(getattr(self.nowcast, name)) for name in ("train", "validation", "test")}
            schema = Schema(inputs=("temperature", "humidity", "rain", "wind"), step=1.0, target=SIMULATED)
            return Material(parts, schema, f"nycflights13-simulated-{key}", [note])
        train, test = self.curves.series(self.seeds[0])
        cut = max(1, len(train) // 4)
        parts = {"train": (train[cut:], None), "validation": (train[:cut], None), "test": (test, None)}
        schema = Schema(inputs=("relative_loss",), step=float(self.curves.every))
        return Material(parts, schema, f"nycflights13-simulated-curves-{key}", [note])

    def prototype(self, seed: int) -> "Forecaster":
        """The forecaster of a seed, not fitted."""
        from library.qrc.forecaster import Forecaster

        device = "cuda" if self.gpu else "cpu"
        if self.task == "closed-loop":
            rows = (self.curves.curves * 2 // 3) * (self.curves.points - 1)
            return Forecaster(
                self.recipe.reservoir(seed),
                alphas=(RAW_ALPHA / rows,),
                washout=0,
                repeats=COPIES,
                start="reset",
                skip=bool(self.recipe.skip),
                scale=False,
                clip=CURVE_CLIP,
                standardize=False,
                device=device,
            )
        return self.recipe.forecaster(seed, closed_loop=True, device=device)

    def _fitted(self, material: Material) -> "dict[str, tuple[Forecaster, dict[str, float]]]":
        """The fitted forecaster of each seed, and its measures."""
        import ray

        options = {"num_cpus": self.cpus_per_task, "num_gpus": 1 if self.gpu else 0, "max_retries": 2}
        drive, fit = (ray.remote(**options)(work) for work in (_drive, _fit))
        shared, job = ray.put(material), ray.put(self)
        members = {
            seed: [drive.remote(job, shared, seed, k) for k in range(len(self.recipe.reservoir(seed).members))]
            for seed in self.seeds
        }
        tasks = {f"seed {seed}": fit.remote(job, shared, seed, *members[seed]) for seed in self.seeds}
        return gather(tasks, name=self.job)

    def _baselines(self, material: Material) -> dict[str, float]:
        """What needs no reservoir: a linear map of the present inputs, and the standard's loss beside the simulated."""
        from library.qrc.readout import ridge_path
        from library.qrc.scores import scores

        (x, y), (tests, wanted) = material.parts["train"], material.parts["test"]
        if y is None:
            held = tests[:, self.curves.primed - 1 : self.curves.primed].expand(-1, self.curves.horizon, -1)
            after = tests[:, self.curves.primed : self.curves.primed + self.curves.horizon]
            return {"persistence_test_nrmse": scores(held, after)["nrmse"]}
        washout = self.recipe.washout
        path = ridge_path(_rows(x, washout), _rows(y, washout), (1e-8,))
        predicted = path.predictions(_rows(tests, washout))[0]
        found = {"linear_test_nrmse": scores(predicted, _rows(wanted, washout))["nrmse"]}
        return found if self.table else found | _dose_response(self.nowcast, wanted)

    def _folder(self) -> str:
        root = root_of(RUN, self.storage)
        return new_folder(RUN, root, self.record(), prefix=self.job, name=self.name, resumable=False)


def _slow(scales: list[dict[str, Any]], washout: int) -> list[str]:
    """A note for each reservoir that has not forgotten its start when learning begins."""
    return [
        f"{row['reservoir']}: its longest time scale of {row['tau']:.0f} steps is more than a fifth of the washout of "
        f"{washout}, so that what is learned depends on its start; raise --washout or its sigma"
        for row in scales
        if washout and row["tau"] > washout / 5
    ]


def _keep(
    model: "Forecaster", metrics: Mapping[str, float], fingerprint: str, about: Mapping[str, Any], folder: str
) -> str:
    """Write the artifact into the run's folder, wherever that is."""
    from library.qrc.trained import save_forecaster

    target = storage.join(folder, "artifact")
    with files.scratch_folder() as scratch:
        local = storage.local_path(target) if storage.is_local(target) else scratch / "artifact"
        save_forecaster(model, local, metrics=dict(metrics), data=fingerprint, about=dict(about))
        if not storage.is_local(target):
            storage.upload_folder(local, target, last="artifact.json")
    return target


def _from_tables(places: tuple[str, ...], inputs: tuple[str, ...]) -> Material:
    """Rates between measurements, by file; one file is cut in time at 60 and 80 %."""
    import torch

    tables = [read_table(place, inputs) for place in places]
    first = tables[0]
    series = []
    for place, table in zip(places, tables, strict=True):
        if list(table.inputs) != list(first.inputs) or abs(table.step - first.step) > 1e-6:
            raise InputError(
                f"{place}: {', '.join(table.inputs)} every {table.step:g} h; {places[0]} has "
                f"{', '.join(first.inputs)} every {first.step:g} h, and all tables must agree"
            )
        begin, end, rates = mean_rates(table)
        rows = torch.from_numpy(table.driven()[begin + 1 : end + 1])  # a rate belongs to the row that ends its hour
        series.append((rows, torch.from_numpy(rates)[:, None]))
    notes = []
    if len(series) == 1:
        rows, rates = series[0]
        a, b = int(0.6 * len(rows)), int(0.8 * len(rows))
        series = [(rows[:a], rates[:a]), (rows[a:b], rates[a:b]), (rows[b:], rates[b:])]
        notes.append("one table was cut in time; a season that training has not seen makes any model fail")
    elif len(series) == 2:
        raise InputError("table: give one file, or at least three: training, then validation, then test")
    parts = {
        "train": ([x for x, _ in series[:-2]], [y for _, y in series[:-2]]),
        "validation": ([series[-2][0]], [series[-2][1]]),
        "test": ([series[-1][0]], [series[-1][1]]),
    }
    stacked = {
        name: (torch.stack(x), torch.stack(y)) if len({len(each) for each in x}) == 1 else (x, y)
        for name, (x, y) in parts.items()
    }
    digest = sha256(b"".join(x.numpy().tobytes() + y.numpy().tobytes() for x, y in series)).hexdigest()[:16]
    return Material(stacked, Schema.of_table(first, MEASURED), f"tables-{digest}", notes)


def _drive(job: QrcJob, material: Material, seed: int, number: int) -> "dict[str, Tensor]":
    """Features of one member for each part's series."""
    model = job.prototype(seed)
    model.fit_range(material.parts["train"][0])
    member = model.reservoir.members[number]
    return {
        name: member.drive(model.driving(x))[0][:, model.repeats :].cpu() for name, (x, _) in material.parts.items()
    }


def _fit(
    job: QrcJob, material: Material, seed: int, *members: "dict[str, Tensor]"
) -> "tuple[Forecaster, dict[str, float]]":
    """The forecaster of a seed from its members' features, on the CPU, and its measures."""
    import torch

    from library.qrc.scores import coverage, scores

    model = job.prototype(seed)
    model.fit_range(material.parts["train"][0])
    first = {name: torch.cat([member[name] for member in members], -1).to(model.device) for name in members[0]}
    model.reservoir = model.reservoir.calibrated(first["train"])
    features = {
        name: model.reservoir.joined(model.driving(x)[:, model.repeats :], first[name])
        for name, (x, _) in material.parts.items()
    }
    (x, y), held = material.parts["train"], material.parts["validation"]
    if y is None:
        model.fit(x, features=features["train"])
        found = _course_scores(job, model, material)
        return model.to("cpu"), found
    model.fit(x, y, features=features["train"], validation=held, validation_features=features["validation"])
    found: dict[str, float] = {}
    for name in ("validation", "test"):
        x, y = material.parts[name]
        predicted = _rows(model.predict(x, features=features[name]), model.washout)
        wanted = _rows(y, model.washout)
        found |= {f"{name}_{key}": value for key, value in scores(predicted, wanted).items()}
        if name == "test":
            ends = model.predict_interval(x, job.level, features=features[name])
            found["test_coverage"] = coverage(*(_rows(end, model.washout) for end in ends), wanted)
    return model.to("cpu"), found


def _course_scores(job: QrcJob, model: "Forecaster", material: Material) -> dict[str, float]:
    """Closed-loop errors over all horizons, and at the last."""
    import torch

    from library.qrc.scores import coverage, scores

    primed, end = job.curves.primed, job.curves.primed + job.curves.horizon
    found = {}
    for name in ("validation", "test"):
        x = material.parts[name][0]
        forecast = model.forecast(x[:, :primed], job.curves.horizon, paths=100, level=job.level)
        wanted, predicted = x[:, primed:end], torch.from_numpy(forecast.mean)
        found |= {f"{name}_{key}": value for key, value in scores(predicted, wanted).items()}
        found[f"{name}_last_nrmse"] = scores(predicted[:, -1], wanted[:, -1])["nrmse"]
    found["test_coverage"] = coverage(torch.from_numpy(forecast.lower), torch.from_numpy(forecast.upper), wanted)
    return found


def _rows(series: Any, washout: int) -> "Tensor":
    """All rows after the washout, of an array or a list of series."""
    import torch

    parts = [torch.as_tensor(each)[washout:] for each in series]
    return torch.cat(parts)


def _dose_response(task: Nowcast, rates: "Tensor") -> dict[str, float]:
    """Loss at the first test station by the simulator, and by ISO 9223 and 9224 with 5 mg SO2/(m2 day)."""
    import torch

    from library.qrc.corrosion import dose_response
    from library.qrc.nowcast import loss_from_rates
    from library.qrc.weather import load_weather

    year = load_weather(task.test[0]).part(0, task.hours)
    years = torch.tensor(task.hours / 8760, dtype=torch.float64)
    standard = dose_response(float(year.temperature.mean()), float(year.humidity.mean()), 5.0, task.salt, years)
    return {"simulated_loss_g_m2": float(loss_from_rates(rates[0])[-1]), "iso9223_loss_g_m2": float(standard)}


def sample_figure(model: "Forecaster", material: Material, level: float) -> "Figure":
    """A stretch of the first test series with its prediction and interval."""
    import numpy as np

    x, y = material.parts["test"]
    drawn = blank(8.0, 3.2)
    axis = drawn.subplots()
    target = material.schema.target
    if y is None:
        half = x.shape[1] // 3
        forecast = model.forecast(x[:3, :half], half, paths=100, level=level)
        for number, colour in enumerate(("#D55E00", "#0072B2", "#009E73")[: len(x)]):
            axis.plot(x[number, : 2 * half, 0], color="0.4", lw=1.0, label="simulated" if number == 0 else None)
            ahead = np.arange(half, 2 * half)
            axis.plot(ahead, forecast.mean[number, :, 0], color=colour, label="closed loop" if number == 0 else None)
            axis.fill_between(
                ahead, forecast.lower[number, :, 0], forecast.upper[number, :, 0], color=colour, alpha=0.2, lw=0
            )
        axis.set(xlabel=f"points of {material.schema.step:g} h", ylabel="loss, relative")
    else:
        assert target is not None
        begin = max(0, len(x[0]) - 500)
        hours = np.arange(begin, len(x[0])) * material.schema.step
        predicted = model.predict(x[:1])[0][begin:, 0]
        ends = model.residuals_.quantiles([(1 - level) / 2, (1 + level) / 2])[:, 0].tolist()
        axis.plot(hours, y[0][begin:, 0], color="0.3", lw=1.0, label="simulated" if target.simulated else "measured")
        axis.plot(hours, predicted, color="#D55E00", lw=1.2, label="predicted")
        axis.fill_between(
            hours,
            predicted + ends[0],
            predicted + ends[1],
            color="#D55E00",
            alpha=0.2,
            lw=0,
            label=f"{level:.0%} interval",
        )
        shown = f"log10 of {target.name}, {target.unit}" if target.logarithmic else f"{target.name}, {target.unit}"
        axis.set(xlabel="hours", ylabel=shown)
    open_frame(axis)
    axis.legend(frameon=False, fontsize=8, ncols=3)
    return drawn
