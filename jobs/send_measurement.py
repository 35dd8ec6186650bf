"""What an analysis takes of one checkpoint, in one task: embeddings, loss, entropy and scores; and how it is kept."""

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cluster import storage
from jobs.send_checkpoints import Source, load_checkpoint
from library.errors import ArtifactError, InputError, PrismError
from library.language import material
from library.language.corpus import read_corpus
from library.language.token_store import TokenBlocks, TokenStream, pack_documents
from library.language.tokens import Tokenizer, tokenizer_hash
from library.send.dropout import SensitivityDropout, embed_texts
from library.send.ees import ees
from library.send.eigenscore import eigenscore
from library.send.recipe import SendRecipe

if TYPE_CHECKING:
    from jobs.send_analysis import SendAnalysis

RESULTS = "results"


class Measured(NamedTuple):
    """What one task finds: embeddings float32 (texts, d), means over prompts and held-out tokens, the tokeniser's hash.

    A standard error is over prompts, whose spread includes what random probes add.
    """

    embeddings: Tensor
    metrics: dict[str, float]
    tokenizer: str


class Fault(NamedTuple):
    """Why a checkpoint could not be measured, and whether the checkpoint itself is at fault."""

    message: str
    artifact: bool


def measure_checkpoint(job: "SendAnalysis", source: Source, key: str) -> Measured | Fault:
    """Load once, embed all texts, continue all prompts. Trying again cannot mend what is returned as a Fault."""
    try:
        lm, tokenizer = load_checkpoint(source, job.tokenizer)
        found = measure(job, lm, tokenizer)
    except PrismError as error:
        message = str(error)
        return Fault(
            message if source.place in message else f"checkpoint {source}: {message}", isinstance(error, ArtifactError)
        )
    if job.out is not None:
        keep(job.out, key, found)
    return found


@torch.no_grad()
def measure(job: "SendAnalysis", lm: torch.nn.Module, tokenizer: Tokenizer) -> Measured:
    """Embeddings of the texts, and loss, entropy (nats per token), EigenScore and EES of one language model."""
    device = torch.device("cuda" if job.gpu else "cpu")
    validation, test = _streams(job, tokenizer)
    model = SensitivityDropout(lm, layer=job.layer, masking=False).to(device).eval()
    needed = max(job.context, job.prompt_tokens + job.answers.max_new_tokens)
    if needed > lm.config.max_position_embeddings:
        raise InputError(f"{lm.config.max_position_embeddings} positions, {needed} are needed; use a shorter context")
    texts = material.tracking_texts(validation, job.texts, job.context)
    embeddings = embed_texts(model, *texts, form=job.form, batch_size=job.batch_size).cpu()

    blocks = TokenBlocks(validation, job.context, f"corpus {job.corpus!r}, validation")
    held_out = torch.stack([blocks[i] for i in range(min(job.blocks, len(blocks)))]).to(device)
    batches = ({"input_ids": part[:, :-1], "targets": part[:, 1:]} for part in held_out.split(job.batch_size))
    metrics = SendRecipe(prompts=0, selection="none").evaluate(model, batches)

    prompts = material.prompts(test, job.prompts, job.prompt_tokens)
    scores, efficient = [], []
    for start in range(0, len(prompts), job.batch_size):
        part = prompts[start : start + job.batch_size]
        drawn = job.answers.draw(lm, part, seed=job.seed, stop_token=tokenizer.end_of_text)
        spread = drawn.sampled.embeddings.cpu()
        scores.append(eigenscore(spread, convention=job.answers.convention, alpha=job.answers.alpha))
        efficient.append(ees(spread).value)
    for name, parts in (("eigenscore", scores), ("ees", efficient)):
        values = torch.cat(parts)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        metrics |= {name: values.mean().item(), f"{name}_standard_error": error}
    return Measured(embeddings, metrics, tokenizer_hash(tokenizer))


def _streams(job: "SendAnalysis", tokenizer: Tokenizer) -> tuple[TokenStream, TokenStream]:
    """Validation and test documents in the checkpoint's own tokens."""
    if Path(job.corpus).is_dir():
        made = material.prepare(
            job.corpus,
            column=job.text_column,
            fractions=job.fractions,
            spaces=True,
            tokenizer="bytes",
            revision=None,
            vocab_size=257,
        )
        if tokenizer_hash(made.tokenizer) != tokenizer_hash(tokenizer):
            raise InputError(f"vocabulary mismatch: token stores {job.corpus} were made with another tokeniser")
        return made.validation, made.test
    splits = read_corpus(job.corpus, column=job.text_column, fractions=job.fractions)
    end = tokenizer.end_of_text
    return tuple(pack_documents(tokenizer.encode(split), end) for split in (splits.validation, splits.test))


def keep(out: str, key: str, found: Measured) -> None:
    """Write a result: the embeddings first, then what says that they are whole."""
    from safetensors.torch import save

    content = save({"embeddings": found.embeddings.contiguous()})
    storage.write_bytes(storage.join(out, RESULTS, f"{key}.safetensors"), content)
    about = {"metrics": found.metrics, "tokenizer": found.tokenizer, "sha256": sha256(content).hexdigest()}
    storage.write_bytes(storage.join(out, RESULTS, f"{key}.json"), json.dumps(about).encode())


def read_kept(out: str, key: str) -> Measured | None:
    """A kept result; None when there is none, or it is damaged and has to be found anew."""
    from safetensors.torch import load

    about, arrays = (storage.join(out, RESULTS, f"{key}.{end}") for end in ("json", "safetensors"))
    if not (storage.exists(about) and storage.exists(arrays)):
        return None
    content = storage.read_bytes(arrays)
    try:
        said = json.loads(storage.read_bytes(about))
    except ValueError:
        return None
    if sha256(content).hexdigest() != said["sha256"]:
        return None
    return Measured(load(content)["embeddings"], said["metrics"], said["tokenizer"])
