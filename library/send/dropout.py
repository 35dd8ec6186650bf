"""Sensitivity dropout: a language model, the mask on one block's output, and the record that the mask is chosen from.

Per epoch end t and tracking text n the embedding e[t, n] (width d) is recorded; after a window of epochs the
coordinates whose embeddings changed and varied most are switched off until the next choice (arXiv 2410.15460).
Mask and record are buffers, alike on all workers, so that every engine's checkpoint carries them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from library import collective
from library.errors import InputError, PrismError
from library.send.decode import block_number, transformer_blocks
from library.send.sensitivity import (
    Record,
    Selection,
    checked_coordinates,
    mean_sensitivity,
    normalised,
    partial_sums,
    scale_over_texts,
    scale_sums,
    update,
)

Form = Literal["slt", "last", "pooled"]
Layer = Literal["penultimate", "middle"]


class SensitivityDropout(nn.Module):
    """A Hugging Face causal language model `lm` whose block `layer` has some output coordinates set to exactly zero.

    Buffers, all kept in their own precision when the model is cast, and moved with it:
        mask                            float32 (d,), 0 where a coordinate is dropped, 1 elsewhere
        count                           int64 (), records in the current window
        previous, change, mean, m2      float32 (N, d), the record of the N = `tracking_texts` texts
                                        (`library.send.sensitivity`)

    The mask multiplies the block's output without rescaling, so the gradients of dropped coordinates are exactly
    zero; a mask of ones leaves every bit of the forward pass unchanged. With `masking=False` (used when weights are
    zeroed instead) `mask` records the choice and changes nothing. Raises InputError for a layer that the model lacks.

    >>> from library.language.pythia import load
    >>> model = SensitivityDropout(load("pythia-tiny"))
    >>> model.drop(torch.tensor([3, 5]))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4096])
    """

    mask: Tensor
    count: Tensor
    previous: Tensor
    change: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, lm: nn.Module, *, layer: Layer = "penultimate", tracking_texts: int = 0, masking: bool = True):
        super().__init__()
        self.lm = lm
        self.masking = masking
        self.block = block_number(lm, layer)
        self._embed_form: Form | None = None
        self._hidden: Tensor | None = None
        width = lm.config.hidden_size
        self.register_buffer("mask", torch.ones(width, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for name in ("previous", "change", "mean", "m2"):
            self.register_buffer(name, torch.zeros(tracking_texts, width, dtype=torch.float32))
        transformer_blocks(lm)[self.block - 1].register_forward_hook(self._on_block)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, embed: Form | None = None, **options: Any
    ) -> Any:
        """Logits (batch, tokens, vocabulary); with `embed`, float32 embeddings (batch, d) of the rows instead.

        `embed` is "slt" (second-to-last token), "last" or "pooled" (mean), by the true length in `attention_mask`
        (all tokens when None), of the masked output of the block. With further `options` of the language model, such
        as its cache, its whole output is returned. Raises InputError for an unknown form, an attention mask of another
        shape than the tokens, and a row of fewer tokens than the form needs.
        """
        if embed is None:
            output = self.lm(input_ids=input_ids, attention_mask=attention_mask, **({"use_cache": False} | options))
            return output if options else output.logits
        _check_form(embed, attention_mask, input_ids.shape)
        self._embed_form = embed
        try:
            self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
            return pool(self._hidden, attention_mask, embed)
        finally:
            self._embed_form = self._hidden = None

    @contextmanager
    def without_mask(self) -> Iterator[None]:
        """Inside the block nothing is dropped, bit for bit."""
        masking, self.masking = self.masking, False
        try:
            yield
        finally:
            self.masking = masking

    @property
    def dropped(self) -> Tensor:
        """The dropped coordinates, int64, rising."""
        return (self.mask == 0).nonzero().flatten()

    @torch.no_grad()
    def drop(self, index: Tensor) -> None:
        """Drop exactly the coordinates `index`, whole numbers (k,), on every worker.

        Raises InputError for one outside 0..d - 1, and PrismError when workers would differ.
        """
        index = checked_coordinates(index, len(self.mask))
        self.mask.fill_(1.0)
        self.mask[index.to(self.mask.device)] = 0.0
        hashes = collective.all_gather(sha256(self.mask.cpu().numpy().tobytes()).hexdigest())
        if len(set(hashes)) > 1:
            raise PrismError(f"workers chose {len(set(hashes))} different masks; their records have diverged")

    @torch.no_grad()
    def record(self, embeddings: Tensor) -> None:
        """Add one checkpoint's embeddings (N, d), the same on every worker, to the window."""
        for buffer, value in zip(self._record(), update(self._record(), embeddings), strict=True):
            buffer.copy_(value)

    def sensitivity(self, by: Selection = "product", *, normalise: bool = False) -> Tensor:
        """Mean sensitivity of each coordinate over the records of the window, float64 (d,) on the CPU.

        Raises InputError for fewer than two records.
        """
        count, *moments = self._record()
        record = Record(count.cpu(), *(moment.cpu().double() for moment in moments))
        mean = mean_sensitivity(partial_sums(record, by))
        if not normalise:
            return mean
        return normalised(mean, scale_over_texts(scale_sums(record)), by)

    @torch.no_grad()
    def clear_record(self) -> None:
        """Begin a new window."""
        for buffer in self._record():
            buffer.zero_()

    def _record(self) -> Record:
        return Record(self.count, self.previous, self.change, self.mean, self.m2)

    def _on_block(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.masking:
            output = output.masked_fill(self.mask == 0, 0.0)
        if self._embed_form is not None:
            self._hidden = output
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self


def pool(hidden: Tensor, attention_mask: Tensor | None, form: Form) -> Tensor:
    """One float32 vector (batch, d) per row of `hidden` (batch, tokens, d), by each row's true length.

    `attention_mask` (batch, tokens) is 1 on the tokens of a row, which must be contiguous; padding may stand on
    either side. Raises InputError for an unknown form, a mask of another shape, and rows of no token, or of one when
    `form` is "slt".
    """
    _check_form(form, attention_mask, hidden.shape[:2])
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    lengths = attention_mask.sum(1)
    needed = 2 if form == "slt" else 1
    if int(lengths.min()) < needed:
        raise InputError(f"a text of {int(lengths.min())} tokens has no {form!r} embedding; it needs at least {needed}")
    if form == "pooled":
        weights = attention_mask.to(torch.float32)
        return torch.einsum("btd,bt->bd", hidden.float(), weights) / lengths[:, None]
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    position = (attention_mask * steps).argmax(1) - (needed - 1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position].float()


def _check_form(form: str, attention_mask: Tensor | None, shape: torch.Size) -> None:
    if form not in get_args(Form):
        raise InputError(f"unknown form of embedding {form!r}; allowed: {', '.join(get_args(Form))}")
    if attention_mask is not None and attention_mask.shape != shape:
        raise InputError(f"an attention mask of {tuple(attention_mask.shape)} does not fit tokens of {tuple(shape)}")


@torch.no_grad()
def embed_texts(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, form: Form, batch_size: int = 16
) -> Tensor:
    """Embeddings (N, d) of N texts through `model` (a SensitivityDropout, or what an engine wrapped around it).

    Each worker embeds its share and all of them get the whole. Every worker makes the same number of forward calls,
    as sharded engines need: one whose share is shorter repeats a text and leaves the result out.
    """
    rows, own = padded_share(len(input_ids))
    device = next(model.parameters()).device
    parts = [
        model(input_ids[batch].to(device), attention_mask[batch].to(device), embed=form)
        for batch in torch.tensor(rows).split(batch_size)
    ]
    embeddings = torch.cat(parts)[:own]
    whole = embeddings.new_zeros(len(input_ids), embeddings.shape[1])
    whole[rows[:own]] = embeddings
    return collective.all_sum(whole)


def padded_share(count: int) -> tuple[list[int], int]:
    """This worker's share of `range(count)`, with zeros behind it so that all shares are equally long, and its size."""
    share = collective.share(count)
    longest = -(-count // collective.world_size())
    return [*share, *[0] * (longest - len(share))], len(share)


@torch.no_grad()
def drop_weights(first: nn.Linear, second: nn.Linear, index: Tensor) -> None:
    """Zero the rows `index` (and biases) of an MLP's first map, and columns and biases `index` of its second.

    Parity with the first published scripts of SeND. The rows live in the MLP's hidden space and the columns too,
    the second bias in the residual stream: coordinate i is not the same thing in each, and the optimiser grows them
    again. The mask is what the paper describes. Raises InputError for a coordinate that one of the maps lacks.
    """
    index = checked_coordinates(index, min(first.out_features, *second.weight.shape)).to(first.weight.device)
    first.weight[index] = 0.0
    second.weight[:, index] = 0.0
    for bias in (first.bias, second.bias):
        if bias is not None:
            bias[index] = 0.0
