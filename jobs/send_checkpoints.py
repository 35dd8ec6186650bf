"""The checkpoints that an analysis compares: found by path, glob, registry reference or hub name, and loaded alike."""

import glob
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cluster import registry, storage
from jobs.checkpoint import INDEX, Checkpoint, model_weights
from library import files
from library.artifact import MANIFEST, open_artifact
from library.errors import ArtifactError, InputError
from library.language import pythia
from library.language.hub import is_loadable
from library.language.tokens import Tokenizer, check_vocabulary, load_tokenizer
from library.recipe import seeded_model
from library.send.recipe import SendRecipe
from library.send.trained import load_send
from library.weights import load_tensors

if TYPE_CHECKING:
    from torch import nn


class Source(NamedTuple):
    """One checkpoint: where it is, what it is, and a key that changes with its content."""

    place: str
    revision: str | None
    kind: Literal["run", "artifact", "model"]
    key: str

    @property
    def label(self) -> str:
        """Its short name: the revision, a run's step, or the last part of its path."""
        name = self.place.rstrip("/").rsplit("/", 1)[-1]
        return self.revision or (name.rpartition("-")[0] if self.kind == "run" and name.count("-") > 1 else name)

    def __str__(self) -> str:
        return f"{self.place}@{self.revision}" if self.revision else self.place


def find_checkpoints(names: Sequence[str], revisions: Sequence[str] = ()) -> list[Source]:
    """The checkpoints that `names` mean, in that order; of a glob sorted by name.

    A name is a folder of a run's checkpoint, an artifact's folder or models:/ reference, a folder that transformers
    wrote, a glob of such, or a hub name OWNER/NAME, which is taken at each of the `revisions`. A hub revision counts
    as content that does not change. Raises InputError for a name that means nothing and revisions without a hub name.
    """
    hub = [name for name in names if not name.startswith("models:") and _local(name) is None and _is_hub(name)]
    if revisions and not hub:
        raise InputError(f"revisions are those of a hub name OWNER/NAME; {', '.join(names)} is none")
    found: list[Source] = []
    for name in names:
        if name in hub:
            found += [Source(name, revision, "model", f"{name}@{revision}") for revision in revisions or ("main",)]
        elif name.startswith("models:"):
            found.append(_source(str(registry.resolve(name, kind=SendRecipe.kind))))
        elif glob.has_magic(name) and storage.is_local(name):
            places = sorted(glob.glob(str(storage.local_path(name))))
            if not places:
                raise InputError(f"no checkpoint matches {name}")
            found += [_source(place) for place in places]
        else:
            found.append(_source(name))
    return found


def load_checkpoint(source: Source, tokenizer: str | None) -> tuple["nn.Module", Tokenizer]:
    """The causal language model of a checkpoint in evaluation mode, nothing dropped, and its tokeniser.

    `tokenizer` names another than the model's own. Raises InputError and ArtifactError that name the checkpoint when
    it is missing, damaged, foreign, or has fewer rows than the tokeniser has entries.
    """
    if source.kind == "artifact":
        model, own, _ = load_send(open_artifact(source.place, kind=SendRecipe.kind))
        lm = model.lm
    elif source.kind == "run":
        lm, own = _load_run(source.place)
    else:
        lm = pythia.load(source.place, revision=source.revision)
        own = None if tokenizer else load_tokenizer(source.place, source.revision)
    chosen = load_tokenizer(tokenizer) if tokenizer and tokenizer != "bytes" else _bytes() if tokenizer else own
    check_vocabulary(chosen, lm.config.vocab_size, str(source))
    return lm.eval(), chosen


def _load_run(place: str) -> tuple["nn.Module", Tokenizer]:
    checkpoint = Checkpoint(place)
    if checkpoint.index.kind != SendRecipe.kind:
        raise ArtifactError(f"{place} is a checkpoint of {checkpoint.index.kind!r}, not of 'send'")
    fault = checkpoint.fault()
    if fault is not None:
        raise ArtifactError(f"checkpoint {place} is damaged: {fault}")
    recipe = SendRecipe.model_validate(checkpoint.index.recipe)
    model: Any = seeded_model(recipe)
    load_tensors(model, dict(model_weights(checkpoint)), source=f"checkpoint {place}")
    model.masking = False
    return model.lm, recipe.material().tokenizer


def _source(place: str) -> Source:
    if storage.exists(storage.join(place, INDEX)):
        return Source(place, None, "run", sha256(storage.read_bytes(storage.join(place, INDEX))).hexdigest())
    folder = _local(place)
    if folder is None:
        raise InputError(
            f"no checkpoint at {place}: it is no folder of a run's checkpoint, an artifact or a model, "
            "no models:/ reference and no hub name OWNER/NAME"
        )
    if (folder / MANIFEST).is_file():
        return Source(str(folder), None, "artifact", open_artifact(folder, kind=SendRecipe.kind).version)
    if not (folder / "config.json").is_file():
        raise InputError(f"no checkpoint at {folder}: it holds no {INDEX}, no {MANIFEST} and no config.json")
    content = [f"{file.name} {files.sha256(file)}" for file in sorted(folder.iterdir()) if file.is_file()]
    return Source(str(folder), None, "model", sha256("\n".join(content).encode()).hexdigest())


def _local(name: str) -> Path | None:
    if not storage.is_local(name):
        return None
    path = storage.local_path(name)
    return path if path.is_dir() else None


def _is_hub(name: str) -> bool:
    return storage.is_local(name) and is_loadable(name) and not glob.has_magic(name)


def _bytes() -> Tokenizer:
    from library.language.tokens import ByteTokenizer

    return ByteTokenizer()
