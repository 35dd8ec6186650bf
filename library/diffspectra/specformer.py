"""SpecFormer: a transformer over patches of UV-Vis, IR and Raman spectra together.

Patches of each spectrum become tokens; the tokens of all spectra attend to each other through post-norm layers that
pass their attention scores on (RealFormer) and normalise over the batch; all tokens, flattened, become one vector.
Sources: Wang et al., "DiffSpectra", 2025; Wang et al., "MolSpectra", 2025; Nie et al., "PatchTST", 2023.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from library.batch_norm import GlobalBatchNorm
from library.diffspectra.lines import MODALITIES, POINTS, chosen
from library.errors import InputError


class SpecFormerSettings(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the encoder. `SpecFormerSettings.paper()` are the published ones."""

    modalities: tuple[str, ...] = MODALITIES
    """Spectra that are read, of uv, ir and raman."""
    patch_length: tuple[PositiveInt, PositiveInt, PositiveInt] = (40, 100, 100)
    """Points in a patch of uv, ir, raman; 20, 50, 50 in the paper."""
    stride: tuple[PositiveInt, PositiveInt, PositiveInt] = (20, 50, 50)
    """Points from one patch to the next; 10, 25, 25 in the paper."""
    width: PositiveInt = 32
    """Channels of a token; 128 in the paper."""
    heads: PositiveInt = 4
    """Attention heads; 16 in the paper."""
    layers: PositiveInt = 2
    """Encoder layers; 3 in the paper."""
    features: PositiveInt = 64
    """Entries of the vector that a molecule's spectra become; 256 in the paper."""
    across: bool = True
    """Whether tokens attend to those of other spectra."""
    absent: bool = False
    """Learn tokens that stand for a spectrum that is not there."""

    @field_validator("modalities")
    @classmethod
    def _in_order(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        return chosen(modalities)

    @model_validator(mode="after")
    def _fit(self) -> "SpecFormerSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the {self.heads} heads")
        for modality, length in zip(MODALITIES, self.patch_length, strict=True):
            if length > POINTS[modality]:
                raise ValueError(f"a patch of {length} points is longer than a {modality} spectrum, {POINTS[modality]}")
        return self

    @classmethod
    def paper(cls, modalities: tuple[str, ...] = MODALITIES, **changed: object) -> "SpecFormerSettings":
        """The published sizes.

        >>> SpecFormerSettings.paper().patches("ir")
        139
        """
        sizes = {"patch_length": (20, 50, 50), "stride": (10, 25, 25), "width": 128, "heads": 16, "layers": 3}
        return cls(**{"modalities": modalities, **sizes, "features": 256, **changed})

    def length(self, modality: str) -> int:
        """Points in a patch."""
        return self.patch_length[MODALITIES.index(modality)]

    def step(self, modality: str) -> int:
        """Points from one patch to the next."""
        return self.stride[MODALITIES.index(modality)]

    def patches(self, modality: str) -> int:
        """Patches of a spectrum: (points - length) // stride + 1, nothing padded."""
        return (POINTS[modality] - self.length(modality)) // self.step(modality) + 1


class EncoderLayer(nn.Module):
    """x <- BN(x + attention(x)), x <- BN(x + FFN(x)); attention adds the scores of the layer before to its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.attention_norm = GlobalBatchNorm(width)
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last_norm = GlobalBatchNorm(width)

    def forward(self, tokens: Tensor, scores: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, P, d), scores (B heads, P, P) before softmax, and which pairs may attend (P, P), to both anew."""
        b, p, d = tokens.shape
        query, key, value = (
            linear(tokens).view(b, p, self.heads, d // self.heads).transpose(1, 2).flatten(0, 1)
            for linear in (self.query, self.key, self.value)
        )
        query, key = query * (d // self.heads) ** -0.5, key.transpose(1, 2)
        scores = query @ key if scores is None else torch.baddbmm(scores, query, key)
        seen = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        mixed = (seen.softmax(-1) @ value).view(b, self.heads, p, -1).transpose(1, 2).reshape(b, p, d)
        tokens = self._normalised(self.attention_norm, tokens + self.out(mixed))
        return self._normalised(self.last_norm, tokens + self.last(F.gelu(self.first(tokens)))), scores

    @staticmethod
    def _normalised(norm: GlobalBatchNorm, tokens: Tensor) -> Tensor:
        return norm(tokens.flatten(0, 1)).view_as(tokens)


class SpecFormer(nn.Module):
    """Spectra to one vector each.

    >>> net = SpecFormer(SpecFormerSettings(modalities=("ir",), width=8, heads=2, features=16)).eval()
    >>> net({"ir": torch.zeros(3, 3501)}).shape
    torch.Size([3, 16])
    """

    def __init__(self, settings: SpecFormerSettings) -> None:
        super().__init__()
        self.settings = settings
        d, modalities = settings.width, settings.modalities
        self.patches = nn.ModuleDict({m: nn.Linear(settings.length(m), d) for m in modalities})
        shapes = {m: (settings.patches(m), d) for m in modalities}
        self.places = nn.ParameterDict({m: torch.empty(shape).uniform_(-0.02, 0.02) for m, shape in shapes.items()})
        if settings.absent:
            self.absent = nn.ParameterDict({m: torch.empty(s).uniform_(-0.02, 0.02) for m, s in shapes.items()})
        self.layers = nn.ModuleList(EncoderLayer(d, settings.heads) for _ in range(settings.layers))
        self.head = nn.Linear(sum(settings.patches(m) for m in modalities) * d, settings.features)
        self.norm = nn.LayerNorm(settings.features)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(".out"):  # which keeps torch's default
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        kind = torch.cat([torch.full((settings.patches(m),), i) for i, m in enumerate(modalities)])
        self.register_buffer("kind", kind, persistent=False)

    def forward(self, spectra: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Spectra as log10(1 + I), modality -> (B, points), to vectors (B, features).

        `present` bool (B, modalities) says which spectra are there, for an encoder with `absent`. Raises InputError
        for missing spectra, no molecules, wrong lengths, values that are not finite, and training on one molecule.
        """
        return self.pooled(self.tokens(self.split(spectra), present))

    def split(self, spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The patches of each spectrum: modality -> (B, patches, points)."""
        found = {}
        for modality in self.settings.modalities:
            if modality not in spectra:
                raise InputError(
                    f"the {modality} spectrum is missing; the model reads {', '.join(self.settings.modalities)}"
                )
            spectrum = spectra[modality]
            if spectrum.ndim != 2 or spectrum.shape[1] != POINTS[modality]:
                raise InputError(f"{modality}: {tuple(spectrum.shape)} must be (molecules, {POINTS[modality]})")
            if not torch.isfinite(spectrum).all():
                raise InputError(f"{modality}: a spectrum has an intensity that is not finite")
            found[modality] = spectrum.unfold(1, self.settings.length(modality), self.settings.step(modality))
        if not all(map(len, found.values())):
            raise InputError("the encoder needs the spectra of at least one molecule")
        if len({len(part) for part in found.values()}) > 1:
            raise InputError(f"spectra of {', '.join(f'{len(part)} ({m})' for m, part in found.items())} molecules")
        return found

    def tokens(self, patches: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Patches (B, patches, points) of each spectrum to tokens (B, P, width), spectra one after the other."""
        parts = []
        for place, modality in enumerate(self.settings.modalities):
            part = self.patches[modality](patches[modality]) + self.places[modality]
            if present is not None:
                if not self.settings.absent:
                    raise InputError(
                        "this encoder has not learnt to do without a spectrum; train with modality_dropout"
                    )
                part = torch.where(present[:, place, None, None], part, self.absent[modality])
            elif self.settings.absent:
                part = part + 0 * self.absent[modality]  # a part of every graph, for engines that average gradients
            parts.append(part)
        tokens = torch.cat(parts, 1)
        if self.training and len(tokens) < 2 and not torch.distributed.is_initialized():
            raise InputError("the encoder normalises over the batch: training needs at least 2 molecules")
        allowed = None if self.settings.across else self.kind[:, None] == self.kind
        scores = None
        for layer in self.layers:
            tokens, scores = layer(tokens, scores, allowed)
        return tokens

    def pooled(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P, width) to vectors (B, features)."""
        return self.norm(self.head(tokens.flatten(1)))
