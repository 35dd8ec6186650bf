"""How well a network denoises a molecule, told its spectrum: what ranks candidates that were drawn equally often."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.loss import loss_weight, terms
from library.diffspectra.molecules import Structure, batch_of
from library.diffspectra.noise import draw_noise, key_generators
from library.diffspectra.process import diffuse
from library.diffspectra.scaling import scale
from library.diffspectra.schedule import NoiseSchedule

TIMES = (0.25, 0.5, 0.75)


@torch.no_grad()
def denoising_penalties(
    network: Conditioned,
    condition: Tensor,
    structures: Sequence[Structure],
    schedule: NoiseSchedule,
    *,
    keys: Sequence[int],
    factors: tuple[float, float, float],
) -> Tensor:
    """The training loss of each molecule, told its condition, a mean over three fixed times and over its atoms: (B,).

    A bound on the likelihood is made of such terms: the less, the better the molecule goes with the spectrum.

    Parameters
    ----------
    condition  of each molecule's spectrum, (B, condition)
    keys       from which noise is drawn; molecules of one spectrum and size with one key meet the same noise
    factors    weights of coordinates, elements and charges, bonds
    """
    batch = batch_of(structures, {})
    mask = batch.node_mask.to(condition.device)
    clean = scale(batch)
    clean = type(clean)(*(part.to(condition.device) for part in clean))
    generators, total = key_generators(keys), torch.zeros(len(structures), device=condition.device)
    for time in TIMES:
        times = torch.full((len(structures),), time, dtype=torch.float64, device=condition.device)
        noise = draw_noise(mask, generators)
        noisy = diffuse(clean, noise, times, schedule)
        found = network.denoiser(noisy, schedule.noise_level(times).float(), condition, mask)
        weight = loss_weight(schedule.alpha(times), schedule.sigma(times)).float()
        total += terms(found, clean, noisy.positions).total(weight, factors)
    return total / (len(TIMES) * mask.sum(1))
