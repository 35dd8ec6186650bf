"""Sums and gathers over the workers of a run; the identity when there is one process.

Methods call these inside `Recipe.evaluate` and `Recipe.after_step`, so that the same line is right in a
notebook and on a thousand workers. Every worker must make the same calls in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether this process is one worker of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """The number of workers, 1 outside a distributed run."""
    return dist.get_world_size() if active() else 1


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all workers, as a new tensor of the same shape, dtype and device."""
    total = value.detach().clone()
    if active():
        moved = total.to(_device())
        dist.all_reduce(moved)
        total = moved.to(value.device)
    return total


class _Sum(torch.autograd.Function):
    """A sum over workers; each worker's part has the sum of all workers' derivatives by it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return all_sum(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all workers, through which gradients flow back to all of them."""
    return _Sum.apply(value) if active() else value


def all_gather(value: Any) -> list[Any]:
    """`value` of every worker in the order of their ranks. Small picklable values only."""
    if not active():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any, source: int = 0) -> Any:
    """The value that worker `source` holds, on every worker."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def barrier() -> None:
    """Wait until every worker is here."""
    if active():
        dist.barrier()


def share(length: int) -> range:
    """This worker's contiguous share of `range(length)`; shares differ by at most one in size."""
    ranks, me = world_size(), rank()
    return range(length * me // ranks, length * (me + 1) // ranks)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
