"""Tokenise a corpus that is too large for memory into token stores, with Ray Data.

Two passes over the files. The first counts the documents of each part (a file, or a row group of a Parquet file), so
that every document has a number; the seeded permutation of these numbers, the same that splits a corpus in memory,
says which split, shard and place a document belongs to. The second reads, tokenises and brings the documents of each
shard together. Neither the number of tasks nor where shards are cut changes a block: a run on the stores trains
exactly as one on the files does.

What is held: on the driver 8 bytes per document; in a task one batch of texts, or one shard. The exchange between
reading and writing goes through Ray's object store, which spills to disk.
"""

import glob
import logging
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from cluster import connect, storage
from jobs.job import Job
from jobs.report import Report
from library import files, order
from library.errors import InputError, PrismError
from library.language.corpus import SUFFIXES, detokenise
from library.language.material import SPLITS, TOKENIZER
from library.language.token_store import INDEX, finish_store, write_shard
from library.language.tokens import ByteTokenizer, Tokenizer, from_json, load_tokenizer, train_bpe

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

READ_ROWS = 4096  # texts in memory per reading task
TOKENIZE_ROWS = 1024
PARTITIONS = 1000  # most parts of the exchange; each is held in memory by the task that writes its shards


class Part(NamedTuple):
    """What one task reads: a file, or one row group of a Parquet file (-1: the file has none)."""

    file: str
    group: int


class Layout(NamedTuple):
    """Where documents go: `rank` (documents,) is each one's place in the shuffled order, `edges` where splits begin."""

    edges: tuple[int, ...]
    shard_documents: int

    def shards(self) -> list[tuple[str, int, int]]:
        """Split, number within the split and first rank of every shard, in order of ranks."""
        return [
            (split, number, first)
            for split, start, stop in zip(SPLITS, self.edges[:-1], self.edges[1:], strict=True)
            for number, first in enumerate(range(start, stop, self.shard_documents))
        ]


class TokenizeJob(Job, frozen=True, extra="forbid"):
    """Tokenise Parquet, CSV or JSON Lines files into a folder of token stores, which `recipe.corpus` then names."""

    job: ClassVar[str] = "tokenize"

    source: tuple[str, ...] = Field(min_length=1)
    """Files, globs or folders, local or URIs (a glob in a URI only in its last part); .csv, .parquet, .jsonl, .gz."""
    out: str
    """The folder that is written; all nodes must see it. Token stores that are there already are replaced."""
    column: str = "text"
    """The column that holds the documents."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the documents to train, validate and test on."""
    wikitext_spaces: bool = True
    """Keep WikiText's spaces around punctuation; False takes them away."""
    tokenizer: str = "bpe"
    """bpe (trained on the train documents), bytes, a folder or a hub name."""
    vocab_size: int = Field(4096, ge=257)
    """Entries of a bpe tokeniser."""
    shard_documents: PositiveInt = 20_000
    """Documents per shard: what one writing task holds in memory."""
    concurrency: PositiveInt | None = None
    """Most tasks of one kind at a time; None leaves it to Ray. Changes nothing in the result."""

    def run(self) -> Report:
        """Write the stores, whole or not at all. Raises InputError for what cannot be read or has too few documents."""
        began = time.monotonic()
        target = storage.local_path(self.out)
        if target.exists() and not _may_be_replaced(target):
            raise InputError(f"{target} exists and holds more than token stores; choose a new or empty folder")
        connect()
        _hush()
        parts = _parts(self.source)
        counts = self._count(parts)
        layout = Layout(_edges(sum(counts), self.fractions), self.shard_documents)
        offsets = np.cumsum([0, *counts])[:-1].tolist()
        rows = [{**part._asdict(), "offset": at} for part, at in zip(parts, offsets, strict=True)]
        rank = np.empty(sum(counts), np.int64)
        rank[order.permutation(0, 0, len(rank))] = np.arange(len(rank))
        with files.atomic_folder(target) as folder:
            texts = self._texts(rows, rank)
            tokenizer = self._tokenizer(texts, layout)
            (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
            written = self._write(texts, layout, tokenizer, folder)
            streams = [finish_store(folder / split, tokenizer) for split in SPLITS]
        seconds = time.monotonic() - began
        return self._report(written, [stream.fingerprint for stream in streams], tokenizer, seconds)

    def _count(self, parts: list[Part]) -> list[int]:
        import ray

        rows = [{**part._asdict(), "number": number} for number, part in enumerate(parts)]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        counted = dataset.map(partial(_count_documents, column=self.column), concurrency=self.concurrency)
        found = sorted(_rows(counted), key=lambda row: row["number"])
        fault = next((row["fault"] for row in found if row["fault"]), None)
        if fault is not None:
            raise InputError(fault)
        if not any(row["documents"] for row in found):
            raise InputError(f"corpus {', '.join(self.source)} is empty: no document has any text")
        return [row["documents"] for row in found]

    def _texts(self, rows: list[dict[str, Any]], rank: np.ndarray) -> "Dataset":
        """The documents, in any order, each with its rank."""
        import ray

        read = partial(_read_ranked, rank=ray.put(rank), column=self.column, spaces=self.wikitext_spaces)
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        # the fraction of a CPU keeps reading apart from what follows, so that one large file is tokenised in parallel
        return dataset.map_batches(
            read, batch_size=1, batch_format="pyarrow", num_cpus=0.5, concurrency=self.concurrency
        )

    def _tokenizer(self, texts: "Dataset", layout: Layout) -> Tokenizer:
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        if self.tokenizer != "bpe":
            return load_tokenizer(self.tokenizer)
        batches = texts.iter_batches(batch_size=TOKENIZE_ROWS, batch_format="pyarrow")
        train = (row["text"] for batch in batches for row in batch.to_pylist() if row["rank"] < layout.edges[1])
        return train_bpe(train, self.vocab_size)

    def _write(self, texts: "Dataset", layout: Layout, tokenizer: Tokenizer, folder: Path) -> list[dict[str, Any]]:
        encoded = tokenizer.to_json()
        shards = layout.shards()
        tokens = texts.map_batches(
            partial(_tokenise, tokenizer=encoded, firsts=[first for _, _, first in shards]),
            batch_size=TOKENIZE_ROWS,
            batch_format="pyarrow",
            concurrency=self.concurrency,
        )
        for split in SPLITS:
            (folder / split).mkdir()
        write = partial(_write_group, folder=str(folder), shards=shards, tokenizer=encoded)
        grouped = tokens.groupby("shard", num_partitions=min(len(shards), PARTITIONS))
        written = grouped.map_groups(write, batch_format="pyarrow", concurrency=self.concurrency)
        return _rows(written)

    def _report(
        self, written: list[dict[str, Any]], fingerprints: list[str], tokenizer: Tokenizer, seconds: float
    ) -> Report:
        import pandas as pd

        shards = pd.DataFrame(written)
        table = shards.groupby("split")[["documents", "tokens"]].sum().reindex(SPLITS).reset_index()
        table["shards"] = table["split"].map(shards["split"].value_counts())
        table["fingerprint"] = fingerprints
        tokens = int(table["tokens"].sum())
        return Report(
            job=self.job,
            config=self.record(),
            metrics={
                "documents": float(table["documents"].sum()),
                "tokens": float(tokens),
                "tokens_per_second": tokens / seconds,
                "vocabulary": float(tokenizer.vocab_size),
            },
            tables={"splits": table},
            folder=str(storage.local_path(self.out)),
            seconds=seconds,
        )


def _may_be_replaced(target: Path) -> bool:
    """Whether it is a folder that is empty, or that holds what this job writes and nothing else."""
    found = {entry.name for entry in target.iterdir()} if target.is_dir() else {target.name}
    return not found or (found == {TOKENIZER, *SPLITS} and all((target / split / INDEX).is_file() for split in SPLITS))


def _parts(sources: tuple[str, ...]) -> list[Part]:
    """The parts of all files, in the order of `sources` and within a glob or folder by name."""
    from pyarrow.parquet import ParquetFile

    parts = []
    for file in [file for source in sources for file in _expand(source)]:
        if not file.endswith(".parquet"):
            parts.append(Part(file, -1))
            continue
        try:
            with storage.open_input(file) as stream:
                groups = ParquetFile(stream).num_row_groups
        except PrismError:
            raise
        except Exception as error:  # pyarrow raises several kinds for a corrupt file
            raise InputError(f"corpus: {file} cannot be read: {_first_line(error)}") from error
        parts += [Part(file, group) for group in range(groups)]
    return parts


def _expand(source: str) -> list[str]:
    name = source.rstrip("/").rsplit("/", 1)[-1]
    if storage.is_local(source):
        path = storage.local_path(source)
        found = sorted(glob.glob(str(path), recursive=True))
        if path.is_dir():
            found = [str(file) for file in sorted(path.iterdir())]
    elif glob.has_magic(name):
        parent = source.rstrip("/").rsplit("/", 1)[0]
        found = [storage.join(parent, entry) for entry in storage.list(parent) if fnmatch(entry, name)]
    else:
        found = [source] if storage.exists(source) else []
    known = [file for file in found if file.removesuffix(".gz").endswith(SUFFIXES)]
    if not known:
        raise InputError(f"corpus: {source!r} names no file that ends in {', '.join(SUFFIXES)} (also .gz)")
    return known


def _documents(part: Part, column: str) -> Iterator[list[str]]:
    """The documents of a part that have any text, in order, some at a time. Raises InputError that names the file."""
    try:
        for values in _columns(part, column):
            wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
            if wrong is not None:
                raise InputError(
                    f"corpus: {part.file}: column {column!r} holds {type(wrong).__name__} values, not text"
                )
            yield [value for value in values if value is not None and value.strip()]
    except PrismError:
        raise
    except Exception as error:  # pandas, pyarrow and gzip raise many kinds for a corrupt file
        raise InputError(f"corpus: {part.file} cannot be read: {_first_line(error)}") from error


def _columns(part: Part, column: str) -> Iterator[list[Any]]:
    import pandas as pd
    from pyarrow.parquet import ParquetFile

    with storage.open_input(part.file) as stream:
        if part.group >= 0:
            table = ParquetFile(stream)
            _check_column(part.file, column, table.schema_arrow.names)
            for batch in table.iter_batches(READ_ROWS, row_groups=[part.group], columns=[column]):
                yield batch.column(0).to_pylist()
            return
        packed = "gzip" if part.file.endswith(".gz") else None
        if part.file.removesuffix(".gz").endswith(".csv"):
            chunks = pd.read_csv(stream, dtype=str, keep_default_na=False, chunksize=READ_ROWS, compression=packed)
        else:
            chunks = pd.read_json(
                stream, lines=True, dtype=False, convert_dates=False, chunksize=READ_ROWS, compression=packed
            )
        for chunk in chunks:
            _check_column(part.file, column, [str(name) for name in chunk.columns])
            yield [None if value is None or value != value else value for value in chunk[column].tolist()]


def _check_column(file: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise InputError(f"corpus: {file} has no column {column!r}; it has {', '.join(columns)}")


def _count_documents(row: dict[str, Any], *, column: str) -> dict[str, Any]:
    counted, fault = 0, ""
    try:
        counted = sum(len(texts) for texts in _documents(Part(row["file"], row["group"]), column))
    except PrismError as error:
        fault = str(error)
    return {"number": row["number"], "documents": counted, "fault": fault}


def _read_ranked(rows: "pa.Table", *, rank: Any, column: str, spaces: bool) -> Iterator["pa.Table"]:
    import pyarrow as pa
    import ray

    places = ray.get(rank)
    for row in rows.to_pylist():
        at = row["offset"]
        for texts in _documents(Part(row["file"], row["group"]), column):
            kept = texts if spaces else [detokenise(text) for text in texts]
            yield pa.table({"rank": places[at : at + len(kept)], "text": pa.array(kept, pa.large_string())})
            at += len(kept)


def _tokenise(batch: "pa.Table", *, tokenizer: str, firsts: list[int]) -> "pa.Table":
    import pyarrow as pa

    ranks = batch["rank"].to_numpy()
    encoded = _loaded(tokenizer).encode(batch["text"].to_pylist())
    return pa.table(
        {
            "shard": pa.array(np.searchsorted(firsts, ranks, side="right") - 1),
            "rank": pa.array(ranks),
            "tokens": pa.array(encoded, pa.large_list(pa.uint32())),
        }
    )


def _write_group(group: "pa.Table", *, folder: str, shards: list[tuple[str, int, int]], tokenizer: str) -> "pa.Table":
    import pyarrow as pa

    split, number, _ = shards[group["shard"][0].as_py()]
    tokens = group["tokens"].combine_chunks()
    flat, starts = tokens.values.to_numpy(), tokens.offsets.to_numpy()
    documents = [flat[starts[i] : starts[i + 1]] for i in group["rank"].to_numpy().argsort()]
    written = write_shard(Path(folder) / split, number, documents, _loaded(tokenizer))
    return pa.table({"split": [split], "shard": [number], "documents": [len(documents)], "tokens": [written]})


def _hush() -> None:
    """Ray Data's progress bars and its own messages stay off the terminal."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _rows(dataset: "Dataset") -> list[dict[str, Any]]:
    """All rows of a small result. A task's failure is raised as one line."""
    try:
        return dataset.take_all()
    except Exception as error:  # Ray wraps what a task raised
        cause = error
        while cause is not None and not isinstance(cause, PrismError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise type(cause)(str(cause)) from error
        raise PrismError(f"tokenising failed: {_first_line(error)}") from error


@lru_cache(maxsize=1)
def _loaded(tokenizer: str) -> Tokenizer:
    return from_json(tokenizer)


def _edges(documents: int, fractions: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """Where the splits begin and end in the shuffled order, by `library.language.corpus.split_documents`'s rule."""
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions: {fractions} must be three positive numbers that sum to 1")
    first = round(fractions[0] * documents)
    second = first + round(fractions[1] * documents)
    if not 0 < first < second < documents:
        raise InputError(f"{documents} documents are too few for fractions {fractions}: a split would be empty")
    return 0, first, second, documents


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
