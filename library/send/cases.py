"""Cloze cases out of the documents that a SeND recipe trains on."""

import itertools
from dataclasses import replace

from library.language.corpus import SAMPLES, detokenise
from library.language.material import SPLITS, Material
from library.samples import json_lines
from library.send.detection import ClozeCase, cloze_cases, plain_passages


def entity_cases(made: Material, corpus: str, split: str, count: int, *, spaces: bool = True) -> list[ClozeCase]:
    """At most `count` cloze cases of the documents of a split, one of each document at most, in the order of the text.

    The shipped Wikipedia passages bring titles and sentences; other documents are read back from their tokens.
    Prompts have their punctuation as the model was trained on it (`spaces` as in `prepare`).
    """
    if corpus == "wikipedia":
        rows = json_lines("send", dict(zip(SPLITS, SAMPLES[corpus][0], strict=True))[split])
    else:
        documents = itertools.islice(getattr(made, split).documents(), 8 * count)
        rows = plain_passages(made.tokenizer.decode(document.tolist()) for document in documents)
    cases = cloze_cases(rows, per_passage=1)[:count]
    return cases if spaces else [replace(case, prompt=detokenise(case.prompt)) for case in cases]
