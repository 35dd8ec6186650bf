"""From noise to molecules: the ancestral sampler of the paper, and DPM-Solver++ of second order in few steps.

A sampler is handed `denoise(state, time, previous) -> State`, which predicts G_0 from G_t, and knows no network. Both
keep coordinates about their mean, edges symmetric, and padding at 0, since noise and predictions are so.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from library.diffspectra.scaling import State
from library.diffspectra.schedule import NoiseSchedule

SamplerName = Literal["dpm-solver", "ancestral"]
Denoise = Callable[[State, Tensor, State | None], State]
Noise = Callable[[int], State]
Progress = Callable[[int, int], None]


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    start: State,
    noise: Noise,
    schedule: NoiseSchedule,
    *,
    steps: int,
    temperature: float = 1.0,
    released: bool = False,
    progress: Progress | None = None,
) -> State:
    """`steps` stochastic steps from G_T to the mean at time 0, which is the last prediction.

    G_s = (alpha_{t|s} sigma_s^2 / sigma_t^2) G_t + (alpha_s sigma^2_{t|s} / sigma_t^2) G_0^ + temperature sigma eps

    Parameters
    ----------
    denoise      predicts G_0; its last prediction is given to the next call
    start        G_T, standard normal
    noise        the noise of step k, counted from 0; not asked for at the last step
    temperature  factor of the noise, 1 in the paper
    released     take the factors of the released code (`NoiseSchedule.released_step`), those of the last step included
    progress     called with (steps done, steps)

    Raises InputError for less than 1 step. Source: Huang et al., 2023; Kingma et al., 2021 (the posterior).
    """
    state, previous = start, None
    times, ends = (t.to(start.nodes.device) for t in schedule.ancestral_times(steps))
    own, predicted, spread = (schedule.released_step if released else schedule.ancestral_step)(times, ends)
    for k in range(steps):
        previous = denoise(state, times[k], previous)
        last = k == steps - 1
        if last and not released:
            state = previous
        else:
            drawn = previous if last else noise(k)
            factor = 0.0 if last else temperature * spread[k]
            state = State(
                *(
                    (own[k] * x + predicted[k] * p + factor * e).to(x.dtype)
                    for x, p, e in zip(state, previous, drawn, strict=True)
                )
            )
        if progress is not None:
            progress(k + 1, steps)
    return state


@torch.no_grad()
def dpm_solver(
    denoise: Denoise,
    start: State,
    schedule: NoiseSchedule,
    *,
    steps: int,
    progress: Progress | None = None,
) -> State:
    """DPM-Solver++(2M): the probability-flow ODE of all streams in `steps` predictions, times even in lambda.

    With h = lambda_t - lambda_s, D_k the prediction at step k and r = h_{k-1} / h_k, from time s to time t:

        G_t = (sigma_t / sigma_s) G_s - alpha_t expm1(-h) [D_k + (D_k - D_{k-1}) / (2 r)]

    The first step, and the last before the final prediction, are of first order. Deterministic. `denoise` and
    `progress` as in `ancestral`; raises InputError for less than 1 step.
    Source: Lu et al., "DPM-Solver++", 2022, algorithm 2, for data prediction.
    """
    times = schedule.even_times(steps).to(start.nodes.device)
    level, alpha, sigma = schedule.half_log_snr(times), schedule.alpha(times), schedule.sigma(times)
    state, previous, last_h = start, None, None
    for k in range(steps):
        prediction = denoise(state, times[k], previous)
        if k == steps - 1:
            state = prediction
        else:
            h = level[k + 1] - level[k]
            slope = 0.0 if previous is None or k == steps - 2 else 0.5 * h / last_h
            before = previous or prediction
            state = State(
                *(
                    (sigma[k + 1] / sigma[k] * x - alpha[k + 1] * torch.expm1(-h) * (d + slope * (d - b))).to(x.dtype)
                    for x, d, b in zip(state, prediction, before, strict=True)
                )
            )
            last_h = h
        previous = prediction
        if progress is not None:
            progress(k + 1, steps)
    return state
