"""The noise process as the training loop meets it: what a batch holds, and the model that takes the noise away.

The model holds two networks: the one that learns, and the running average of its weights, which answers in evaluation
and is what an artifact keeps.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.molecules import MoleculeBatch
from library.diffspectra.noise import draw_noise, key_generators, random_rotations, stream
from library.diffspectra.scaling import State, scale
from library.diffspectra.schedule import TRAINING_TIME, NoiseSchedule


class Draws(NamedTuple):
    """How much of what is drawn for each molecule of a training batch."""

    self_condition: float
    """Probability that the network is given its own prediction."""
    drop_condition: float
    """Probability that the spectra are replaced by the learned vector."""
    drop_modality: float
    """Probability, for each spectrum, that it is replaced by the learned tokens; one always stays."""
    rotate: bool
    """Turn each molecule at random."""


class DiffusionBatch(NamedTuple):
    """Molecules and all that was drawn for them. B molecules of at most N atoms.

    clean              the scaled molecules
    noise              standard normal, of the same shapes
    times              float64 (B,)
    spectra            modality -> (B, points), log10(1 + I)
    present            bool (B, modalities): which spectra are shown
    self_conditioned   bool (B,): whose first prediction is given back to the network
    unconditioned      bool (B,): whose spectra are replaced by the learned vector
    node_mask          bool (B, N)
    """

    clean: State
    noise: State
    times: Tensor
    spectra: dict[str, Tensor]
    present: Tensor
    self_conditioned: Tensor
    unconditioned: Tensor
    node_mask: Tensor

    @property
    def sizes(self) -> Tensor:
        """Atoms of each molecule, int64 (B,)."""
        return self.node_mask.sum(1)


class Denoised(NamedTuple):
    """What the model says of a batch: molecules, noisy positions (B, N, 3), and logits (B, 29) of 1 to 29 atoms."""

    predicted: State
    noisy_positions: Tensor
    count_logits: Tensor | None


def draw(batch: MoleculeBatch, draws: Draws) -> DiffusionBatch:
    """Everything random of a training step, from the molecules' keys alone.

    Times are u (1 - 1e-5) + 1e-5 with u uniform on (0, 1).
    """
    generators = key_generators([stream(int(key), 1) for key in batch.keys])
    modalities = len(batch.spectra)
    uniform = torch.stack(
        [torch.rand(4 + modalities, generator=generator, dtype=torch.float64) for generator in generators]
    )
    time, conditioned, dropped, kept = uniform[:, :4].unbind(1)
    present = uniform[:, 4:] >= draws.drop_modality
    present |= (torch.arange(modalities) == (kept * modalities).long()[:, None]) & ~present.any(1, keepdim=True)
    clean = scale(batch)
    if draws.rotate:
        turned = clean.positions @ random_rotations(generators).transpose(1, 2)
        clean = State(torch.cat([turned, clean.features], -1), clean.edges)
    return DiffusionBatch(
        clean=clean,
        noise=draw_noise(batch.node_mask, generators),
        times=time * (1 - TRAINING_TIME) + TRAINING_TIME,
        spectra=batch.spectra,
        present=present,
        self_conditioned=conditioned < draws.self_condition,
        unconditioned=dropped < draws.drop_condition,
        node_mask=batch.node_mask,
    )


def diffuse(clean: State, noise: State, times: Tensor, schedule: NoiseSchedule) -> State:
    """G_t = alpha_t G_0 + sigma_t eps for times (B,)."""
    alpha, sigma = schedule.alpha(times).to(clean.nodes), schedule.sigma(times).to(clean.nodes)
    return State(
        alpha[:, None, None] * clean.nodes + sigma[:, None, None] * noise.nodes,
        alpha[:, None, None, None] * clean.edges + sigma[:, None, None, None] * noise.edges,
    )


class DiffusionModel(nn.Module):
    """A `Conditioned` network in training, and the running average of its weights beside it."""

    def __init__(self, network: Conditioned, schedule: NoiseSchedule, *, size_groups: int = 1) -> None:
        """`size_groups`: molecules are sorted by size into that many equal groups, each padded to its own largest."""
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.schedule, self.size_groups = schedule, size_groups

    def forward(self, batch: DiffusionBatch) -> Denoised:
        """Denoise a batch: the spectra are read once, whatever the number of passes; molecules go by groups of size.

        In evaluation without gradients by the average; with them, as where curvature is measured, by what learns.
        """
        network = self.network if self.training or torch.is_grad_enabled() else self.average
        noisy = diffuse(batch.clean, batch.noise, batch.times, self.schedule)
        level = self.schedule.noise_level(batch.times).to(noisy.nodes)
        shown = batch.present if network.encoder.settings.absent else None
        condition, logits = network.encode(batch.spectra, shown)
        if network.null is not None:
            condition = torch.where(batch.unconditioned[:, None], network.null, condition)

        sizes, nodes, edges = batch.sizes, torch.zeros_like(noisy.nodes), torch.zeros_like(noisy.edges)
        order = sizes.argsort(stable=True)
        for group in range(self.size_groups):
            start, stop = (len(order) * edge // self.size_groups for edge in (group, group + 1))
            rows = order[start:stop] if stop > start else order[:1]  # as many passes on every worker
            size = int(sizes[rows].max())
            found = self._denoised(network, noisy.at(rows, size), level[rows], condition[rows], batch, rows, size)
            nodes[rows, :size], edges[rows, :size, :size] = found
        return Denoised(State(nodes, edges), noisy.positions, logits)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average <- decay average + (1 - decay) network; statistics of the batch norms are copied."""
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            getattr(mean, "ds_tensor", mean).lerp_(getattr(value, "ds_tensor", value), 1 - decay)  # ZeRO-3: own parts
        for mean, value in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mean.copy_(value)

    def _denoised(
        self,
        network: Conditioned,
        noisy: State,
        level: Tensor,
        condition: Tensor,
        batch: DiffusionBatch,
        rows: Tensor,
        size: int,
    ) -> State:
        mask, again = batch.node_mask[rows, :size], batch.self_conditioned[rows]
        previous = State(torch.zeros_like(noisy.nodes), torch.zeros_like(noisy.edges))
        with torch.no_grad():
            first = again.nonzero().flatten() if bool(again.any()) else rows.new_zeros(1)
            own = network.denoiser(noisy.at(first), level[first], condition[first], mask[first])
            previous.nodes[first] = own.nodes * again[first, None, None]
            previous.edges[first] = own.edges * again[first, None, None, None]
        return network.denoiser(noisy, level, condition, mask, previous)
