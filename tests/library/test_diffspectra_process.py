"""Schedules, scaling, alignment, loss and noise: golden numbers and what must hold exactly."""

import math

import pytest
import torch

from library.diffspectra.building import build
from library.diffspectra.data import Collate, load_molecules
from library.diffspectra.kabsch import aligned, rotations_onto
from library.diffspectra.loss import loss_weight, terms
from library.diffspectra.molecules import MoleculeBatch, batch_of
from library.diffspectra.noise import draw_noise, key_generators, random_rotations, stream
from library.diffspectra.process import Draws, diffuse, draw
from library.diffspectra.scaling import State, check_state, discretise, pair_mask, scale
from library.diffspectra.schedule import SCHEDULES, noise_schedule
from library.errors import InputError
from tests.library.diffspectra_cases import CLOSE, golden, masks, random_state

TIMES = torch.linspace(1e-4, 0.9946, 400, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_the_released_ones(name):
    arrays, schedule = golden("schedule"), noise_schedule(name)
    time = arrays[f"{name}_t"].double()
    level = arrays[f"{name}_noise_level"].double()
    tight = slice(1, None)  # at the first time the released sigma, 1 - alpha^2 in float32, has no digit left

    def same(found, wanted, tolerance=1e-5):
        torch.testing.assert_close(found[tight], arrays[f"{name}_{wanted}"].double()[tight], rtol=tolerance, atol=1e-5)

    same(schedule.alpha(time), "alpha")
    same(schedule.sigma(time), "sigma", 3e-5)
    same(schedule.half_log_snr(time), "lambda", 3e-5)
    same(schedule.noise_level(time), "noise_level", 3e-5)
    same(schedule.time_of(level / 2), "inverse_lambda_t")


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_preserve_variance_fall_and_invert(name):
    schedule = noise_schedule(name)
    torch.testing.assert_close(schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2, torch.ones_like(TIMES))
    assert (schedule.half_log_snr(TIMES).diff() < 0).all()
    torch.testing.assert_close(schedule.time_of(schedule.half_log_snr(TIMES)), TIMES, rtol=1e-9, atol=1e-9)
    if name != "discrete_poly":  # which is pulled 1e-4 off 1
        assert float(schedule.alpha(torch.zeros(1, dtype=torch.float64))) == 1
    assert torch.isfinite(schedule.noise_level(torch.ones(1))).all()
    for to in (0.3, 0.0):
        time, end = torch.tensor(0.5, dtype=torch.float64), torch.tensor(to, dtype=torch.float64)
        own, predicted, spread = schedule.ancestral_step(time, end)
        alpha, sigma = schedule.alpha(end), schedule.sigma(end)
        torch.testing.assert_close(own * schedule.alpha(time) + predicted, alpha)
        torch.testing.assert_close(own**2 * schedule.sigma(time) ** 2 + spread**2, sigma**2, rtol=1e-9, atol=1e-12)


def test_small_noise_is_exact_in_single_precision():
    time = torch.tensor([1e-5, 1e-4, 1e-3])
    schedule = noise_schedule("cosine")
    torch.testing.assert_close(schedule.sigma(time), schedule.sigma(time.double()).float(), rtol=1e-6, atol=0)


def test_ancestral_factors_equal_the_released_ones():
    arrays, schedule = golden("schedule"), noise_schedule("cosine")
    times, ends = schedule.ancestral_times(len(arrays["anc_t"]))
    torch.testing.assert_close(times, arrays["anc_t"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ends, arrays["anc_s"].double(), rtol=0, atol=1e-6)
    inner = slice(None, -1)  # at the last step, to 0, the exact factors are 0, 1, 0; released: 1e-3 off, by rounding
    found = schedule.ancestral_step(times, ends)
    for factor, name in zip(found, ("coef_x", "coef_pred", "noise_std"), strict=True):
        torch.testing.assert_close(factor[inner], arrays[f"anc_{name}"].double()[inner], rtol=0, atol=2e-5)
    assert [float(factor[-1]) for factor in found] == pytest.approx([0, 1, 0], abs=1e-12)


def test_unknown_schedules_and_no_steps_are_refused():
    with pytest.raises(InputError, match="cosine, linear, discrete_poly"):
        noise_schedule("sine")
    with pytest.raises(InputError, match="at least 1 step"):
        noise_schedule("cosine").even_times(0)


def loss_case() -> tuple[MoleculeBatch, dict[str, torch.Tensor]]:
    arrays = golden("loss")
    mask = arrays["node_mask"][..., 0] > 0
    charges, bonds = arrays["formal_charges"][..., 0].long(), arrays["bond_order"].long()
    numbers = torch.arange(len(mask))
    return MoleculeBatch(arrays["positions"], arrays["atom_types"], charges, bonds, mask, {}, numbers, numbers), arrays


def test_the_loss_and_all_its_parts_equal_the_released_ones():
    batch, arrays = loss_case()
    schedule, time = noise_schedule("cosine"), arrays["t"]
    clean = scale(batch)
    torch.testing.assert_close(clean.nodes, arrays["scaled_x"], **CLOSE)
    assert torch.equal(clean.edges, arrays["scaled_edge"])
    noisy = diffuse(clean, State(arrays["noise"], arrays["edge_noise"]), time, schedule)
    rotations = rotations_onto(noisy.positions, clean.positions)
    torch.testing.assert_close(rotations, arrays["kabsch_rotation"].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(aligned(noisy.positions, clean.positions), arrays["aligned_pos"], **CLOSE)
    parts = terms(State(arrays["pred"], arrays["edge_pred"]), clean, noisy.positions)
    for part, name in zip(parts, ("loss_pos", "loss_atom", "loss_edge"), strict=True):
        torch.testing.assert_close(part, arrays[name], rtol=1e-5, atol=1e-5)
    weight = loss_weight(schedule.alpha(time), schedule.sigma(time))
    torch.testing.assert_close(parts.total(weight, (1.0, 0.25, 0.1)).mean(), arrays["loss"], rtol=1e-5, atol=1e-5)


def test_a_perfect_prediction_loses_nothing_and_rotations_change_no_loss():
    batch, arrays = loss_case()
    clean, noise = scale(batch), State(arrays["noise"], arrays["edge_noise"])
    noisy = diffuse(clean, noise, arrays["t"], noise_schedule("cosine"))
    target = torch.cat([aligned(noisy.positions, clean.positions), clean.features], -1)
    assert all(not part.any() for part in terms(State(target, clean.edges), clean, noisy.positions))
    predicted = random_state(batch.node_mask, 5)
    rotation = random_rotations(key_generators([3]))[0]
    turned = State(torch.cat([clean.positions @ rotation.T, clean.features], -1), clean.edges)
    for a, b in zip(*(terms(predicted, one, noisy.positions) for one in (clean, turned)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rotations_are_proper_and_best_whatever_the_rank():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(4, 6, 3, generator=generator)
    line = torch.zeros(4, 6, 3)
    line[..., 0] = torch.arange(6) - 2.5
    single = torch.zeros(4, 6, 3)
    for source in (full, full * torch.tensor([1.0, 1.0, 0.0]), line, single):
        for target in (full, line, single, -source):
            rotation = rotations_onto(target, source)
            eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
            torch.testing.assert_close(rotation @ rotation.transpose(1, 2), eye)
            torch.testing.assert_close(torch.det(rotation), torch.ones(4, dtype=torch.float64))
            distance = (aligned(target, source) - target).square().sum((1, 2))
            assert (distance <= (source - target).square().sum((1, 2)) + 1e-4).all()
            for k in range(5):
                other = random_rotations(key_generators([k]))[0]
                assert (distance <= (source @ other.T - target).square().sum((1, 2)) + 1e-4).all()


def test_continuous_outputs_mean_the_released_molecules():
    arrays = golden("postprocess")
    mask = arrays["node_mask"][..., 0] > 0
    for i, found in enumerate(discretise(State(arrays["x"], arrays["edge"]), mask)):
        n = len(found)
        assert torch.equal(found.types, arrays["atom_type"][i, :n])
        assert torch.equal(found.charges, arrays["formal_charge"][i, :n, 0].long())
        assert torch.equal(found.bonds, arrays["bond_order"][i, :n, :n].long())
        assert torch.equal(found.positions, arrays["pos"][i, :n])


def test_every_molecule_of_the_sample_survives_scaling_and_building():
    data = load_molecules()
    for start in range(0, len(data), 100):
        known = [data.atoms.structure(i) for i in range(start, min(start + 100, len(data)))]
        batch = batch_of(known, {})
        state = scale(batch)
        check_state(state, batch.node_mask)
        for one, found in zip(known, discretise(state, batch.node_mask), strict=True):
            assert torch.equal(one.types, found.types)
            assert torch.equal(one.bonds, found.bonds)
            assert torch.equal(one.charges, found.charges)
            torch.testing.assert_close(found.positions, one.positions - one.positions.mean(0), rtol=0, atol=1e-5)
    for i in range(0, len(data), 40):
        one = data.atoms.structure(i)
        [found] = discretise(scale(batch_of([one], {})), torch.ones(1, len(one), dtype=torch.bool))
        assert build(found).smiles == build(one).smiles


def test_moving_a_molecule_changes_nothing_of_what_the_network_sees():
    structure = load_molecules().atoms.structure(7)
    batch = batch_of([structure], {})
    moved = batch._replace(positions=batch.positions + torch.tensor([3.0, -1.0, 2.0]))
    torch.testing.assert_close(scale(moved).nodes, scale(batch).nodes, rtol=0, atol=1e-5)


def test_states_that_do_not_fit_are_refused():
    mask = masks(3, 4)
    state = random_state(mask)
    with pytest.raises(InputError, match="need nodes"):
        check_state(State(state.nodes[:, :3], state.edges), mask)
    with pytest.raises(InputError, match="about the mean"):
        check_state(State(state.nodes + 1, state.edges), mask)


def test_noise_is_symmetric_centred_standard_and_the_molecules_own():
    mask = masks(3, 29, 29)
    noise = draw_noise(mask, key_generators([5, 6, 7]))
    assert torch.equal(noise.edges, noise.edges.transpose(1, 2))
    assert not noise.edges[~pair_mask(mask)].any()
    assert not noise.nodes[~mask].any()
    assert noise.positions.sum(1).abs().max() < 1e-5
    alone = draw_noise(masks(3), key_generators([5]))
    assert torch.equal(noise.nodes[0, :3], alone.nodes[0])
    assert torch.equal(noise.edges[0, :3, :3], alone.edges[0])
    many = draw_noise(masks(*[20] * 400), key_generators(range(400)))
    assert float(many.features.var()) == pytest.approx(1, abs=0.02)
    assert float(many.positions.var()) == pytest.approx(19 / 20, abs=0.03)
    lower = torch.tril_indices(20, 20, -1)
    assert float(many.edges[:, lower[0], lower[1]].var()) == pytest.approx(1, abs=0.02)


def test_random_rotations_are_proper_and_uniform():
    rotations = random_rotations(key_generators(range(4000)))
    torch.testing.assert_close(torch.det(rotations), torch.ones(4000))
    assert rotations.mean(0).abs().max() < 0.04
    assert (rotations.square().mean(0) - 1 / 3).abs().max() < 0.02


def test_keys_of_different_places_differ():
    keys = {stream(seed, a, b) for seed in range(4) for a in range(30) for b in range(30)}
    assert len(keys) == 3600
    assert max(keys) < 2**63


def test_what_is_drawn_for_a_molecule_depends_on_its_key_alone():
    data = load_molecules()
    samples = [data.part("train")[i] for i in range(6)]
    draws, keys = Draws(0.5, 0.3, 0.6, rotate=True), torch.arange(6) + 2**60
    whole = draw(Collate()(samples, keys), draws)
    part = draw(Collate()(samples[2:4], keys[2:4]), draws)
    size = part.clean.nodes.shape[1]
    for a, b in zip((whole.clean, whole.noise), (part.clean, part.noise), strict=True):
        cut = a.at(slice(2, 4), size)
        torch.testing.assert_close(cut.nodes, b.nodes, rtol=0, atol=1e-6)
        assert torch.equal(cut.edges, b.edges)
    for name in ("times", "present", "self_conditioned", "unconditioned"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(part, name))


def test_draws_have_their_probabilities_and_one_spectrum_stays():
    structure = load_molecules().atoms.structure(0)
    batch = batch_of([structure] * 2000, {name: torch.zeros(2000, 1) for name in ("uv", "ir", "raman")})
    found = draw(batch, Draws(0.5, 0.25, 0.8, rotate=False))
    assert float(found.self_conditioned.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(found.unconditioned.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert found.present.any(1).all()
    assert float(found.present.float().mean()) == pytest.approx(0.2 + 0.8**3 / 3, abs=0.03)
    assert float(found.times.min()) > 1e-5
    assert float(found.times.mean()) == pytest.approx(0.5, abs=0.02)
    assert math.isclose(float(found.times.max()), 1, abs_tol=0.01)
    assert draw(batch, Draws(0.5, 0.25, 0.0, rotate=False)).present.all()
