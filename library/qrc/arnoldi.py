"""The largest modulus of a linear map's eigenvalues, from the map's action alone.

Arnoldi's method: the map, restricted to the space of a start x and its images A x, A^2 x ..., is a small Hessenberg
matrix H whose extreme eigenvalues approach those of A. Source: W. E. Arnoldi, Quarterly of Applied Mathematics 9, 1951;
its residual |h_{k+1,k}| |last entry of the eigenvector| tells when to stop.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.errors import InputError

MOST_STEPS = 160  # many eigenvalues of almost equal modulus lead then: the modulus is known, though none of them is
BETWEEN = 8  # steps between two looks at the eigenvalues of H


def largest_modulus(apply: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-9) -> float:
    """The largest |lambda| of the map `apply` of real vectors (size,), begun at `start` (size,), not zero.

    Ends when the leading eigenvalue's residual is at most `tolerance` of its distance from the unit circle, when the
    space is exhausted, or after 160 steps, when it may be a little too small. Raises InputError for images that are
    not finite.

    >>> values = torch.linspace(0, 0.9, 50, dtype=torch.float64)
    >>> round(largest_modulus(lambda x: values * x, torch.ones_like(values)), 9)
    0.9
    """
    most = min(MOST_STEPS, len(start))
    basis = start.new_zeros(most + 1, len(start))
    small = start.new_zeros(most + 1, most)
    basis[0] = start / start.norm()
    for step in range(most):
        image = apply(basis[step])
        size = float(image.norm())
        for _ in range(2):  # once more against rounding
            along = basis[: step + 1] @ image
            image = image - along @ basis[: step + 1]
            small[: step + 1, step] += along
        small[step + 1, step] = rest = image.norm()
        if not torch.isfinite(rest):
            raise InputError(f"image {step + 1} of the map is not finite; its entries are too large")
        done = float(rest) <= 1e-14 * max(size, 1e-300)
        if done or (step + 1) % BETWEEN == 0 or step + 1 == most:
            modulus, residual = _leading(small[: step + 2, : step + 1])
            if done or residual <= tolerance * abs(1 - modulus) or step + 1 == most:
                break
        basis[step + 1] = image / rest
    return modulus


def _leading(small: Tensor) -> tuple[float, float]:
    """The largest modulus of the eigenvalues of H (k + 1, k), and the residual of its vector."""
    values, vectors = torch.linalg.eig(small[:-1])
    place = int(values.abs().argmax())
    return float(values[place].abs()), float(small[-1, -1] * vectors[-1, place].abs())
