"""Echo state networks against reservoirpy's numbers and reservoirpy itself; onions' annuli; hybrids."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from library.errors import InputError
from library.qrc.esn import THIRDS, EchoState, drive_echo_states, run
from library.qrc.hybrid import HybridReservoir
from library.qrc.readout import ridge_path
from library.qrc.reservoir import QuantumReservoir

GOLDEN = Path(__file__).parents[1] / "golden" / "qrc" / "esn.npz"
ONION = HybridReservoir(
    members=tuple(QuantumReservoir(qubits=3, sigma=sigma) for sigma in (0.1, 0.3, 1.0)), layer=EchoState(units=5)
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_states_and_ridge_are_those_of_reservoirpy():
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN).items()}
    drive = golden["inputs"] @ golden["Win"].T + golden["bias"]
    start = torch.zeros(1, 1, len(golden["W"]), dtype=torch.float64)
    states = run(drive[:, None, None], golden["W"][None], golden["leak"][None], start)[:, 0, 0]
    assert torch.allclose(states, golden["states"], rtol=0, atol=1e-12)
    washout = int(golden["washout"])
    rows, targets = states[washout:], golden["targets"][washout:]
    path = ridge_path(rows, targets, [float(golden["ridge"]) / len(rows)], standardize=False)
    for name in ("prediction", "prediction_intercept_unpenalised"):
        assert torch.allclose(path.predictions(states)[0], golden[name], rtol=0, atol=1e-10)


def test_a_drawn_network_is_reservoirpys_with_the_same_weights():
    from reservoirpy.nodes import Reservoir

    network = EchoState(units=12, leak=0.4, seed=3)
    inputs = rand(1, 80, 2)
    weights, entry, bias = (part.numpy() for part in network.weights(2))
    peer = Reservoir(W=weights, Win=entry, bias=bias, lr=0.4)
    assert np.abs(peer.run(inputs[0].numpy()) - network.drive(inputs)[0][0].numpy()).max() < 1e-12


def test_batches_pieces_and_seeds():
    networks = [EchoState(units=6), EchoState(units=9, leak=1.0, seed=1), EchoState(units=6, spectral_radius=0.5)]
    inputs = rand(3, 40, 2)
    together, last = drive_echo_states(networks, inputs)
    for network, features, end in zip(networks, together, last, strict=True):
        alone, _ = network.drive(inputs)
        assert torch.allclose(features, alone, rtol=0, atol=1e-14)
        first, state = network.drive(inputs[:, :15])
        rest, state = network.drive(inputs[:, 15:], state)
        assert torch.allclose(torch.cat([first, rest], 1), alone, rtol=0, atol=1e-14)
        assert torch.allclose(state, end, rtol=0, atol=1e-14)
    assert torch.equal(EchoState(seed=4).weights(3)[0], EchoState(seed=4).weights(3)[0])
    assert not torch.equal(EchoState(seed=4).weights(3)[0], EchoState(seed=5).weights(3)[0])


def test_spectra_are_as_asked_for():
    assert torch.linalg.eigvals(EchoState(units=20, spectral_radius=0.7).weights(1)[0]).abs().max() == pytest.approx(
        0.7
    )
    sparse = EchoState(units=100, density=0.1, spectral_radius=1.2).weights(1)[0]
    assert (sparse != 0).double().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.linalg.eigvals(sparse).abs().max() == pytest.approx(1.2)
    onion = EchoState(units=31, spectral_radius=0.99, annuli=THIRDS).weights(1)[0]
    for (low, high), (begin, end) in zip(THIRDS, itertools.pairwise((0, 11, 21, 31)), strict=True):
        moduli = torch.linalg.eigvals(onion[begin:end, begin:end]).abs() / 0.99
        assert float(moduli.min()) >= low - 1e-9
        assert float(moduli.max()) == pytest.approx(high)
        assert not onion[begin:end, end:].any()


def test_two_starts_converge_where_the_radius_is_small():
    network = EchoState(units=15, spectral_radius=0.8)
    inputs = rand(1, 400, 1)
    assert (network.drive(inputs)[1] - network.drive(inputs, rand(1, 15))[1]).abs().max() < 1e-10


def test_a_hybrid_is_its_parts_side_by_side():
    inputs = rand(2, 30, 2)
    features, state = ONION.drive(inputs)
    parts = [part.drive(inputs)[0] for part in (*ONION.members, ONION.layer)]
    assert torch.allclose(features, torch.cat(parts, -1), rtol=0, atol=1e-12)
    assert features.shape[-1] == ONION.width == 3 * 6 + 5
    assert [list(block) for block in ONION.blocks][-1] == list(range(18, 23))
    first, middle = ONION.drive(inputs[:, :11])
    rest, end = ONION.drive(inputs[:, 11:], middle)
    assert torch.allclose(torch.cat([first, rest], 1), features, rtol=0, atol=1e-12)
    assert torch.allclose(end, state, rtol=0, atol=1e-12)
    assert ONION.start(2).shape == state.shape
    assert HybridReservoir.model_validate_json(ONION.model_dump_json()) == ONION


def test_a_stacked_layer_sees_standardised_features():
    inputs = rand(1, 60, 2)
    stacked = ONION.model_copy(update={"wiring": "stacked"})
    with pytest.raises(InputError, match="not calibrated"):
        stacked.drive(inputs)
    first = HybridReservoir(members=ONION.members).drive(inputs)[0]
    features = stacked.calibrated(first).drive(inputs)[0]
    scaled = (first - first.mean((0, 1))) / first.std((0, 1), correction=0)
    assert torch.allclose(features[..., 18:], ONION.layer.drive(scaled)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {"units": 0},
        {"leak": 0.0},
        {"spectral_radius": np.inf},
        {"input_scale": np.inf},
        {"annuli": ((0.5, 0.2),)},
        {"units": 2, "annuli": THIRDS},
        {"density": 0.5, "annuli": THIRDS},
        {"unknown": 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValidationError):
        EchoState(**changes)


def test_inputs_and_states_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"needed is float64 \(series, time, channels\)"):
        EchoState().drive(torch.zeros(3, 2))
    with pytest.raises(InputError, match="not finite"):
        EchoState().drive(torch.full((1, 3, 1), torch.nan, dtype=torch.float64))
    network, inputs = EchoState(units=3), rand(1, 4, 1)
    for state in (rand(5, 3), rand(1, 4), rand(3)):
        with pytest.raises(InputError, match=r"this reservoir and input take \(1, 3\)"):
            network.drive(inputs, state)
    with pytest.raises(InputError, match="the state holds numbers that are not finite"):
        network.drive(inputs, rand(1, 3) * torch.nan)
    with pytest.raises(InputError, match="1 states for 2 reservoirs"):
        drive_echo_states([network, network], inputs, [rand(1, 3)])
    with pytest.raises(InputError, match="inputs are a ndarray"):
        network.drive(inputs.numpy())
    with pytest.raises(InputError, match="the state has shape"):
        ONION.drive(rand(1, 3, 1), rand(1, 3))
    with pytest.raises(ValidationError, match="no layer to stack"):
        HybridReservoir(members=ONION.members, wiring="stacked")
    with pytest.raises(ValidationError, match="for each of 18 features"):
        HybridReservoir(members=ONION.members, centre=(1.0,), spread=(1.0,))
