"""Exact spectra of Gauss-Newton matrix and gradient covariance from per-sample factors, never M x M when N k < M.

G = B^T B with rows S_i^{1/2} J_i / sqrt(N), and C = B^T B with rows g_i / sqrt(N). The non-zero eigenvalues of B^T B
(M x M) and of the Gram matrix B B^T (N k x N k) are the same; the smaller one is diagonalised.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev, vmap

from library.errors import InputError
from library.spectral.differentiation import evaluation_mode
from library.spectral.operators import DENSE_BYTES, CurvatureOperator, GaussNewton, GradientCovariance


def gauss_newton_factor(operator: GaussNewton) -> Tensor:
    """B (N k, M) with G = B^T B for N samples and k outputs; rows of sample i are S_i^{1/2} J_i / sqrt(N).

    S_i comes from the loss by differentiation. The loss must be the mean over the rows of the batch, and the outputs
    (N, k). Raises InputError for outputs of another form, or a factor above 4 GiB.
    """
    return _stacked(operator, _curved_jacobians(operator))


def gradient_factor(operator: GradientCovariance) -> Tensor:
    """B (N, M) with C = B^T B; row i is g_i / sqrt(N), less the mean gradient when the operator is centred."""
    rows = _stacked(operator, _gradients(operator))
    return rows - rows.mean(0) if operator.centred else rows


def factor_eigenvalues(factor: Tensor) -> Tensor:
    """All M eigenvalues of B^T B, ascending, from the smaller Gram matrix of B (rows, M), in its precision."""
    rows, size = factor.shape
    gram = factor @ factor.mT if rows < size else factor.mT @ factor
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return torch.cat([values.new_zeros(size - len(values)), values])


def _stacked(operator: CurvatureOperator, parts: Iterable[Tensor]) -> Tensor:
    found, held = [], 0
    for part in parts:
        held += part.nbytes
        if held > DENSE_BYTES:
            raise InputError(f"the per-sample factor takes more than {DENSE_BYTES >> 30} GiB; ask for top eigenvalues")
        found.append(part)
    rows = torch.cat(found)
    return rows.flatten(0, -2) / len(rows) ** 0.5


def _curved_jacobians(operator: GaussNewton) -> Iterator[Tensor]:
    """(b, k, M) of each batch: S^{1/2} J, with the symmetric square root's columns scaled eigenvectors."""
    with evaluation_mode(operator.model):
        for source, target in operator.batches():
            output = operator.model(source).detach()
            if output.ndim != 2:
                raise InputError(f"exact factors need outputs (samples, classes), got shape {tuple(output.shape)}")
            curved = vmap(hessian(lambda s, t: operator.loss(s[None], t[None])))(output, target)
            values, vectors = torch.linalg.eigh(curved)
            roots = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
            yield roots.mT @ _per_sample(operator, source, target, lambda output, _: output)


def _gradients(operator: GradientCovariance) -> Iterator[Tensor]:
    """(b, 1, M) of each batch: the samples' gradients."""
    with evaluation_mode(operator.model):
        for source, target in operator.batches():
            yield _per_sample(operator, source, target, lambda output, t: operator.loss(output[None], t[None])[None])


def _per_sample(operator: CurvatureOperator, source: Tensor, target: Tensor, function: Any) -> Tensor:
    """The Jacobian (b, outputs, M) of `function(model output, target)` for each sample alone."""
    names = operator.layout.names
    values = {name: value for name, value in operator.model.named_parameters() if name in names}

    def one(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return function(functional_call(operator.model, parameters, (x[None],))[0], t)

    found = vmap(jacrev(one), in_dims=(None, 0, 0))({name: values[name].detach() for name in names}, source, target)
    return torch.cat([found[name].flatten(2) for name in names], -1)
