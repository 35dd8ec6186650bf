"""The spectral core shared by the methods: curvature operators, traces and densities of symmetric operators."""

from library.spectral.density import (
    Quadrature,
    Tridiagonal,
    chebyshev_coefficients,
    chebyshev_moments,
    exact_eigenpairs,
    exact_moments,
    exact_quadrature,
    jackson_factors,
    kpm_density,
    lanczos,
    lanczos_quadrature,
    spectral_bounds,
)
from library.spectral.eigen import Eigenpairs, extreme_eigenpairs
from library.spectral.layout import Layout
from library.spectral.operators import (
    CurvatureOperator,
    GaussNewton,
    GradientCovariance,
    Hessian,
    dense_matrix,
    require_symmetric,
)
from library.spectral.sharded import sharded_lanczos
from library.spectral.smoothing import (
    cumulative_density,
    deflated_quadrature,
    smoothed_density,
    spectral_grid,
    wasserstein_distance,
)
from library.spectral.trace import (
    Estimate,
    Operator,
    block_traces,
    hutch_plus_plus,
    hutchinson,
    product,
    random_probes,
    xtrace,
)

__all__ = [
    "CurvatureOperator",
    "Eigenpairs",
    "Estimate",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "Layout",
    "Operator",
    "Quadrature",
    "Tridiagonal",
    "block_traces",
    "chebyshev_coefficients",
    "chebyshev_moments",
    "cumulative_density",
    "deflated_quadrature",
    "dense_matrix",
    "exact_eigenpairs",
    "exact_moments",
    "exact_quadrature",
    "extreme_eigenpairs",
    "hutch_plus_plus",
    "hutchinson",
    "jackson_factors",
    "kpm_density",
    "lanczos",
    "lanczos_quadrature",
    "product",
    "random_probes",
    "require_symmetric",
    "sharded_lanczos",
    "smoothed_density",
    "spectral_bounds",
    "spectral_grid",
    "wasserstein_distance",
    "xtrace",
]
