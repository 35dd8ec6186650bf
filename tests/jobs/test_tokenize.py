"""The stores that the job writes hold exactly what packing the same documents in memory gives."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from jobs.tokenize import TokenizeJob
from library.errors import InputError
from library.language import material
from library.language.tokens import tokenizer_hash
from library.recipe import fit
from library.samples import json_lines
from library.send.recipe import SendRecipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows = [" ".join(row["sentences"]) for row in json_lines("send", "wiki_valid")][:150]
    rows[3], rows[70] = "   ", 'naïve, "quoted",\nand on two lines'
    return rows


@pytest.fixture
def parquet(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "corpus.parquet"
    pd.DataFrame({"text": [*texts[:20], None, *texts[20:]], "other": 1}).to_parquet(path, row_group_size=40)
    return path


def in_memory(source: Path, tokenizer: str = "bytes") -> material.Material:
    return material.prepare(
        str(source),
        column="text",
        fractions=(0.8, 0.1, 0.1),
        spaces=True,
        tokenizer=tokenizer,
        revision=None,
        vocab_size=600,
    )


def assert_same(made: material.Material, expected: material.Material) -> None:
    assert tokenizer_hash(made.tokenizer) == tokenizer_hash(expected.tokenizer)
    for stream, other in zip(made[1:], expected[1:], strict=True):
        assert stream.fingerprint == other.fingerprint
        assert (stream.read(0, len(stream)) == other.read(0, len(other))).all()


@pytest.mark.parametrize(("concurrency", "shard_documents"), [(None, 1000), (1, 17), (3, 50)])
def test_stores_equal_packing_in_memory(parquet, tmp_path, concurrency, shard_documents):
    job = TokenizeJob(
        source=(str(parquet),),
        out=str(tmp_path / "stores"),
        tokenizer="bytes",
        concurrency=concurrency,
        shard_documents=shard_documents,
    )
    report = job.run()
    made, expected = in_memory(tmp_path / "stores"), in_memory(parquet)
    assert_same(made, expected)
    assert len(made.train.shards) == -(-119 // shard_documents)
    assert report.metrics["documents"] == 149
    assert report.metrics["tokens"] == sum(len(stream) for stream in made[1:])
    assert report.tables["splits"]["documents"].tolist() == [119, 15, 15]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_trained_vocabulary_does_not_depend_on_the_order_of_reading(texts, parquet, tmp_path):
    for number in range(3):
        rows = pd.DataFrame({"text": texts[50 * number : 50 * (number + 1)]})
        rows.to_json(tmp_path / f"part-{number}.jsonl.gz", orient="records", lines=True, force_ascii=False)
    TokenizeJob(source=(str(tmp_path / "part-*.jsonl.gz"),), out=str(tmp_path / "stores"), vocab_size=600).run()
    assert_same(in_memory(tmp_path / "stores"), in_memory(parquet, "bpe"))


def test_training_on_the_stores_is_training_on_the_file(texts, tmp_path):
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "corpus.csv", index=False)
    TokenizeJob(source=(str(tmp_path / "corpus.csv"),), out=str(tmp_path / "stores"), tokenizer="bytes").run()
    losses: dict[str, list[float]] = {"corpus.csv": [], "stores": []}
    for name, found in losses.items():
        recipe = SendRecipe(
            corpus=str(tmp_path / name),
            tokenizer="bytes",
            steps=3,
            context=32,
            batch_size=4,
            prompts=0,
            selection="none",
        )
        fit(recipe, path=tmp_path / f"artifact-{name}", callbacks=[lambda _, m, found=found: found.append(m["loss"])])
    assert losses["stores"] == losses["corpus.csv"]
    assert len(losses["stores"]) == 3


def _corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", [{"body": "x"}], "has no column 'text'; it has body"),
        ("a.jsonl", [{"text": 3}, {"text": 4}], "holds int values, not text"),
        ("a.jsonl", [{"text": " "}, {"text": ""}], "is empty: no document has any text"),
        ("a.jsonl", [{"text": "one"}, {"text": "two"}], "2 documents are too few"),
        ("a.txt", [{"text": "one"}], "names no file that ends in .csv, .parquet, .jsonl"),
        ("a.jsonl.gz", None, "a.jsonl.gz cannot be read"),
        ("a.parquet", None, "a.parquet cannot be read"),
    ],
)
def test_bad_corpora_are_named_and_leave_nothing(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text("\n".join(map(json.dumps, content)))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 1000)[:60])
    else:
        path.write_bytes(b"PAR1 this is no table")
    with pytest.raises(InputError, match=r"corpus|documents") as caught:
        TokenizeJob(source=(str(path),), out=str(tmp_path / "stores"), tokenizer="bytes").run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if "stores" in path.name] == []


def test_a_folder_that_holds_something_else_is_not_replaced(parquet, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds more than token stores"):
        TokenizeJob(source=(str(parquet),), out=str(tmp_path / "mine"), tokenizer="bytes").run()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_token_stores_are_replaced_and_a_model_with_a_tokeniser_is_not(parquet, tmp_path):
    model, stores = tmp_path / "model", tmp_path / "stores"
    TokenizeJob(source=(str(parquet),), out=str(stores), tokenizer="bytes").run()
    TokenizeJob(source=(str(parquet),), out=str(stores), tokenizer="bytes", shard_documents=17).run()
    assert len(in_memory(stores).train.shards) > 1
    model.mkdir()
    (model / "tokenizer.json").write_bytes((stores / "tokenizer.json").read_bytes())
    (model / "model.safetensors").write_text("weights")
    (stores / "notes.txt").write_text("precious")
    for place in (model, stores):
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match="holds more than token stores"):
            TokenizeJob(source=(str(parquet),), out=str(place), tokenizer="bytes").run()
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
