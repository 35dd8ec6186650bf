"""The engines behind the one training loop: DDP, FSDP2, and DeepSpeed ZeRO stages 1 to 3, in one small shape.

An engine wraps a model for data-parallel training and knows three things that differ between them: how gradients are
averaged, how a step is taken, and which stretches of which tensors this worker owns. `pieces` yields what this worker
contributes to a checkpoint and `restore` reads what it needs from one, both by parameter name and in full precision
(see `jobs.checkpoint`), so a run may change engine and number of workers at any checkpoint. The model's own tensors
are loaded before an engine wraps it; `restore` adds the optimiser's state and, under ZeRO, the fp32 master weights.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from jobs.checkpoint import Checkpoint, Piece
from library import collective
from library.errors import NonFiniteError
from library.recipe import Recipe
from library.weights import persistent_buffers

EngineName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "bf16"]


class Engine(Protocol):
    """What the training loop needs of an engine."""

    model: nn.Module
    """What the recipe's functions are called with."""
    optimizer: Optimizer
    """The torch optimiser, whose `param_groups` a schedule changes."""

    def begin(self, *, last: bool) -> None:
        """Called before the forward pass of a micro-batch; gradients are averaged at the `last` one of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; the last micro-batch's call averages their sums over the workers."""

    def step(self) -> float:
        """Clip, step, clear the gradients; return their norm. Raises NonFiniteError alike on all workers, before
        any weight changes."""

    def pieces(self) -> Iterator[Piece]:
        """This worker's part of the state; the parts of all workers together cover it exactly once."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the optimiser's tensors from a checkpoint of any engine and number of workers."""


def prepare(
    name: EngineName,
    recipe: Recipe,
    model: nn.Module,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> Engine:
    """Wrap `model` (on the CPU, its weights set) in an engine; needs an initialised torch.distributed."""
    if activation_checkpointing:
        for block in blocks(model):
            block.forward = functools.partial(_checkpointed, block.forward)
    if compile:
        model.compile()
    if name == "ddp":
        return DataParallel(recipe, model.to(device), precision)
    if name == "fsdp":
        return FullyShardedDataParallel(recipe, model, device, precision)
    return Zero(recipe, model, device, precision, stage=int(name.removeprefix("zero")))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the entries of its outermost module lists."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    return [block for name in outer for block in lists[name] if any(True for _ in block.parameters())]


class DataParallel:
    """torch's DistributedDataParallel: every worker holds everything, gradients are all-reduced in buckets."""

    def __init__(self, recipe: Recipe, model: nn.Module, precision: Precision) -> None:
        self._module = model
        self._recipe = recipe
        self.optimizer = recipe.optimizer(model)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a new name for the argument
            wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._wrapped = wrapped
        self.model = wrapped
        if precision == "bf16":
            wrapped.forward = torch.autocast(next(model.parameters()).device.type, torch.bfloat16)(wrapped.forward)

    def begin(self, *, last: bool) -> None:
        self._wrapped.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        limit = self._recipe.largest_norm(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), limit or float("inf"))
        return _finish_step(self._recipe, self.optimizer, norm)

    def pieces(self) -> Iterator[Piece]:
        ranks, me = collective.world_size(), collective.rank()
        for i, (name, parameter) in enumerate(self._module.named_parameters()):
            if i % ranks == me:  # replicated: the workers share the writing
                yield Piece(f"model/{name}", 0, parameter.detach().flatten(), tuple(parameter.shape))
                for key, value in _elementwise(self.optimizer, parameter):
                    yield Piece(f"optimizer/{name}/{key}", 0, value.flatten(), tuple(parameter.shape))
        yield from _buffer_pieces(self._module)

    def restore(self, checkpoint: Checkpoint) -> None:
        for name, parameter in self._module.named_parameters():
            for key in _state_keys(checkpoint, name):
                value = checkpoint.tensor(f"optimizer/{name}/{key}")
                self.optimizer.state[parameter][key] = value.to(parameter.device, parameter.dtype)


class FullyShardedDataParallel:
    """torch's FSDP2: parameters, gradients and moments sharded by rows; each block is gathered while it computes."""

    def __init__(self, recipe: Recipe, model: nn.Module, device: torch.device, precision: Precision) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=precision == "bf16",
        )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self.model = fully_shard(model, mesh=mesh, mp_policy=policy)
        for _, buffer in self.model.named_buffers():
            buffer.data = buffer.data.to(device)
        self._recipe = recipe
        self.optimizer = recipe.optimizer(self.model)

    def begin(self, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        limit = self._recipe.largest_norm(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit or float("inf"))
        return _finish_step(self._recipe, self.optimizer, norm.full_tensor())

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.model.named_parameters():
            start, shape = self._start(parameter), tuple(parameter.shape)
            values = [("model/" + name, parameter)]
            values += [(f"optimizer/{name}/{key}", value) for key, value in _elementwise(self.optimizer, parameter)]
            for key, value in values:
                local = value.detach().to_local().flatten()
                if local.numel() or (collective.rank() == 0 and not parameter.numel()):
                    yield Piece(key, start, local, shape)
        yield from _buffer_pieces(self.model)

    def restore(self, checkpoint: Checkpoint) -> None:
        from torch.distributed.tensor import DTensor

        for name, parameter in self.model.named_parameters():
            local = parameter.to_local()
            for key in _state_keys(checkpoint, name):
                stretch = checkpoint.read(f"optimizer/{name}/{key}", self._start(parameter), local.numel())
                self.optimizer.state[parameter][key] = DTensor.from_local(
                    stretch.reshape(local.shape).to(local.device, local.dtype),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )

    @staticmethod
    def _start(parameter: Tensor) -> int:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape = parameter.shape
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        return offset[0] * torch.Size(shape[1:]).numel() if shape else 0


class _Fragment(NamedTuple):
    """This worker's stretch of a parameter inside ZeRO's flat fp32 partition `flat`."""

    name: str
    parameter: nn.Parameter
    flat: Tensor
    offset: int
    start: int
    length: int


class Zero:
    """DeepSpeed ZeRO: moments (1), gradients (2) and parameters (3) partitioned as flat vectors over the workers."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, device: torch.device, precision: Precision, *, stage: int
    ) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed = _quiet_deepspeed(compile_ops=device.type != "cpu")
        self._recipe, self._stage = recipe, stage
        self.optimizer = recipe.optimizer(model)
        buffers = dict(model.named_buffers())  # DeepSpeed rounds them to bf16 with the weights
        self.model, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=_zero_config(stage, precision)
        )
        self._module = self.model.module
        if precision == "bf16":
            self._module.register_forward_pre_hook(_bf16_inputs, with_kwargs=True)
        for prefix, module in self._module.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffers[f"{prefix}.{name}".lstrip(".")].to(buffer.device)

    def begin(self, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        self._zero.clip_grad = self._recipe.largest_norm(self.optimizer) or 0.0
        self.model.step()
        norm = float(self._zero._global_grad_norm)
        if self._zero.overflow:
            raise NonFiniteError(f"gradient norm {norm}")
        self._recipe.note_norm(self.optimizer, norm)
        return norm

    def pieces(self) -> Iterator[Piece]:
        learning = set()
        for fragment in self._fragments():
            learning.add(fragment.name)
            shape = tuple(getattr(fragment.parameter, "ds_shape", fragment.parameter.shape))
            values = [(f"model/{fragment.name}", fragment.flat)]
            for key, value in _elementwise(self.optimizer, fragment.flat):
                values.append((f"optimizer/{fragment.name}/{key}", value))
            for key, value in values:
                yield Piece(key, fragment.start, value.detach().narrow(0, fragment.offset, fragment.length), shape)
        yield from self._frozen_pieces()
        yield from _buffer_pieces(self._module)

    def restore(self, checkpoint: Checkpoint) -> None:
        for fragment in self._fragments():
            masters = checkpoint.read(f"model/{fragment.name}", fragment.start, fragment.length)
            fragment.flat.data.narrow(0, fragment.offset, fragment.length).copy_(masters)
            state = self.optimizer.state[fragment.flat]
            for key in _state_keys(checkpoint, fragment.name):
                stretch = checkpoint.read(f"optimizer/{fragment.name}/{key}", fragment.start, fragment.length)
                flat = state.setdefault(key, torch.zeros_like(fragment.flat))
                flat.narrow(0, fragment.offset, fragment.length).copy_(stretch)

    def _fragments(self) -> Iterator[_Fragment]:
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 3:
                group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = collective.rank() * length
                length = max(0, min(length, parameter.ds_numel - start))
                flat = self._zero.fp32_partitioned_groups_flat[group]
                if length:
                    yield _Fragment(name, parameter, flat, offset, start, length)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield _Fragment(name, parameter, flat, inside.start, whole.start, inside.numel)

    def _frozen_pieces(self) -> Iterator[Piece]:
        for i, (name, parameter) in enumerate(self._module.named_parameters()):
            if parameter.requires_grad:
                continue
            if self._stage == 3:
                stretch = parameter.ds_tensor
                start = collective.rank() * stretch.numel()
                length = max(0, min(stretch.numel(), parameter.ds_numel - start))
                if length:
                    yield Piece(f"model/{name}", start, stretch.data[:length], tuple(parameter.ds_shape))
            elif i % collective.world_size() == collective.rank():
                yield Piece(f"model/{name}", 0, parameter.detach().flatten(), tuple(parameter.shape))


def optimizer_record(optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps of an optimiser beside its moments: the groups' settings and the step count."""
    groups = [
        {
            key: value
            for key, value in group.items()
            if key != "params" and isinstance(value, int | float | list | tuple)
        }
        for group in optimizer.param_groups
    ]
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return {"groups": groups, "step": max(counts, default=None)}


def restore_optimizer_record(optimizer: Optimizer, record: dict[str, Any]) -> None:
    """Set the groups' settings and the step count from a checkpoint."""
    for group, stored in zip(optimizer.param_groups, record["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
    for state in optimizer.state.values():
        if record["step"] is not None and state:
            state["step"] = torch.tensor(record["step"], dtype=torch.float32)


def _finish_step(recipe: Recipe, optimizer: Optimizer, norm: Tensor) -> float:
    value = float(norm)
    if value != value or value == float("inf"):
        raise NonFiniteError(f"gradient norm {value}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    recipe.note_norm(optimizer, value)
    return value


def _elementwise(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's tensors with one value per element of a parameter (its moments)."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
            yield key, value


def _state_keys(checkpoint: Checkpoint, name: str) -> list[str]:
    prefix = f"optimizer/{name}/"
    return [key.removeprefix(prefix) for key in checkpoint.keys(prefix)]


def _buffer_pieces(model: nn.Module) -> Iterator[Piece]:
    if collective.rank() == 0:
        for name, buffer in persistent_buffers(model):
            yield Piece(f"model/{name}", 0, buffer.flatten(), tuple(buffer.shape))


def _bf16_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What FSDP2 does by its policy and autocast by operation: floating-point inputs meet bf16 weights."""

    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _quiet_deepspeed(*, compile_ops: bool) -> Any:
    """DeepSpeed; without `compile_ops` it builds no extension.

    On CPUs it would compile an all-reduce that only its tensor-parallel inference calls: a minute at the first run,
    a compiler on every machine, and for ever a wait at the lock of a build that was killed.
    """
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not compile_ops:
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _zero_config(stage: int, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are the loop's business: DeepSpeed only needs them to be consistent."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "reduce_bucket_size": 500_000_000 if torch.cuda.is_available() else 50_000_000,
        "allgather_bucket_size": 500_000_000 if torch.cuda.is_available() else 50_000_000,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
