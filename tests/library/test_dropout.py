import numpy as np
import pytest
import torch
from torch import nn

from library import collective
from library.errors import InputError, PrismError
from library.language.pythia import load
from library.send.decode import transformer_blocks
from library.send.dropout import SensitivityDropout, drop_weights, embed_texts, padded_share, pool
from library.send.sensitivity import sensitivity
from library.weights import persistent_buffers

GOLDEN = "tests/golden/send/drop_weights.npz"
DROPPED = torch.tensor([3, 17, 90])


def model(**options) -> SensitivityDropout:
    lm = load("pythia-tiny", vocab_rows=300, generator=torch.Generator().manual_seed(0))
    return SensitivityDropout(lm, **options).eval()


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def block_output(lm: nn.Module, number: int, input_ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = transformer_blocks(lm)[number - 1].register_forward_hook(lambda *call: seen.append(call[-1]))
    lm(input_ids)
    handle.remove()
    return seen[0]


def test_a_mask_of_ones_changes_no_bit_of_forward_or_gradients():
    plain = load("pythia-tiny", vocab_rows=300, generator=torch.Generator().manual_seed(0)).eval()
    wrapped = model()
    expected, found = plain(tokens()).logits, wrapped(tokens())
    assert torch.equal(expected, found)
    expected.square().mean().backward()
    found.square().mean().backward()
    for a, b in zip(plain.parameters(), wrapped.lm.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("layer", "number"), [("penultimate", 3), ("middle", 2)])
def test_dropped_coordinates_and_their_gradients_are_exactly_zero(layer, number):
    wrapped = model(layer=layer)
    wrapped.drop(DROPPED)
    seen = []
    block = transformer_blocks(wrapped.lm)[number - 1]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    block.mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = wrapped(tokens())
    written, output = seen
    written.retain_grad()
    logits.square().mean().backward()
    assert not output[..., DROPPED].any()
    assert not written.grad[..., DROPPED].any()
    kept = torch.ones(128, dtype=torch.bool).index_fill(0, DROPPED, False)
    assert (output[..., kept] != 0).all()
    assert written.grad[..., kept].any(-1).any(-1).any()
    assert not block.mlp.dense_4h_to_h.weight.grad[DROPPED].any()
    assert wrapped.dropped.tolist() == DROPPED.tolist()


def test_infinite_activations_do_not_survive_dropping():
    wrapped = model()
    transformer_blocks(wrapped.lm)[2].mlp.dense_4h_to_h.bias.data[3] = torch.inf
    wrapped.drop(DROPPED)
    assert wrapped(tokens()).isfinite().all()


def test_removing_the_mask_restores_the_forward_bitwise_and_only_inside_the_block():
    wrapped = model()
    before = wrapped(tokens())
    wrapped.drop(DROPPED)
    masked = wrapped(tokens())
    with wrapped.without_mask():
        assert torch.equal(wrapped(tokens()), before)
    with pytest.raises(InputError), wrapped.without_mask():
        pool(torch.zeros(1, 1, 1), None, "slt")
    assert torch.equal(wrapped(tokens()), masked)
    assert not torch.equal(masked, before)
    assert torch.equal(model(masking=False)(tokens()), before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["slt", "last", "pooled"])
def test_embeddings_go_by_true_length(form, side):
    wrapped = model()
    text = tokens(1, 9)
    hidden = block_output(wrapped.lm, 3, text)[0]
    expected = {"slt": hidden[-2], "last": hidden[-1], "pooled": hidden.mean(0)}[form]
    assert torch.allclose(wrapped(text, embed=form)[0], expected, rtol=1e-6, atol=1e-7)
    padding = torch.full((1, 5), 299)
    present = torch.tensor([[1] * 9])
    absent = torch.zeros(1, 5, dtype=torch.int64)
    order = slice(None, None, -1 if side == "left" else 1)
    mask = torch.cat([present, absent][order], 1)
    rows = pool(torch.cat([hidden[None], wrapped.lm.gpt_neox.embed_in(padding)][order], 1), mask, form)
    assert torch.allclose(rows[0], expected, rtol=1e-6, atol=1e-7)
    if side == "right":
        padded = wrapped(torch.cat([text, padding], 1), mask, embed=form)[0]
        assert torch.allclose(padded, expected, rtol=1e-5, atol=1e-6)


def test_texts_too_short_for_their_form_are_refused():
    hidden = torch.zeros(2, 4, 8)
    with pytest.raises(InputError, match="a text of 1 tokens has no 'slt' embedding; it needs at least 2"):
        pool(hidden, torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), "slt")
    with pytest.raises(InputError, match="a text of 0 tokens"):
        pool(hidden, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "last")


def test_unknown_forms_and_masks_of_another_shape_are_refused():
    wrapped = model()
    with pytest.raises(InputError, match="unknown form of embedding 'median'; allowed: slt, last, pooled"):
        wrapped(tokens(), embed="median")
    with pytest.raises(InputError, match=r"mask of \(3, 4\) does not fit tokens of \(3, 12\)"):
        wrapped(tokens(), torch.ones(3, 4, dtype=torch.int64), embed="last")


def test_only_coordinates_that_are_there_are_dropped():
    wrapped = model()
    wrapped.drop([5])
    for index in (torch.tensor([-1]), torch.tensor([128]), torch.tensor([1.0])):
        with pytest.raises(InputError, match="whole numbers from 0 to 127"):
            wrapped.drop(index)
    assert wrapped.dropped.tolist() == [5]


def test_mask_and_record_are_float32_whatever_the_default():
    lm = model().lm
    try:
        torch.set_default_dtype(torch.bfloat16)
        wrapped = SensitivityDropout(lm, tracking_texts=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {wrapped.mask.dtype, wrapped.m2.dtype} == {torch.float32}
    wrapped.record(torch.ones(2, 128))


def test_the_recorded_window_is_the_sensitivity_of_its_embeddings():
    wrapped = model(tracking_texts=5)
    window = torch.randn(4, 5, 128, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for embeddings in window:
            wrapped.record(embeddings)
        for by in ("product", "change", "variance"):
            for normalise in (False, True):
                expected = sensitivity(window, by, normalise=normalise)
                found = wrapped.sensitivity(by, normalise=normalise)
                assert torch.allclose(found, expected, rtol=1e-5, atol=0)
        wrapped.clear_record()


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_record_and_mask_keep_their_precision_when_the_model_is_cast(cast):
    wrapped = model(tracking_texts=5)
    embeddings = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    wrapped.record(embeddings)
    wrapped.record(2 * embeddings)
    wrapped.drop(DROPPED)
    before = {name: value.clone() for name, value in persistent_buffers(wrapped)}
    assert set(before) == {"mask", "count", "previous", "change", "mean", "m2"}
    cast(wrapped)
    assert next(wrapped.parameters()).dtype != torch.float32
    for name, value in persistent_buffers(wrapped):
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert not wrapped(tokens(), embed="slt")[:, DROPPED].any()
    assert wrapped(tokens()).dtype == next(wrapped.parameters()).dtype


def test_gradient_checkpointing_recomputes_under_the_same_mask():
    grads = []
    for checkpointing in (False, True):
        wrapped = model().train()
        wrapped.drop(DROPPED)
        if checkpointing:
            wrapped.lm.gradient_checkpointing_enable()
        wrapped(tokens()).square().mean().backward()
        grads.append([p.grad for p in wrapped.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_workers_embed_equally_often_and_get_the_same_whole(monkeypatch):
    wrapped = model()
    ids, mask = tokens(7, 10), torch.ones(7, 10, dtype=torch.int64)
    alone = embed_texts(wrapped, ids, mask, form="slt", batch_size=2)
    with torch.no_grad():
        assert torch.allclose(alone, wrapped(ids, embed="slt"), rtol=1e-5, atol=1e-6)
    partial, calls = [], []
    for rank in range(4):
        monkeypatch.setattr(collective, "world_size", lambda: 4)
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collective, "all_sum", lambda value: partial.append(value) or value)
        handle = wrapped.register_forward_hook(lambda *call: calls.append(rank))  # noqa: B023 - called in this pass
        embed_texts(wrapped, ids, mask, form="slt", batch_size=1)
        handle.remove()
    assert [calls.count(rank) for rank in range(4)] == [2, 2, 2, 2]
    assert torch.allclose(sum(partial), alone, rtol=1e-5, atol=1e-6)


def test_shares_are_padded_to_one_length(monkeypatch):
    monkeypatch.setattr(collective, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        shares.append(padded_share(5))
    assert [len(rows) for rows, _ in shares] == [2, 2, 2]
    assert sorted(row for rows, own in shares for row in rows[:own]) == list(range(5))


def test_masks_that_differ_between_workers_are_refused(monkeypatch):
    monkeypatch.setattr(collective, "all_gather", lambda value: [value, "another"])
    with pytest.raises(PrismError, match="2 different masks"):
        model().drop(DROPPED)


def test_drop_weights_golden():
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    maps = {}
    for name in ("dense_h_to_4h", "dense_4h_to_h"):
        weight, bias = golden[f"before_{name}_weight"], golden[f"before_{name}_bias"]
        maps[name] = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        maps[name].load_state_dict({"weight": weight, "bias": bias})
    first, second = maps.values()
    drop_weights(first, second, golden["idx"])
    for name, linear in maps.items():
        assert torch.equal(linear.weight, golden[f"after_{name}_weight"])
        assert torch.equal(linear.bias, golden[f"after_{name}_bias"])
    output = second(nn.functional.gelu(first(golden["x"])))
    assert torch.allclose(output, golden["mlp_out_after_gelu"], rtol=1e-10, atol=1e-12)


def test_weights_of_maps_without_bias_are_dropped_and_others_refused():
    first, second = nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False)
    drop_weights(first, second, torch.tensor([1]))
    assert not first.weight[1].any()
    assert not second.weight[:, 1].any()
    with pytest.raises(InputError, match="from 0 to 3"):
        drop_weights(first, second, torch.tensor([7]))


def test_decoding_options_return_the_whole_output():
    wrapped = model()
    output = wrapped(input_ids=tokens(), attention_mask=None, use_cache=True, logits_to_keep=1)
    assert output.logits.shape == (3, 1, 300)
    assert torch.allclose(output.logits[:, -1], wrapped(tokens())[:, -1], rtol=1e-5, atol=1e-5)


def test_a_layer_the_model_lacks_is_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(InputError, match="layer: 'penultimate' is not in this model of 1 blocks"):
        SensitivityDropout(GPTNeoXForCausalLM(config))
