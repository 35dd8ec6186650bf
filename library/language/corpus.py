"""Texts to train on: a shipped sample, a user's table, or a data set of the Hugging Face hub."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library import order
from library.errors import InputError
from library.language.hub import load_errors
from library.samples import json_lines


class TextSplits(NamedTuple):
    """Documents to train on, to validate on (the tracking texts are among these), and to test on (the prompts)."""

    train: list[str]
    validation: list[str]
    test: list[str]


def _passage(row: dict[str, Any]) -> str:
    return " ".join(row["sentences"])


def _question_and_answer(row: dict[str, Any]) -> str:
    return f"{row['question']} {row['best_answer']}"


def _question(row: dict[str, Any]) -> str:
    return row["question"]


# name: (files of the sample, either one or train, validation, test; the text of a row)
SAMPLES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], str]]] = {
    "wikipedia": (("wiki_train", "wiki_valid", "wiki_test"), _passage),
    "truthfulqa": (("truthfulqa",), _question_and_answer),
    "medhalt": (("medhalt_reasoning_fake",), _question),
}

SUFFIXES = (".csv", ".parquet", ".jsonl")


def read_corpus(
    source: str, *, column: str = "text", fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> TextSplits:
    """The documents of `source`, without empty ones, as train, validation and test.

    source      a shipped sample ("wikipedia", "truthfulqa", "medhalt"); a CSV, Parquet or JSON Lines file (also .gz)
                with one document per row in `column`; or a hub data set, OWNER/NAME or OWNER/NAME:CONFIG, with
                the `datasets` package
    fractions   of the documents in train, validation and test, where the source has no splits of its own; who goes
                where depends on the number of documents alone, so that all seeds share one test set

    Raises InputError for an unknown source, a missing column (with the columns there are), a column that is not text,
    and a corpus with no text or too few documents for the three splits.

    >>> [len(split) for split in read_corpus("wikipedia")]
    [6000, 1000, 1304]
    """
    if source in SAMPLES:
        names, text = SAMPLES[source]
        parts = [[text(row) for row in json_lines("send", name)] for name in names]
    elif source.removesuffix(".gz").endswith(SUFFIXES):
        parts = [_read_file(Path(source), column)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and not Path(source).exists():
        parts = _read_hub(source, column)
    else:
        raise InputError(
            f"corpus: {source!r} is not one of {', '.join(SAMPLES)}, a file {', '.join(SUFFIXES)} (also .gz), a folder "
            f"of token stores, or a hub data set OWNER/NAME"
        )
    parts = [[document for document in part if document.strip()] for part in parts]
    if not any(parts):
        raise InputError(f"corpus {source!r} is empty: no document has any text")
    return TextSplits(*parts) if len(parts) == 3 else split_documents(parts[0], fractions)


def split_documents(documents: Sequence[str], fractions: tuple[float, float, float]) -> TextSplits:
    """The documents in a fixed shuffled order, cut by `fractions`. Raises InputError when a split would be empty."""
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions: {fractions} must be three positive numbers that sum to 1")
    shuffled = order.permutation(0, 0, len(documents))
    first = round(fractions[0] * len(documents))
    second = first + round(fractions[1] * len(documents))
    parts = [[documents[i] for i in part] for part in (shuffled[:first], shuffled[first:second], shuffled[second:])]
    if not all(parts):
        raise InputError(f"{len(documents)} documents are too few for fractions {fractions}: a split would be empty")
    return TextSplits(*parts)


def detokenise(text: str) -> str:
    """Undo the spaces that WikiText puts around punctuation, the unambiguous ones.

    >>> detokenise("It 's a test ( of 1 @,@ 000 well @-@ known words ) , he said .")
    "It's a test (of 1,000 well-known words), he said."
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€]) ", r"\1", text)
    return re.sub(r" (n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)


def _read_file(path: Path, column: str) -> list[str]:
    import pandas

    if not path.is_file():
        raise InputError(f"corpus: there is no file {path}")
    with load_errors("corpus", str(path), None):
        if path.suffix == ".parquet":
            from pyarrow import parquet

            _check_column(str(path), column, parquet.read_schema(path).names)
            table = pandas.read_parquet(path, columns=[column])
        elif path.name.removesuffix(".gz").endswith(".csv"):
            _check_column(str(path), column, pandas.read_csv(path, nrows=0).columns)
            table = pandas.read_csv(path, usecols=[column], dtype=str, keep_default_na=False)
        else:
            table = pandas.read_json(path, lines=True, dtype=False, convert_dates=False)
            _check_column(str(path), column, table.columns)
    return _texts(str(path), column, table[column].dropna().tolist())


def _read_hub(source: str, column: str) -> list[list[str]]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"corpus: to read {source!r} from the hub, install the `datasets` package") from None
    name, _, config = source.partition(":")
    with load_errors("corpus", name, None):
        loaded = datasets.load_dataset(name, config or None)
    own = [split for split in ("train", "validation", "test") if split in loaded]
    splits = [loaded[split] for split in (own if len(own) == 3 else list(loaded)[:1])]
    for split in splits:
        _check_column(source, column, split.column_names)
    return [_texts(source, column, [t for t in split[column] if t is not None]) for split in splits]


def _check_column(source: str, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise InputError(f"corpus {source!r} has no column {column!r}; it has {', '.join(map(str, columns))}")


def _texts(source: str, column: str, values: list[Any]) -> list[str]:
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None:
        raise InputError(f"corpus {source!r}: column {column!r} holds {type(wrong).__name__} values, not text")
    return values
