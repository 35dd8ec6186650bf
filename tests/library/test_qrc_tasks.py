"""Benchmark series are what their equations say; memory capacity against exact registers and golden numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import InputError
from library.qrc import tasks
from library.qrc.esn import run
from library.qrc.scores import coverage, paired_gain, scores
from library.qrc.tasks import memory_capacity

GOLDEN = Path(__file__).parents[1] / "golden" / "qrc" / "memory_capacity.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN).items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    large = expected > 0.01
    return bool((found - expected)[large].abs().max() < 1e-6 and (found - expected).abs().max() < 1e-3)


def test_a_register_of_eight_holds_eight_inputs(golden):
    signal = golden["signal"]
    register = torch.stack([torch.cat([signal.new_zeros(k), signal[: len(signal) - k]]) for k in range(8)], 1)
    found = memory_capacity(register, signal, delays=21)
    assert torch.allclose(found.recalled[:8], torch.ones(8, dtype=torch.float64), atol=1e-6)
    assert found.recalled[8:].max() < 10 * found.noise_floor
    assert close(found.recalled, golden["register_states_r2"])
    assert found.mean_delay == pytest.approx(3.5, abs=0.05)


def test_an_echo_state_networks_memory_is_the_golden_one(golden):
    signal = golden["signal"]
    drive = (golden["esn_win"] * (2 * signal[:, None] - 1))[:, None, None]
    start = torch.zeros(1, 1, 20, dtype=torch.float64)
    states = run(drive, golden["esn_W"][None], torch.ones(1, dtype=torch.float64), start)[:, 0, 0]
    found = memory_capacity(states, signal, delays=21)
    assert close(found.recalled, golden["esn_r2"])
    assert found.total <= 20 + 21 * 5 * found.noise_floor


def test_narma_obeys_its_equation_and_diverging_series_are_drawn_again(monkeypatch):
    u, y = tasks.narma10(300, series=3, seed=1)
    y = torch.cat([torch.zeros(3, 1, dtype=torch.float64), y], 1)
    for t in (9, 50, 299):
        expected = 0.3 * y[:, t] + 0.05 * y[:, t] * y[:, t - 9 : t + 1].sum(1) + 1.5 * u[:, t - 9] * u[:, t] + 0.1
        assert torch.allclose(y[:, t + 1], expected, rtol=1e-13)
    draws = []
    signal = tasks.uniform_signal

    def larger_at_first(length, **options):
        draws.append(options["seed"])
        return signal(length, **options) * (1.6 if len(draws) == 1 else 1.0)

    monkeypatch.setattr(tasks, "uniform_signal", larger_at_first)
    _, y = tasks.narma10(300, series=2)
    assert len(draws) > 1
    assert float(y.max()) <= 1
    assert torch.equal(tasks.narma10(50, seed=3)[0], tasks.narma10(50, seed=3)[0])


def test_mackey_glass_obeys_its_equation():
    """The derivative from samples of a fine step is what the delay equation gives."""
    fine = tasks.mackey_glass(60, series=2, step=0.05)
    assert torch.allclose(fine, tasks.mackey_glass(60, series=2, step=0.1), atol=2e-2)
    x = tasks.mackey_glass(400, series=1)[0]
    slope = (x[20:] - x[18:-2]) / 2
    delayed = x[2:-18]
    expected = 0.2 * delayed / (1 + delayed**10) - 0.1 * x[19:-1]
    assert (slope - expected).abs().mean() < 0.02 * expected.abs().mean() + 2e-3
    assert 0.2 < float(x.min()) < float(x.max()) < 1.5


def test_the_laser_stand_in_is_eight_bit_and_chaotic():
    x = tasks.lorenz_intensity(600, series=2)
    assert torch.equal(x, x.round())
    assert float(x.min()) >= 0
    assert x.amax(1).tolist() == [255, 255]
    assert (x[0] - x[1]).abs()[300:].mean() > 20


def test_the_multi_scale_target_is_the_sum_of_its_averages():
    s, y = tasks.multi_scale(4000, taus=(3.0,))
    decay = np.exp(-1 / 3)
    kernel = (1 - decay) * decay ** np.arange(200)
    average = np.convolve(s[0].numpy(), kernel)[:4000]
    correlation = np.corrcoef(average[200:], y[0, 200:].numpy())[0, 1]
    assert correlation == pytest.approx(1, abs=1e-12)
    assert float(tasks.multi_scale(500, product=True)[1].std()) > 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.narma10(5), "at least 11"),
        (lambda: tasks.mackey_glass(10, step=0.3), "must divide"),
        (lambda: tasks.lorenz_intensity(1), "at least 2"),
        (lambda: tasks.multi_scale(10, taus=()), "one or more"),
        (lambda: memory_capacity(torch.zeros(50, 2), torch.zeros(50)), "too few"),
        (lambda: memory_capacity(torch.zeros(50, 2), torch.zeros(51)), "as many steps"),
        (lambda: memory_capacity(torch.zeros(900, 2), torch.zeros(900), delays=0), "0 delays, washout 200: at least 1"),
        (lambda: tasks.nrmse(torch.ones(3), torch.ones(3)), "constant"),
        (lambda: tasks.nrmse(torch.zeros(3, 1), torch.arange(3.0)), r"predictions \(3, 1\) and target \(3,\)"),
        (lambda: scores(torch.ones(2, 1), torch.ones(2, 1)), "constant.*more series"),
        (lambda: scores(torch.zeros(3, 1), torch.arange(3.0)), "both need the same shape"),
        (lambda: scores(torch.tensor([torch.nan, 1.0]), torch.arange(2.0)), "predictions: 1 values are not finite"),
        (lambda: scores(torch.arange(2.0), torch.tensor([torch.inf, 1.0])), "target: 1 values are not finite"),
        (lambda: scores(torch.zeros(0), torch.zeros(0)), "not empty"),
        (lambda: coverage(torch.zeros(3, 1), torch.ones(3), torch.arange(3.0)), r"lower ends \(3, 1\)"),
        (lambda: coverage(torch.zeros(3), torch.ones(1), torch.arange(3.0)), r"upper ends \(1,\)"),
        (lambda: paired_gain(torch.ones(1, 9), torch.ones(1, 9), block=0), "blocks of 0 steps; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_made_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
