"""Records of jobs from files and URIs, and those that are none."""

from pathlib import Path

import pytest

from jobs import flags
from library.errors import InputError


@pytest.mark.parametrize("content", ["5", "[]", "null", '{"config": null}', '{"config": 5}', '{"config": []}'])
def test_a_file_without_a_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(InputError, match=r"job\.json holds no JSON object; a job's record is one"):
        flags.load_record(str(tmp_path / "job.json"))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_record_is_read_from_a_path_and_from_a_uri(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "job.json").write_text('{"config": {"job": "send"}}')
    assert flags.load_record(f"{prefix}{tmp_path}/job.json") == {"job": "send"}
    with pytest.raises(InputError, match=r"no-such\.json cannot be read: No such file or directory"):
        flags.load_record(f"{prefix}{tmp_path}/no-such.json")
