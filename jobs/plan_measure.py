"""What one pass through a recipe's model costs: bytes alive and floating-point operations, on tensors without data.

Language models and image networks run on fake tensors, which have shapes and no storage, so a model of any size is
measured in seconds on any machine. A network over graphs or molecules has shapes that depend on the values of its
batch (how many nodes, which pairs), which fake tensors do not have: a few real samples go through it on this CPU.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from jobs import engines
from jobs.training import TrainingJob
from library.artifact import MANIFEST, open_artifact
from library.images.recipe import ClassifierRecipe
from library.language import pythia
from library.language.hub import is_loadable, load_errors
from library.recipe import Batch, Recipe, make_batch, seeded_model
from library.send.decode import transformer_blocks
from library.send.dropout import SensitivityDropout
from library.send.recipe import SendRecipe

ASK_VALUE = torch.ops.aten._local_scalar_dense.default
ATTENTION = {  # which torch's counter does not know: two products forwards, four backwards, the masked half included
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, products=2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, *_, **__: _attention(
        q, k, products=4
    ),
}
FEW, MORE = 2, 4  # samples of the two passes between which everything else is a straight line


@dataclass(frozen=True)
class Line:
    """A quantity that grows with the samples of a pass: `fixed + each * samples`."""

    fixed: float
    each: float

    def __call__(self, samples: int) -> float:
        """The quantity for a number of samples."""
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class Measured:
    """A recipe's model and what its passes cost.

    parameters, learning   numbers of all weights, and of those that learn
    buffers                bytes of the model's buffers
    moments                bytes of the optimiser's state per byte of learning weights in fp32
    largest, outside       weights of the largest repeated block, and of what is in none
    activations            bytes alive at the peak of forward and backward, beside weights and their gradients
    flops                  operations of forward and backward
    on_data                whether real samples were needed
    """

    parameters: int
    learning: int
    buffers: int
    moments: float
    largest: int
    outside: int
    activations: Line
    flops: Line
    on_data: bool


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active, from their making until nobody holds them.

    Those of `held` (weights, the batch) are not counted, nor are views of them. A fake tensor that is asked for its
    value answers as one that passes every check, in its first step.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in held if tensor.layout == torch.strided}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is ASK_VALUE and type(args[0]) is not Tensor:
            return args[0].dtype == torch.bool or 1
        made = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.bytes -= self._known.pop(key)


def measure(job: TrainingJob) -> Measured:
    """Measure the model of a job's recipe in the job's precision. Raises InputError where it cannot be made."""
    recipe, fake = job.recipe, FakeTensorMode()
    if isinstance(recipe, SendRecipe):
        with fake:
            return _measure(job, language_model(recipe), lambda samples: _tokens(recipe, samples), fake)
    splits = recipe.datasets()
    model = seeded_model(recipe)
    there = len(splits.train)
    batches = {n: make_batch(splits, splits.train, [i % there for i in range(n)], range(n)) for n in (FEW, MORE)}
    if not isinstance(recipe, ClassifierRecipe):
        return _measure(job, model, batches.__getitem__, fake, on_data=True)
    batches = {n: tree_map(fake.from_tensor, batch) for n, batch in batches.items()}
    empty = _emptied(model, fake)
    with fake:
        return _measure(job, empty, batches.__getitem__, fake)


def peak_bytes(recipe: Recipe, model: nn.Module, batch: Batch, *, bf16: bool = False) -> tuple[int, float]:
    """Bytes alive at the peak of one forward and backward beside weights and gradients, and its operations."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    whole = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    try:
        with (
            Alive([*model.parameters(), *model.buffers(), *_tensors(batch)]) as alive,
            FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops,
        ):
            with whole:
                loss = recipe.losses(model.train(), batch)["loss"]
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return alive.peak, flops.get_total_flops()


def _measure(
    job: TrainingJob,
    model: nn.Module,
    batch: Callable[[int], Batch],
    fake: FakeTensorMode,
    *,
    on_data: bool = False,
) -> Measured:
    recipe, bf16 = job.recipe, job.precision == "bf16"
    empty = _emptied(copy.deepcopy(model), fake) if on_data else model
    with fake:
        moments = _moments(recipe, empty)
    repeated = engines.blocks(model)
    with _recomputing(repeated) if job.activation_checkpointing else contextlib.nullcontext():
        activations, flops = _lines(recipe, model, batch, bf16=bf16)
    sizes = [sum(p.numel() for p in block.parameters()) for block in repeated]
    count = sum(p.numel() for p in model.parameters())
    return Measured(
        parameters=count,
        learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        moments=moments,
        largest=max(sizes, default=count),
        outside=count - sum(sizes),
        activations=activations,
        flops=flops,
        on_data=on_data,
    )


def _lines(recipe: Recipe, model: nn.Module, batch: Callable[[int], Batch], *, bf16: bool) -> tuple[Line, Line]:
    few, more = (peak_bytes(recipe, model, batch(samples), bf16=bf16) for samples in (FEW, MORE))
    each = [(b - a) / (MORE - FEW) for a, b in zip(few, more, strict=True)]
    activations, flops = (Line(max(0.0, a - FEW * slope), slope) for a, slope in zip(few, each, strict=True))
    return activations, flops


def _moments(recipe: Recipe, model: nn.Module) -> float:
    """Bytes of the optimiser's tensors with one value per weight, over those of the weights, after one step."""
    optimizer = recipe.optimizer(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    with Alive():
        optimizer.step()
    for parameter in learning:
        parameter.grad = None
    held = sum(
        value.nbytes
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    )
    return held / sum(p.nbytes for p in learning)


def _attention(query: torch.Size, key: torch.Size, *, products: int) -> int:
    batch, heads, rows, width = query
    return 2 * products * batch * heads * rows * key[-2] * width


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _recomputing(blocks: list[nn.Module]) -> Iterator[None]:
    """The blocks recompute their activations, as `engines.prepare` makes them do."""
    before = [block.forward for block in blocks]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.forward = forward


def language_model(recipe: SendRecipe) -> nn.Module:
    """The recipe's model by its configuration alone: no weights are drawn or loaded, no tokeniser is trained."""
    named = recipe.lm.removeprefix("EleutherAI/").removesuffix("-deduped")
    if is_loadable(recipe.lm) and named not in pythia.SIZES:
        config = _configuration(recipe)
    else:
        config = pythia.pythia_config(named, _vocabulary(recipe))
    lm = pythia.from_config(config)
    for block in transformer_blocks(lm)[: recipe.freeze_blocks]:
        block.requires_grad_(False)
    tracked = recipe.tracking_texts if recipe.selection in ("product", "change", "variance") else 0
    return SensitivityDropout(lm, layer=recipe.layer, tracking_texts=tracked, masking=recipe.dropping == "mask")


def _configuration(recipe: SendRecipe) -> Any:
    from transformers import AutoConfig

    if (Path(recipe.lm) / MANIFEST).is_file():
        return pythia.artifact_config(open_artifact(recipe.lm, kind="send"))
    with load_errors("model", recipe.lm, recipe.revision):
        return AutoConfig.from_pretrained(recipe.lm, revision=recipe.revision or "main")


def _vocabulary(recipe: SendRecipe) -> int | None:
    """Rows of the vocabulary: a new model has its tokeniser's, a named one its own."""
    if is_loadable(recipe.lm) or recipe.tokenizer not in (None, "bpe", "bytes"):
        return None
    return 257 if recipe.tokenizer == "bytes" else recipe.vocab_size


def _tokens(recipe: SendRecipe, samples: int) -> Batch:
    ids = torch.zeros(samples, recipe.context, dtype=torch.int64)
    return {"input_ids": ids, "targets": ids}


def _emptied(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """The model with fake tensors in place of its own; those that are shared stay shared."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                learns = parameter.requires_grad
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(fake.from_tensor(parameter.detach()), requires_grad=learns)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)
    return model
