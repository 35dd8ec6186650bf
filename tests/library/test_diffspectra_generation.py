"""Candidates depend on their query alone, formulas hold, and what cannot be answered is refused."""

from dataclasses import replace

import pytest
import torch

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.data import load_molecules
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.formulas import Formulas, parse_formula
from library.diffspectra.generation import Elucidator
from library.diffspectra.lines import grid
from library.diffspectra.loss import loss_weight, terms
from library.diffspectra.measured import EV_NM, Recording
from library.diffspectra.molecules import batch_of
from library.diffspectra.noise import draw_noise, key_generators
from library.diffspectra.process import diffuse
from library.diffspectra.queries import Query
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling, draw_counts, draw_samples
from library.diffspectra.scaling import State, scale
from library.diffspectra.scoring import TIMES, denoising_penalties
from library.diffspectra.specformer import SpecFormerSettings
from library.errors import InputError
from tests.library.diffspectra_cases import PATCHES

DENOISER = DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=16)
SETTINGS = {"width": 8, "heads": 2, "layers": 1, "features": 8}
ENCODER = SpecFormerSettings(modalities=("ir",), **PATCHES, **SETTINGS)
FEW = Sampling(samples=3, steps=4, seed=9)


def elucidator_of(recipe: DiffSpectraRecipe) -> Elucidator:
    torch.manual_seed(0)
    return Elucidator(recipe.network(), recipe, {"uv": 1.0, "ir": 300.0, "raman": 500.0})


@pytest.fixture(scope="module")
def elucidator() -> Elucidator:
    return elucidator_of(DiffSpectraRecipe(encoder=ENCODER, denoiser=DENOISER))


def asked(*sizes: int | None, seed: int = 1) -> list[Query]:
    spectra = 10 * torch.rand(len(sizes), 3501, generator=torch.Generator().manual_seed(seed))
    return [Query({"ir": one}, size, key=key) for key, (one, size) in enumerate(zip(spectra, sizes, strict=True))]


def same(a, b) -> bool:
    return (
        torch.equal(a.types, b.types)
        and torch.equal(a.bonds, b.bonds)
        and torch.allclose(a.positions, b.positions, rtol=0, atol=1e-4)
    )


@pytest.mark.parametrize("sampler", ["ancestral", "dpm-solver"])
def test_candidates_depend_on_their_query_and_the_seed_alone(elucidator, sampler):
    sampling = FEW.model_copy(update={"sampler": sampler})
    queries = asked(4, 7, 4)
    found = elucidator.find(queries, sampling)
    assert [[len(sample) for sample in one.samples] for one in found] == [[4] * 3, [7] * 3, [4] * 3]
    split = elucidator.find(queries, sampling.model_copy(update={"at_once": 2}))
    fewer = elucidator.find(queries[1:], sampling.model_copy(update={"samples": 2}))
    for one, again in zip(found, split, strict=True):
        assert all(same(a, b) for a, b in zip(one.samples, again.samples, strict=True))
    assert all(same(found[i + 1].samples[k], fewer[i].samples[k]) for i in range(2) for k in range(2))
    assert not same(found[0].samples[0], found[0].samples[1])
    [other] = elucidator.find([replace(queries[0], key=5)], sampling)
    assert not same(found[0].samples[0], other.samples[0])


def test_guidance_of_one_is_plain_and_of_zero_ignores_the_spectrum(elucidator):
    def samples(guidance, seed=1):
        return [one.samples[0] for one in elucidator.find(asked(5, 5, seed=seed), Sampling(steps=4, guidance=guidance))]

    assert all(map(same, samples(1.0), samples(1 + 1e-7)))
    assert all(map(same, samples(0.0), samples(0.0, seed=2)))


@pytest.mark.parametrize("sampler", ["ancestral", "dpm-solver"])
def test_every_sample_has_the_formula_that_is_given(elucidator, sampler):
    formula = parse_formula("C2H6O")
    free, fixed, other = asked(9, None, None)
    queries = [free, replace(fixed, formula=formula), replace(other, formula={"F": 2, "H": 0})]
    sampling = FEW.model_copy(update={"sampler": sampler})
    found = elucidator.find(queries, sampling)
    assert [one.formula() for one in found[1].samples] == [{"H": 6, "C": 2, "O": 1}] * 3
    assert [one.formula() for one in found[2].samples] == [{"F": 2}] * 3
    [alone] = elucidator.find([free], sampling)
    assert all(map(same, alone.samples, found[0].samples)), "others' formulas do not matter"


def test_elements_are_those_closest_to_the_prediction_with_the_counts_of_the_formula():
    mask = torch.tensor([[True] * 3 + [False], [True] * 4])
    nodes = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    sure = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    chance = torch.tensor([[0.2, 0.7, 0.1, 0, 0], [0.6, 0.1, 0.3, 0, 0], [0.5, 0.2, 0.3, 0, 0]])
    formulas = Formulas([{"H": 1, "C": 1, "N": 1}, None], mask)

    def told(p):
        nodes[0, :3, 3:8] = (2 * p - 1) / 4
        return State(nodes.clone(), torch.zeros(2, 4, 4, 2))

    def read(state):
        return (4 * state.nodes[0, :3, 3:8] + 1) / 2

    state = told(chance)
    found = formulas.expected(state)
    p = read(found)[:, :3]
    torch.testing.assert_close(p.sum(0), torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(p.sum(1), torch.ones(3), rtol=0, atol=1e-5)
    ratio = p / chance[:, :3]  # u_i v_c: every minor of two rows and columns vanishes
    torch.testing.assert_close(ratio[0, 0] * ratio[1, 1], ratio[0, 1] * ratio[1, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ratio[1, 1] * ratio[2, 2], ratio[1, 2] * ratio[2, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(read(formulas.expected(told(sure))), sure.float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(read(formulas.expected(told(0.2 * torch.ones(3, 5))))[:, :3], torch.full((3, 3), 1 / 3))
    chosen = formulas.chosen(state)
    assert read(chosen).argmax(1).tolist() == [1, 0, 2], "the assignment of the greatest product"
    for one in (found, chosen):
        rest = [0, 1, 2, 8]
        assert torch.equal(one.nodes[1], state.nodes[1])
        assert torch.equal(one.nodes[0][:, rest], state.nodes[0][:, rest])
        assert not one.nodes[0, 3].any()


def test_sizes_are_drawn_from_what_the_network_says(elucidator):
    logits = torch.full((2, 29), -30.0)
    logits[0, 4] = logits[1, 9] = 0.0
    assert draw_counts(logits, 3, 0, [0, 1]).tolist() == [[5] * 3, [10] * 3]
    even = draw_counts(torch.zeros(1, 29), 5000, 0, [0])
    assert int(even.min()) == 1
    assert int(even.max()) == 29
    assert float(even.float().mean()) == pytest.approx(15, abs=0.5)
    known, unknown = asked(6, None)
    a, b = elucidator.find([known, unknown], FEW)
    with torch.no_grad():
        logits = elucidator.network.encode({"ir": torch.log10(1 + unknown.spectra["ir"])[None]})[1]
    assert [len(one) for one in b.samples] == draw_counts(logits, 3, 9, [1])[0].tolist()
    assert [len(one) for one in a.samples] == [6] * 3
    chances = logits.softmax(-1)[0]
    assert b.atom_counts == pytest.approx({i + 1: float(c) for i, c in enumerate(chances) if c >= 0.005}, rel=1e-5)


def test_progress_is_told_after_every_pass_and_can_stop_the_work(elucidator):
    told = []
    sampling = Sampling(samples=2, steps=3, at_once=2)
    elucidator.find(asked(3, 4), sampling, progress=lambda *one: told.append(one))
    assert told == [(k, 6) for k in range(1, 7)]

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise TimeoutError("nobody waits")

    with pytest.raises(TimeoutError, match="nobody waits"):
        elucidator.find(asked(3, 4), sampling, progress=stop)


def test_penalties_are_the_losses_at_three_times(elucidator):
    data = load_molecules()
    structures = [data.atoms.structure(i) for i in (3, 40)]
    condition = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    told = {"keys": [5, 6], "factors": (1.0, 0.25, 0.1)}
    found = denoising_penalties(elucidator.network, condition, structures, elucidator.schedule, **told)
    for row, structure in enumerate(structures):
        batch, total, generators = batch_of([structure], {}), 0.0, key_generators([5 + row])
        for time in TIMES:
            t = torch.tensor([time], dtype=torch.float64)
            alpha, sigma = elucidator.schedule.alpha(t), elucidator.schedule.sigma(t)
            noisy = diffuse(scale(batch), draw_noise(batch.node_mask, generators), t, elucidator.schedule)
            level = torch.log(alpha**2 / sigma**2).float()
            with torch.no_grad():
                out = elucidator.network.denoiser(noisy, level, condition[row : row + 1], batch.node_mask)
            parts = terms(out, scale(batch), noisy.positions)
            total += float((parts.position + 0.25 * parts.atom + 0.1 * parts.bond) * loss_weight(alpha, sigma))
        assert float(found[row]) == pytest.approx(total / 3 / len(structure), rel=1e-4)


def test_recordings_in_other_units_ask_the_same():
    recipe = DiffSpectraRecipe(
        encoder=SpecFormerSettings(**PATCHES, **SETTINGS), denoiser=DENOISER, modality_dropout=0.2
    )
    elucidator = elucidator_of(recipe)
    data = load_molecules()
    [query] = elucidator.queries(data, [700])
    assert query.size == int(data.sizes[700])
    ir, uv = query.spectra["ir"], query.spectra["uv"]
    percent = 100 * 10 ** (-0.4 * ir / ir.max())
    recordings = {
        "uv": Recording(x=(EV_NM / grid("uv").double()).tolist(), y=uv.tolist(), axis="nm", absolute=True),
        "ir": Recording(x=grid("ir").tolist(), y=percent.tolist(), values="percent transmittance"),
    }
    found = elucidator.query(recordings, formula={"C": 2, "H": 4})
    torch.testing.assert_close(found.spectra["uv"], uv, rtol=1e-3, atol=1e-5)
    assert float(found.spectra["ir"].sum()) == pytest.approx(300, rel=1e-4)
    torch.testing.assert_close(found.spectra["ir"], ir * (300 / ir.sum()), rtol=2e-3, atol=1e-4)
    assert found.size == 6
    [answer] = elucidator.find([found], Sampling(samples=1, steps=2))
    assert answer.modalities == ("uv", "ir")


def test_formulas_are_read():
    assert parse_formula("C6H5NO2") == {"H": 5, "C": 6, "N": 1, "O": 2}
    for text, message in (("C2Si", "Si is none of H, C, N, O, F"), ("c2h6", "is no formula"), ("", "is no formula")):
        with pytest.raises(InputError, match=message):
            parse_formula(text)


def test_what_cannot_be_answered_is_refused(elucidator):
    plain = elucidator_of(
        DiffSpectraRecipe(encoder=ENCODER, denoiser=DENOISER, condition_dropout=0.0, count_weight=0.0)
    )
    [sized], [free] = asked(3), asked(None)
    uv = torch.ones(701)
    for answers, query, sampling, message in (
        (plain, free, FEW, "not learned to tell their number"),
        (plain, sized, Sampling(guidance=2.0), "recipe.condition_dropout"),
        (elucidator, Query({"uv": uv}, 3), FEW, "the model reads ir, but uv alone is given"),
        (elucidator, Query({"ir": -torch.ones(3501)}, 3), FEW, "negative intensity"),
    ):
        with pytest.raises(InputError, match=message):
            answers.find([query], sampling)
    with pytest.raises(InputError, match="there are no queries"):
        elucidator.find([])
    encoder = SpecFormerSettings(modalities=("uv", "ir"), **PATCHES, **SETTINGS)
    both = DiffSpectraRecipe(encoder=encoder, modality_dropout=0.0)
    with pytest.raises(InputError, match="uv is missing; this model needs all of uv, ir"):
        elucidator_of(both.model_copy(update={"denoiser": DENOISER})).find([sized])
    for told, message in (
        ({"spectra": {}}, "there are none"),
        ({"spectra": {"nmr": uv}}, "no modality 'nmr'"),
        ({"spectra": {"ir": uv}}, r"ir \(701,\) must be \(3501,\)"),
        ({"spectra": {"uv": uv}, "atoms": 30}, "1 to 29 atoms"),
        ({"spectra": {"uv": uv}, "atoms": 3, "formula": {"C": 1, "H": 4}}, "3 are given, but the formula has 5"),
        ({"spectra": {"uv": uv}, "formula": {"S": 1}}, "S is none of"),
        ({"spectra": {"uv": uv}, "formula": {"C": -1, "H": 4}}, "-1 atoms of C"),
        ({"spectra": {"uv": uv}, "formula": {"C": 1.5, "H": 2.5}}, "1.5 atoms of C"),
        ({"spectra": {"uv": uv}, "atoms": 2.5}, "2.5 is not a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            Query(**told)
    network, sizes = Conditioned(ENCODER, DENOISER), torch.full((2, 1), 5)
    with pytest.raises(InputError, match="evaluation mode"):
        draw_samples(network, torch.zeros(2, 16), sizes, elucidator.schedule, FEW, keys=[0, 1])
    for rows, told, message in (
        (2, {"keys": [0]}, "keys: 1 for the sizes of 2 queries"),
        (1, {"keys": [0, 1]}, "conditions: 1 for the sizes of 2"),
        (2, {"keys": [0, 1], "formulas": [None]}, "formulas: 1 for the sizes of 2"),
        (2, {"keys": [0, 1], "formulas": [None, {"C": 1, "H": 4, "O": 1}]}, "but the formula has 6"),
    ):
        with pytest.raises(InputError, match=message):
            draw_samples(network.eval(), torch.zeros(rows, 16), sizes, elucidator.schedule, FEW, **told)


def test_absent_spectra_are_those_a_conditioned_network_learned_to_miss():
    encoder = SpecFormerSettings(modalities=("uv", "ir"), absent=True, **PATCHES, **SETTINGS)
    torch.manual_seed(0)
    network = Conditioned(encoder, DENOISER).eval()
    spectra = {"uv": torch.rand(2, 701), "ir": torch.rand(2, 3501)}
    present = torch.tensor([[True, False]] * 2)
    changed = spectra | {"ir": torch.zeros(2, 3501)}
    with torch.no_grad():
        torch.testing.assert_close(network.encode(spectra, present)[0], network.encode(changed, present)[0])
