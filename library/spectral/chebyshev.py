"""Chebyshev polynomials of graph operators: one recurrence serves every filter.

T_0(t) = 1, T_1(t) = t, T_{k+1}(t) = 2 t T_k(t) - T_{k-1}(t). For L = I - S with eigenvalues in [0, 2], filters are
polynomials of the shifted L~ = L - I = -S, whose eigenvalues lie in [-1, 1]. Source: Hammond, Vandergheynst, Gribonval,
"Wavelets on graphs via spectral graph theory", 2011.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.errors import InputError
from library.spectral.density import chebyshev_coefficients
from library.spectral.graph_laplacians import symmetric_product


def chebyshev_terms(matrix: Tensor, block: Tensor, count: int, *, sign: float = 1.0) -> list[Tensor]:
    """T_0(sign M) X, ..., T_{count-1}(sign M) X for a symmetric M (n, n), dense or CSR, and X (n, channels).

    Eigenvalues of M within [-1, 1]. count - 1 products with M in all, whichever filters use the terms. With M = S
    and sign -1 these are the terms of the shifted Laplacian. Raises InputError for count below 1.
    """
    if count < 1:
        raise InputError(f"a polynomial needs at least one Chebyshev term, got {count}")

    def apply(x: Tensor) -> Tensor:
        return symmetric_product(matrix, x) if matrix.layout == torch.sparse_csr else matrix @ x

    terms = [block]
    if count > 1:
        terms.append(apply(block) * sign)
    while len(terms) < count:
        terms.append(2 * sign * apply(terms[-1]) - terms[-2])
    return terms


def chebyshev_filter(matrix: Tensor, block: Tensor, coefficients: Tensor, *, sign: float = 1.0) -> Tensor:
    """sum_k c_k T_k(sign M) X for scalar coefficients (..., terms): one filtered block (..., n, channels) for each row.

    All rows share the terms' products with M.
    """
    terms = torch.stack(chebyshev_terms(matrix, block, coefficients.shape[-1], sign=sign))
    return torch.tensordot(coefficients.to(block), terms, 1)


def laplacian_filter(function: Callable[[Tensor], Tensor], degree: int) -> Tensor:
    """Coefficients (degree + 1,) of h(L), h given on [0, 2], in the terms of L~ = L - I (`sign=-1` with S).

    >>> from library.spectral.graphs import Graphs
    >>> from library.spectral.graph_laplacians import propagation_matrix
    >>> edge = propagation_matrix(Graphs.from_edges([2], [[0], [1]]), torch.float64)
    >>> chebyshev_filter(edge, torch.eye(2, dtype=torch.float64), laplacian_filter(lambda t: t, 1), sign=-1)  # L
    tensor([[ 1.0000, -1.0000],
            [-1.0000,  1.0000]], dtype=torch.float64)
    """
    return chebyshev_coefficients(function, degree, 0.0, 2.0)
