"""Decoding: against transformers' own generation and warpers, against re-encoding, and the invariances it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from library.errors import InputError
from library.send import decode

VOCABULARY, WIDTH, DEPTH = 61, 32, 4
PROMPTS = [[7, 8, 9, 10, 11], [3], [21, 22, 23], [5, 4, 3, 2, 1, 30, 31, 32, 33]]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "eos_token_id": 0,
}
MODELS = {
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=DEPTH,
            n_head=4,
            n_positions=48,
            initializer_range=0.25,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
}


def build(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]().eval()


@pytest.fixture(scope="module", params=list(MODELS))
def lm(request) -> torch.nn.Module:
    return build(request.param)


@pytest.fixture(scope="module")
def neox() -> torch.nn.Module:
    return build("gpt-neox")


def flat(answers: decode.Answers) -> list[tuple[int, list[int], torch.Tensor, torch.Tensor]]:
    """(prompt, tokens, log-probabilities, embedding) of each sampled answer."""
    return [
        (p, tokens, answers.logprobs[p, k, : len(tokens)], answers.embeddings[p, k])
        for p, lists in enumerate(answers.token_lists())
        for k, tokens in enumerate(lists)
    ]


def reencode(lm, tokens):
    """All hidden states (after block 0..L) and log-probabilities of a sequence read in one pass, with no cache."""
    with torch.no_grad():
        outputs = lm(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return [h[0] for h in outputs.hidden_states], outputs.logits[0].log_softmax(-1)


def assert_same_embedding(actual, expected):
    """Equal up to 1e-5 of the norm, which is what float32 leaves after a few blocks."""
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error < 1e-5).all(), f"relative error {float(error.max()):.2e}"


def test_greedy_answers_are_those_of_transformers(lm):
    answers = decode.sample(lm, PROMPTS, samples=1, max_new_tokens=20, stop_token=0).greedy.token_lists()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(0)] if 0 in expected else expected)


@pytest.mark.parametrize(("layer", "block"), [("penultimate", DEPTH - 1), ("middle", 2), (1, 1)])
def test_embeddings_and_logprobs_are_those_of_encoding_the_answer_again(lm, layer, block):
    answers = decode.sample(lm, PROMPTS, samples=3, temperature=1.0, max_new_tokens=7, layer=layer, stop_token=None)
    for p, tokens, logprobs, embedding in flat(answers.sampled):
        hidden, log_softmax = reencode(lm, PROMPTS[p] + tokens)
        assert_same_embedding(embedding, hidden[block][-1])
        expected = log_softmax[len(PROMPTS[p]) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_stop_keep_the_embedding_of_their_last_token(neox):
    # with no truncation at a high temperature every token is likely, so answers stop at all sorts of lengths
    stops = list(range(12))
    answers = decode.sample(
        neox, PROMPTS, samples=12, temperature=3.0, top_k=None, top_p=1.0, max_new_tokens=10, stop_token=stops
    ).sampled
    assert len(set(answers.lengths.flatten().tolist())) > 4
    for p, tokens, logprobs, embedding in flat(answers):
        assert not set(tokens) & set(stops)
        hidden, log_softmax = reencode(neox, PROMPTS[p] + tokens)
        assert_same_embedding(embedding, hidden[-2][-1])
        if tokens:
            expected = log_softmax[len(PROMPTS[p]) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    ended = torch.arange(answers.tokens.shape[-1]) >= answers.lengths[..., None]
    assert (answers.tokens[ended] == 0).all()
    assert (answers.logprobs[ended] == 0).all()


@pytest.mark.parametrize("form", ["slt", "pooled"])
def test_other_forms_of_the_embedding(neox, form):
    answers = decode.sample(
        neox, PROMPTS, samples=6, temperature=3.0, top_k=None, max_new_tokens=6, stop_token=list(range(12)), form=form
    ).sampled
    assert {1, 2} <= set(answers.lengths.flatten().tolist())
    for p, tokens, _, embedding in flat(answers):
        if tokens:
            hidden = reencode(neox, PROMPTS[p] + tokens)[0][-2]
            expected = hidden[-2] if form == "slt" else hidden[len(PROMPTS[p]) :].mean(0)
            assert_same_embedding(embedding, expected)


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(lm):
    settings = {"samples": 5, "temperature": 1.0, "top_k": None, "max_new_tokens": 12, "stop_token": [0, 1, 2, 3]}
    together = decode.sample(lm, PROMPTS, seed=3, **settings)
    reversed_order = decode.sample(lm, PROMPTS[::-1], seed=3, **settings)
    for p, prompt in enumerate(PROMPTS):
        alone = decode.sample(lm, [prompt], seed=3, **settings)
        for batch, place in ((together, p), (reversed_order, len(PROMPTS) - 1 - p)):
            assert batch.greedy.token_lists()[place] == alone.greedy.token_lists()[0]
            assert batch.sampled.token_lists()[place] == alone.sampled.token_lists()[0]
            assert_same_embedding(batch.sampled.embeddings[place], alone.sampled.embeddings[0])


def test_seeds(neox):
    settings = {"samples": 4, "temperature": 1.0, "top_k": None, "stop_token": None}
    short = decode.sample(neox, PROMPTS, seed=5, max_new_tokens=6, **settings).sampled.tokens
    again = decode.sample(neox, PROMPTS, seed=[5, 5, 6, 5], max_new_tokens=10, **settings).sampled.tokens
    same = (short == again[..., :6]).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True]
    assert len({tuple(row) for row in short[0].tolist()}) == 4, "the samples of one prompt draw different noise"


def test_whatever_holds_the_prompt_and_the_seed_the_answers_are_the_same(neox):
    settings = {"samples": 4, "temperature": 1.0, "top_k": None, "stop_token": None, "max_new_tokens": 6}
    expected = decode.sample(neox, [[1, 2, 3]], seed=3, **settings).sampled.tokens
    arrays = torch.tensor([1, 2, 3]), np.array([1, 2, 3]), list(torch.tensor([1, 2, 3]))
    for prompt, seed in zip(arrays, (np.int64(3), [np.int64(3)], torch.tensor([3])), strict=True):
        assert torch.equal(decode.sample(neox, [prompt], seed=seed, **settings).sampled.tokens, expected)


def test_fixed_length_makes_the_same_calls_whatever_the_answers(neox):
    calls = []

    def forward(**inputs):
        calls.append(inputs["input_ids"].shape)
        return neox(**inputs)

    everything = list(range(VOCABULARY))
    for fixed, expected in ((True, 1 + 5), (False, 1)):
        calls.clear()
        decoded = decode.sample(
            neox, PROMPTS, samples=2, max_new_tokens=5, stop_token=everything, fixed_length=fixed, forward=forward
        )
        assert len(calls) == expected
        assert decoded.all_empty.all()
        assert decoded.sampled.lengths.sum() == 0
    assert calls[0] == (len(PROMPTS), max(map(len, PROMPTS))), "each prompt is read once"


def test_empty_answers_fall_back_to_the_last_token_of_the_prompt(neox):
    decoded = decode.sample(neox, PROMPTS, samples=2, max_new_tokens=3, stop_token=list(range(VOCABULARY)))
    for p, prompt in enumerate(PROMPTS):
        expected = reencode(neox, prompt)[0][-2][-1]
        assert_same_embedding(decoded.sampled.embeddings[p, 1], expected)
    assert (decoded.greedy.mean_logprob == 0).all()


def test_equal_samples_of_a_prompt_share_an_embedding():
    tokens = torch.tensor([[[5, 0], [5, 0], [6, 7], [5, 0]], [[5, 0], [6, 7], [6, 7], [8, 9]]])
    lengths = torch.tensor([[1, 2, 2, 1], [1, 2, 2, 2]])  # a token 0 may be one of the answer's own
    rounded_apart = torch.arange(8.0).reshape(2, 4, 1)
    shared = decode._sharing_embeddings(decode.Answers(tokens, lengths, torch.zeros(2, 4, 2), rounded_apart))
    assert shared.embeddings[..., 0].tolist() == [[0, 1, 2, 0], [4, 5, 5, 7]]


def test_an_earlier_hook_on_the_block_is_seen(neox):
    mask = torch.ones(WIDTH)
    mask[::3] = 0
    handle = neox.gpt_neox.layers[-2].register_forward_hook(lambda module, inputs, output: output * mask)
    try:
        embeddings = decode.sample(neox, PROMPTS, samples=2, max_new_tokens=3).sampled.embeddings
    finally:
        handle.remove()
    assert (embeddings[..., ::3] == 0).all()
    assert (embeddings[..., 1::3] != 0).all()


def test_bfloat16_gives_finite_float32_results(neox):
    decoded = decode.sample(build("gpt-neox").bfloat16(), PROMPTS, samples=2, max_new_tokens=4, stop_token=None)
    assert decoded.sampled.embeddings.dtype == decoded.sampled.logprobs.dtype == torch.float32
    assert decoded.sampled.embeddings.isfinite().all()
    assert (decoded.sampled.lengths == 4).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(1, 45),
    top_p=st.floats(0.05, 0.999),
    ties=st.booleans(),
)
def test_truncation_is_that_of_transformers(seed, temperature, top_k, top_p, ties):
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        logits = logits.round()
        top_p = 1.0  # which of several equal tokens the nucleus keeps is a matter of the sort
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    probabilities, tokens = decode.truncated_distribution(logits, temperature, top_k, top_p)
    ours = torch.zeros_like(logits).scatter_add(-1, tokens, probabilities)
    torch.testing.assert_close(ours, scores.softmax(-1), atol=1e-12, rtol=1e-9)


def test_sampling_inverts_the_distribution_function():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    count = 4000
    uniforms = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None]
    drawn = decode._choose(logits.repeat(count + 1, 1), uniforms, 0.7, 8, 0.9)
    assert drawn[0] == logits.argmax()
    probabilities, tokens = decode.truncated_distribution(logits, 0.7, 8, 0.9)
    counts = torch.bincount(drawn[1:], minlength=30)[tokens[0]]
    assert ((counts - count * probabilities[0]).abs() <= 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: empty"),
        ({"prompts": [[1, VOCABULARY]]}, r"prompts\[0\]: a token is outside"),
        ({"prompts": [[1] * 45]}, r"prompts\[0\]: too long, 45 tokens and max_new_tokens=4 exceed the model's 48"),
        ({"prompts": [[1.5, 2]]}, r"prompts\[0\]: .* not whole numbers"),
        ({"prompts": ["ab"]}, r"prompts\[0\]: 'ab' are not whole numbers"),
        ({"seed": 1.5}, "seed: '1.5' are not whole numbers"),
        ({"samples": 0}, "samples: 0"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"seed": [1]}, "seed: 1 seeds for 4 prompts"),
        ({"layer": 5}, "layer: 5 is not in this model of 4 blocks"),
        ({"layer": "last"}, "layer: 'last'"),
        ({"form": "mean"}, "form: 'mean'"),
    ],
)
def test_bad_input_is_named(neox, change, message):
    arguments = {"prompts": PROMPTS, "samples": 2, "max_new_tokens": 4} | change
    with pytest.raises(InputError, match=message):
        decode.sample(neox, arguments.pop("prompts"), **arguments)


def test_training_mode_is_refused():
    with pytest.raises(InputError, match="training mode"):
        decode.sample(build("gpt-neox").train(), PROMPTS)
