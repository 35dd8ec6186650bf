"""The whole conditional network: SpecFormer, the denoiser, and what they need beyond the paper.

Beyond the paper: a learned vector instead of the spectrum (for guidance), learned tokens instead of a missing spectrum,
and the distribution of the number of atoms given the spectrum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.diffspectra.denoiser import Denoiser, DenoiserSettings
from library.diffspectra.molecules import MOST_ATOMS
from library.diffspectra.scaling import State
from library.diffspectra.specformer import SpecFormer, SpecFormerSettings


class Conditioned(nn.Module):
    """Encoder, projection to the denoiser's condition, denoiser; with `null` and `counts` where they are asked for."""

    def __init__(
        self,
        encoder: SpecFormerSettings,
        denoiser: DenoiserSettings,
        *,
        null: bool = False,
        count_atoms: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = SpecFormer(encoder)
        self.project = nn.Linear(encoder.features, denoiser.condition)
        self.denoiser = Denoiser(denoiser)
        self.null = nn.Parameter(torch.zeros(denoiser.condition)) if null else None
        self.counts = nn.Linear(encoder.features, MOST_ATOMS) if count_atoms else None

    def encode(self, spectra: Mapping[str, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Condition (B, condition) of the denoiser, once per molecule, and logits (B, 29) of 1 to 29 atoms or None."""
        features = self.encoder(spectra, present)
        return self.project(features), None if self.counts is None else self.counts(features)

    def forward(
        self,
        noisy: State,
        level: Tensor,
        spectra: Mapping[str, Tensor],
        node_mask: Tensor,
        previous: State | None = None,
    ) -> State:
        """The predicted molecules of `Denoiser.forward`, from spectra instead of a condition."""
        return self.denoiser(noisy, level, self.encode(spectra)[0], node_mask, previous)
