"""A compact equivariant encoder of geometries, for pre-training the encoder of spectra against it.

Atoms hold scalars s (d) and vectors v (3, d). In each layer, messages of all atoms within a cutoff,

    s_i += sum_j phi_s(s_j) W_s(r_ij)
    v_i += sum_j [v_j phi_v(s_j) W_v(r_ij) + (x_i - x_j) / r_ij phi_x(s_j) W_x(r_ij)]

then scalars and the norms of linear maps of vectors update each other. W are linear maps of exponential normal radial
functions times a cosine cutoff. Scalars are invariant, vectors turn with the molecule. After Schuett et al., "PaiNN",
2021, and Unke, Meuwly, "PhysNet", 2019 (the radial functions).
"""

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from library.diffspectra.molecules import ELEMENTS
from library.diffspectra.scaling import pair_mask


class GeometrySettings(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the encoder of geometries."""

    width: PositiveInt = 32
    """Channels of scalars and of vectors; MolSpectra's encoder (another one, TorchMD-ET) has 256."""
    layers: PositiveInt = 2
    """Layers; MolSpectra's has 8."""
    radial: PositiveInt = Field(16, ge=2)
    """Radial functions; MolSpectra's has 64."""
    cutoff: PositiveFloat = 5.0
    """Angstrom beyond which atoms do not see each other."""

    @classmethod
    def paper(cls) -> "GeometrySettings":
        """MolSpectra's sizes."""
        return cls(width=256, layers=8, radial=64)


class RadialFunctions(nn.Module):
    """exp(-beta_k (exp(-5 r / cutoff) - mu_k)^2) times (cos(pi r / cutoff) + 1) / 2 inside the cutoff, else 0."""

    def __init__(self, number: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        first = math.exp(-5.0)
        self.centres = nn.Parameter(torch.linspace(first, 1.0, number))
        self.sharpness = nn.Parameter(torch.full((number,), (2 / number * (1 - first)) ** -2))

    def forward(self, distance: Tensor) -> Tensor:
        """Distances (...) to functions (..., number)."""
        decayed = torch.exp(-5.0 / self.cutoff * distance)[..., None]
        window = 0.5 * (torch.cos(math.pi * distance / self.cutoff) + 1) * (distance < self.cutoff)
        return torch.exp(-self.sharpness * (decayed - self.centres).square()) * window[..., None]


class GeometryLayer(nn.Module):
    """Messages between atoms, then an exchange between an atom's scalars and vectors."""

    def __init__(self, width: int, radial: int) -> None:
        super().__init__()
        self.send = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.filter = nn.Linear(radial, 3 * width, bias=False)
        self.mix = nn.Linear(width, 2 * width, bias=False)
        self.exchange = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, scalars: Tensor, vectors: Tensor, radial: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars (B, N, d), vectors (B, N, 3, d), radial functions (B, N, N, k), unit vectors (B, N, N, 3)."""
        weights = self.filter(radial)
        own, carried, pointed = (self.send(scalars)[:, None] * weights).chunk(3, -1)
        scalars = scalars + own.sum(2)
        arrived = torch.einsum("bijc,bjxc->bixc", carried, vectors) + torch.einsum(
            "bijc,bijx->bixc", pointed, direction
        )
        vectors = vectors + arrived
        left, right = self.mix(vectors).chunk(2, -1)
        length = left.square().sum(2).add(1e-8).sqrt()
        scale, add, cross = self.exchange(torch.cat([F.layer_norm(scalars, scalars.shape[-1:]), length], -1)).chunk(
            3, -1
        )
        scalars = scalars + add + cross * (left * right).sum(2)
        return scalars, vectors + scale[:, :, None] * right


class GeometryEncoder(nn.Module):
    """Molecules to vectors of features, and one vector in space for each atom."""

    def __init__(self, settings: GeometrySettings, features: int) -> None:
        super().__init__()
        d = settings.width
        self.elements = nn.Embedding(len(ELEMENTS), d)
        self.radial = RadialFunctions(settings.radial, settings.cutoff)
        self.layers = nn.ModuleList(GeometryLayer(d, settings.radial) for _ in range(settings.layers))
        self.out = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, features))
        self.gate = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.arrow = nn.Linear(d, 1, bias=False)

    def forward(self, positions: Tensor, types: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, N, 3) in angstrom, types int64 (B, N), node_mask bool (B, N) to
        features (B, features), summed over atoms and invariant, and vectors (B, N, 3), which turn with the molecule.
        """
        difference = positions[:, :, None] - positions[:, None]
        distance = difference.square().sum(-1).clamp(min=1e-12).sqrt()
        direction = difference / distance[..., None]
        radial = self.radial(distance) * pair_mask(node_mask)[..., None]
        scalars = self.elements(types)
        vectors = scalars.new_zeros(*scalars.shape[:2], 3, scalars.shape[2])
        for layer in self.layers:
            scalars, vectors = layer(scalars, vectors, radial, direction)
        mask = node_mask[..., None].to(scalars.dtype)
        arrows = self.arrow(vectors * self.gate(scalars)[:, :, None]).squeeze(-1)
        return (self.out(scalars) * mask).sum(1), arrows * mask
