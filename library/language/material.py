"""What a language model is trained and measured on, made once per process: tokeniser, streams, texts and prompts."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import ArtifactError, InputError
from library.language.corpus import detokenise, read_corpus
from library.language.token_store import TokenStream, open_store, pack_documents
from library.language.tokens import ByteTokenizer, Tokenizer, from_json, load_tokenizer, tokenizer_hash, train_bpe

SPLITS = ("train", "validation", "test")
TOKENIZER = "tokenizer.json"


class Material(NamedTuple):
    """A tokeniser and the streams of the three splits."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    test: TokenStream


@lru_cache(maxsize=2)
def prepare(
    corpus: str,
    *,
    column: str,
    fractions: tuple[float, float, float],
    spaces: bool,
    tokenizer: str,
    revision: str | None,
    vocab_size: int,
) -> Material:
    """Tokenise a corpus in memory, or open a folder of token stores.

    Such a folder holds `train`, `validation` and `test` (`library.language.token_store`) and `tokenizer.json`, and the
    other arguments do not apply to it. `tokenizer` is "bpe" (trained on the train documents), "bytes", a folder or
    a hub name; `spaces=False` takes WikiText's spaces around punctuation away. Raises InputError.
    """
    if Path(corpus).is_dir():
        return _open(Path(corpus))
    splits = read_corpus(corpus, column=column, fractions=fractions)
    if not spaces:
        splits = type(splits)(*([detokenise(text) for text in split] for split in splits))
    if tokenizer == "bpe":
        made: Tokenizer = train_bpe(splits.train, vocab_size)
    elif tokenizer == "bytes":
        made = ByteTokenizer()
    else:
        made = load_tokenizer(tokenizer, revision)
    key = tokenizer_hash(made)
    return Material(made, *(pack_documents(made.encode(split), made.end_of_text, key) for split in splits))


def tracking_texts(stream: TokenStream, count: int, longest: int) -> tuple[Tensor, Tensor]:
    """The first `count` documents of at least two tokens, cut to `longest`: tokens and mask, int64 (count, longest).

    Rows are padded on the right with the end of text. Raises InputError when there are not so many.
    """
    texts = _first(stream, count, 2, "tracking_texts")
    input_ids = torch.full((count, longest), stream.end_of_text)
    attention_mask = torch.zeros(count, longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        kept = torch.from_numpy(text[:longest])
        input_ids[row, : len(kept)] = kept
        attention_mask[row, : len(kept)] = 1
    return input_ids, attention_mask


def prompts(stream: TokenStream, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first `count` documents that are longer. Raises InputError when too few are."""
    return [text[:length].tolist() for text in _first(stream, count, length + 1, "prompts")]


def _first(stream: TokenStream, count: int, shortest: int, name: str) -> list:
    found: list = []
    documents: Iterator = stream.documents()
    while len(found) < count:
        document = next(documents, None)
        if document is None:
            raise InputError(f"{name}: {count} asked, only {len(found)} documents have {shortest} tokens or more")
        if len(document) >= shortest:
            found.append(document)
    return found


def _open(folder: Path) -> Material:
    if not (folder / TOKENIZER).is_file():
        raise ArtifactError(f"no token stores at {folder}: there is no {TOKENIZER}")
    tokenizer = from_json((folder / TOKENIZER).read_text(encoding="utf-8"))
    return Material(tokenizer, *(open_store(folder / split, tokenizer) for split in SPLITS))
