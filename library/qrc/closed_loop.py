"""Forecasts without further input: predictions drive the reservoir, and resampled errors give the intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError

if TYPE_CHECKING:
    from library.qrc.forecaster import Forecaster

KEPT_ROWS = 20_000
STRETCH = 24  # mean rows that errors are drawn in one piece, so that what hangs together in time does so in a path


@dataclass(frozen=True)
class Residuals:
    """Errors of a read-out on series after one another: `rows` (rows, outputs), `ends` (series,) where each ends."""

    rows: Tensor
    ends: Tensor

    @classmethod
    def of(cls, series: Sequence[Tensor]) -> Self:
        """The residuals of some series, the newest `KEPT_ROWS` of all, shared equally."""
        each = max(2, KEPT_ROWS // len(series))
        parts = [part[-each:] for part in series if len(part)]
        lengths = torch.tensor([len(part) for part in parts])
        return cls(torch.cat(parts).contiguous(), lengths.cumsum(0))

    def to(self, device: str) -> "Residuals":
        """The same on a torch device."""
        return Residuals(self.rows.to(device), self.ends.to(device))

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """Quantiles (shares, outputs) of all rows."""
        return torch.quantile(self.rows, torch.tensor(shares, dtype=self.rows.dtype, device=self.rows.device), 0)

    def paths(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Errors (count, length, outputs) by the stationary bootstrap: stretches of rows, of random start and length.

        Errors are centred, since the forecast's middle is the prediction itself. Source: Politis and Romano, Journal
        of the American Statistical Association 89, 1994.
        """
        total = len(self.rows)
        last = torch.zeros(total, dtype=torch.bool)
        last[self.ends.cpu() - 1] = True
        jump = torch.rand(length, count, generator=generator) < 1 / STRETCH
        drawn = torch.randint(total, (length, count), generator=generator)
        places = torch.empty(length, count, dtype=torch.int64)
        now = drawn[0]
        for step in range(length):
            now = torch.where(jump[step], drawn[step], now)
            places[step] = now
            now = torch.where(last[now], drawn[step], now + 1) % total
        return (self.rows - self.rows.mean(0))[places.T.to(self.rows.device)]


@dataclass(frozen=True)
class Forecast:
    """What comes next. Axes (horizon, outputs) of one series, with series in front for a batch.

    mean           without errors
    lower, upper   the interval's ends; None without paths
    paths          (paths, series, horizon, outputs) as a tensor; None without
    """

    mean: np.ndarray
    lower: np.ndarray | None
    upper: np.ndarray | None
    paths: Tensor | None


def run_closed(
    model: "Forecaster",
    state: Tensor,
    last: Tensor,
    horizon: int,
    *,
    future: Tensor | None,
    paths: int,
    level: float,
    seed: int,
    single: bool = False,
) -> Forecast:
    """Go on from a state (series, ...) and the read-out's last outputs (series, outputs), as `Forecaster.prime` gives.

    future  (series, horizon, channels) scaled inputs that are known; None feeds predictions back
    """
    series = len(state)
    copies = paths + 1  # the first is without errors
    errors = last.new_zeros(copies, series, horizon, last.shape[-1])
    if paths:
        generator = torch.Generator().manual_seed(seed)
        errors[1:] = model.residuals_.paths(paths, horizon, generator)[:, None]  # a series' do not depend on others
    errors = errors.flatten(0, 1)
    if future is not None:
        features, _ = model.reservoir_.drive(future, state)
        outputs = model.readout_(model.with_inputs(features, future))
        found = model.bounded(outputs).repeat(copies, 1, 1) + errors
    else:
        found = _loop(model, state.repeat(copies, 1), last.repeat(copies, 1), errors)
    shown = model.shown(found).unflatten(0, (copies, series))
    if not torch.isfinite(shown).all():
        raise InputError("the closed loop diverged; use a stronger alpha or a narrower clip")
    middle = _array(shown[0], single)
    if not paths:
        return Forecast(middle, None, None, None)
    shares = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=shown.dtype, device=shown.device)
    lower, upper = torch.quantile(shown[1:], shares, 0)
    return Forecast(middle, _array(lower, single), _array(upper, single), shown[1:])


def _loop(model: "Forecaster", state: Tensor, last: Tensor, errors: Tensor) -> Tensor:
    """Outputs (lanes, horizon, outputs) with errors (lanes, horizon, outputs) in what is fed back and what is shown."""
    targets, horizon = model.n_targets_, errors.shape[1]
    found = torch.empty_like(errors)
    if not targets:  # the outputs are the next inputs: the last row of the history predicts the first of the horizon
        found[:, 0] = last + errors[:, 0]
    given = (last[:, targets:] + errors[:, 0, targets:]).clamp(*model.clip)
    for step in range(horizon if targets else horizon - 1):
        features, state = model.reservoir_.drive(given[:, None], state)
        outputs = model.readout_(model.with_inputs(features, given[:, None]))[:, 0]
        place = step if targets else step + 1
        found[:, place] = model.bounded(outputs) + errors[:, place]
        given = found[:, place, targets:].clamp(*model.clip)
    return found if targets else found.clamp(*model.clip)


def _array(values: Tensor, single: bool) -> np.ndarray:
    found = values.cpu().numpy()
    return found[0] if single else found
