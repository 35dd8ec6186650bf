"""The endpoint `corrosion`: how fast a metal corrodes under the weather so far, and what is to come, with intervals."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from library.errors import InputError
from library.qrc.series import QUANTITIES, converted, hours_of, spacing
from library.qrc.stream import Stream, packed, unpacked
from serving.corrosion_bodies import (
    EXAMPLE_HOURS,
    MOST_HORIZON,
    MOST_ROWS,
    UNITS,
    CorrosionRequest,
    CorrosionResponse,
    Curve,
    Environment,
    Scale,
    SiteForecast,
    example_site,
)
from serving.corrosion_tables import sites_of
from serving.endpoint import ARROW, Endpoint

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

    from library.artifact import Artifact
    from library.qrc.forecaster import Forecaster
    from library.qrc.schema import Schema

PATHS = 200  # closed loops with resampled errors behind an interval
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
END = datetime(9999, 12, 31, 23, tzinfo=UTC)  # of what dates can be told


@dataclass(frozen=True)
class Row:
    """A site of some request after its checks: what drives the reservoir, where it stands, what it asks for."""

    where: str
    rows: np.ndarray
    stream: Stream | None
    last: float
    future: np.ndarray | None
    horizon: int
    level: float


class Corrosion(Endpoint):
    """A forecaster of corrosion, or of any other series that was fitted."""

    name = "corrosion"
    summary = "How fast does it corrode under this weather, and what is to come? A stream keeps its state."
    kind = "qrc"
    model = "qrc"
    Request = CorrosionRequest
    Response = CorrosionResponse
    examples = {  # noqa: RUF012 - read only
        "two days": {"series": [example_site(EXAMPLE_HOURS)], "units": UNITS, "horizon": 24, "explain": True},
        "with a weather forecast": {
            "series": [example_site(EXAMPLE_HOURS)],
            "future": [example_site(12, EXAMPLE_HOURS)],
            "units": UNITS,
            "horizon": 12,
        },
    }
    media = (ARROW,)
    score_bounds = tuple(10.0 ** (step / 4) for step in range(-16, 17))
    cost_unit = "rows, of series and of horizons"
    request_cost = MOST_ROWS
    batch_cost = 2 * MOST_ROWS

    def __init__(self, forecaster: "Forecaster", schema: "Schema", scales: list[Scale], version: str):
        self.forecaster, self.schema, self.scales, self.version = forecaster, schema, scales, version
        self.size = forecaster.begin(1).shape[1]
        self.errors = forecaster.residuals_.quantiles([(i + 0.5) / 100 for i in range(100)])[:, 0].cpu().numpy()

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.errors import ArtifactError
        from library.qrc.schema import Schema
        from library.qrc.trained import load_forecaster

        forecaster, schema = load_forecaster(artifact, device=device), Schema.of(artifact)
        if len(schema.inputs) != forecaster.n_features_in_:
            raise ArtifactError(
                f"{artifact.path}: {len(schema.inputs)} inputs, {forecaster.n_features_in_} are learned"
            )
        try:
            scales = [
                Scale(
                    reservoir=row["reservoir"],
                    kind=row["kind"],
                    hours=None if row["tau"] is None else row["tau"] * schema.step,
                    annulus=(row["annulus_low"], row["annulus_high"]),
                )
                for row in artifact.recipe["time_scales"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{artifact.path} does not say its reservoirs' time scales") from error
        return cls(forecaster, schema, scales, artifact.version)

    @classmethod
    def read(cls, body: "pyarrow.Table", settings: dict[str, Any]) -> CorrosionRequest:
        return CorrosionRequest.model_validate({**settings, "series": sites_of(body)})

    def scores(self, response: CorrosionResponse) -> list[float]:
        return [result.nowcast[0].mean[-1] for result in response.results]

    def cost(self, request: CorrosionRequest) -> int:
        return sum(len(site.time) + request.horizon for site in request.series)

    def group(self, request: CorrosionRequest) -> Hashable:
        return None  # series of equal form are driven together, whatever request they are of

    def limits(self) -> dict[str, int]:
        return {"inputs": len(self.schema.inputs), "horizon": MOST_HORIZON}

    def answer(self, requests: Sequence[CorrosionRequest]) -> list[CorrosionResponse]:
        sites = [[self._row(request, number) for number in range(len(request.series))] for request in requests]
        every = [(place, number) for place, found in enumerate(sites) for number in range(len(found))]
        alike: dict[Hashable, list[tuple[int, int]]] = {}
        for place, number in every:
            row = sites[place][number]
            alike.setdefault((len(row.rows), row.horizon, row.level, row.future is None), []).append((place, number))
        answers: dict[tuple[int, int], SiteForecast] = {}
        for places in alike.values():
            rows = [sites[place][number] for place, number in places]
            explained = [requests[place].explain for place, _ in places]
            answers |= zip(places, self._answers(rows, explained), strict=True)
        return [
            CorrosionResponse(
                model=self.version,
                simulated=bool(self.schema.target and self.schema.target.simulated),
                results=[answers[place, number] for number in range(len(sites[place]))],
                time_scales=self.scales if request.explain else None,
            )
            for place, request in enumerate(requests)
        ]

    def _row(self, request: CorrosionRequest, number: int) -> Row:
        site, where = request.series[number], f"series[{number}]"
        hours, rows = self._checked(site, request.units, where)
        if hours[-1] + self.schema.step * request.horizon > (END - EPOCH) / timedelta(hours=1):
            raise InputError(f"{where}: time: rows and horizon must end before {END:%Y-%m-%d %H:%M}")
        stream = None
        if site.state is not None:
            try:
                stream = unpacked(site.state, self.version, self.size)
            except InputError as error:
                raise InputError(f"{where}: state: {error}") from error
            spacing(np.array([0.0, hours[0] - stream.hours]), f"{where}: time", step=self.schema.step)
        future = None
        if request.future is not None and request.horizon:
            about = f"future[{number}]"
            ahead, future = self._checked(request.future[number], request.units, about)
            if len(ahead) != request.horizon:
                raise InputError(f"{about}: {len(ahead)} rows; the horizon is {request.horizon}")
            spacing(np.array([0.0, ahead[0] - hours[-1]]), f"{about}: time", step=self.schema.step)
        elif request.horizon and not self.forecaster.loops:
            raise InputError("future: this model needs a weather forecast for a horizon above 0")
        return Row(where, rows, stream, float(hours[-1]), future, request.horizon, request.level)

    def _checked(self, site: Environment, units: dict[str, str], where: str) -> tuple[np.ndarray, np.ndarray]:
        """Hours since 1970, and what drives the reservoir (rows, channels)."""
        start, since = hours_of(site.time, f"{where}: time")
        spacing(since, f"{where}: time", step=self.schema.step)
        values = {}
        for name, column in site.inputs.items():
            if len(column) != len(site.time):
                raise InputError(f"{where}: {name} has {len(column)} values, time has {len(site.time)}")
            missing = [i for i, value in enumerate(column) if value is None or not math.isfinite(value)]
            if missing:
                raise InputError(f"{where}: {name}: row {missing[0]} is missing or not finite; fill it before")
            if name in QUANTITIES and name in self.schema.inputs:
                if name not in units:
                    raise InputError(f"units: {name} has none; there are {', '.join(QUANTITIES[name].units)}")
                if units[name] not in QUANTITIES[name].units:
                    known = ", ".join(QUANTITIES[name].units)
                    raise InputError(f"units: {name} in {units[name][:40]!r}; there are {known}")
                values[name] = converted(column, name, units[name], f"{where}: {name}")
            else:
                values[name] = np.asarray(column, np.float64)
        try:
            rows = self.schema.rows(values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return since + (start - EPOCH).total_seconds() / 3600, rows

    def _answers(self, rows: list[Row], explained: list[bool]) -> list[SiteForecast]:
        """The answers to series of equal length and horizon, in one batch."""
        import torch

        from library.qrc.closed_loop import run_closed

        model, first = self.forecaster, rows[0]
        device = model.low_.device
        values = torch.from_numpy(np.stack([row.rows for row in rows])).to(device)
        begin = torch.stack([self._begin(row, one) for row, one in zip(rows, values, strict=True)])
        inputs = model.scaled(values)
        features, state = model.reservoir_.drive(inputs, begin)
        outputs = model.bounded(model.readout_(model.with_inputs(features, inputs)))
        ends = model.residuals_.quantiles([(1 - first.level) / 2, (1 + first.level) / 2]).to(outputs)
        now = [model.shown(outputs + shift) for shift in (torch.zeros_like(ends[0]), *ends)]
        ahead = None
        if first.horizon:
            future = None
            if first.future is not None:
                given = torch.from_numpy(np.stack([row.future for row in rows])).to(device)
                future = model.scaled(given)
            ahead = run_closed(
                model, state, outputs[:, -1], first.horizon, future=future, paths=PATHS, level=first.level, seed=0
            )
        found = []
        for place, (row, explain) in enumerate(zip(rows, explained, strict=True)):
            near = [part[place].cpu().numpy() for part in now]
            loss = self._gathered(row, near[0])
            far = None if ahead is None else (ahead.mean[place], ahead.paths[:, place].cpu().numpy())
            kept = slice(None) if explain else slice(-1, None)
            stream = Stream(state[place].cpu().numpy(), row.last, loss, self._seen(row))
            last = EPOCH + timedelta(hours=row.last)
            found.append(
                SiteForecast(
                    nowcast=[self._finite(row, _at(curve, kept)) for curve in self._curves(*near)],
                    time=[(last + timedelta(hours=self.schema.step * (i + 1))).isoformat() for i in range(row.horizon)],
                    forecast=[] if far is None else [self._finite(row, c) for c in self._ahead(*far, loss, row.level)],
                    state=packed(stream, self.version),
                    warnings=self._warnings(row, values[place]),
                )
            )
        return found

    def _begin(self, row: Row, values: "Tensor") -> "Tensor":
        """The reservoir's state before the rows."""
        import torch

        model = self.forecaster
        if row.stream is not None:
            return torch.from_numpy(row.stream.state).to(values.device)
        if not model.repeats:
            return model.begin()[0]
        return model.reservoir_.drive(model.scaled(values[:1]).expand(1, model.repeats, -1), model.begin())[1][0]

    def _seen(self, row: Row) -> int:
        return len(row.rows) + (row.stream.rows if row.stream else 0)

    def _gathered(self, row: Row, learned: np.ndarray) -> float:
        """Expected loss in g/m2 since the stream began, up to the last row.

        Where logarithms are learned, the mean rate is over the errors around them (Duan's smearing, 1983).
        """
        target = self.schema.target
        if target is None:
            return 0.0
        rates = target.natural(learned[:, :1] + self.errors).mean(1)
        return float(rates.sum()) * target.grams * self.schema.step + (row.stream.loss if row.stream else 0.0)

    def _curves(self, mean: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> list[Curve]:
        """Rates (rows, 1), or the series themselves (rows, inputs), in their own units."""
        if self.schema.target is not None:
            target = self.schema.target
            ends = [target.natural(part[:, 0]).tolist() for part in (mean, lower, upper)]
            return [Curve(name=target.name, unit=target.unit, mean=ends[0], lower=ends[1], upper=ends[2])]
        parts = [self.schema.natural(part) for part in (mean, lower, upper)]
        return [
            Curve(name=name, unit=self.schema.unit(name), mean=m.tolist(), lower=low.tolist(), upper=high.tolist())
            for (name, m), low, high in zip(parts[0].items(), *(part.values() for part in parts[1:]), strict=True)
        ]

    def _ahead(self, mean: np.ndarray, paths: np.ndarray, loss: float, level: float) -> list[Curve]:
        """Forecasts with intervals from the paths (paths, horizon, outputs)."""
        shares = [(1 - level) / 2, (1 + level) / 2]
        curves = self._curves(mean, *np.quantile(paths, shares, 0))
        target = self.schema.target
        if target is None:
            return curves

        def gathered(learned: np.ndarray) -> np.ndarray:
            return loss + np.cumsum(target.natural(learned) * target.grams * self.schema.step, -1)

        lower, upper = np.quantile(gathered(paths[..., 0]), shares, 0)
        middle = np.median(gathered(paths[..., 0]), 0)
        total = Curve(name="loss", unit="g/m2", mean=middle.tolist(), lower=lower.tolist(), upper=upper.tolist())
        return [*curves, total]

    def _warnings(self, row: Row, values: "Tensor") -> list[str]:
        model = self.forecaster
        found = []
        seen = self._seen(row)
        if seen < model.washout:
            found.append(f"{seen} rows were shown; before {model.washout} the reservoirs still remember their start")
        outside = model.outside(values).cpu().numpy()
        low, high = (self.schema.natural(edge.cpu().numpy()) for edge in (model.low_, model.high_))
        for place, name in enumerate(self.schema.inputs):
            if (beyond := outside[:, place] > 0).any():
                unit = f" {self.schema.unit(name)}".rstrip()
                found.append(
                    f"{name}: {int(beyond.sum())} of {len(beyond)} rows outside the training range "
                    f"{float(low[name]):.4g} to {float(high[name]):.4g}{unit}, by up to {outside[:, place].max():.0%}"
                )
        return found

    def _finite(self, row: Row, curve: Curve) -> Curve:
        if not all(math.isfinite(value) for part in (curve.mean, curve.lower, curve.upper) for value in part):
            raise InputError(
                f"{row.where}: the forecast of {curve.name} diverges; begin the stream anew, or shorten it"
            )
        return curve


def _at(curve: Curve, kept: slice) -> Curve:
    """The curve at some of its rows."""
    return curve.model_copy(update={name: getattr(curve, name)[kept] for name in ("mean", "lower", "upper")})
