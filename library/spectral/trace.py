"""Stochastic estimates of tr A from products with random vectors; every estimate carries its standard error.

An operator is a matrix of shape (..., n, n) or a function that maps a block of column vectors (..., n, p) to A times
that block. Vectors are probes z with E[z z^T] = I, so that E[z^T A z] = tr A.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from library.errors import InputError

Operator = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """An estimate and how far it may be off.

    `value` and `standard_error` have the same shape (...,). `probes` is the number of random vectors behind them; it
    is 0 for an exact value, whose standard error is 0. One probe alone says nothing of its error: nan.
    """

    value: Tensor
    standard_error: Tensor
    probes: int

    @classmethod
    def of_samples(cls, samples: Tensor) -> "Estimate":
        """Mean and standard error s / sqrt(p) of independent samples of shape (..., p)."""
        probes = samples.shape[-1]
        value = samples.mean(-1)
        if probes == 1:
            return cls(value, torch.full_like(value, float("nan")), 1)
        return cls(value, samples.std(-1) / probes**0.5, probes)

    @classmethod
    def exact(cls, value: Tensor) -> "Estimate":
        """A value that no random vector took part in."""
        return cls(value, torch.zeros_like(value), 0)


def random_probes(
    n: int,
    count: int,
    *,
    generator: torch.Generator,
    batch: Sequence[int] = (),
    kind: Literal["rademacher", "gaussian"] = "rademacher",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random vectors with identity covariance, shape (*batch, n, count).

    Rademacher entries are +1 or -1: the variance of z^T A z is then 2 ||A - diag A||_F^2, against 2 ||A||_F^2 for
    Gaussian entries. The draw is made on the generator's device and moved, so that a CPU generator gives the same
    probes everywhere. Raises InputError for n or count below 1 or an unknown kind.
    """
    if n < 1 or count < 1:
        raise InputError(f"random probes need at least one vector of at least one entry, got {count} of length {n}")
    shape, source = (*batch, n, count), generator.device
    if kind == "rademacher":
        return _signs(math.prod(shape), generator, dtype).reshape(shape).to(device)
    if kind == "gaussian":
        return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
    raise InputError(f"unknown kind of probes {kind!r}; allowed: 'rademacher', 'gaussian'")


def _signs(count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`count` fair signs, eight from every random byte."""
    drawn = torch.randint(0, 256, (-(-count // 8),), generator=generator, device=generator.device, dtype=torch.uint8)
    bits = drawn.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=drawn.device) & 1
    return bits.flatten()[:count].to(dtype).mul_(2).sub_(1)


def product(operator: Operator, block: Tensor) -> Tensor:
    """A times a block of column vectors of shape (..., n, p).

    Raises InputError when a matrix does not fit the block, or a function returns another length or block size.
    """
    if isinstance(operator, Tensor):
        n = block.shape[-2]
        if operator.ndim < 2 or operator.shape[-2:] != (n, n):
            raise InputError(f"operator of shape {tuple(operator.shape)} cannot act on vectors of length {n}")
        return operator @ block
    image = operator(block)
    if image.shape[-2:] != block.shape[-2:]:
        raise InputError(
            f"operator maps a block of shape {tuple(block.shape)} to {tuple(image.shape)}; it must keep the shape"
        )
    return image


def hutchinson(operator: Operator, probes: Tensor) -> Estimate:
    """Hutchinson's estimate of the trace: mean over the probes of z^T A z.

    `probes` has shape (..., n, p); the estimate has the leading shape. Unbiased; exact for a diagonal A with
    Rademacher probes, and for any A with the n probes sqrt(n) e_j. Source: Hutchinson, 1989.

    >>> a = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> hutchinson(a, random_probes(3, 4, generator=torch.Generator().manual_seed(0))).value.item()
    6.0
    """
    return Estimate.of_samples((probes * product(operator, probes)).sum(-2))


def hutch_plus_plus(operator: Operator, probes: Tensor) -> Estimate:
    """Hutch++: the trace on a sketched range exactly, and Hutchinson's estimate on the rest.

    With S the first half of the probes, G the other half, Q an orthonormal basis of A S and P = I - Q Q^T:
    tr A = tr(Q^T A Q) + E[(P g)^T A (P g)]. Takes 3 p / 2 products and errs by O(1/p) for a positive semi-definite
    A, where Hutchinson errs by O(1/sqrt(p)); exact when rank A <= p / 2. The standard error is that of the second
    term, for the basis as drawn.

    `probes` has shape (..., n, p) with p even, p >= 4 and p / 2 <= n; InputError otherwise.
    Source: Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", 2021, algorithm 1.
    """
    n, count = probes.shape[-2:]
    if count < 4 or count % 2 or count // 2 > n:
        raise InputError(f"Hutch++ needs an even number of probes from 4 to {2 * n} for n = {n}, got {count}")
    sketch, rest = probes.split(count // 2, dim=-1)
    basis = torch.linalg.qr(product(operator, sketch)).Q
    captured = (basis * product(operator, basis)).sum((-2, -1))
    rest = rest - basis @ (basis.mT @ rest)
    remainder = Estimate.of_samples((rest * product(operator, rest)).sum(-2))
    return Estimate(captured + remainder.value, remainder.standard_error, count)


def xtrace(operator: Operator, probes: Tensor) -> Estimate:
    """XTrace: every probe is used both to sketch the range and, left out of the sketch, to estimate the rest.

    With Q_i an orthonormal basis of A Omega without its column i and P_i = I - Q_i Q_i^T,
    t_i = tr(Q_i^T A Q_i) + w_i^T P_i A P_i w_i; the estimate is the mean of t_i over the p columns, its standard error
    s / sqrt(p). Takes 2 p products, has no split to choose, and is exact when rank A <= p - 1. The bases are never
    formed: Q_i Q_i^T = Q (I - s_i s_i^T) Q^T, with A Omega = Q R and s_i orthogonal to the other columns of R.

    `probes` has shape (..., n, p) with 2 <= p <= n; InputError otherwise.
    Source: Epperly, Tropp, Webber, "XTrace: Making the most of every sample in stochastic trace estimation", 2024,
    section 2.1, without their rescaling of the residual.
    """
    n, count = probes.shape[-2:]
    if not 2 <= count <= n:
        raise InputError(f"XTrace needs from 2 to {n} probes for n = {n}, got {count}")
    image = product(operator, probes)
    basis, triangle = torch.linalg.qr(image)
    inner = basis.mT @ product(operator, basis)
    left_out = torch.stack([torch.cat([triangle[..., :i], triangle[..., i + 1 :]], -1) for i in range(count)], -3)
    lost = torch.linalg.qr(left_out, mode="complete").Q[..., -1].mT
    coordinates = basis.mT @ probes
    kept = coordinates - lost * (lost * coordinates).sum(-2, keepdim=True)
    captured = inner.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - (lost * (inner @ lost)).sum(-2)
    rest = (probes * image).sum(-2) - 2 * (kept * triangle).sum(-2) + (kept * (inner @ kept)).sum(-2)
    return Estimate.of_samples(captured + rest)


def block_traces(operator: Operator, probes: Tensor, sizes: Sequence[int]) -> Estimate:
    """The traces of all diagonal blocks (a network's layers) from one product per probe.

    Rows are cut into consecutive blocks of `sizes` (`CurvatureOperator.layout.sizes`): block i's estimate is the mean
    of z_i^T (A z)_i. It is unbiased because E[z_i^T A_ij z_j] = 0 for j != i; sharing the product costs the variance
    sum_{j != i} ||A_ij||_F^2 on top of that of a probe for block i alone, and saves a factor of the number of blocks.
    The blocks' estimates add up to Hutchinson's estimate of tr A. Their standard errors are not independent.

    `probes` has shape (..., n, p); the estimate has shape (..., blocks). Raises InputError unless the sizes sum to n.

    >>> a = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> block_traces(a, random_probes(3, 2, generator=torch.Generator().manual_seed(0)), [2, 1]).value.tolist()
    [3.0, 3.0]
    """
    if sum(sizes) != probes.shape[-2] or min(sizes, default=0) < 1:
        raise InputError(f"blocks of sizes {list(sizes)} do not make up the {probes.shape[-2]} rows")
    terms = (probes * product(operator, probes)).split(list(sizes), dim=-2)
    return Estimate.of_samples(torch.stack([term.sum(-2) for term in terms], -2))
