"""Documents as one stream of tokens, in memory or in shards on disk, and its blocks.

The stream is every document's tokens, each document followed by the end-of-text token. Block i of length T is
stream[i T : (i + 1) T + 1], so that inputs and targets, shifted by one, both have T tokens. A store on disk is a
folder of shards `tokens-00000.npy`, ... (uint16, or uint32 for large vocabularies) and `index.json`; where the
shards were cut changes neither blocks nor fingerprint.
"""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from library import files
from library.errors import ArtifactError, InputError
from library.language.tokens import Tokenizer, tokenizer_hash

INDEX = "index.json"


class StoreIndex(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What `index.json` holds."""

    format: Literal["prism-tokens/1"] = "prism-tokens/1"
    dtype: Literal["uint16", "uint32"]
    lengths: tuple[int, ...]
    """Tokens in each shard, in order."""
    end_of_text: int
    tokenizer: str
    """`tokenizer_hash` of the tokeniser that made it."""
    fingerprint: str
    """SHA-256 over the tokeniser's hash and the stream."""


@dataclass(frozen=True)
class TokenStream:
    """The stream as one or more shards in order; `read` finds tokens across their boundaries."""

    shards: tuple[np.ndarray, ...]
    end_of_text: int
    fingerprint: str

    def __post_init__(self):
        object.__setattr__(self, "starts", np.cumsum([0, *map(len, self.shards)]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self.starts[first])
            parts.append(self.shards[first][offset : offset + stop - start])
            start += len(parts[-1])
            first += 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def documents(self, chunk: int = 1 << 16) -> Iterator[np.ndarray]:
        """The documents in order, without their end-of-text tokens, as int64; empty ones are skipped."""
        left = np.empty(0, np.int64)
        for start in range(0, len(self), chunk):
            tokens = np.concatenate([left, self.read(start, min(start + chunk, len(self)))])
            ends = np.flatnonzero(tokens == self.end_of_text)
            for a, b in itertools.pairwise([-1, *ends]):
                if b > a + 1:
                    yield tokens[a + 1 : b]
            left = tokens[ends[-1] + 1 :] if len(ends) else tokens
        if len(left):
            yield left


class TokenBlocks:
    """The blocks of a stream as a map-style data set: int64 tensors of shape (length + 1,).

    The tokens after the last whole block are left out. Raises InputError when there is not one block.

    >>> stream = pack_documents([[1, 2, 3], [4, 5]], end_of_text=0)
    >>> [block.tolist() for block in TokenBlocks(stream, length=3)]
    [[1, 2, 3, 0], [0, 4, 5, 0]]
    """

    def __init__(self, stream: TokenStream, length: int, name: str = "corpus"):
        if len(stream) < length + 1:
            raise InputError(
                f"{name}: {len(stream)} tokens are shorter than one block of {length} + 1; use a shorter context"
            )
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return torch.from_numpy(self.stream.read(index * self.length, (index + 1) * self.length + 1))


def concatenate(documents: Sequence[Sequence[int]], end_of_text: int) -> np.ndarray:
    """The tokens of the documents, each followed by `end_of_text`: int64; empty documents are left out."""
    return np.fromiter(
        itertools.chain.from_iterable((*document, end_of_text) for document in documents if len(document)), np.int64
    )


def pack_documents(documents: Sequence[Sequence[int]], end_of_text: int, tokenizer: str = "") -> TokenStream:
    """A stream in memory; `tokenizer` is the `tokenizer_hash` that enters its fingerprint."""
    tokens = concatenate(documents, end_of_text)
    return TokenStream((tokens,), end_of_text, _fingerprint(tokenizer, (tokens,)))


def write_shard(folder: str | Path, number: int, documents: Sequence[Sequence[int]], tokenizer: Tokenizer) -> int:
    """Write the tokens of some documents as shard `number` (from 0) and return how many tokens it holds.

    Workers may write different shards at once; a shard appears whole or not at all.
    """
    tokens = concatenate(documents, tokenizer.end_of_text).astype(_dtype(tokenizer))
    content = io.BytesIO()
    np.save(content, tokens)
    files.write_bytes(_shard(Path(folder), number), content.getvalue())
    return len(tokens)


def finish_store(folder: str | Path, tokenizer: Tokenizer) -> TokenStream:
    """Write the index over shards 0 ... n - 1, after all are there, and open the store.

    Reads every token once, for the fingerprint. Raises InputError when there is no token or a number is missing.
    """
    folder = Path(folder)
    numbers = sorted(int(file.stem.removeprefix("tokens-")) for file in folder.glob("tokens-*.npy"))
    if numbers != list(range(len(numbers))):
        missing = min(set(range(len(numbers))) - set(numbers))
        raise InputError(f"token store {folder}: shard {missing} of {len(numbers)} or more is missing")
    shards = tuple(_open_shard(_shard(folder, number), _dtype(tokenizer)) for number in numbers)
    if not sum(map(len, shards)):
        raise InputError(f"token store {folder} is empty: no document has any text")
    index = StoreIndex(
        dtype=_dtype(tokenizer),
        lengths=tuple(map(len, shards)),
        end_of_text=tokenizer.end_of_text,
        tokenizer=tokenizer_hash(tokenizer),
        fingerprint=_fingerprint(tokenizer_hash(tokenizer), shards),
    )
    files.write_bytes(folder / INDEX, index.model_dump_json().encode())
    return TokenStream(shards, index.end_of_text, index.fingerprint)


def open_store(folder: str | Path, tokenizer: Tokenizer, *, verify: bool = False) -> TokenStream:
    """The stream of the store in `folder`, memory-mapped; with `verify` every token is read and checked.

    Raises ArtifactError when the index or a shard is missing, truncated or foreign, and InputError when the store
    was made with another tokeniser.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ArtifactError(f"no token store at {folder}: there is no {INDEX}")
    try:
        index = StoreIndex.model_validate(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"{folder / INDEX} is corrupt or foreign") from error
    if index.tokenizer != tokenizer_hash(tokenizer):
        raise InputError(f"token store {folder} was made with another tokeniser; use the one beside it")
    shards = tuple(_open_shard(_shard(folder, number), index.dtype) for number in range(len(index.lengths)))
    for number, (shard, length) in enumerate(zip(shards, index.lengths, strict=True)):
        if len(shard) != length:
            raise ArtifactError(f"{_shard(folder, number)} is corrupt: {len(shard)} tokens, {length} were written")
    if verify and _fingerprint(index.tokenizer, shards) != index.fingerprint:
        raise ArtifactError(f"token store {folder} is corrupt: its tokens are not those that were written")
    return TokenStream(shards, index.end_of_text, index.fingerprint)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05d}.npy"


def _dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _open_shard(path: Path, dtype: str) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ArtifactError(f"token store {path.parent} is incomplete: {path.name} is missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"{path} is truncated or not a token shard") from error
    if shard.dtype != dtype or shard.ndim != 1:
        raise ArtifactError(f"{path} is foreign: {shard.dtype} of {shard.ndim} dimensions, not {dtype} of 1")
    return shard


def _fingerprint(tokenizer: str, shards: Sequence[np.ndarray], chunk: int = 1 << 22) -> str:
    digest = sha256(tokenizer.encode())
    for shard in shards:
        for start in range(0, len(shard), chunk):
            digest.update(shard[start : start + chunk].astype("<u4").tobytes())
    return digest.hexdigest()
