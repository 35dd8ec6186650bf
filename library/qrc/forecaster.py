"""A forecaster after scikit-learn's manner: any reservoir, a ridge read-out, streams, and closed loops."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from library.errors import InputError
from library.qrc.closed_loop import Forecast, Residuals, run_closed
from library.qrc.echo import check_echo_state
from library.qrc.hybrid import HybridReservoir
from library.qrc.readout import ALPHAS, ridge_path
from library.qrc.reservoir import QuantumReservoir, Reservoir
from library.qrc.sequences import Batch
from library.qrc.shots import SampledReservoir

ONION = HybridReservoir(members=tuple(QuantumReservoir(sigma=sigma, seed=i) for i, sigma in enumerate((0.1, 0.3, 1.0))))
FEWEST = 30  # rows of a washout from which a rate of forgetting can be told
WINDOWS = 16  # stretches of the training series whose last states make the typical one


class Forecaster(RegressorMixin, BaseEstimator):
    """Predicts series from driven series; only a linear read-out is trained.

    reservoir     any `Reservoir`; None is an onion of three quantum reservoirs, sigma 0.1, 0.3, 1
    alphas        regularisations per sample to choose from, for each output by itself
    choose        loo: least error of leaving a sample out; gcv: generalised cross-validation. `fit(validation=...)`
                  chooses by the error on other series instead
    washout       rows at the start of each series from which nothing is learned, and which `score` leaves out
    repeats       how often the first row is shown before a series begins
    start         typical: what is predicted begins in the mean state of training, which is far from no read row;
                  reset: in the reservoir's own start. Training always begins in the latter, and has the washout
    skip          give the read-out the scaled inputs beside the features
    scale         map each input from its range in training to [0, 1]
    clip          least and largest value of what drives the reservoir
    closed_loop   learn to predict the next inputs too, so that `forecast` can run on without any
    standardize   let alpha act on features of unit deviation, not on the features as they are
    device        torch device of reservoir and read-out

    `fit(X)` without targets learns the next row of X itself. X is (time,), (time, channels), (series, time, channels),
    or a list of series of unequal length; targets alike. Predictions have the targets' form. Row t of a prediction is
    made of rows 0 ... t.

    >>> import numpy as np
    >>> from library.qrc.esn import EchoState
    >>> wave = np.sin(np.arange(400) / 5)
    >>> found = Forecaster(EchoState(units=20), washout=50).fit(wave[:300]).forecast(wave[200:300], 100)
    >>> bool(np.abs(found.mean[:, 0] - wave[300:]).max() < 0.05)
    True
    """

    def __init__(
        self,
        reservoir: Reservoir | None = None,
        *,
        alphas: Sequence[float] = ALPHAS,
        choose: Literal["loo", "gcv"] = "loo",
        washout: int = 100,
        repeats: int = 0,
        start: Literal["typical", "reset"] = "typical",
        skip: bool = False,
        scale: bool = True,
        clip: tuple[float, float] = (0.0, 1.2),
        closed_loop: bool = False,
        standardize: bool = True,
        device: str = "cpu",
    ) -> None:
        self.reservoir = reservoir
        self.alphas = alphas
        self.choose = choose
        self.washout = washout
        self.repeats = repeats
        self.start = start
        self.skip = skip
        self.scale = scale
        self.clip = clip
        self.closed_loop = closed_loop
        self.standardize = standardize
        self.device = device

    @property
    def loops(self) -> bool:
        """Whether next inputs are among the outputs, so that a forecast needs no further ones."""
        return self.closed_loop or not self.n_targets_

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        features: Tensor | None = None,
        validation: tuple[Any, Any] | None = None,
        validation_features: Tensor | None = None,
    ) -> Self:
        """Drive the reservoir with X and solve the read-out.

        features              (series, time, width) of the reservoir for X where they were computed elsewhere
        validation            X and y of other series: alpha has their least NRMSE, and intervals have their residuals
        validation_features   likewise for these

        Raises InputError for series that do not fit together, are shorter than the washout, or not finite, and for a
        quantum reservoir whose features still depend on its start after the washout (`library.qrc.echo`).
        """
        batch = self.fit_range(X)
        self.reservoir_ = self.reservoir if self.reservoir is not None else ONION
        outputs = batch.aligned(y, "y") if y is not None else None
        self.n_targets_ = outputs.values.shape[2] if outputs is not None else 0
        self.flat_ = outputs.flat if outputs is not None else batch.flat
        inputs = self.scaled(batch.values)
        if features is None:
            longest = batch.lengths.index(max(batch.lengths))
            self._check_echo(inputs[longest])
        driven = self._driven(inputs, features, fitting=True)
        self.typical_ = self._typical(inputs, batch.lengths)
        x, wanted, _ = self._pairs(batch, outputs, inputs, driven)
        self.target_range_ = torch.stack([wanted.amin(0), wanted.amax(0)])
        path = ridge_path(x, wanted, self.alphas, standardize=self.standardize)
        floor = shot_floor(self.reservoir_, x)
        if validation is None:
            self.readout_ = path.least(path.loo if self.choose == "loo" else path.gcv, floor)
            self.residuals_ = Residuals.of(self._errors(batch, outputs, inputs, driven))
            return self
        other = Batch.of(validation[0], "validation X", device=self.device)
        other_y = other.aligned(validation[1], "validation y") if y is not None else None
        shown = self.scaled(other.values)
        other_driven = self._driven(shown, validation_features)
        rows, target, _ = self._pairs(other, other_y, shown, other_driven)
        self.readout_ = path.least((path.predictions(rows) - target).square().mean(1), floor)
        self.residuals_ = Residuals.of(self._errors(other, other_y, shown, other_driven))
        return self

    def fit_range(self, X: Any) -> Batch:
        """Learn the range of each input alone, after which `scaled` can be asked; X as a batch."""
        self._check_settings()
        batch = Batch.of(X, "X", device=self.device)
        self.n_features_in_ = channels = batch.values.shape[2]
        self.low_, self.high_ = torch.zeros(channels), torch.ones(channels)
        if self.scale:
            rows = batch.values[batch.mask(0)]
            self.low_, self.high_ = rows.amin(0), rows.amax(0)
            if (flat := (self.high_ <= self.low_).nonzero()).numel():
                raise InputError(f"X: channel {int(flat[0])} is constant, so it has no range to scale by; leave it out")
        self.low_, self.high_ = (edge.to(self.device, torch.float64) for edge in (self.low_, self.high_))
        return batch

    def predict(self, X: Any, *, features: Tensor | None = None) -> Any:
        """Targets of each row of X; without targets in `fit`, the row after it. float64, in the targets' form."""
        batch, found = self._predicted(X, features)
        return batch.given_back(self.shown(found), flat=self.flat_)

    def predict_interval(self, X: Any, level: float = 0.8, *, features: Tensor | None = None) -> tuple[Any, Any]:
        """Lower and upper ends between which the share `level` of the residuals lies around each prediction."""
        if not 0 < level < 1:
            raise InputError(f"level {level}: between 0 and 1")
        batch, found = self._predicted(X, features)
        ends = self.residuals_.quantiles([(1 - level) / 2, (1 + level) / 2]).to(found)
        return tuple(batch.given_back(self.shown(found + end), flat=self.flat_) for end in ends)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """R^2 over the rows after the washout, the mean over outputs; without y, of predicting the next row."""
        if sample_weight is not None:
            raise InputError("sample_weight: rows of a series count alike")
        batch, found = self._predicted(X, None)
        outputs = batch.aligned(y, "y") if y is not None else None
        inputs = self.scaled(batch.values)
        _, wanted, mask = self._pairs(batch, outputs, inputs, found)
        predicted, wanted = (part[:, : self._visible()] for part in (found[mask], wanted))
        total = (wanted - wanted.mean(0)).square().sum(0)
        if not (total > 0).all():
            raise InputError("y is constant after the washout, so R^2 is not defined")
        return float((1 - (wanted - predicted).square().sum(0) / total).mean())

    def begin(self, series: int = 1) -> Tensor:
        """The state of the reservoir before the first row of `series` series; `advance` takes and gives it."""
        self._check_fitted()
        return self._begin(series)

    def advance(self, X: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (series, time, targets) for the next rows, and the state after them.

        A step costs the same however many were before it, and gives what `predict` would for the whole series. With
        `repeats` it does so once the first row has been advanced that often before: a stream repeats nothing itself.
        """
        self._check_fitted()
        batch = Batch.of(X, "X", device=self.device)
        inputs = self.scaled(self._columns(batch).values)
        features, state = self.reservoir_.drive(inputs, state)
        return self.shown(self.readout_(self.with_inputs(features, inputs))), state

    def forecast(
        self,
        X: Any,
        horizon: int,
        *,
        future: Any = None,
        paths: int = 0,
        level: float = 0.8,
        seed: int = 0,
    ) -> Forecast:
        """What follows X (series, time, channels): `horizon` rows, without any further input unless `future` has them.

        Without `future` the predicted next inputs drive the reservoir. Each of `paths` repeats that with errors drawn
        from the residuals, row for row, in stretches; interval ends are their quantiles. See `Forecast`.

        Raises InputError for a horizon below 1 and for a forecaster that learned neither next inputs nor has `future`.
        """
        self._check_fitted()
        if horizon < 1 or paths < 0 or not 0 < level < 1:
            raise InputError(f"horizon {horizon}, paths {paths}, level {level}: at least 1, at least 0, within (0, 1)")
        if future is None and not self.loops:
            raise InputError("future: this forecaster did not learn next inputs; give them, or fit with closed_loop")
        batch = self._columns(Batch.of(X, "X", device=self.device))
        if len(set(batch.lengths)) > 1:
            raise InputError("X: forecasts of a batch need series of equal length")
        given = None if future is None else self.scaled(self._columns(Batch.of(future, "future")).values)
        if given is not None and given.shape[:2] != (len(batch.values), horizon):
            raise InputError(f"future: {tuple(given.shape[:2])} series and rows; needed {(len(batch.values), horizon)}")
        state, last = self.prime(batch.values)
        return run_closed(
            self, state, last, horizon, future=given, paths=paths, level=level, seed=seed, single=batch.single
        )

    def prime(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the rows `values` (series, time, channels), and the read-out's last row (series, outputs)."""
        inputs = self._repeated(self.scaled(values))
        features, state = self.reservoir_.drive(inputs, self.begin(len(inputs)))
        return state, self.readout_(self.with_inputs(features[:, -1:], inputs[:, -1:]))[:, 0]

    def to(self, device: str) -> Self:
        """Itself, once fitted, with all that it learned on another torch device."""
        self.device = device
        for name in ("low_", "high_", "typical_", "target_range_", "readout_", "residuals_"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def outside(self, values: Tensor) -> Tensor:
        """How far inputs (..., channels) lie outside the training range, in its widths; 0 inside."""
        self._check_fitted()
        scaled = (values - self.low_) / (self.high_ - self.low_)
        return torch.maximum(scaled - 1, -scaled).clamp(min=0)

    def scaled(self, values: Tensor) -> Tensor:
        """What drives the reservoir for inputs (..., channels)."""
        return ((values - self.low_) / (self.high_ - self.low_)).clamp(*self.clip)

    def driving(self, X: Any) -> Tensor:
        """What the reservoir is shown for series X: scaled, the first row repeated, (series, time, channels)."""
        return self._repeated(self.scaled(self._columns(Batch.of(X, "X", device=self.device)).values))

    def bounded(self, outputs: Tensor) -> Tensor:
        """Outputs with targets no further beyond the range of training than half its width."""
        if not self.n_targets_:
            return outputs
        low, high = self.target_range_[:, : self.n_targets_]
        margin = (high - low) / 2
        kept = outputs[..., : self.n_targets_].clamp(low - margin, high + margin)
        return torch.cat([kept, outputs[..., self.n_targets_ :]], -1)

    def unscaled(self, inputs: Tensor) -> Tensor:
        """The inputs that scaled ones stand for."""
        return self.low_ + inputs * (self.high_ - self.low_)

    def __sklearn_clone__(self) -> Self:
        return type(self)(**copy.deepcopy(self.get_params(deep=False)))

    def _outputs(self) -> int:
        return self.n_targets_ + (self.n_features_in_ if self.loops else 0)

    def _visible(self) -> int:
        """Outputs that are predictions: the targets, or the next inputs where there are none."""
        return self.n_targets_ or self.n_features_in_

    def shown(self, outputs: Tensor) -> Tensor:
        """The visible outputs, next inputs in their own units."""
        return outputs[..., : self.n_targets_] if self.n_targets_ else self.unscaled(outputs)

    def _pairs(
        self, batch: Batch, outputs: Batch | None, inputs: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (samples, ...) that count, what each should give (samples, outputs), and where they are."""
        if outputs is not None and outputs.values.shape[2] != self.n_targets_:
            raise InputError(f"y has {outputs.values.shape[2]} columns; {self.n_targets_} were learned")
        if outputs is None and self.n_targets_:
            raise InputError("y: targets were learned, so targets are needed here too")
        mask = batch.mask(self.washout, int(self.loops))
        if int(mask.sum()) < 2:
            raise InputError(
                f"washout {self.washout} leaves {int(mask.sum())} of {sum(batch.lengths)} rows; use longer series"
            )
        parts = [] if outputs is None else [outputs.values]
        if self.loops:
            parts.append(torch.cat([inputs[:, 1:], inputs[:, -1:]], 1))
        return rows[mask], torch.cat(parts, -1)[mask], mask

    def _errors(self, batch: Batch, outputs: Batch | None, inputs: Tensor, driven: Tensor) -> list[Tensor]:
        """Residuals (rows, outputs) of each series, in its order."""
        rows, wanted, mask = self._pairs(batch, outputs, inputs, driven)
        return list((wanted - self.readout_(rows)).split(mask.sum(1).tolist()))

    def _check_echo(self, inputs: Tensor) -> None:
        """Each quantum reservoir must forget its start within the washout, if any, of one series (time, channels)."""
        members = self.reservoir_.members if isinstance(self.reservoir_, HybridReservoir) else (self.reservoir_,)
        for member in members:
            if isinstance(member, QuantumReservoir) and FEWEST <= self.washout <= len(inputs):
                check_echo_state(member, inputs, self.washout)

    def _driven(self, inputs: Tensor, features: Tensor | None, *, fitting: bool = False) -> Tensor:
        """What the read-out sees for scaled inputs, (series, time, width); fitting calibrates a stacked layer."""
        repeated = self._repeated(inputs)
        if fitting and features is None and isinstance(self.reservoir_, HybridReservoir) and not self.reservoir_.centre:
            self.reservoir_ = fitted_hybrid(self.reservoir_, repeated)
        if features is None:
            begin = self._reset(len(inputs)) if fitting else self._begin(len(inputs))
            features = self.reservoir_.drive(repeated, begin)[0][:, self.repeats :]
        if features.shape != (*inputs.shape[:2], self.reservoir_.width):
            wanted = (*inputs.shape[:2], self.reservoir_.width)
            raise InputError(f"features have shape {tuple(features.shape)}; needed {wanted}")
        return self.with_inputs(features, inputs)

    def with_inputs(self, features: Tensor, inputs: Tensor) -> Tensor:
        """What the read-out sees: the features, and with `skip` the scaled inputs."""
        return torch.cat([features, inputs], -1) if self.skip else features

    def _begin(self, series: int) -> Tensor:
        return self.typical_.expand(series, -1) if self.start == "typical" else self._reset(series)

    def _reset(self, series: int) -> Tensor:
        return self.reservoir_.start(series).to(self.device, torch.float64)

    def _typical(self, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
        """The mean state after stretches of training as long as the washout, (1, size).

        They lie within the true `lengths` of the series; shorter series than a stretch are left out. A mean of density
        matrices is one, and what is linear in the state takes its mean value there.
        """
        length = min(max(lengths), max(self.washout, 50))
        whole = [number for number, rows in enumerate(lengths) if rows >= length]
        windows = []
        for number in range(WINDOWS):
            series = whole[number % len(whole)]
            first = int(torch.linspace(0, lengths[series] - length, WINDOWS)[number])
            windows.append(inputs[series, first : first + length])
        return self.reservoir_.drive(torch.stack(windows))[1].mean(0, keepdim=True)

    def _repeated(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs[:, :1].expand(-1, self.repeats, -1), inputs], 1)

    def _predicted(self, X: Any, features: Tensor | None) -> tuple[Batch, Tensor]:
        self._check_fitted()
        batch = self._columns(Batch.of(X, "X", device=self.device))
        return batch, self.readout_(self._driven(self.scaled(batch.values), features))

    def _columns(self, batch: Batch) -> Batch:
        if batch.values.shape[2] != self.n_features_in_:
            raise InputError(f"X has {batch.values.shape[2]} channels; {self.n_features_in_} were learned")
        return batch

    def _check_settings(self) -> None:
        if self.washout < 0 or self.repeats < 0:
            raise InputError(f"washout {self.washout}, repeats {self.repeats}: at least 0")
        if self.choose not in ("loo", "gcv") or self.start not in ("typical", "reset"):
            raise InputError(f"choose {self.choose!r}, start {self.start!r}: loo or gcv, typical or reset")
        if len(self.clip) != 2 or not self.clip[0] < self.clip[1]:
            raise InputError(f"clip {self.clip}: a smaller and a larger number")

    def _check_fitted(self) -> None:
        if not hasattr(self, "readout_"):
            raise NotFittedError("this forecaster is not fitted: call `fit`, or load an artifact")


def fitted_hybrid(reservoir: HybridReservoir, inputs: Tensor) -> HybridReservoir:
    """The reservoir with its stacked layer calibrated on the features that these inputs make."""
    if reservoir.wiring == "parallel":
        return reservoir
    return reservoir.calibrated(HybridReservoir(members=reservoir.members).drive(inputs)[0])


def shot_floor(reservoir: Reservoir, rows: Tensor) -> float:
    """The least alpha that makes sense for sampled features (samples, columns); 0 for exact ones.

    A feature f of `shots` shots carries the variance (1 - f^2) / shots, and noise acts as a ridge of its share in the
    feature's variance: the median of these shares.
    """
    if isinstance(reservoir, SampledReservoir):
        blocks = [(range(reservoir.width), reservoir.shots)]
    elif isinstance(reservoir, HybridReservoir):
        pairs = zip(reservoir.blocks, reservoir.members, strict=False)
        blocks = [(block, member.shots) for block, member in pairs if isinstance(member, SampledReservoir)]
    else:
        blocks = []
    shares = []
    for block, shots in blocks:
        columns = rows[:, block.start : block.stop]
        shares.append((1 - columns.square().mean(0)) / shots / columns.var(0).clamp(min=1e-300))
    return float(torch.cat(shares).median()) if shares else 0.0
