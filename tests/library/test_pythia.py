import math

import huggingface_hub.constants
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from library.errors import InputError
from library.language import pythia
from library.send.decode import transformer_blocks

PUBLISHED = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}
SMALL = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
OTHERS = [
    lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=3, n_head=2, n_embd=16)),
]


@pytest.mark.parametrize("name", pythia.SIZES)
def test_parameter_counts(name):
    with torch.device("meta"):
        lm = pythia.from_config(pythia.pythia_config(name))
    count = sum(p.numel() for p in lm.parameters())
    assert count == pythia.SIZES[name].parameters() == PUBLISHED.get(name, count)
    assert len(transformer_blocks(lm)) == pythia.SIZES[name].blocks
    assert lm.config._attn_implementation == "sdpa"


def test_initialisation_has_the_published_deviations():
    lm = pythia.load("pythia-tiny", generator=torch.Generator().manual_seed(0))
    small, wang = math.sqrt(2 / (5 * 128)), 2 / (4 * math.sqrt(128))
    for name, value in lm.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            expected = wang if "attention.dense" in name or "4h_to_h" in name else small
            assert float(value.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * value.numel()))
            assert abs(float(value.mean())) < 5 * expected / math.sqrt(value.numel())


def test_weights_depend_on_the_generator_alone():
    first, second = (pythia.load("pythia-tiny", generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pythia.load("pythia-tiny", generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_folder_comes_back_bitwise_in_float32(tmp_path):
    lm = pythia.load("pythia-tiny", vocab_rows=300, generator=torch.Generator().manual_seed(0)).eval()
    lm.save_pretrained(tmp_path)
    again = pythia.load(str(tmp_path)).eval()
    tokens = torch.arange(1, 40)[None]
    assert torch.equal(lm(tokens).logits, again(tokens).logits)
    lm.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in pythia.load(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("make", OTHERS, ids=["llama", "qwen2", "gpt2"])
def test_other_causal_models_load_and_show_their_blocks(tmp_path, make):
    make().save_pretrained(tmp_path)
    lm = pythia.load(str(tmp_path))
    assert len(transformer_blocks(lm)) == 3


def test_bad_names_and_folders(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"unknown model 'pythia-3b'; use one of pythia-tiny, pythia-14m"):
        pythia.load("pythia-3b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot be loaded.*check the files there"):
        pythia.load(str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"'EleutherAI/nothing' at revision 'step9' cannot be loaded.*network"
    ) as caught:
        pythia.load("EleutherAI/nothing", revision="step9")
    assert "\n" not in str(caught.value)


def test_corrupt_and_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    pythia.load("pythia-tiny", vocab_rows=300).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"is incomplete: its weights lack gpt_neox.layers.1.mlp.dense_h_to_4h.bias"):
        pythia.load(str(tmp_path))
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(7)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cannot be loaded"):
        pythia.load(str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot be loaded"):
        pythia.load(str(tmp_path))
