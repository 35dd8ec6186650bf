"""Candidates for spectra: many samples of each spectrum at once, guided, in groups of equal size."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.molecules import MOST_ATOMS, Structure
from library.diffspectra.noise import draw_noise, key_generators, stream
from library.diffspectra.samplers import Progress, SamplerName, ancestral, dpm_solver
from library.diffspectra.scaling import State, discretise
from library.diffspectra.schedule import NoiseSchedule
from library.errors import InputError

START, STEP, COUNT = 0, 1, 2  # what a key is for


@torch.no_grad()
def generate(
    network: Conditioned,
    spectra: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    *,
    sizes: Sequence[int] | Tensor | None = None,
    samples: int = 1,
    sampler: SamplerName = "dpm-solver",
    steps: int = 50,
    guidance: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    present: Tensor | None = None,
    at_once: int = 64,
    progress: Progress | None = None,
) -> list[list[Structure]]:
    """`samples` candidate molecules for each spectrum, in the order of the spectra.

    A candidate depends on its spectrum, its place, `seed` and the number of atoms; not on what else is asked for.

    Parameters
    ----------
    network      in evaluation mode
    spectra      modality -> (B, points), log10(1 + I)
    sizes        atoms of each molecule, hydrogens included; None draws them from what the network says of the spectrum
    sampler      dpm-solver (50 to 100 steps), or ancestral as in the paper (1000)
    guidance     g in G_0 = G_null + g (G_spectrum - G_null); 1 is the plain prediction, 2 follows spectra more closely
    temperature  factor of the ancestral sampler's noise
    present      bool (B, modalities), which spectra are there, for a network trained with modality_dropout
    at_once      most molecules in one pass
    progress     called with (done, all) in units of steps of groups

    Raises InputError for a network in training mode, sizes out of range or as many as there are no spectra, and
    guidance, missing spectra or unknown sizes that the network has not learnt.
    """
    _check(network, samples=samples, steps=steps, guidance=guidance, at_once=at_once)
    condition, logits = network.encode(spectra, present)
    many, device = len(condition), condition.device
    if sizes is not None:
        counts = torch.as_tensor(sizes).long().cpu()
        if counts.shape != (many,):
            raise InputError(f"sizes: {many} spectra have {counts.numel()} sizes")
        if many and not 1 <= int(counts.min()) <= int(counts.max()) <= MOST_ATOMS:
            raise InputError(f"sizes: molecules of 1 to {MOST_ATOMS} atoms are allowed, hydrogens included")
        counts = counts[:, None].expand(many, samples)
    elif logits is None:
        raise InputError("the network has not learnt the number of atoms: give sizes, or train with count_weight")
    else:
        counts = draw_counts(logits, samples, seed)

    wanted = sorted((int(counts[i, k]), i, k) for i in range(many) for k in range(samples))
    groups = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
    found: dict[tuple[int, int], Structure] = {}
    for number, group in enumerate(groups):
        rows = torch.tensor([i for _, i, _ in group], device=device)
        mask = torch.arange(group[-1][0]) < torch.tensor([n for n, _, _ in group])[:, None]
        places = [(i, k) for _, i, k in group]

        def told(done: int, _: int, number: int = number) -> None:
            if progress is not None:
                progress(number * steps + done, len(groups) * steps)

        state = _sampled(
            network,
            condition[rows],
            mask.to(device),
            places,
            schedule,
            sampler,
            steps,
            guidance,
            temperature,
            seed,
            told,
        )
        found |= dict(zip(places, discretise(state, mask.to(device)), strict=True))
    return [[found[i, k] for k in range(samples)] for i in range(many)]


def draw_counts(logits: Tensor, samples: int, seed: int) -> Tensor:
    """Numbers of atoms drawn from softmax(logits (B, 29)), the same for a spectrum in any batch: int64 (B, samples)."""
    chances = logits.double().softmax(-1).cpu()
    rows = [
        torch.multinomial(
            row, samples, replacement=True, generator=torch.Generator().manual_seed(stream(seed, COUNT, i))
        )
        for i, row in enumerate(chances)
    ]
    return torch.stack(rows) + 1 if rows else torch.zeros(0, samples, dtype=torch.int64)


def _sampled(
    network: Conditioned,
    condition: Tensor,
    mask: Tensor,
    places: list[tuple[int, int]],
    schedule: NoiseSchedule,
    sampler: SamplerName,
    steps: int,
    guidance: float,
    temperature: float,
    seed: int,
    progress: Progress,
) -> State:
    """The continuous molecules of one group."""

    def drawn(*purpose: int) -> State:
        return draw_noise(mask, key_generators([stream(seed, *purpose, *place) for place in places]))

    def denoise(state: State, time: Tensor, previous: State | None) -> State:
        level = schedule.noise_level(time).float().expand(len(mask))
        if guidance == 1:
            return network.denoiser(state, level, condition, mask, previous)
        both = State(*(torch.cat([part, part]) for part in state))
        before = State(*(torch.cat([part, part]) for part in previous)) if previous is not None else None
        told = torch.cat([network.null.expand_as(condition), condition])
        found = network.denoiser(both, torch.cat([level, level]), told, torch.cat([mask, mask]), before)
        without, spectrum = zip(*(part.chunk(2) for part in found), strict=True)
        return State(*(a + guidance * (b - a) for a, b in zip(without, spectrum, strict=True)))

    start = drawn(START)
    if sampler == "ancestral":
        settings = {"steps": steps, "temperature": temperature, "progress": progress}
        return ancestral(denoise, start, lambda k: drawn(STEP, k), schedule, **settings)
    return dpm_solver(denoise, start, schedule, steps=steps, progress=progress)


def _check(network: Conditioned, *, samples: int, steps: int, guidance: float, at_once: int) -> None:
    if network.training:
        raise InputError("candidates need a network in evaluation mode; call network.eval()")
    for name, value in (("samples", samples), ("steps", steps), ("at_once", at_once)):
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    if guidance != 1 and network.null is None:
        raise InputError(f"guidance {guidance:g}: use 1, or a network that was trained with condition_dropout")
