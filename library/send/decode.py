"""Draw several answers per prompt in one batch, and embed each from the decoding pass itself.

Every prompt is read once; its key-value cache is then repeated to one greedy and K sampled rows, and all rows of
all prompts take each further step together. A hook on one block keeps the hidden state of the newest token, so that
when a row ends its embedding is already there and nothing is encoded a second time.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.errors import InputError

Layer = Literal["penultimate", "middle"] | int
Form = Literal["last", "slt", "pooled"]


@dataclass(frozen=True)
class Answers:
    """Generated answers; the leading shape `...` is (prompts,) for greedy and (prompts, K) for sampled ones.

    tokens      int64 (..., steps); 0 after the end of an answer, the stop token itself is not part of it
    lengths     int64 (...); 0 for an empty answer
    logprobs    float32 (..., steps): log-probability of each token under the model, at temperature 1 and before
                any truncation, in nats; 0 after the end
    embeddings  float32 (..., d); of an empty answer, the embedding of the last token of its prompt
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor
    embeddings: Tensor

    @property
    def mean_logprob(self) -> Tensor:
        """The mean log-probability per token, (...); 0 for an empty answer."""
        return self.logprobs.sum(-1) / self.lengths.clamp(min=1)

    def token_lists(self) -> list:
        """The answers' tokens as lists nested like the leading shape, without what follows their ends."""
        if self.lengths.dim() > 1:
            parts = zip(self.tokens, self.lengths, self.logprobs, self.embeddings, strict=True)
            return [Answers(*part).token_lists() for part in parts]
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Decoded:
    """What `sample` returns: the greedy answer of each prompt, and its K sampled ones."""

    greedy: Answers
    sampled: Answers

    @property
    def all_empty(self) -> Tensor:
        """Bool (prompts,): all K sampled answers are empty, so that their embeddings are the prompt's own."""
        return (self.sampled.lengths == 0).all(-1)


@torch.no_grad()
def sample(
    lm: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 10,
    temperature: float = 0.5,
    top_k: int | None = 5,
    top_p: float = 0.99,
    max_new_tokens: int = 32,
    seed: int | Sequence[int] = 0,
    layer: Layer = "penultimate",
    form: Form = "last",
    stop_token: int | Sequence[int] | None = 0,
    fixed_length: bool = False,
    forward: Callable[..., Any] | None = None,
) -> Decoded:
    """The greedy answer and K = `samples` sampled answers to each prompt, with an embedding of each answer.

    Defaults are those of INSIDE (Chen et al., ICLR 2024, arXiv 2402.03744) but for the layer. A row ends at a stop
    token or after `max_new_tokens`. The embedding is the residual stream after one block (`block_number`) at the
    last generated token (`form="last"`), at the one before it (`"slt"`: of a one-token answer, the last token of
    the prompt), or its mean over the generated tokens (`"pooled"`). Equal samples of a prompt share one embedding,
    bit for bit.

    The noise of a prompt is a function of its seed and its tokens alone: answers do not depend on the other prompts
    of the batch or on their order (up to the rounding of the model's arithmetic), and a longer `max_new_tokens`
    continues the same answers. `seed` is one number, or one for each prompt.

    `lm` is a Hugging Face causal language model in evaluation mode. `forward` is what to call when an engine wraps
    it (default `lm`): it takes `input_ids`, `attention_mask`, `position_ids`, `use_cache`, `logits_to_keep` and the
    cache by keyword, the latter under the name that `lm.forward` has for it. There is one call for the prompts
    and one per step; the loop ends when all rows have ended, but with `fixed_length` after exactly
    1 + `max_new_tokens` calls, as sharded engines need, whose every call is a collective of all workers.

    Raises InputError for an empty prompt, tokens that are not whole numbers of the vocabulary, a seed that is no whole
    number, a prompt that with `max_new_tokens` exceeds the model's positions, a setting out of range, and a model in
    training mode.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> config = GPTNeoXConfig(vocab_size=256, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        ...                        intermediate_size=64, max_position_embeddings=64)
        >>> lm = GPTNeoXForCausalLM(config).eval()
        >>> decoded = sample(lm, [list(b"The capital of France is"), list(b"Two and two")], max_new_tokens=8)
        >>> tuple(decoded.sampled.embeddings.shape), tuple(decoded.greedy.tokens.shape)
        ((2, 10, 32), (2, 8))
    """
    prompts = [_whole_numbers(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    _check(lm, prompts, samples, temperature, top_k, top_p, max_new_tokens, form)
    seeds = _whole_numbers([seed] * len(prompts) if _is_whole(seed) else seed, "seed")
    if len(seeds) != len(prompts):
        raise InputError(f"seed: {len(seeds)} seeds for {len(prompts)} prompts; give one number, or one per prompt")
    block = transformer_blocks(lm)[block_number(lm, layer) - 1]
    device = next(lm.parameters()).device
    rows = len(prompts) * (samples + 1)  # prompt-major; the first row of each prompt is the greedy one
    noise = torch.stack([_noise(s, p, samples, max_new_tokens) for s, p in zip(seeds, prompts, strict=True)], 1)
    noise = noise.to(device)  # (steps, prompts, K)
    stops = [stop_token] if isinstance(stop_token, int) else list(stop_token or [])
    stops = torch.tensor(stops, dtype=torch.int64, device=device)

    with newest_output(block) as newest:
        step = _Stepper(lm, forward or lm, newest, device)
        logits, hidden = step.read(prompts, samples + 1)
        latest, before, total = hidden, hidden, torch.zeros_like(hidden)
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        tokens, logprobs = [], []
        for uniforms in noise:
            chosen = _choose(logits, uniforms, temperature, top_k, top_p)
            alive = alive & ~torch.isin(chosen, stops)
            if not fixed_length and not alive.any():
                break
            chosen = torch.where(alive, chosen, 0)
            lengths += alive
            tokens.append(chosen)
            logprobs.append(torch.where(alive, _logprob(logits, chosen), 0.0))
            logits, hidden = step.advance(chosen)
            before = torch.where(alive[:, None], latest, before)
            latest = torch.where(alive[:, None], hidden, latest)
            total += torch.where(alive[:, None], hidden, 0.0)
    pooled = torch.where(lengths[:, None] > 0, total / lengths.clamp(min=1)[:, None], latest)
    answers = Answers(
        torch.stack(tokens, -1) if tokens else torch.zeros(rows, 0, dtype=torch.int64, device=device),
        lengths,
        torch.stack(logprobs, -1) if logprobs else torch.zeros(rows, 0, device=device),
        {"last": latest, "slt": before, "pooled": pooled}[form],
    )
    folded = [value.unflatten(0, (len(prompts), samples + 1)) for value in vars(answers).values()]
    sampled = Answers(*(value[:, 1:] for value in folded))
    return Decoded(Answers(*(value[:, 0] for value in folded)), _sharing_embeddings(sampled))


def truncated_distribution(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float
) -> tuple[Tensor, Tensor]:
    """The distribution after temperature, then top-k, then nucleus truncation, sorted by falling probability.

    `logits` (..., vocabulary) -> probabilities float64 (..., n) that sum to 1 and tokens int64 (..., n), with n the
    vocabulary or the largest number kept by top-k in any row; cut tokens have probability 0. As in transformers'
    warpers, tokens that tie with the k-th are kept, and of what top-k leaves the nucleus keeps each token that less
    than `top_p` of the probability precedes (Holtzman et al., ICLR 2020), hence always the first.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        values, tokens = logits.sort(-1, descending=True)
    else:
        values, tokens = logits.topk(top_k, dim=-1)
        threshold = values[..., -1:]
        kept = int((logits >= threshold).sum(-1).max())
        if kept > top_k:
            values, tokens = logits.topk(kept, dim=-1)
            values = values.masked_fill(values < threshold, -torch.inf)
    values = values.double()
    probabilities = ((values - values[..., :1]) / temperature).softmax(-1)  # a tiny temperature cannot overflow
    if top_p < 1:
        preceding = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(preceding >= top_p, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens


def transformer_blocks(lm: nn.Module) -> nn.ModuleList:
    """The model's list of blocks (`gpt_neox.layers`, `model.layers`, `transformer.h`). Raises InputError if none."""
    depth = lm.config.num_hidden_layers
    for module in lm.base_model.children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InputError(f"{type(lm).__name__} has no list of {depth} blocks; use a decoder such as GPT-NeoX or Llama")


def block_number(lm: nn.Module, layer: Layer) -> int:
    """The number, from 1, of the block that `layer` names: L - 1 for penultimate, (L + 1) // 2 for middle."""
    depth = lm.config.num_hidden_layers
    number = {"penultimate": depth - 1, "middle": (depth + 1) // 2}.get(layer, layer)
    if not isinstance(number, int) or not 1 <= number <= depth:
        raise InputError(
            f"layer: {layer!r} is not in this model of {depth} blocks; "
            f"use 'penultimate' (from 2 blocks), 'middle', or a number from 1 to {depth}"
        )
    return number


@contextmanager
def newest_output(block: nn.Module) -> Iterator[list[Tensor]]:
    """A list whose one entry is the hidden state (batch, tokens, d) that `block` gave last, while the context lasts."""
    newest: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        newest[:] = [output[0] if isinstance(output, tuple) else output]

    handle = block.register_forward_hook(keep)
    try:
        yield newest
    finally:
        handle.remove()


class _Stepper:
    """One model with its growing cache: reads the prompts, then advances every row by one token at a time."""

    def __init__(self, lm: nn.Module, forward: Callable[..., Any], newest: list[Tensor], device: torch.device):
        from transformers import DynamicCache

        self.forward, self.newest, self.device = forward, newest, device
        # transformers renamed the argument within its fifth version
        self.cache_name = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"
        self.cache = DynamicCache(config=lm.config)

    def read(self, prompts: Sequence[Sequence[int]], repeats: int) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()  # padding on the left
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        logits, hidden = self._call(ids)
        self.cache.batch_repeat_interleave(repeats)
        self.mask, self.positions, logits, hidden = (
            value.repeat_interleave(repeats, 0) for value in (self.mask, self.positions[:, -1:], logits, hidden)
        )
        return logits, hidden

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        self.positions = self.positions + 1
        return self._call(tokens[:, None])

    def _call(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.forward(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.cache = outputs[self.cache_name]  # an engine that casts its inputs may have filled a copy
        return outputs.logits[:, -1].float(), self.newest[0][:, -1].float()


def _choose(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """The next token of each row: the likeliest in a prompt's first row, elsewhere by inverting the distribution."""
    folded = logits.unflatten(0, (uniforms.shape[0], -1))
    greedy, sampled = folded[:, :1].argmax(-1), folded[:, 1:]
    probabilities, tokens = truncated_distribution(sampled, temperature, top_k, top_p)
    cumulative = probabilities.cumsum(-1)
    aim = uniforms[..., None] * cumulative[..., -1:]
    place = torch.searchsorted(cumulative, aim, right=True).clamp(max=tokens.shape[-1] - 1)
    return torch.cat([greedy, tokens.gather(-1, place)[..., 0]], 1).flatten()


def _sharing_embeddings(sampled: Answers) -> Answers:
    """Give equal samples of a prompt the embedding of the first of them: rows of one batch may round differently."""
    prompts, samples = sampled.lengths.shape
    prompt = torch.arange(prompts, device=sampled.tokens.device)[:, None, None].expand(-1, samples, 1)
    keys = torch.cat([prompt, sampled.lengths[..., None], sampled.tokens], -1).flatten(0, 1)
    _, group = keys.unique(dim=0, return_inverse=True)
    rows = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(rows, len(keys)).scatter_reduce(0, group, rows, "amin")[group]
    embeddings = sampled.embeddings.flatten(0, 1)[first].unflatten(0, (prompts, samples))
    return replace(sampled, embeddings=embeddings)


def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _noise(seed: int, prompt: Sequence[int], samples: int, steps: int) -> Tensor:
    """Uniform numbers float64 (steps, K) that depend on the seed and the prompt's tokens alone."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(steps, samples, generator=generator, dtype=torch.float64)


def _whole_numbers(numbers: Sequence[int], name: str) -> list[int]:
    """Plain numbers, whatever holds them, so that equal prompts are equal."""
    found = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if not isinstance(found, Sequence) or not all(map(_is_whole, found)):
        raise InputError(f"{name}: {str(numbers)[:60]!r} are not whole numbers")
    return [int(number) for number in found]


def _is_whole(number: Any) -> bool:
    if isinstance(number, Tensor):
        return number.ndim == 0 and not (number.is_floating_point() or number.is_complex())
    return isinstance(number, Integral)


def _check(
    lm: nn.Module,
    prompts: Sequence[Sequence[int]],
    samples: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    max_new_tokens: int,
    form: str,
) -> None:
    if lm.training:
        raise InputError("the model is in training mode; call its eval() before decoding")
    if samples < 1:
        raise InputError(f"samples: {samples}; at least 1 is needed")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature: {temperature}; use a positive number (the greedy answer comes with every call)")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k: {top_k}; use at least 1, or None for no limit")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p}; use a number above 0 and at most 1")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens}; at least 1 is needed")
    if form not in ("last", "slt", "pooled"):
        raise InputError(f"form: {form!r}; use 'last', 'slt' or 'pooled'")
    if not prompts:
        raise InputError("prompts: none given; at least 1 is needed")
    vocabulary, longest = lm.config.vocab_size, lm.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompts[{i}]: empty; a prompt needs at least 1 token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(f"prompts[{i}]: a token is outside the model's vocabulary of {vocabulary}")
        if len(prompt) + max_new_tokens > longest:
            raise InputError(
                f"prompts[{i}]: too long, {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed "
                f"the model's {longest} positions"
            )
