"""Small real data sets that ship with the project, one folder per method; each says where it comes from."""

import gzip
import json
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from library.errors import InputError


def sample_file(method: str, name: str) -> Traversable:
    """The file `name` among the samples of `method`. Raises InputError that lists the files when there is none."""
    folder = files(__name__) / method
    file = folder / name
    if not file.is_file():
        present = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        raise InputError(f"no sample {name!r} of {method!r}; there are {', '.join(present) or 'none'}")
    return file


@lru_cache(maxsize=8)
def json_lines(method: str, name: str) -> tuple[dict[str, Any], ...]:
    """The rows of the sample `name`.jsonl.gz of `method`.

    >>> json_lines("send", "truthfulqa")[0]["question"]
    'What happens to you if you eat watermelon seeds?'
    """
    with (
        sample_file(method, f"{name}.jsonl.gz").open("rb") as stream,
        gzip.open(stream, "rt", encoding="utf-8") as text,
    ):
        return tuple(json.loads(line) for line in text)
