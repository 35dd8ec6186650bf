"""The SeND recipe: train a causal language model, and every few epochs drop its most sensitive coordinates."""

import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library import collective
from library.errors import InputError
from library.language import material, pythia
from library.language.blocks import token_splits
from library.language.hub import is_loadable
from library.language.token_store import TokenBlocks
from library.language.tokens import Tokenizer, check_vocabulary
from library.recipe import Batch, Recipe, Splits, unwrap
from library.send.cases import entity_cases
from library.send.decode import transformer_blocks
from library.send.detection import ClozeCase, DetectionSettings, calibrate
from library.send.dropout import Form, Layer, SensitivityDropout, drop_weights, embed_texts, padded_share
from library.send.ees import ees
from library.send.eigenscore import eigenscore
from library.send.sensitivity import drop_count, random_indices, top_indices

CALIBRATION = "calibration.json"  # in an artifact: what the calibrated risk rests on


class SendRecipe(Recipe, frozen=True, extra="forbid"):
    """Sensitivity dropout (Mohammadzadeh et al., arXiv 2410.15460) during the training of a causal language model.

    An epoch is `epoch_steps` optimiser steps. At its end the embeddings of the tracking texts are recorded; every
    `window` epochs the `drop_fraction` of coordinates with the largest sensitivity over those records replaces what
    is dropped, from then to the next choice. Nothing is dropped in the first window, nor after training.

    >>> SendRecipe(steps=20, corpus="truthfulqa").lm
    'pythia-tiny'
    """

    kind: ClassVar[str] = "send"
    unit: ClassVar[str] = "tokens"

    steps: PositiveInt = 300
    """Optimiser steps."""
    batch_size: PositiveInt = 16
    """Blocks of `context` tokens per optimiser step over all workers."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it."""

    lm: str = "pythia-tiny"
    """A new Pythia by size (pythia-tiny, -14m ... -12b), or weights from a folder, an artifact or a hub OWNER/NAME."""
    revision: str | None = None
    """Revision of the hub's weights, such as step1000; None is the newest."""
    context: int = Field(128, ge=2)
    """Tokens per block."""
    freeze_blocks: NonNegativeInt = 0
    """How many blocks, from the first, do not learn."""

    corpus: str = "wikipedia"
    """wikipedia, truthfulqa or medhalt (shipped); a CSV, Parquet or JSONL file; token stores; a hub data set."""
    text_column: str = "text"
    """The column of a file or hub data set that holds the documents."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the documents to train, validate and test on, where the corpus has no splits of its own."""
    wikitext_spaces: bool = True
    """Keep WikiText's spaces around punctuation, as the shipped passages have them; False takes them away."""
    tokenizer: str | None = None
    """bpe (trained on the corpus), bytes, a folder or a hub name; None is bpe for a new model, else the model's own."""
    vocab_size: int = Field(4096, ge=257)
    """Entries of a bpe tokeniser."""

    validation_blocks: PositiveInt | None = 512
    """Validation blocks that an evaluation reads, spread evenly over the validation data; None reads all."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moments."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; biases and norms do not decay."""
    warmup_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly to its peak."""
    lr_floor: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak; 1 keeps the rate constant."""

    selection: Literal["product", "change", "variance", "random", "none"] = "product"
    """What picks what is dropped: change x variance (product, the paper), either, chance, or none (plain training)."""
    drop_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the coordinates that are dropped (K% in the paper)."""
    window: int = Field(3, ge=2)
    """Epochs between two choices (T in the paper)."""
    epoch_steps: PositiveInt | None = 40
    """Optimiser steps per epoch; None is one pass over the training blocks."""
    layer: Layer = "penultimate"
    """Block whose output is recorded and masked."""
    form: Form = "slt"
    """Embedding of a tracking text: its second-to-last token (slt), its last, or the mean over its tokens (pooled)."""
    dropping: Literal["mask", "weights"] = "mask"
    """Mask the block's output, or zero weights of its MLP each epoch like the first scripts (GPT-NeoX; engine ddp)."""
    normalise: bool = False
    """Divide each coordinate by its deviation over the texts, so that a large scale alone is not sensitive."""
    tracking_texts: PositiveInt = 64
    """How many validation documents are tracked."""
    record_batch: PositiveInt = 8
    """Tracking texts, or prompts, that one worker handles at a time at an epoch's end."""

    prompts: NonNegativeInt = 8
    """Test documents whose openings are continued at each epoch's end to log EigenScore and EES; 0 leaves that out."""
    prompt_tokens: PositiveInt = 16
    """Tokens of each opening."""
    answers: DetectionSettings = DetectionSettings()
    """How the continuations are drawn and scored."""
    calibration_cases: NonNegativeInt = 160
    """Validation documents whose entities the trained model is asked for, to calibrate its risk; 0 leaves that out."""
    loss_threshold: PositiveFloat | None = None
    """Stop when the validation loss is below this (and EES below its own threshold, when set)."""
    ees_threshold: float | None = None
    """Stop when EES is below this (and the loss below its own threshold, when set)."""

    @model_validator(mode="after")
    def _ees_is_measured(self) -> Self:
        if self.ees_threshold is not None and not self.prompts:
            raise ValueError("ees_threshold: EES is not measured with prompts=0; use prompts=8, say")
        return self

    @classmethod
    def pretraining(cls, size: str, **changes: Any) -> Self:
        """The suite's own pre-training of a size: 143000 steps of 1024 x 2048 tokens, an epoch per kept checkpoint.

        >>> SendRecipe.pretraining("pythia-1b", corpus="/data/pile").lr
        0.00025
        """
        full = {
            "lm": size,
            "lr": pythia.named_size(size).lr,
            "steps": 143_000,
            "batch_size": 1024,
            "context": 2048,
            "epoch_steps": 1000,
            "tokenizer": "EleutherAI/gpt-neox-20b",
            "tracking_texts": 256,
            "prompts": 64,
        }
        return cls(**(full | changes))

    @classmethod
    def adaptation(cls, lm: str, steps: int, **changes: Any) -> Self:
        """The paper's continued training of a pre-trained model: AdamW at a constant 1e-4, one text of 512 per step."""
        full = {
            "lm": lm,
            "steps": steps,
            "batch_size": 1,
            "context": 512,
            "epoch_steps": None,
            "lr": 1e-4,
            "betas": (0.9, 0.999),
            "weight_decay": 0.01,
            "warmup_fraction": 0.0,
            "lr_floor": 1.0,
        }
        return cls(**(full | changes))

    def material(self) -> material.Material:
        """Tokeniser and token streams, made once per process."""
        return material.prepare(
            self.corpus,
            column=self.text_column,
            fractions=self.fractions,
            spaces=self.wikitext_spaces,
            tokenizer=self.tokenizer or (self.lm if is_loadable(self.lm) else "bpe"),
            revision=self.revision if self.tokenizer is None else None,
            vocab_size=self.vocab_size,
        )

    def datasets(self) -> Splits:
        made = self.material()
        splits = token_splits(made, self.context, self.corpus, self.validation_blocks)
        if self._tracks():
            material.tracking_texts(made.validation, self.tracking_texts, self.context)
        if self.prompts:
            material.prompts(made.test, self.prompts, self.prompt_tokens)
        return splits

    def model(self) -> SensitivityDropout:
        tokenizer = self.material().tokenizer
        rows = tokenizer.vocab_size if self.tokenizer in (None, "bpe", "bytes") else None
        return self.wrap(pythia.load(self.lm, revision=self.revision, vocab_rows=rows), tokenizer)

    def wrap(self, lm: nn.Module, tokenizer: Tokenizer) -> SensitivityDropout:
        """`lm` with what this recipe drops in it. Raises InputError where the two do not fit."""
        check_vocabulary(tokenizer, lm.config.vocab_size, self.lm)
        positions = lm.config.max_position_embeddings
        opening = self.prompt_tokens if self.prompts else int(self.calibration_cases > 0)
        needed = max(self.context, opening + self.answers.max_new_tokens if opening else 0)
        if needed > positions:
            raise InputError(f"{self.lm} has {positions} positions, {needed} are needed; use a shorter context")
        if self.dropping == "weights" and lm.config.model_type != "gpt_neox":
            raise InputError(f"dropping: 'weights' is defined for GPT-NeoX, not {lm.config.model_type}; use 'mask'")
        if self.selection != "none":
            drop_count(self.drop_fraction, lm.config.hidden_size)
        blocks = transformer_blocks(lm)
        if self.freeze_blocks > len(blocks):
            raise InputError(f"freeze_blocks: {self.freeze_blocks} of the {len(blocks)} blocks of {self.lm}")
        for block in blocks[: self.freeze_blocks]:
            block.requires_grad_(False)
        return SensitivityDropout(
            lm,
            layer=self.layer,
            tracking_texts=self.tracking_texts if self._tracks() else 0,
            masking=self.dropping == "mask",
        )

    def optimizer(self, model: nn.Module) -> Optimizer:
        learning = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in learning if len(_shape(p)) >= 2]
        vectors = [p for p in learning if len(_shape(p)) < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW(groups, lr=self.lr, betas=self.betas)

    def schedule(self, optimizer: Optimizer) -> LRScheduler:
        warmup = math.ceil(self.warmup_fraction * self.steps)
        return LambdaLR(optimizer, partial(_rate, steps=self.steps, warmup=warmup, floor=self.lr_floor))

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.outputs(model, batch).float(), self.targets(batch))}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Next-token logits (tokens, vocabulary)."""
        return model(batch["input_ids"]).flatten(0, 1)

    def targets(self, batch: Batch) -> Tensor:
        """The tokens that follow (tokens,)."""
        return batch["targets"].flatten()

    def count(self, batch: Batch) -> int:
        return batch["targets"].numel()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over target tokens, in nats.

        `loss` and the next-token `entropy` are with nothing dropped, `loss_masked` is with the current mask, when there
        is one. The perplexity is `exp(loss)` of the mean over all workers, which is no mean itself.
        """
        inner: SensitivityDropout = unwrap(model)
        masked = inner.masking and len(inner.dropped) > 0
        sums: dict[str, float] = {}
        total = 0
        for batch in batches:
            with inner.without_mask():
                logits = model(batch["input_ids"]).float().flatten(0, 1)
            values = {
                "loss": F.cross_entropy(logits, batch["targets"].flatten()),
                "entropy": torch.distributions.Categorical(logits=logits, validate_args=False).entropy().mean(),
            }
            if masked:
                values["loss_masked"] = self.losses(model, batch)["loss"]
            units = self.count(batch)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value) * units
            total += units
        return {name: value / total for name, value in sums.items()}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        if self.dropping == "weights" and self.selection != "none":
            _check_whole(model)
        epoch, rest = divmod(step, self._epoch_steps())
        if rest or (self.selection == "none" and not self.prompts):
            return None
        metrics: dict[str, float] = {"epoch": epoch}
        inner: SensitivityDropout = unwrap(model)
        if self._tracks():
            texts = material.tracking_texts(self.material().validation, self.tracking_texts, self.context)
            inner.record(embed_texts(model, *texts, form=self.form, batch_size=self.record_batch))
        if self.selection != "none" and epoch % self.window == 0:
            before = inner.dropped
            inner.drop(self._select(inner, epoch))
            metrics["newly_dropped"] = int((~torch.isin(inner.dropped, before)).sum())
        if self.dropping == "weights" and len(inner.dropped):
            mlp = transformer_blocks(inner.lm)[inner.block - 1].mlp
            drop_weights(mlp.dense_h_to_4h, mlp.dense_4h_to_h, inner.dropped)
        metrics["dropped"] = len(inner.dropped)
        return metrics | (self._self_consistency(model) if self.prompts else {})

    def finished(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether every threshold that is set is met; a value that is not known yet meets none."""
        limits = {"loss": self.loss_threshold, "ees": self.ees_threshold}
        asked = {name: limit for name, limit in limits.items() if limit is not None}
        return bool(asked) and all(metrics.get(name, math.inf) < limit for name, limit in asked.items())

    def flops_per_unit(self, model: nn.Module) -> float:
        """6 per parameter outside the input embedding, and 12 L d T for attention over T tokens, per token."""
        lm = unwrap(model).lm
        weights = sum(p.numel() for p in lm.parameters()) - lm.get_input_embeddings().weight.numel()
        return 6 * weights + 12 * lm.config.num_hidden_layers * lm.config.hidden_size * self.context

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tokeniser, the language model's configuration, and the calibration with its record, if asked for."""
        made, inner = self.material(), unwrap(model)
        texts = {
            material.TOKENIZER: made.tokenizer.to_json(),
            "config.json": inner.lm.config.to_json_string(use_diff=False),
        }
        if not self.calibration_cases:
            return {}, texts
        cases = self.entity_cases("validation", self.calibration_cases)
        with inner.without_mask():
            arrays, record = calibrate(
                inner.lm, made.tokenizer, cases, self.answers, seed=self.seed, batch_size=self.record_batch
            )
        return arrays, texts | {CALIBRATION: json.dumps(record, indent=1)}

    def entity_cases(self, split: Literal["validation", "test"], count: int) -> list[ClozeCase]:
        """At most `count` documents of a split, each cut before a named entity."""
        return entity_cases(self.material(), self.corpus, split, count, spaces=self.wikitext_spaces)

    def _tracks(self) -> bool:
        return self.selection in ("product", "change", "variance")

    def _epoch_steps(self) -> int:
        return self.epoch_steps or max(1, len(TokenBlocks(self.material().train, self.context)) // self.batch_size)

    def _select(self, inner: SensitivityDropout, epoch: int) -> Tensor:
        width = len(inner.mask)
        count = drop_count(self.drop_fraction, width)
        if self.selection == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            return random_indices(width, count, generator=generator)
        chosen = top_indices(inner.sensitivity(self.selection, normalise=self.normalise), count)
        inner.clear_record()
        return chosen

    def _self_consistency(self, model: nn.Module) -> dict[str, float]:
        """Mean EigenScore and EES over the prompts, nothing dropped: under a mask they fall by construction."""
        made, inner = self.material(), unwrap(model)
        prompts = material.prompts(made.test, self.prompts, self.prompt_tokens)
        rows, own = padded_share(len(prompts))
        sums = torch.zeros(3, dtype=torch.float64)
        with inner.without_mask():
            for start in range(0, len(rows), self.record_batch):
                answers = self.answers.draw(
                    inner.lm,
                    [prompts[row] for row in rows[start : start + self.record_batch]],
                    seed=self.seed,
                    stop_token=made.tokenizer.end_of_text,
                    fixed_length=collective.active(),
                    forward=model,
                )
                kept = answers.sampled.embeddings[: max(0, own - start)].cpu()
                if len(kept):
                    spread = eigenscore(kept, convention=self.answers.convention, alpha=self.answers.alpha)
                    efficient = ees(kept)
                    variance = efficient.standard_error.square()
                    sums += torch.stack([spread, efficient.value, variance], 1).sum(0)
        total = collective.all_sum(sums)
        return {
            "eigenscore": float(total[0]) / len(prompts),
            "ees": float(total[1]) / len(prompts),
            "ees_standard_error": math.sqrt(float(total[2])) / len(prompts),
        }


def _check_whole(model: nn.Module) -> None:
    sharded = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())
    if sharded or type(model).__name__ == "DeepSpeedEngine":
        raise InputError("dropping: 'weights' writes into parameters, which this engine shards or copies; use ddp")


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the true shape there


def _rate(step: int, *, steps: int, warmup: int, floor: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2
