"""Causal language models block by block: where their layers are, and hidden states that pass one block at a time.

Only one block is on the compute device at any time, so that a model of any size is measured and pruned in the memory of
a block and of the hidden states, which stay on the CPU.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import collective
from library.errors import InputError
from library.recipe import to_device


@dataclass(frozen=True)
class Layout:
    """Dotted names in a transformers causal LM: its list of blocks, the linear layers of a block, the last norm."""

    blocks: str
    linears: tuple[str, ...]
    norm: str


_LLAMA = Layout(
    "model.layers",
    (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "model.norm",
)

LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Layout(
        "gpt_neox.layers",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "gpt_neox.final_layer_norm",
    ),
    "gpt2": Layout("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "transformer.ln_f"),
}


@dataclass(frozen=True)
class BlockLayer:
    """A linear layer of a block. `weight` is a view (out, in), whatever the order in which the module keeps it."""

    name: str
    block: int
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight as (out, in)."""
        weight = self.module.weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.mT

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Set the weight from one of shape (out, in)."""
        self.weight.copy_(weight)


def layout_of(lm: nn.Module) -> Layout:
    """The layout of a model. Raises InputError for an architecture without one, and one whose blocks differ in kind."""
    kind = lm.config.model_type
    if kind not in LAYOUTS:
        raise InputError(f"models of type {kind!r} cannot be taken block by block; there are {', '.join(LAYOUTS)}")
    kinds = set(getattr(lm.config, "layer_types", None) or [])
    if len(kinds) > 1:
        raise InputError(f"the blocks of this {kind} differ in their attention ({', '.join(sorted(kinds))})")
    return LAYOUTS[kind]


def blocks_of(lm: nn.Module) -> nn.ModuleList:
    """The model's blocks in order."""
    return lm.get_submodule(layout_of(lm).blocks)


def block_layers(lm: nn.Module) -> list[BlockLayer]:
    """The linear layers of all blocks, block after block, each in the order of its layout."""
    layout = layout_of(lm)
    return [
        BlockLayer(f"{layout.blocks}.{number}.{name}", number, block.get_submodule(name))
        for number, block in enumerate(blocks_of(lm))
        for name in layout.linears
    ]


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The module on a device while the block lasts, and back on the CPU after it."""
    try:
        yield module.to(device)
    finally:
        module.to("cpu")


class HiddenStates:
    """The hidden states of token sequences on their way through a model in evaluation mode, kept on the CPU.

    tokens       int64 (sequences, length)
    batch_size   sequences that pass a block at once
    """

    def __init__(self, lm: nn.Module, tokens: Tensor, *, batch_size: int) -> None:
        self._batches = [_entry(lm, part) for part in tokens.split(batch_size)]

    @torch.no_grad()
    def run(self, block: nn.Module, *, keep: bool = True) -> None:
        """Let all states pass a block, on its device; with `keep` they go on from there, else they stay before it."""
        device = next(block.parameters()).device
        for number, batch in enumerate(self._batches):
            output = block(batch.states.to(device), *to_device(batch.args, device), **to_device(batch.kwargs, device))
            if keep:
                states = output[0] if isinstance(output, tuple) else output
                self._batches[number] = batch._replace(states=states.cpu())

    @torch.no_grad()
    def negative_log_likelihood(self, lm: nn.Module, targets: Tensor, device: torch.device) -> float:
        """The sum over tokens of -ln p(target), for states past the last block; `targets` (sequences, length)."""
        total, start = 0.0, 0
        last_norm, output = lm.get_submodule(layout_of(lm).norm), lm.get_output_embeddings()
        with on_device(last_norm, device) as norm, on_device(output, device) as head:
            for batch in self._batches:
                wanted = targets[start : start + len(batch.states)].to(device)
                logits = head(norm(batch.states.to(device))).float()
                total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
                start += len(batch.states)
        return total


class _Batch(NamedTuple):
    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    def __init__(self, batch: _Batch) -> None:
        self.batch = batch


@torch.no_grad()
def _entry(lm: nn.Module, tokens: Tensor) -> _Batch:
    """What reaches the first block."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        raise _Reached(_Batch(kwargs["hidden_states"], args, rest) if not args else _Batch(args[0], args[1:], rest))

    hook = blocks_of(lm)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        lm(tokens, use_cache=False)
    except _Reached as reached:
        return reached.batch
    finally:
        hook.remove()
    raise InputError(f"{type(lm).__name__} ends before its first block")


@torch.no_grad()
def perplexity(lm: nn.Module, sequences: Tensor, *, batch_size: int = 8, device: torch.device | str = "cpu") -> float:
    """exp of the mean over all target tokens of -ln p, one block of the model on the device at a time.

    `sequences` int64 (sequences, length + 1): the first `length` tokens of each predict the last `length`. Shared by
    the workers of a run, on each of which the model is. Raises InputError for another shape, tokens outside the
    vocabulary, a batch of none, and when there are fewer sequences than workers.

    >>> from library.language.pythia import load
    >>> lm = load("pythia-tiny", vocab_rows=257, generator=torch.Generator().manual_seed(0)).eval()
    >>> 200 < perplexity(lm, torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))) < 350
    True
    """
    check_tokens(lm, sequences, "sequences", batch_size)
    mine = sequences[own_share(len(sequences), "sequences")]
    states = HiddenStates(lm, mine[:, :-1], batch_size=batch_size)
    for block in blocks_of(lm):
        with on_device(block, torch.device(device)):
            states.run(block)
    found = states.negative_log_likelihood(lm, mine[:, 1:], torch.device(device))
    total, count = collective.all_sum(torch.tensor([found, mine[:, 1:].numel()], dtype=torch.float64)).tolist()
    return math.exp(total / count)


def check_tokens(lm: nn.Module, sequences: Tensor, name: str, batch_size: int) -> None:
    """InputError unless these are tokens (sequences, length + 1) of the model, and a batch holds some."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    whole = not (sequences.is_floating_point() or sequences.is_complex() or sequences.dtype == torch.bool)
    if not whole or sequences.ndim != 2 or sequences.shape[1] < 2:
        raise InputError(
            f"{name} must be whole numbers (sequences, length + 1) of at least 2 tokens each, "
            f"got {sequences.dtype} of shape {tuple(sequences.shape)}"
        )
    vocabulary = lm.get_input_embeddings().num_embeddings
    if not ((sequences >= 0) & (sequences < vocabulary)).all():
        raise InputError(f"{name}: a token is outside the model's vocabulary of {vocabulary}")


def own_share(length: int, name: str) -> slice:
    """This worker's stretch of `length` things. Raises InputError, on all workers alike, when one would have none."""
    if length < collective.world_size():
        raise InputError(f"{length} {name} cannot be shared by {collective.world_size()} workers; use fewer workers")
    mine = collective.share(length)
    return slice(mine.start, mine.stop)
