"""The Diffusion Molecule Transformer (DMT): from noisy molecules to the molecules that they were.

It predicts positions, elements, charges and bonds together, and is exactly equivariant: it knows positions by
distances alone. Source: Wang et al., "DiffSpectra", 2025; after Huang et al., "JODO", 2023.
"""

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from library.diffspectra.attention import Block
from library.diffspectra.basis import GaussianBasis, NoiseLevelFeatures
from library.diffspectra.scaling import EDGE_CHANNELS, NODE_CHANNELS, State, centred, pair_mask
from library.errors import NonFiniteError

FEATURES = NODE_CHANNELS - 3


class DenoiserSettings(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the denoiser. `DenoiserSettings.paper()` are the published ones."""

    width: PositiveInt = 64
    """Channels of an atom; 256 in the paper."""
    pair_width: PositiveInt = Field(16, ge=4)
    """Channels of a pair of atoms; 64 in the paper."""
    heads: PositiveInt = Field(8, ge=3)
    """Attention heads, two of which follow bonds and near neighbours of the last prediction; 16 in the paper."""
    blocks: PositiveInt = 4
    """Blocks; 8 in the paper."""
    condition: PositiveInt = 128
    """Channels of noise level and spectrum together; 1024 in the paper."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout in the feed-forward maps."""
    neighbour: PositiveFloat = 2.0
    """Squared distance in angstrom^2 below which atoms of the last prediction are near neighbours."""
    equivariant: bool = True
    """False is the paper's ablation: positions are plain input and output features of atoms."""

    @model_validator(mode="after")
    def _divides(self) -> "DenoiserSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the {self.heads} heads")
        if 2 * self.width // self.blocks == 0 or 2 * self.pair_width // self.blocks == 0:
            raise ValueError(f"{self.blocks} blocks are too many for widths {self.width} and {self.pair_width}")
        return self

    @classmethod
    def paper(cls, **changed: object) -> "DenoiserSettings":
        """The published sizes."""
        sizes = {"width": 256, "pair_width": 64, "heads": 16, "blocks": 8, "condition": 1024}
        return cls(**{**sizes, **changed})


class Denoiser(nn.Module):
    """The network G_0 = f(G_t, noise level, spectrum, last prediction)."""

    def __init__(self, settings: DenoiserSettings) -> None:
        super().__init__()
        self.settings = settings
        d, e, c = settings.width, settings.pair_width, settings.condition
        channels = FEATURES if settings.equivariant else NODE_CHANNELS
        self.level = nn.Sequential(NoiseLevelFeatures(), nn.Linear(17, c), nn.GELU(), nn.Linear(c, c))
        self.basis = GaussianBasis(e, c)
        self.node_input = nn.Linear(2 * channels, d)
        self.pair_input = nn.Linear(2 * EDGE_CHANNELS + e, e)
        self.blocks = nn.ModuleList(
            Block(d, e, settings.heads, c, settings.dropout, equivariant=settings.equivariant)
            for _ in range(settings.blocks)
        )
        part, pair_part = 2 * d // settings.blocks, 2 * e // settings.blocks
        self.node_skips = nn.ModuleList(nn.Linear(d, part) for _ in range(settings.blocks))
        self.pair_skips = nn.ModuleList(nn.Linear(e, pair_part) for _ in range(settings.blocks))
        whole, pair_whole = d + settings.blocks * part, e + settings.blocks * pair_part
        self.node_head = _head(whole, d, channels)
        self.exists_head = _head(pair_whole, e, 1)
        self.order_head = _head(pair_whole, e, 1)

    def forward(
        self, noisy: State, level: Tensor, spectrum: Tensor, node_mask: Tensor, previous: State | None = None
    ) -> State:
        """The predicted molecules.

        noisy      G_t, about the mean of its atoms, masked
        level      noise level log(alpha^2 / sigma^2), (B,)
        spectrum   condition of each molecule, (B, condition), added to that of the noise level
        node_mask  bool (B, N)
        previous   the last prediction; a molecule without one is all zeros; None is none for all

        Raises NonFiniteError for predicted coordinates that are not finite, in evaluation.
        """
        positions, mask = noisy.positions, pair_mask(node_mask)
        if previous is None:
            previous = State(torch.zeros_like(noisy.nodes), torch.zeros_like(noisy.edges))
        tau = F.silu(self.level(level) + spectrum)
        guess = (previous.positions[:, :, None] - previous.positions[:, None]).square().sum(-1)
        known = ((guess != 0) & mask).flatten(1).any(1)[:, None, None, None]
        distances = torch.where(known, self.basis(guess, tau), 0.0)
        adjacency = torch.stack([previous.edges[..., 0] >= 0, guess <= self.settings.neighbour], -1)

        if self.settings.equivariant:
            inputs = torch.cat([noisy.features, previous.features], -1)
        else:
            inputs = torch.cat([noisy.nodes, previous.nodes], -1)
        nodes = self.node_input(inputs)
        pairs = self.pair_input(torch.cat([noisy.edges, previous.edges, distances], -1))
        found_nodes, found_pairs = [nodes], [pairs]
        for block, node_skip, pair_skip in zip(self.blocks, self.node_skips, self.pair_skips, strict=True):
            nodes, pairs, positions = block(nodes, pairs, positions, adjacency, node_mask, mask, tau)
            if self.settings.equivariant:
                positions = centred(positions, node_mask)
            found_nodes.append(node_skip(nodes))
            found_pairs.append(pair_skip(pairs))

        out = self.node_head(torch.cat(found_nodes, -1)).float() * node_mask[..., None]
        every = torch.cat(found_pairs, -1)
        edges = torch.cat([self.exists_head(every), self.order_head(every)], -1).float()
        edges = (edges + edges.transpose(1, 2)) / 2 * mask[..., None]
        if self.settings.equivariant:
            out = torch.cat([positions, out], -1)
        else:
            out = torch.cat([centred(out[..., :3], node_mask), out[..., 3:]], -1)
        if not self.training and not torch.isfinite(out).all():
            raise NonFiniteError("the denoiser's prediction is not finite")
        return State(out, edges)


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """inputs -> width -> width / 2 -> outputs with SiLU between."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, outputs)
    )
