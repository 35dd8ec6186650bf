"""Tokenisers behind one small interface: bytes, a byte-pair encoding trained on the corpus, or any from the hub."""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from library.artifact import MANIFEST, open_artifact
from library.errors import ArtifactError, InputError
from library.language.hub import first_line, is_loadable, load_errors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them makes a tokeniser
END_OF_TEXT = 0  # of every tokeniser made here, as in GPT-NeoX


class Tokenizer(Protocol):
    """Texts to tokens and back. `end_of_text` separates documents; no text encodes to it, whatever it spells."""

    vocab_size: int
    end_of_text: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with no special tokens added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """All of it as one JSON document, which `from_json` reads."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8: byte b is token b + 1, and token 0 ends a text.

    A model may have more rows than the 257 tokens; what it says with the others is no UTF-8 either and becomes U+FFFD.

    >>> ByteTokenizer().encode(["é!"])
    [[196, 170, 34]]
    """

    vocab_size = 257
    end_of_text = END_OF_TEXT

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        known = (token - 1 if token < self.vocab_size else 0xFF for token in tokens if token != END_OF_TEXT)
        return bytes(known).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


class SubwordTokenizer:
    """A tokeniser of the `tokenizers` library, whose texts cannot spell special tokens."""

    def __init__(self, backend: Any, end_of_text: int):
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.end_of_text = end_of_text
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=True)

    def to_json(self) -> str:
        return json.dumps(
            {"kind": "subword", "end_of_text": self.end_of_text, "tokenizer": json.loads(self.backend.to_str())},
            ensure_ascii=False,
        )


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> SubwordTokenizer:
    """A byte-level byte-pair encoding of at most `vocab_size` entries: end of text, 256 bytes, then merges.

    The same texts give the same tokeniser. A small corpus may yield fewer entries. Raises InputError below 257.

    >>> tokenizer = train_bpe(["the cat and the hat"], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode(["the bat"])[0])
    'the bat'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InputError(f"vocab_size: {vocab_size} is too few; the end of text and 256 bytes alone are 257")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return SubwordTokenizer(backend, END_OF_TEXT)


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokeniser of a Hugging Face folder, of a SeND artifact, or of a hub name such as `EleutherAI/pythia-70m`.

    Raises InputError that says why it cannot be had (missing, corrupt, offline, no fast tokeniser, no end of text).
    """
    if not is_loadable(name):
        raise InputError(f"tokenizer: {name!r} is not 'bpe', 'bytes', a folder, or a hub name OWNER/NAME")
    if (Path(name) / MANIFEST).is_file():
        return from_json(open_artifact(name, kind="send", verify=False).text("tokenizer.json"))
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(f"tokenizer: the folder {name!r} has none of {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    with load_errors("tokenizer", name, revision):
        loaded = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    if not loaded.is_fast:
        raise InputError(f"tokenizer {name!r} has no tokenizer.json; convert it to a fast tokeniser first")
    if loaded.eos_token_id is None:
        raise InputError(f"tokenizer {name!r} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return SubwordTokenizer(loaded.backend_tokenizer, loaded.eos_token_id)


def from_json(text: str) -> Tokenizer:
    """The tokeniser that `to_json` wrote. Raises ArtifactError for anything else."""
    from tokenizers import Tokenizer as Backend

    try:
        content = json.loads(text)
        if content["kind"] == "bytes":
            return ByteTokenizer()
        return SubwordTokenizer(Backend.from_str(json.dumps(content["tokenizer"])), int(content["end_of_text"]))
    except Exception as error:  # the backend raises bare Exception
        raise ArtifactError(f"not a tokeniser of SeND: {first_line(error)}") from error


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokeniser's JSON: token stores and models made with different ones must not be mixed."""
    return sha256(tokenizer.to_json().encode()).hexdigest()


def check_vocabulary(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Raise InputError unless each token has a row among the `rows` of the model's embedding."""
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"vocabulary mismatch: the tokeniser has {tokenizer.vocab_size} entries, {model} only {rows} rows; "
            f"use the model's own tokeniser"
        )
