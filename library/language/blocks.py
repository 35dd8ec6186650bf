"""Blocks of tokens as the data of a recipe: inputs, the tokens that follow them, and the three splits."""

from hashlib import sha256

import torch
from torch import Tensor
from torch.utils.data import Subset

from library.language.material import SPLITS, Material
from library.language.token_store import TokenBlocks
from library.recipe import Splits


def token_splits(made: Material, context: int, corpus: str, validation_blocks: int | None = None) -> Splits:
    """The blocks of `context` tokens of a corpus; batches hold `input_ids` and `targets`, int64 (blocks, context).

    With `validation_blocks` that many validation blocks are taken, spread evenly over them. Raises InputError for a
    split that is shorter than a block.
    """
    train, validation, test = (
        TokenBlocks(stream, context, f"corpus {corpus!r}, {name}")
        for name, stream in zip(SPLITS, made[1:], strict=True)
    )
    count = min(len(validation), validation_blocks or len(validation))
    spread = Subset(validation, [i * len(validation) // count for i in range(count)])
    fingerprint = sha256(" ".join(stream.fingerprint for stream in made[1:]).encode()).hexdigest()
    return Splits(train, spread, test, collate=token_batch, fingerprint=fingerprint)


def token_batch(samples: list[Tensor], keys: Tensor) -> dict[str, Tensor]:
    """Blocks of context + 1 tokens as inputs and targets."""
    blocks = torch.stack(samples)
    return {"input_ids": blocks[:, :-1], "targets": blocks[:, 1:]}
