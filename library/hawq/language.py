"""The HAWQ-V2 recipe for causal language models: bits for every linear layer, the output layer included."""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from library import order
from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.hawq.costs import BitChoice
from library.hawq.network import converted
from library.hawq.packing import LAYOUT, load_packed
from library.hawq.quantized_recipe import QuantizedRecipe
from library.language import material, pythia
from library.language.blocks import token_batch, token_splits
from library.language.token_store import TokenBlocks
from library.language.tokens import Tokenizer, check_vocabulary, from_json
from library.recipe import Batch, Splits

CONFIG = "config.json"  # in an artifact: the model's configuration


class TokenLogits(nn.Module):
    """A causal language model as a map from tokens (blocks, context) to next-token logits (blocks x context, rows)."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)


class HawqLanguageRecipe(QuantizedRecipe, frozen=True, extra="forbid"):
    """HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852) on a causal language model's linear layers.

    Embeddings and norms stay in full precision. The Gauss-Newton matrix is not offered: a token's S = d^2 l / ds^2 is
    as large as the vocabulary squared.

    >>> HawqLanguageRecipe(lm="folder-of-a-model", fraction=0.5).metric
    'loss'
    """

    kind: ClassVar[str] = "hawq-lm"
    unit: ClassVar[str] = "tokens"

    steps: PositiveInt = 100
    """Optimiser steps of the fine-tuning."""
    batch_size: PositiveInt = 16
    """Blocks of `context` tokens per optimiser step over all workers."""
    probes: int = Field(20, ge=2)
    """Most random probes; fewer when the choice of bits is stable before."""

    lm: str = "models:/send@champion"
    """The trained model: a folder that transformers wrote, a SeND artifact, models:/NAME@ALIAS, or OWNER/NAME."""
    revision: str | None = None
    """Revision of a hub name; None is the newest."""
    corpus: str = "wikipedia"
    """Texts: a shipped sample, a CSV, Parquet or JSONL file, token stores, or a hub data set."""
    text_column: str = "text"
    """The column of a file or hub data set that holds the documents."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the documents to train, validate and test on, where the corpus has no splits of its own."""
    tokenizer: str | None = None
    """bytes, a folder or a hub name; None is the model's own."""
    context: int = Field(128, ge=2)
    """Tokens per block."""
    validation_blocks: PositiveInt | None = 256
    """Validation blocks that an evaluation reads, spread evenly over the validation data; None reads all."""
    probe_blocks: PositiveInt = 32
    """Training blocks, drawn by `seed`, that the curvature is taken on, and the input ranges."""
    probe_batch: PositiveInt = 8
    """Of these at a time."""

    @model_validator(mode="after")
    def _measurable(self) -> "HawqLanguageRecipe":
        if self.curvature == "ggn":
            raise ValueError("curvature: ggn needs the square of the vocabulary per token; use hessian or fisher")
        return self

    def material(self) -> material.Material:
        """Tokeniser and token streams, made once per process."""
        return material.prepare(
            self.corpus,
            column=self.text_column,
            fractions=self.fractions,
            spaces=True,
            tokenizer=self.tokenizer or self.lm,
            revision=self.revision if self.tokenizer is None else None,
            vocab_size=257,
        )

    def datasets(self) -> Splits:
        return token_splits(self.material(), self.context, self.corpus, self.validation_blocks)

    def network(self) -> nn.Module:
        """The full-precision model: one per process, not to be changed. Raises InputError for one that does not fit."""
        model = _loaded(self.lm, self.revision, torch.device("cpu"))
        check_vocabulary(self.material().tokenizer, model.lm.config.vocab_size, self.lm)
        if self.context > (positions := model.lm.config.max_position_embeddings):
            raise InputError(f"context: {self.context} tokens, the model has {positions} positions")
        return model

    def measurement(self) -> list[tuple[Tensor, Tensor]]:
        """Training blocks on which curvature and ranges are measured, in batches: (blocks, context) and their targets.

        Raises InputError when there are not so many.
        """
        blocks = TokenBlocks(self.material().train, self.context, f"corpus {self.corpus!r}, train")
        if len(blocks) < self.probe_blocks:
            raise InputError(f"probe_blocks: {self.probe_blocks} asked, the train split has {len(blocks)}")
        drawn = order.permutation(self.seed, 0, len(blocks))[: self.probe_blocks].tolist()
        edges = [*range(0, self.probe_blocks, self.probe_batch), self.probe_blocks]
        found = []
        for a, b in pairwise(edges):
            batch = token_batch([blocks[i] for i in drawn[a:b]], torch.empty(0))
            found.append((batch["input_ids"], self.targets(batch)))
        return found

    def measured_on(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("context", "probe_blocks", "probe_batch")}

    def teacher(self, device: torch.device) -> nn.Module:
        return _loaded(self.lm, self.revision, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["input_ids"])

    def targets(self, batch: Batch) -> Tensor:
        return batch["targets"].flatten()

    def count(self, batch: Batch) -> int:
        return batch["targets"].numel()

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The layers' bits, and what a reader needs: the model's configuration and its tokeniser."""
        arrays, texts = super().attachments(model)
        texts[CONFIG] = model.lm.config.to_json_string(use_diff=False)
        texts[material.TOKENIZER] = self.material().tokenizer.to_json()
        return arrays, texts


@dataclass(frozen=True)
class QuantizedLanguageModel:
    """A language model whose weights are those that its packed integers stand for; `layout` says which bits."""

    lm: nn.Module
    tokenizer: Tokenizer
    recipe: HawqLanguageRecipe
    layout: dict[str, Any]


def load_quantized_lm(artifact: Artifact) -> QuantizedLanguageModel:
    """The model of an artifact of kind `hawq-lm`. Needs neither the corpus nor the model that it was made from.

    Raises ArtifactError when the artifact is of another kind or its parts do not fit.
    """
    if artifact.kind != HawqLanguageRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'hawq-lm'")
    try:
        recipe = HawqLanguageRecipe.model_validate(artifact.recipe)
        layout = json.loads(artifact.text(LAYOUT))
        choices = {
            entry["name"]: BitChoice(entry["weight_bits"], entry["input_bits"] or 32) for entry in layout["layers"]
        }
        activations = recipe.activations if recipe.activation_bits else None
        empty = TokenLogits(pythia.from_config(pythia.artifact_config(artifact)))
        model = converted(empty, choices, quantizer=recipe.quantizer, activations=activations)
        tokenizer = from_json(artifact.text(material.TOKENIZER))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: its parts do not fit: {str(error).splitlines()[0]}") from error
    load_packed(model, artifact.weights(), source=str(artifact.path))
    return QuantizedLanguageModel(model.eval().lm, tokenizer, recipe, layout)


@lru_cache(maxsize=2)
def _loaded(lm: str, revision: str | None, device: torch.device) -> TokenLogits:
    return TokenLogits(pythia.load(lm, revision=revision)).to(device).eval()
