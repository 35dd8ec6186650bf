"""The spectral core shared by the methods: traces and densities of symmetric operators."""

from library.spectral.density import (
    Quadrature,
    Tridiagonal,
    chebyshev_coefficients,
    chebyshev_moments,
    exact_moments,
    exact_quadrature,
    jackson_factors,
    kpm_density,
    lanczos,
    lanczos_quadrature,
    spectral_bounds,
)
from library.spectral.trace import Estimate, Operator, hutch_plus_plus, hutchinson, product, random_probes

__all__ = [
    "Estimate",
    "Operator",
    "Quadrature",
    "Tridiagonal",
    "chebyshev_coefficients",
    "chebyshev_moments",
    "exact_moments",
    "exact_quadrature",
    "hutch_plus_plus",
    "hutchinson",
    "jackson_factors",
    "kpm_density",
    "lanczos",
    "lanczos_quadrature",
    "product",
    "random_probes",
    "spectral_bounds",
]
