"""The Pythia suite (Biderman et al., ICML 2023, arXiv 2304.01373): sizes by name, initialisation, and weights.

A Pythia is a GPT-NeoX: rotary positions on a quarter of each head's dimensions, attention and MLP in parallel,
untied embeddings. With V vocabulary rows, width d and L blocks it has 2 V d + L (12 d^2 + 13 d) + 2 d parameters.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.artifact import MANIFEST, Artifact, open_artifact
from library.errors import ArtifactError, InputError
from library.language.hub import first_line, is_loadable, load_errors
from library.weights import load_tensors

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Size:
    """One row of the suite's table: blocks, width, heads, rows of the vocabulary, and peak rate of pre-training."""

    blocks: int
    width: int
    heads: int
    vocab_rows: int
    lr: float
    positions: int = 2048

    def parameters(self, vocab_rows: int | None = None) -> int:
        """The exact number of parameters, with `vocab_rows` instead of the suite's when given."""
        rows, d = vocab_rows or self.vocab_rows, self.width
        return 2 * rows * d + self.blocks * (12 * d * d + 13 * d) + 2 * d


SIZES = {
    "pythia-tiny": Size(4, 128, 4, 4096, 1e-3, positions=256),  # ours: a laptop trains it in a minute
    "pythia-14m": Size(6, 128, 4, 50304, 1e-3),
    "pythia-31m": Size(6, 256, 8, 50304, 1e-3),
    "pythia-70m": Size(6, 512, 8, 50304, 1e-3),
    "pythia-160m": Size(12, 768, 12, 50304, 6e-4),
    "pythia-410m": Size(24, 1024, 16, 50304, 3e-4),
    "pythia-1b": Size(16, 2048, 8, 50304, 2.5e-4),
    "pythia-1.4b": Size(24, 2048, 16, 50304, 2e-4),
    "pythia-2.8b": Size(32, 2560, 32, 50304, 1.6e-4),
    "pythia-6.9b": Size(32, 4096, 32, 50432, 1.2e-4),
    "pythia-12b": Size(36, 5120, 40, 50688, 1.2e-4),
}


def pythia_config(name: str, vocab_rows: int | None = None) -> "GPTNeoXConfig":
    """The configuration of a named size, with `vocab_rows` rows of vocabulary instead of the suite's when given.

    Raises InputError that lists the names.
    """
    from transformers import GPTNeoXConfig

    size = named_size(name)
    return GPTNeoXConfig(
        vocab_size=vocab_rows or size.vocab_rows,
        hidden_size=size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.positions,
        bos_token_id=0,
        eos_token_id=0,
    )


def named_size(name: str) -> Size:
    """The row of the table. Raises InputError that lists the names."""
    if name not in SIZES:
        raise InputError(f"unknown model {name!r}; use one of {', '.join(SIZES)}, a folder, or a hub name OWNER/NAME")
    return SIZES[name]


def load(
    name: str, *, revision: str | None = None, vocab_rows: int | None = None, generator: torch.Generator | None = None
) -> "PreTrainedModel":
    """A causal language model in float32: new by name, or with the weights of a folder or of the hub.

    `pythia-160m` is a new model of that size, drawn from `generator` (torch's own when None); a folder that
    transformers wrote, a SeND artifact, or a hub name such as `EleutherAI/pythia-160m` with a `revision` such as
    `step1000`, is loaded whatever its architecture, as long as it is a causal language model. Raises InputError for
    an unknown name, a model that cannot be reached or read, and weights that lack a tensor or have one of another
    shape, and ArtifactError for a corrupt artifact.

    >>> sum(p.numel() for p in load("pythia-tiny", vocab_rows=512).parameters())
    924416
    """
    from transformers import AutoModelForCausalLM

    if not is_loadable(name):
        lm = from_config(pythia_config(name, vocab_rows))
        initialise(lm, generator)
        return lm
    if (Path(name) / MANIFEST).is_file():
        artifact = open_artifact(name, kind="send")
        lm = from_config(artifact_config(artifact))
        weights = artifact.iter_weights()
        load_tensors(lm, {key.removeprefix("lm."): value for key, value in weights if key.startswith("lm.")})
        return lm
    with load_errors("model", name, revision):
        lm, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise InputError(
            f"model {name!r} is incomplete: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}"
        )
    return lm


def artifact_config(artifact: Artifact) -> "PretrainedConfig":
    """The configuration of the language model in an artifact of kind `send`. Raises ArtifactError for a foreign one."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(artifact.text("config.json")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: config.json is no causal language model: {first_line(error)}") from error


def from_config(config: "PretrainedConfig") -> "PreTrainedModel":
    """A causal language model in float32 whose weights are not drawn yet, with fused attention."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


@torch.no_grad()
def initialise(lm: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw a GPT-NeoX's weights as the suite's were: biases 0, norms 1, matrices normal with mean 0.

    Their deviation is sqrt(2 / (5 d)) ("small init", Nguyen and Salazar 2019), but 2 / (L sqrt(d)) in the two maps
    of each block that write to the residual stream ("Wang init", Wang and Komatsuzaki 2021).
    """
    d, depth = lm.config.hidden_size, lm.config.num_hidden_layers
    small, wang = math.sqrt(2 / (5 * d)), 2 / (depth * math.sqrt(d))
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = name.endswith(("attention.dense", "mlp.dense_4h_to_h"))
            module.weight.normal_(0.0, wang if writes else small, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
