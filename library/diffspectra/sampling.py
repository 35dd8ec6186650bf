"""Many samples of many spectra at once: groups of equal size, guidance, known elements, noise by key."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.formulas import Formulas, counted
from library.diffspectra.molecules import MOST_ATOMS, Structure
from library.diffspectra.noise import draw_noise, key_generators, stream
from library.diffspectra.samplers import Progress, SamplerName, ancestral, dpm_solver
from library.diffspectra.scaling import State, discretise
from library.diffspectra.schedule import NoiseSchedule
from library.errors import InputError

START, STEP, COUNT = 0, 1, 2  # what a key is for


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """How candidates are drawn and ranked."""

    samples: int = Field(16, ge=1, le=1024)
    """Molecules that are drawn for each query."""
    sampler: SamplerName = "dpm-solver"
    """dpm-solver (50 to 100 steps), or ancestral as in the paper (1000)."""
    steps: int = Field(50, ge=1, le=10_000)
    """Steps of the sampler, each of which is one pass of the network."""
    guidance: NonNegativeFloat = 1.0
    """g in G_0 = G_null + g (G_spectrum - G_null): 1 is the plain prediction, more follows spectra more closely."""
    temperature: NonNegativeFloat = 1.0
    """Factor of the ancestral sampler's noise."""
    penalties: bool = True
    """Order candidates that were drawn equally often by how well the network denoises them, told the spectrum."""
    seed: NonNegativeInt = 0
    """Seed of everything random, together with the key of each query."""
    at_once: PositiveInt = 64
    """Most molecules in one pass; changes nothing in the result but its last digits."""


@torch.no_grad()
def draw_samples(
    network: Conditioned,
    condition: Tensor,
    counts: Tensor,
    schedule: NoiseSchedule,
    sampling: Sampling,
    *,
    keys: Sequence[int],
    formulas: Sequence[Mapping[str, int] | None] | None = None,
    progress: Progress | None = None,
) -> list[list[Structure]]:
    """Molecules for each of B conditions, in their order, as many as `counts` has columns.

    A molecule depends on its condition, key, place and size alone.

    Parameters
    ----------
    network    in evaluation mode
    condition  (B, condition), of `network.encode`
    counts     int64 (B, samples), atoms of each molecule, hydrogens included
    keys       of each condition: with `sampling.seed` and the place of a sample, what noise is drawn from
    formulas   of each condition, or None where it is not known; see `formulas.py`
    progress   called with (done, all) after every step of a group

    Raises InputError for a network in training mode, counts out of range or at odds with a formula, conditions, keys
    and formulas that are not as many, and guidance that was not learned.
    """
    _check(network, counts, sampling)
    _check_rows(condition, counts, keys, formulas)
    many, samples = counts.shape
    wanted = sorted((int(counts[i, k]), i, k) for i in range(many) for k in range(samples))
    groups = [wanted[start : start + sampling.at_once] for start in range(0, len(wanted), sampling.at_once)]
    found: dict[tuple[int, int], Structure] = {}
    for number, group in enumerate(groups):
        rows = torch.tensor([i for _, i, _ in group], device=condition.device)
        mask = torch.arange(group[-1][0]) < torch.tensor([n for n, _, _ in group])[:, None]
        mask = mask.to(condition.device)
        places = [(keys[i], k) for _, i, k in group]
        known = Formulas([formulas[i] if formulas else None for _, i, _ in group], mask)

        def told(done: int, _: int, number: int = number) -> None:
            if progress is not None:
                progress(number * sampling.steps + done, len(groups) * sampling.steps)

        state = _sampled(network, condition[rows], mask, places, known, schedule, sampling, told)
        found |= dict(zip(((i, k) for _, i, k in group), discretise(known.chosen(state), mask), strict=True))
    return [[found[i, k] for k in range(samples)] for i in range(many)]


def draw_counts(logits: Tensor, samples: int, seed: int, keys: Sequence[int]) -> Tensor:
    """Numbers of atoms drawn from softmax(logits (B, 29)), each row by its key: int64 (B, samples)."""
    chances = logits.double().softmax(-1).cpu()
    generators = key_generators([stream(seed, COUNT, key) for key in keys])
    rows = [
        torch.multinomial(row, samples, replacement=True, generator=generator)
        for row, generator in zip(chances, generators, strict=True)
    ]
    return torch.stack(rows) + 1 if rows else torch.zeros(0, samples, dtype=torch.int64)


def _sampled(
    network: Conditioned,
    condition: Tensor,
    mask: Tensor,
    places: list[tuple[int, int]],
    known: Formulas,
    schedule: NoiseSchedule,
    sampling: Sampling,
    progress: Progress,
) -> State:
    """The continuous molecules of one group."""

    def drawn(*purpose: int) -> State:
        return draw_noise(mask, key_generators([stream(sampling.seed, *purpose, *place) for place in places]))

    def predicted(state: State, level: Tensor, previous: State | None) -> State:
        if sampling.guidance == 1:
            return network.denoiser(state, level, condition, mask, previous)
        both = State(*(torch.cat([part, part]) for part in state))
        before = State(*(torch.cat([part, part]) for part in previous)) if previous is not None else None
        told = torch.cat([network.null.expand_as(condition), condition])
        found = network.denoiser(both, torch.cat([level, level]), told, torch.cat([mask, mask]), before)
        without, spectrum = zip(*(part.chunk(2) for part in found), strict=True)
        return State(*(a + sampling.guidance * (b - a) for a, b in zip(without, spectrum, strict=True)))

    def denoise(state: State, time: Tensor, previous: State | None) -> State:
        return known.expected(predicted(state, schedule.noise_level(time).float().expand(len(mask)), previous))

    start = drawn(START)
    if sampling.sampler == "ancestral":
        settings = {"steps": sampling.steps, "temperature": sampling.temperature, "progress": progress}
        return ancestral(denoise, start, lambda k: drawn(STEP, k), schedule, **settings)
    return dpm_solver(denoise, start, schedule, steps=sampling.steps, progress=progress)


def _check(network: Conditioned, counts: Tensor, sampling: Sampling) -> None:
    if network.training:
        raise InputError("candidates need a network in evaluation mode; call network.eval()")
    if counts.numel() and not 1 <= int(counts.min()) <= int(counts.max()) <= MOST_ATOMS:
        raise InputError(f"sizes: molecules of 1 to {MOST_ATOMS} atoms are allowed, hydrogens included")
    if sampling.guidance != 1 and network.null is None:
        raise InputError(f"guidance: {sampling.guidance:g} was not learned, only 1; see recipe.condition_dropout")


def _check_rows(
    condition: Tensor, counts: Tensor, keys: Sequence[int], formulas: Sequence[Mapping[str, int] | None] | None
) -> None:
    given = {"conditions": condition, "keys": keys, "formulas": counts if formulas is None else formulas}
    for name, rows in given.items():
        if len(rows) != len(counts):
            raise InputError(f"{name}: {len(rows)} for the sizes of {len(counts)} queries; both must be as many")
    for sizes, formula in zip(counts.tolist(), formulas or [None] * len(counts), strict=True):
        atoms = None if formula is None else sum(counted(formula).values())
        if atoms is not None and any(size != atoms for size in sizes):
            raise InputError(f"sizes: {sizes} atoms are asked for, but the formula has {atoms}")
