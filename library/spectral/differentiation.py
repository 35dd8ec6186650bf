"""Derivatives of a module that curvature products are made of: blocks of backward passes on one graph, safely."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from library.errors import InputError


def batched_grad(outputs: Sequence[Tensor], inputs: tuple[Tensor, ...], seeds: Sequence[Tensor]) -> list[Tensor]:
    """Gradients (p, *input) of sum_j outputs_j . seeds_j for p seeds at once; 0 where nothing depends on one."""
    live = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    if not live:
        return [seeds[0].new_zeros(len(seeds[0]), *value.shape) for value in inputs]
    count = len(seeds[0])
    values, vectors = [output for output, _ in live], [seed for _, seed in live]
    if count == 1:  # without a batch dimension every operation is the plain one
        plain = torch.autograd.grad(
            values, inputs, [vector[0] for vector in vectors], retain_graph=True, allow_unused=True
        )
        found = [None if grad is None else grad.unsqueeze(0) for grad in plain]
    else:
        found = torch.autograd.grad(
            values, inputs, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    return [
        value.new_zeros(count, *value.shape) if grad is None else grad
        for value, grad in zip(inputs, found, strict=True)
    ]


def require_twice_differentiable(gradients: Sequence[Tensor]) -> None:
    """Refuse functions marked as differentiable once: autograd would pass over them in silence and return zeros."""
    seen, waiting = set(), [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            raise InputError("the model cannot be differentiated twice: it holds a function marked once_differentiable")
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module of the model in evaluation mode within the block, and as it was after it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
