import json

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from library.errors import ArtifactError, InputError
from library.language.tokens import (
    END_OF_TEXT,
    ByteTokenizer,
    check_vocabulary,
    from_json,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
)

TEXTS = ["the cat sat on the mat", "the hat of the cat is flat", "Zürich, 3 °C, naïve"] * 3
BPE = train_bpe(TEXTS, vocab_size=300)


@given(st.text())
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_any_text_survives_and_never_spells_the_end_of_text(tokenizer, text):
    for spelled in (text, text + "<|endoftext|>"):
        (tokens,) = tokenizer.encode([spelled])
        assert tokenizer.decode(tokens) == spelled
        assert END_OF_TEXT not in tokens
        assert all(0 < token < tokenizer.vocab_size for token in tokens)


def test_what_a_larger_model_says_beyond_the_bytes_is_no_text():
    tokenizer = ByteTokenizer()
    assert (
        tokenizer.decode([*tokenizer.encode(["a"])[0], 257, 50_303, END_OF_TEXT, *tokenizer.encode(["b"])[0]])
        == "a\ufffd\ufffdb"
    )


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_json_round_trip_keeps_the_tokens_and_the_hash(tokenizer):
    again = from_json(tokenizer.to_json())
    assert again.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)


def test_bpe_training_is_deterministic_and_merges():
    assert train_bpe(list(TEXTS), vocab_size=300).to_json() == BPE.to_json()
    assert len(BPE.encode(["the cat"])[0]) < len("the cat")
    assert train_bpe(["ab"], vocab_size=4096).vocab_size == 258  # end of text, 256 bytes, one merge


def test_a_hugging_face_folder_gives_the_same_tokens(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=BPE.backend, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(TEXTS) == BPE.encode(TEXTS)
    assert loaded.end_of_text == END_OF_TEXT
    assert END_OF_TEXT not in loaded.encode(["<|endoftext|>"])[0]


def test_a_folder_without_end_of_text_or_tokenizer_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=BPE.backend).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has none of tokenizer.json"):
        load_tokenizer(str(tmp_path / "empty"))


def test_unreachable_and_unknown_names(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="check the name, the revision and the network"):
        load_tokenizer("nobody/nothing", revision="step1")
    with pytest.raises(InputError, match="is not 'bpe', 'bytes', a folder, or a hub name"):
        load_tokenizer("gpt-neox")


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"kind": "subword", "tokenizer": {}, "end_of_text": 0}), "[1]"])
def test_foreign_json_is_refused(text):
    with pytest.raises(ArtifactError, match="not a tokeniser of SeND"):
        from_json(text)


def test_vocabulary_limits():
    check_vocabulary(BPE, BPE.vocab_size, "a model")
    with pytest.raises(
        InputError, match=f"vocabulary mismatch.*{BPE.vocab_size} entries, pythia-x only {BPE.vocab_size - 1} rows"
    ):
        check_vocabulary(BPE, BPE.vocab_size - 1, "pythia-x")
    with pytest.raises(InputError, match="too few"):
        train_bpe(TEXTS, vocab_size=256)
