"""Samplers: golden numbers, closed forms of Gaussians, and symmetries."""

import pytest
import torch

from library.diffspectra.noise import draw_noise, key_generators
from library.diffspectra.samplers import ancestral, dpm_solver
from library.diffspectra.scaling import State, pair_mask
from library.diffspectra.schedule import noise_schedule
from tests.library.diffspectra_cases import golden, masks, random_state

COSINE = noise_schedule("cosine")


def gaussian(variance: float):
    """The exact denoiser of data N(0, variance)."""

    def denoise(state: State, time: torch.Tensor, previous: State | None) -> State:
        alpha, sigma = COSINE.alpha(time), COSINE.sigma(time)
        factor = alpha * variance / (alpha**2 * variance + sigma**2)
        return State(factor * state.nodes, factor * state.edges)

    return denoise


def test_ancestral_sampling_equals_the_released_one():
    arrays = golden("ancestral")

    def denoise(state: State, time: torch.Tensor, previous: State | None) -> State:
        x, e = (torch.zeros_like(part) for part in state) if previous is None else previous
        return State(0.6 * state.nodes + 0.3 * x, 0.5 * state.edges.tanh() + 0.2 * e)

    def noise(k: int) -> State:
        return State(arrays["noise"][k], arrays["edge_noise"][k])

    start, steps = State(arrays["z_T"], arrays["edge_z_T"]), int(arrays["steps"])
    told = {"steps": steps, "temperature": float(arrays["temperature"])}
    found = ancestral(denoise, start, noise, COSINE, released=True, **told)
    torch.testing.assert_close(found.nodes, arrays["x_0"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.edges, arrays["edge_x_0"], rtol=1e-5, atol=1e-5)
    exact = ancestral(denoise, start, noise, COSINE, **told)
    assert 1e-5 < (exact.nodes - found.nodes).abs().max() < 1e-3, "the released last step is a rounding error off"


def test_released_factors_are_those_of_the_golden_schedule():
    arrays = golden("schedule")
    own, predicted, spread = COSINE.released_step(arrays["anc_t"], arrays["anc_s"])
    torch.testing.assert_close(own, arrays["anc_coef_x"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(predicted, arrays["anc_coef_pred"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(spread, arrays["anc_noise_std"], rtol=1e-5, atol=1e-7)
    for name in ("linear", "discrete_poly"):
        schedule = noise_schedule(name)
        times, ends = schedule.ancestral_times(20)
        for ours, theirs in zip(schedule.ancestral_step(times, ends), schedule.released_step(times, ends), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-3)  # digits cancel there


def test_ancestral_sampling_of_a_gaussian_has_its_variance_as_steps_grow():
    variance, spread = 0.25, {}
    for steps in (20, 80, 320):
        generator = torch.Generator().manual_seed(0)

        def noise(_: int, generator: torch.Generator = generator) -> State:
            return State(torch.randn(1, 4000, 9, generator=generator), torch.zeros(1, 1, 1, 2))

        found = ancestral(gaussian(variance), noise(0), noise, COSINE, steps=steps)
        spread[steps] = float(found.nodes.var())
    assert abs(spread[20] - variance) > abs(spread[80] - variance) > abs(spread[320] - variance)
    assert spread[320] == pytest.approx(variance, rel=0.05)


def test_the_solver_follows_the_ode_of_a_gaussian_with_second_order():
    variance = 0.25
    start = State(torch.ones(1, 1, 9, dtype=torch.float64), torch.ones(1, 1, 1, 2, dtype=torch.float64))

    def spread(time: float) -> float:
        t = torch.tensor(time, dtype=torch.float64)
        return float((COSINE.alpha(t) ** 2 * variance + COSINE.sigma(t) ** 2).sqrt())

    # along the ODE x / sqrt(alpha^2 v + sigma^2) is constant; the prediction at the last time multiplies by its factor
    t = torch.tensor(1e-3, dtype=torch.float64)
    factor = float(COSINE.alpha(t)) * variance / spread(1e-3) ** 2
    exact = factor * spread(1e-3) / spread(COSINE.last_time)
    errors = [
        abs(float(dpm_solver(gaussian(variance), start, COSINE, steps=k).nodes[0, 0, 0]) - exact) for k in (20, 40, 80)
    ]
    assert errors[0] > 3.2 * errors[1] > 3.2 * 3.2 * errors[2]
    assert errors[2] < 1e-3 * exact


@pytest.mark.parametrize("sampler", ["ancestral", "dpm-solver"])
def test_states_stay_centred_symmetric_and_masked_at_every_step(sampler):
    mask = masks(2, 5)
    pulled = random_state(mask, 3)
    seen = []

    def denoise(state: State, time: torch.Tensor, previous: State | None) -> State:
        seen.append(state)
        return State(0.3 * state.nodes + pulled.nodes, 0.3 * state.edges.tanh() + pulled.edges)

    start = draw_noise(mask, key_generators([0, 1]))
    if sampler == "ancestral":
        ancestral(denoise, start, lambda k: draw_noise(mask, key_generators([2 * k, 2 * k + 1])), COSINE, steps=12)
    else:
        dpm_solver(denoise, start, COSINE, steps=12)
    assert len(seen) == 12
    for state in seen:
        assert state.positions.sum(1).abs().max() < 1e-4
        torch.testing.assert_close(state.edges, state.edges.transpose(1, 2))
        assert not state.nodes[~mask].any()
        assert not state.edges[~pair_mask(mask)].any()
