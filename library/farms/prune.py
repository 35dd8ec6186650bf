"""Prune a causal language model: exponents, ratios, and block after block the weights.

Calibration sequences are shared by the workers of a run, and what the pruners need of them is summed over the workers;
so are the layers whose exponents are taken, and the layers of a block that are pruned. Every worker ends with the same
pruned model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from pydantic import BaseModel, Field, PositiveInt, model_validator
from torch import Tensor, nn

from library import collective
from library.errors import InputError
from library.farms.allocation import CAP, Mapping, achieved, allocate
from library.farms.analysis import Settings
from library.farms.balance import shared_alphas
from library.farms.causal_lm import (
    BlockLayer,
    HiddenStates,
    block_layers,
    blocks_of,
    check_tokens,
    on_device,
    own_share,
    perplexity,
)
from library.farms.layers import Layer
from library.farms.pruning import InputStatistics, Pruner, prune_weight

if TYPE_CHECKING:
    import pandas as pd

Tell = Callable[[str], None]


class Pruning(BaseModel, frozen=True, extra="forbid"):
    """How much of a language model is pruned, of which layers, and how."""

    pruner: Pruner = "sparsegpt"
    """What is pruned of a layer: its smallest weights (magnitude), smallest by inputs (wanda), or with a make-up."""
    sparsity: float = Field(0.5, gt=0, lt=CAP)
    """Share of the weights of the blocks' linear layers that is pruned."""
    pattern: tuple[PositiveInt, PositiveInt] | None = None
    """N M: prune N of every M columns of each layer; sparsity is then N / M everywhere."""
    mapping: Mapping = "block"
    """Ratios: all alike (uniform), one per block by its mean exponent, or one per layer."""
    epsilon: tuple[float, ...] = Field((0.1, 0.2, 0.3), min_length=1)
    """How far ratios differ. Of several, the one of least perplexity on the validation text is taken."""
    analysis: Settings = Settings.language_models()
    """How exponents are taken: method plain is AlphaPruning, farms is FARMS."""
    compatible: bool = False
    """Keep the published code's numbers: clipped ratios lose budget, thresholds prune one weight more."""

    @model_validator(mode="after")
    def _pattern_prunes_some(self) -> Self:
        if self.pattern is not None and self.pattern[0] >= self.pattern[1]:
            raise ValueError(f"pattern: {self.pattern[0]}:{self.pattern[1]} prunes all; N must be less than M")
        return self

    @model_validator(mode="after")
    def _epsilons_in_range(self) -> Self:
        if not all(0 <= epsilon < 1 for epsilon in self.epsilon):
            raise ValueError(f"epsilon: each must lie in [0, 1), got {', '.join(map(str, self.epsilon))}")
        return self

    @property
    def candidates(self) -> tuple[float, ...]:
        """The epsilons that make a difference."""
        return self.epsilon if self.mapping != "uniform" and self.pattern is None else (0.0,)

    def ratios(self, layers: list[BlockLayer], alphas: list[float], epsilon: float) -> Tensor:
        """The share to prune of each layer."""
        parameters = [layer.weight.numel() for layer in layers]
        if self.pattern is not None or self.mapping == "uniform":
            share = self.sparsity if self.pattern is None else self.pattern[0] / self.pattern[1]
            return torch.full((len(layers),), share, dtype=torch.float64)
        return allocate(
            alphas,
            parameters,
            self.sparsity,
            epsilon=epsilon,
            blocks=[layer.block for layer in layers] if self.mapping == "block" else None,
            compatible=self.compatible,
        )


class Texts(NamedTuple):
    """Sequences of tokens, int64 (sequences, length + 1): to calibrate on, to choose epsilon by, and to judge by."""

    calibration: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Pruned:
    """What pruning a model gave: its `metrics`, a row per layer, and the perplexity on validation text per epsilon."""

    metrics: dict[str, float]
    layers: "pd.DataFrame"
    choices: dict[float, float]


def prune_causal_lm(
    lm: nn.Module,
    texts: Texts,
    pruning: Pruning | None = None,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    tell: Tell = lambda line: None,
) -> Pruned:
    """Prune a transformers causal LM in place. It stays on the CPU, one block at a time goes to the device.

    Perplexity on the test text before and after; where several epsilons are given, each is tried on the dense model and
    the one of least perplexity on the validation text is kept (twice the memory of the model). With torch.distributed
    initialised, all workers must call this with the same model and texts.

    Raises InputError for an unknown architecture, layers without an exponent where ratios need them, fewer sequences
    than workers, texts that are not tokens of the model, and a model whose perplexity is not finite.

    >>> from library.language.pythia import load
    >>> lm = load("pythia-tiny", vocab_rows=257, generator=torch.Generator().manual_seed(0))
    >>> tokens = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    >>> pruned = prune_causal_lm(lm, Texts(tokens, tokens, tokens), Pruning(sparsity=0.5, epsilon=(0.2,)))
    >>> round(pruned.metrics["sparsity"], 3)
    0.5
    """
    import pandas as pd

    pruning = pruning or Pruning()
    device = torch.device(device)
    for name, tokens in texts._asdict().items():
        check_tokens(lm, tokens, name, batch_size)
    lm.eval()
    layers = block_layers(lm)
    tell(f"{len(layers)} layers in {len(blocks_of(lm))} blocks")
    measure = {"batch_size": batch_size, "device": device}
    before = perplexity(lm, texts.test, **measure)
    _check_finite(before)
    tell(f"perplexity {before:.2f} on test text")
    alphas = exponents(layers, pruning.analysis) if pruning.mapping != "uniform" else [float("nan")] * len(layers)
    dense = [layer.weight.clone() for layer in layers] if len(pruning.candidates) > 1 else []
    choices: dict[float, float] = {}
    for epsilon in pruning.candidates if dense else ():
        prune_blocks(lm, pruning, pruning.ratios(layers, alphas, epsilon), texts.calibration, **measure)
        choices[epsilon] = perplexity(lm, texts.validation, **measure)
        tell(f"epsilon {epsilon:g}: perplexity {choices[epsilon]:.2f} on validation text")
        for layer, weight in zip(layers, dense, strict=True):
            layer.assign(weight)
    best = min(choices, key=choices.__getitem__) if choices else pruning.candidates[0]
    ratios = pruning.ratios(layers, alphas, best)
    prune_blocks(lm, pruning, ratios, texts.calibration, **measure, tell=tell)
    after = perplexity(lm, texts.test, **measure)
    parameters = [layer.weight.numel() for layer in layers]
    zeros = [int((layer.weight == 0).sum()) for layer in layers]
    table = pd.DataFrame(
        {
            "layer": [layer.name for layer in layers],
            "block": [layer.block for layer in layers],
            "parameters": parameters,
            "alpha": alphas,
            "ratio": ratios.tolist(),
            "sparsity": [zero / count for zero, count in zip(zeros, parameters, strict=True)],
        }
    )
    metrics = {
        "perplexity_before": before,
        "perplexity_after": after,
        "perplexity_ratio": after / before,
        "sparsity": sum(zeros) / sum(parameters),
        "sparsity_asked": achieved(ratios, parameters),
        "epsilon": best,
    }
    return Pruned(metrics, table, choices)


def exponents(layers: list[BlockLayer], settings: Settings) -> list[float]:
    """The exponent of each layer; the workers share the layers."""
    found = [
        Layer(layer.name, "linear", tuple(layer.weight.shape), tensor=layer.weight)  # a view: nothing is copied
        for layer in layers
    ]
    return shared_alphas(found, settings)


@torch.no_grad()
def prune_blocks(
    lm: nn.Module,
    pruning: Pruning,
    ratios: Tensor,
    calibration: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    tell: Tell = lambda line: None,
) -> None:
    """Prune the layers of each block on what reaches it through the pruned blocks before, by a share for each layer."""
    layers = block_layers(lm)
    shares = dict(zip([layer.name for layer in layers], ratios.tolist(), strict=True))
    states = HiddenStates(lm, calibration[own_share(len(calibration), "sequences")][:, :-1], batch_size=batch_size)
    needs_inputs = pruning.pruner != "magnitude"
    blocks = blocks_of(lm)
    for number, block in enumerate(blocks):
        own = [layer for layer in layers if layer.block == number]
        with on_device(block, device):
            statistics: dict[str, InputStatistics | None] = dict.fromkeys(layer.name for layer in own)
            if needs_inputs:
                with collected(own, gram=pruning.pruner == "sparsegpt") as statistics:
                    states.run(block, keep=False)
                statistics = _summed(statistics)
            for place, layer in enumerate(own):
                weight = layer.weight
                if place % collective.world_size() == collective.rank():
                    result = prune_weight(
                        weight,
                        pruning.pruner,
                        shares[layer.name],
                        statistics[layer.name],
                        pattern=pruning.pattern,
                        compatible=pruning.compatible,
                    )
                else:
                    result = torch.zeros_like(weight)  # the sum over workers is what the one who pruned it found
                layer.assign(collective.all_sum(result))
            if needs_inputs:
                states.run(block)
        tell(f"block {number + 1} of {len(blocks)} pruned")


@contextmanager
def collected(layers: list[BlockLayer], *, gram: bool) -> Iterator[dict[str, InputStatistics]]:
    """The statistics of the inputs that the layers see while the context lasts.

    Layers that are given the very same input one after another (queries, keys and values) share one entry.
    """
    found: dict[str, InputStatistics] = {}
    last: list[Any] = [None, None]

    def watch(layer: BlockLayer) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if last[0] is inputs[0]:
                found.setdefault(layer.name, last[1])
                return
            width = layer.weight.shape[1]
            entry = found.setdefault(layer.name, InputStatistics.empty(width, gram=gram, device=inputs[0].device))
            entry.add(inputs[0])
            last[:] = [inputs[0], entry]

        return see

    hooks = [layer.module.register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _summed(statistics: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Each entry summed over the workers, entries that are shared only once."""
    sums = {id(entry): entry.summed() for entry in {id(entry): entry for entry in statistics.values()}.values()}
    return {name: sums[id(entry)] for name, entry in statistics.items()}


def _check_finite(value: float) -> None:
    if not value < float("inf"):
        raise InputError(f"the model's perplexity is {value}; there is nothing to prune towards")
