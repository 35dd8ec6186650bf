"""Pruning block after block: what passes the blocks is what the model computes, and each layer gets what it should."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from library.errors import InputError
from library.farms.analysis import Settings
from library.farms.causal_lm import HiddenStates, block_layers, blocks_of, perplexity
from library.farms.prune import Pruning, Texts, collected, prune_causal_lm
from library.farms.pruning import wanda_mask

CPU = torch.device("cpu")
TAILS = Settings(window=12, ops=3)


def tokens(count: int = 6, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (count, length), generator=torch.Generator().manual_seed(seed))


TEXTS = Texts(tokens(seed=1), tokens(seed=2), tokens(seed=3))


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        lm = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=40, num_key_value_heads=2))
    elif kind == "gpt_neox":
        lm = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=40))
    else:
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    return lm.eval()


KINDS = ("llama", "gpt_neox", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_is_the_whole_model(kind):
    lm, sequences = model(kind), tokens()
    with torch.no_grad():
        loss = F.cross_entropy(lm(sequences[:, :-1]).logits.flatten(0, 1), sequences[:, 1:].flatten())
    for batch_size in (1, 4):
        assert perplexity(lm, sequences, batch_size=batch_size) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_collected_inputs_are_those_of_each_layer(kind):
    lm, sequences = model(kind), tokens()
    first = [layer for layer in block_layers(lm) if layer.block == 0]
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in first}
    hooks = [
        layer.module.register_forward_pre_hook(lambda module, inputs, name=layer.name: seen[name].append(inputs[0]))
        for layer in first
    ]
    with torch.no_grad():
        lm(sequences)
    for hook in hooks:
        hook.remove()
    states = HiddenStates(lm, sequences, batch_size=4)
    with collected(first, gram=True) as statistics:
        states.run(blocks_of(lm)[0], keep=False)
    for layer in first:
        inputs = torch.cat(seen[layer.name]).flatten(0, -2).double()
        assert statistics[layer.name].sequences == len(sequences)
        assert torch.allclose(statistics[layer.name].squares, inputs.square().sum(0), rtol=1e-5)
        assert torch.allclose(statistics[layer.name].gram, inputs.mT @ inputs, rtol=1e-4, atol=1e-4)
    shared = len({id(entry) for entry in statistics.values()})
    assert shared == {"llama": 4, "gpt_neox": 4, "gpt2": 4}[kind]  # q, k, v see one input, gate and up another


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_the_budget_is_held_and_only_the_blocks_layers_change(kind, pruner):
    lm = model(kind)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    pruned = prune_causal_lm(lm, TEXTS, Pruning(pruner=pruner, sparsity=0.5, epsilon=(0.3,), analysis=TAILS))
    names = {f"{layer.name}.weight" for layer in block_layers(lm)}
    changed = {name for name, value in lm.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names
    assert pruned.metrics["sparsity_asked"] == pytest.approx(0.5, abs=1e-12)
    assert pruned.metrics["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert pruned.layers["ratio"].nunique() == 2  # one per block
    assert pruned.metrics["perplexity_after"] == pytest.approx(perplexity(lm, TEXTS.test), rel=1e-6)
    assert not pruned.choices


def test_each_block_is_pruned_on_what_comes_through_the_pruned_ones_before():
    lm, dense = model("gpt_neox"), model("gpt_neox")
    prune_causal_lm(lm, TEXTS, Pruning(pruner="wanda", sparsity=0.6, mapping="uniform"))
    second = [layer for layer in block_layers(dense) if layer.block == 1]
    blocks_of(dense)[0].load_state_dict(blocks_of(lm)[0].state_dict())
    states = HiddenStates(dense, TEXTS.calibration[:, :-1], batch_size=8)
    states.run(blocks_of(dense)[0])
    with collected(second, gram=False) as statistics:
        states.run(blocks_of(dense)[1], keep=False)
    pruned = {layer.name: layer for layer in block_layers(lm)}
    for layer in second:
        mask = wanda_mask(layer.weight, statistics[layer.name].scaler, 0.6)
        assert torch.equal(pruned[layer.name].weight, layer.weight.masked_fill(mask, 0))


def test_epsilon_is_the_best_on_validation_text_and_starts_from_the_dense_model():
    several = Pruning(pruner="wanda", sparsity=0.6, epsilon=(0.05, 0.4, 0.8), mapping="layer", analysis=TAILS)
    lm = model("llama")
    pruned = prune_causal_lm(lm, TEXTS, several)
    assert set(pruned.choices) == {0.05, 0.4, 0.8}
    best = min(pruned.choices, key=pruned.choices.get)
    alone = model("llama")
    single = several.model_copy(update={"epsilon": (best,)})
    assert prune_causal_lm(alone, TEXTS, single).metrics == pruned.metrics
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in alone.state_dict().items())
    assert pruned.choices[best] == pytest.approx(perplexity(alone, TEXTS.validation), rel=1e-6)
    other = TEXTS._replace(test=tokens(seed=9))
    assert prune_causal_lm(model("llama"), other, several).choices == pruned.choices  # the test text has no say


def test_a_pattern_holds_in_the_layout_that_a_layer_keeps():
    lm = model("gpt2")
    pruned = prune_causal_lm(lm, TEXTS, Pruning(pruner="sparsegpt", pattern=(2, 4)))
    for layer in block_layers(lm):
        assert ((layer.weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert pruned.metrics["sparsity"] == 0.5


def test_what_cannot_be_pruned_is_refused():
    lm = model("gpt_neox")
    lm.config.model_type = "mamba"
    with pytest.raises(InputError, match="type 'mamba' cannot be taken block by block; there are llama"):
        prune_causal_lm(lm, TEXTS)
    lm = model("llama")
    lm.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(InputError, match="blocks of this llama differ"):
        prune_causal_lm(lm, TEXTS)
    lm = model("llama")
    with torch.no_grad():
        lm.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="perplexity is nan"):
        prune_causal_lm(lm, TEXTS)
    with pytest.raises(ValueError, match="4:4 prunes all"):
        Pruning(pattern=(4, 4))
    for epsilon in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"epsilon: each must lie in \[0, 1\)"):
            Pruning(epsilon=(0.1, epsilon))


@pytest.mark.parametrize(
    ("sequences", "batch_size", "message"),
    [
        (tokens() + 49, 8, "outside the model's vocabulary of 50"),
        (tokens() - 1, 8, "outside the model's vocabulary of 50"),
        (tokens().float(), 8, "whole numbers .* got torch.float32"),
        (tokens()[0], 8, r"of shape \(17,\)"),
        (tokens()[:, :1], 8, r"of shape \(6, 1\)"),
        (tokens(), 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_are_no_tokens_of_the_model_is_refused_before_it_is_touched(sequences, batch_size, message):
    lm = model("llama")
    with pytest.raises(InputError, match=message):
        perplexity(lm, sequences, batch_size=batch_size)
    with pytest.raises(InputError, match=message):
        prune_causal_lm(lm, TEXTS._replace(validation=sequences), batch_size=batch_size)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), model("llama").parameters(), strict=True))
