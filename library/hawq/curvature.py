"""How sharply the loss curves along each layer's weights: a number per batch, probe and layer, all layers at once.

For a batch, a probe z and the block of layer i, the mean over probes of each of these is that layer's trace:

hessian   z_i' (H z)_i with z of random signs over all layers: one product serves them all, since E z_i' H_ij z_j = 0
ggn       |d(sum_n (S_n^(1/2) u_n) . s_n)/dW_i|^2 / N with random signs u: one backward pass; never negative
fisher    |d(sum_n u_n l_n)/dW_i|^2 / N with random signs u_n: one backward pass; never negative

s_n are the outputs of sample n of N, S_n = d^2 l_n / ds_n^2, and l_n its loss with the given label (the "empirical"
Fisher matrix). Probes are numbered: probe p of a seed is the same on every machine.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.errors import InputError, NonFiniteError, PrismError
from library.recipe import to_device
from library.spectral import Hessian, random_probes
from library.spectral.differentiation import batched_grad, evaluation_mode
from library.spectral.eigen import extreme_eigenpairs

Loss = Callable[[Any, Any], Tensor]
Curvature = Literal["hessian", "ggn", "fisher"]
CHUNK = 4  # backward passes that run as one; more gains nothing on a CPU and takes memory


def quadratic_forms(
    model: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any],
    weights: Sequence[str],
    *,
    curvature: Curvature,
    seed: int,
    start: int,
    count: int,
) -> Tensor:
    """The forms of probes `start` to `start + count` on one batch: float64 (count, layers), not divided by n_i.

    `weights` are parameter names. Raises InputError for a loss or model that does not fit the curvature, and
    NonFiniteError.
    """
    if curvature == "hessian":
        operator = Hessian(model, loss, [batch], parameters=weights)
        block = torch.cat([operator.probes(1, generator=_generator(seed, p)) for p in range(start, start + count)], 1)
        products = block * operator(block)
        sizes = dict(zip(operator.layout.names, products.double().split(operator.layout.sizes), strict=True))
        return torch.stack([sizes[name].sum(0) for name in weights], 1)
    parameters = dict(model.named_parameters())
    device = parameters[weights[0]].device
    source, target = to_device(batch, device)
    with evaluation_mode(model), torch.enable_grad():
        output = model(source)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise InputError(f"curvature={curvature} needs outputs (batch, classes); use curvature=hessian")
        rows, roots = (
            (output, _output_roots(loss, output.detach(), target))
            if curvature == "ggn"
            else (torch.func.vmap(loss)(output.unsqueeze(1), target.unsqueeze(1)), None)
        )
        found = []
        for begin in range(start, start + count, CHUNK):
            probes = range(begin, min(begin + CHUNK, start + count))
            signs = torch.cat([_signs(rows, _generator(seed, p)) for p in probes])
            seeds = signs if roots is None else torch.einsum("nkj,pnj->pnk", roots, signs)
            gradients = batched_grad([rows], tuple(parameters[name] for name in weights), [seeds])
            found.append(torch.stack([part.double().flatten(1).square().sum(1) for part in gradients], 1))
    forms = torch.cat(found) / len(output)
    if not bool(torch.isfinite(forms).all()):
        raise NonFiniteError(f"a trace of curvature {curvature} is not finite")
    return forms


def top_eigenvalues(
    model: nn.Module, loss: Loss, batches: Sequence[tuple[Any, Any]], weights: Sequence[str], *, seed: int = 0
) -> Tensor:
    """The largest eigenvalue of each layer's diagonal block of the Hessian: float64 (layers,).

    What HAWQ-V1 (Dong et al., ICCV 2019) ranked layers by. To 1 % of itself, where that is more than the rounding of
    the eigenvalue of largest magnitude. Raises PrismError when that is not reached.
    """
    values = []
    for name in weights:
        operator = Hessian(model, loss, batches, parameters=[name])
        start = random_probes(
            operator.size, 1, generator=_generator(seed, 0), dtype=operator.dtype, device=operator.device
        )
        generator = torch.Generator(operator.device).manual_seed(seed)
        pairs = extreme_eigenpairs(operator, start, largest=1, generator=generator, tolerance=1e-3, own=True)
        if not bool(pairs.converged.all()):
            raise PrismError(f"the largest eigenvalue of {name} is not known to 1 % after {pairs.products} products")
        values.append(pairs.values[0])
    return torch.stack(values).double()


def second_order_terms(
    model: nn.Module, loss: Loss, batches: Sequence[tuple[Any, Any]], changes: dict[str, Tensor]
) -> Tensor:
    """dW' H_ii dW of every layer i and each of its changes, float64 (layers, changes): one product each.

    `changes` has, by parameter name, tensors (changes, *shape). Needs no assumption on how a change spreads over
    eigenvectors; half of it is the second-order change of the loss.
    """
    terms = []
    for name, change in changes.items():
        operator = Hessian(model, loss, batches, parameters=[name])
        block = change.reshape(len(change), -1).mT
        terms.append((block.double() * operator(block).double()).sum(0))
    return torch.stack(terms)


def _output_roots(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Symmetric square roots (N, k, k) of the Hessian of each sample's loss with respect to its outputs."""

    def own(row: Tensor, label: Tensor) -> Tensor:
        return loss(row.unsqueeze(0), label.unsqueeze(0))

    curved = torch.func.vmap(torch.func.hessian(own))(output, target)
    values, vectors = torch.linalg.eigh((curved + curved.mT) / 2)
    if bool((values < -1e-3 * values.abs().amax(-1, keepdim=True)).any()):
        raise InputError("curvature=ggn needs a loss that is convex in the outputs; use curvature=hessian")
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def _generator(seed: int, probe: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + probe) % 2**63)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    flat = random_probes(like.numel(), 1, generator=generator, dtype=like.dtype, device=like.device)
    return flat.reshape(1, *like.shape)
