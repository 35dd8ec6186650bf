import errno
import itertools
import json

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import ArtifactError, InputError, PrismError
from library.language.corpus import detokenise, read_corpus, split_documents
from library.language.token_store import TokenBlocks, finish_store, open_store, pack_documents, write_shard
from library.language.tokens import ByteTokenizer, tokenizer_hash, train_bpe
from library.samples import json_lines, sample_file

BYTES = ByteTokenizer()
TEXTS = [f"document number {i}, {'x' * (i % 5)}" for i in range(20)]
DOCUMENTS = st.lists(st.lists(st.integers(1, 256), max_size=9), max_size=12)


def test_shipped_samples_have_their_sizes_and_licences():
    rows = {
        "wiki_train": 6000,
        "wiki_valid": 1000,
        "wiki_test": 1304,
        "truthfulqa": 817,
        "medhalt_reasoning_fake": 1858,
    }
    assert {name: len(json_lines("send", name)) for name in rows} == rows
    assert sample_file("send", "LICENSE-CC-BY-SA.md").is_file()
    with pytest.raises(InputError, match=r"no sample 'halueval.jsonl.gz' of 'send'; there are .*truthfulqa"):
        json_lines("send", "halueval")


def test_samples_as_corpora():
    assert [len(part) for part in read_corpus("wikipedia")] == [6000, 1000, 1304]
    assert sum(len(part) for part in read_corpus("truthfulqa")) == 817
    assert sum(len(part) for part in read_corpus("medhalt")) == 1858


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_every_file_kind_gives_the_same_documents(tmp_path, name):
    table = pandas.DataFrame({"texts": [*TEXTS[:10], "", *TEXTS[10:]], "label": range(21)})
    path = tmp_path / name
    if ".csv" in name:
        table.to_csv(path, index=False)
    elif ".jsonl" in name:
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    splits = read_corpus(str(path), column="texts")
    assert [len(part) for part in splits] == [16, 2, 2]
    assert sorted(splits.train + splits.validation + splits.test) == sorted(TEXTS)
    assert splits == split_documents(TEXTS, (0.8, 0.1, 0.1))
    with pytest.raises(InputError, match="has no column 'text'; it has texts, label"):
        read_corpus(str(path))


def test_bad_corpora_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "broken.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    (tmp_path / "nothing.csv").write_text("")
    for name in ("broken.parquet", "broken.jsonl", "broken.csv.gz", "nothing.csv"):
        with pytest.raises(InputError, match=r"cannot be loaded.*check the files") as caught:
            read_corpus(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="holds int values, not text"):
        read_corpus(str(tmp_path / "numbers.jsonl"))
    with pytest.raises(InputError, match="is empty: no document has any text"):
        read_corpus(str(tmp_path / "blank.jsonl"))
    with pytest.raises(InputError, match="there is no file"):
        read_corpus(str(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="is not one of wikipedia, truthfulqa, medhalt"):
        read_corpus("pile")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="install the `datasets` package"):
        read_corpus("openlifescienceai/Med-HALT:reasoning_FCT")


def test_splits_need_documents_and_fractions():
    with pytest.raises(InputError, match="3 documents are too few"):
        split_documents(TEXTS[:3], (0.8, 0.1, 0.1))
    for fractions in ((0.8, 0.2, 0.2), (1.0, 0.0, 0.0)):
        with pytest.raises(InputError, match="three positive numbers that sum to 1"):
            split_documents(TEXTS, fractions)


def test_detokenised_text_has_no_space_before_punctuation():
    text = detokenise(" ".join(json_lines("send", "wiki_train")[0]["sentences"]))
    assert text.startswith('"The Big Goodbye" is the 12th episode')
    assert " ," not in text
    assert " ." not in text


@given(documents=DOCUMENTS, cuts=st.lists(st.integers(0, 12), max_size=4), length=st.integers(1, 7))
def test_blocks_and_fingerprint_do_not_depend_on_the_shards(tmp_path_factory, documents, cuts, length):
    whole = pack_documents(documents, 0, tokenizer_hash(BYTES))
    if len(whole) == 0:
        return
    folder = tmp_path_factory.mktemp("store")
    edges = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        write_shard(folder, number, documents[start:stop], BYTES)
    finished = finish_store(folder, BYTES)
    opened = open_store(folder, BYTES, verify=True)
    assert finished.fingerprint == opened.fingerprint == whole.fingerprint
    assert [d.tolist() for d in opened.documents(chunk=3)] == [d for d in documents if d]
    expected = [token for document in documents if document for token in [*document, 0]]
    assert opened.read(0, len(opened)).tolist() == expected
    if len(whole) > length:
        for stream in (whole, opened):
            blocks = TokenBlocks(stream, length)
            assert len(blocks) == (len(expected) - 1) // length
            for i, block in enumerate(blocks):
                assert block.tolist() == expected[i * length : (i + 1) * length + 1]


def test_large_vocabularies_take_four_bytes(tmp_path):
    wide = train_bpe(["a"], vocab_size=257)
    wide.vocab_size = 1 << 17
    write_shard(tmp_path, 0, [[70_000, 1]], wide)
    assert finish_store(tmp_path, wide).read(0, 3).tolist() == [70_000, 1, 0]
    assert np.load(tmp_path / "tokens-00000.npy").dtype == np.uint32


@pytest.fixture
def store(tmp_path):
    for number in range(3):
        write_shard(tmp_path, number, BYTES.encode(TEXTS[number * 5 : number * 5 + 5]), BYTES)
    finish_store(tmp_path, BYTES)
    return tmp_path


def test_damaged_stores_are_refused(store):
    shard = store / "tokens-00001.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ArtifactError, match=r"tokens-00001.npy is truncated"):
        open_store(store, BYTES)
    shard.write_bytes(content[:-2] + b"\x07\x00")
    open_store(store, BYTES)
    with pytest.raises(ArtifactError, match="its tokens are not those that were written"):
        open_store(store, BYTES, verify=True)
    np.save(shard, np.zeros((3, 3)))
    with pytest.raises(ArtifactError, match="is foreign"):
        open_store(store, BYTES)
    np.save(shard, np.zeros(5, np.uint16))
    with pytest.raises(ArtifactError, match="is corrupt: 5 tokens"):
        open_store(store, BYTES)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"incomplete: tokens-00001.npy is missing"):
        open_store(store, BYTES)
    with pytest.raises(InputError, match="shard 1 of 2 or more is missing"):
        finish_store(store, BYTES)
    (store / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ArtifactError, match="corrupt or foreign"):
        open_store(store, BYTES)
    (store / "index.json").unlink()
    with pytest.raises(ArtifactError, match="no token store"):
        open_store(store, BYTES)


def test_a_store_knows_its_tokeniser(store):
    with pytest.raises(InputError, match="made with another tokeniser"):
        open_store(store, train_bpe(["a"], vocab_size=257))


def test_empty_and_short_streams_are_refused(tmp_path):
    write_shard(tmp_path, 0, [[], []], BYTES)
    with pytest.raises(InputError, match="is empty"):
        finish_store(tmp_path, BYTES)
    with pytest.raises(InputError, match="4 tokens are shorter than one block of 4"):
        TokenBlocks(pack_documents([[1, 2, 3]], 0), 4)
    with pytest.raises(IndexError):
        TokenBlocks(pack_documents([[1, 2, 3]], 0), 3)[1]


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(PrismError, match="the disk is full"):
        write_shard(tmp_path, 0, [[1]], BYTES)
    assert list(tmp_path.iterdir()) == []
