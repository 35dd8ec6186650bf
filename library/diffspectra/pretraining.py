"""Pre-training of SpecFormer: hidden patches are filled in, and spectra are told apart by their molecules' geometries.

One pass over spectra with hidden patches gives both the patches and the vector that is compared; the encoder of
geometries also learns to point back along noise on its positions. Source: Wang et al., "MolSpectra", 2025, after
"DiffSpectra", 2025.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import collective
from library.diffspectra.geometry_encoder import GeometryEncoder, GeometrySettings
from library.diffspectra.molecules import MoleculeBatch
from library.diffspectra.noise import key_generators, stream
from library.diffspectra.scaling import centred
from library.diffspectra.specformer import SpecFormer, SpecFormerSettings


class PretrainingBatch(NamedTuple):
    """Molecules, spectra, and what was drawn for them.

    positions  float32 (B, N, 3), angstrom, about their mean
    shifts     float32 (B, N, 3), standard normal, of the noise on positions
    types      int64 (B, N)
    node_mask  bool (B, N)
    spectra    modality -> (B, points)
    uniform    modality -> (B, patches), which say what patches are hidden
    """

    positions: Tensor
    shifts: Tensor
    types: Tensor
    node_mask: Tensor
    spectra: dict[str, Tensor]
    uniform: dict[str, Tensor]


class Pretrained(NamedTuple):
    """What the model says: features of molecules and of spectra (B, features), vectors (B, N, 3), patch errors.

    errors  modality -> (B, patches), mean squared error of each patch
    hidden  modality -> (B, patches), 1 where it was hidden
    """

    molecules: Tensor
    spectra: Tensor
    arrows: Tensor
    errors: dict[str, Tensor]
    hidden: dict[str, Tensor]


def draw_pretraining(batch: MoleculeBatch, settings: SpecFormerSettings) -> PretrainingBatch:
    """Everything random of a step, from the molecules' keys alone."""
    generators = key_generators([stream(int(key), 2) for key in batch.keys])
    shifts = torch.zeros_like(batch.positions)
    for row, (n, generator) in enumerate(zip(batch.counts.tolist(), generators, strict=True)):
        shifts[row, :n] = torch.randn(n, 3, generator=generator)
    uniform = {
        modality: torch.stack([torch.rand(settings.patches(modality), generator=one) for one in generators])
        for modality in settings.modalities
    }
    positions = centred(batch.positions, batch.node_mask)
    return PretrainingBatch(positions, shifts, batch.types, batch.node_mask, batch.spectra, uniform)


def hidden_patches(uniform: Tensor, ratio: float) -> Tensor:
    """1 at hidden patches, 0 at the floor(P (1 - ratio)) that stay, those of the smallest numbers: (B, P) of (B, P)."""
    kept = int(uniform.shape[1] * (1 - ratio))
    ranks = uniform.argsort(1).argsort(1)
    return (ranks >= kept).to(uniform.dtype)


def reconstruction_loss(errors: Tensor, hidden: Tensor) -> Tensor:
    """The mean of the patches' errors (B, P) over those that were hidden (B, P)."""
    return (errors * hidden).sum() / hidden.sum()


def contrastive_loss(molecules: Tensor, spectra: Tensor, temperature: float) -> Tensor:
    """InfoNCE in one direction: the mean of -log softmax_j(cos(m_i, s_j) / temperature) at j = i, over rows i.

    Features (B, d) each. Across workers each molecule is compared with the spectra of all of them, and the mean is
    over this worker's molecules; gradients reach every worker's spectra.
    """
    m, s = F.normalize(molecules.float(), dim=-1), F.normalize(spectra.float(), dim=-1)
    sizes = torch.zeros(collective.world_size(), dtype=torch.int64)
    sizes[collective.rank()] = len(s)
    sizes = collective.all_sum(sizes).tolist()
    first = sum(sizes[: collective.rank()])
    every = collective.differentiable_sum(F.pad(s, (0, 0, first, sum(sizes) - first - len(s))))
    own = torch.arange(first, first + len(s), device=m.device)
    return F.cross_entropy(m @ every.T / temperature, own)


class PretrainingModel(nn.Module):
    """SpecFormer with a linear map back to patches for each spectrum, and an encoder of geometries."""

    def __init__(self, encoder: SpecFormerSettings, geometry: GeometrySettings, *, ratio: float, shift: float) -> None:
        """`ratio` of the patches are hidden; `shift` angstrom is the deviation of the noise on positions."""
        super().__init__()
        self.encoder = SpecFormer(encoder)
        self.patches = nn.ModuleDict({m: nn.Linear(encoder.width, encoder.length(m)) for m in encoder.modalities})
        self.geometry = GeometryEncoder(geometry, encoder.features)
        self.ratio, self.shift = ratio, shift

    def forward(self, batch: PretrainingBatch) -> Pretrained:
        """Hide, encode, fill in, and encode the shaken geometry."""
        patches = self.encoder.split(batch.spectra)
        hidden = {modality: hidden_patches(batch.uniform[modality], self.ratio) for modality in patches}
        shown = {modality: part * (1 - hidden[modality][..., None]) for modality, part in patches.items()}
        tokens = self.encoder.tokens(shown)
        found = tokens.split([part.shape[1] for part in patches.values()], 1)
        errors = {
            modality: (self.patches[modality](own) - part).square().mean(-1)
            for (modality, part), own in zip(patches.items(), found, strict=True)
        }
        shaken = batch.positions + self.shift * batch.shifts
        features, arrows = self.geometry(shaken, batch.types, batch.node_mask)
        return Pretrained(features, self.encoder.pooled(tokens), arrows, errors, hidden)
