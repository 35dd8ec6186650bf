"""HessianReport: what the analysis of a loss's curvature found, as numbers, tables and a picture."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.hessian.attribution import Attribution
from library.hessian.layers import Layers
from library.hessian.outliers import Outliers
from library.spectral.density import Quadrature
from library.spectral.eigen import Eigenpairs
from library.spectral.smoothing import cumulative_density
from library.spectral.trace import Estimate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FLAT = 1e-3  # an eigenvalue below this share of the largest counts as flat (Sagun et al. 2017)


@dataclass(frozen=True)
class HessianReport:
    """The curvature of a loss at a point w of `parameters` entries, over `samples` samples.

    `spectrum` is the density of all eigenvalues, exact or by deflated Lanczos quadrature; `top` the largest
    eigenpairs, `bottom` the smallest. `trace` is tr H, `square` ||H||_F^2, `residual_share` ||H - G||_F / ||H||_F;
    `gauss_newton` the largest eigenpairs of G, None when the output is not one tensor. `attribution` says which
    classes the eigenvectors of `top` belong to, None without labels.
    """

    parameters: int
    samples: int
    loss: float
    gradient_norm: float
    spectrum: Quadrature
    top: Eigenpairs
    bottom: Eigenpairs
    trace: Estimate
    square: Estimate
    layers: Layers
    outliers: Outliers
    gauss_newton: Eigenpairs | None = None
    residual_share: float | None = None
    attribution: Attribution | None = None
    classes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, the sharpness."""
        return float(self.top.values[0])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        return float(self.bottom.values[-1])

    @property
    def flat_share(self) -> Estimate:
        """The share of eigenvalues with |lambda| at most 1e-3 of the largest: the near-null space."""
        edge = FLAT * self.largest
        ends = torch.tensor([-edge, edge], dtype=self.spectrum.nodes.dtype, device=self.spectrum.nodes.device)
        rule = Quadrature(self.spectrum.nodes.abs(), self.spectrum.weights, self.spectrum.exact)
        found = cumulative_density(rule, ends[1:])
        return Estimate(found.value[0], found.standard_error[0], found.probes)

    @property
    def effective_rank(self) -> float:
        """(tr H)^2 / ||H||_F^2: how many equal eigenvalues would give the same trace and norm; 0 for H = 0."""
        return float(self.trace.value**2 / self.square.value) if float(self.square.value) else 0.0

    def metrics(self) -> dict[str, float]:
        """Headline numbers by name."""
        found = {
            "parameters": float(self.parameters),
            "samples": float(self.samples),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "largest_eigenvalue": self.largest,
            "smallest_eigenvalue": self.smallest,
            "smallest_over_largest": self.smallest / self.largest if self.largest else math.nan,
            "trace": float(self.trace.value),
            "trace_standard_error": float(self.trace.standard_error),
            "frobenius_norm": math.sqrt(max(float(self.square.value), 0.0)),
            "effective_rank": self.effective_rank,
            "flat_share": float(self.flat_share.value),
            "outliers_by_gap": float(self.outliers.by_gap),
            "gap": self.outliers.gap,
            "outliers_above_negative": float(self.outliers.above_negative),
            "outliers_beyond_bulk": float(self.outliers.beyond_bulk),
        }
        if self.residual_share is not None:
            found["residual_share"] = self.residual_share
        if self.attribution is not None and self.classes:
            found["outliers_in_class_means"] = float(self.attribution.pairs[: self.classes].mean())
        return found

    def eigenvalue_table(self) -> "pd.DataFrame":
        """A row per pair of `top`: eigenvalue, its residual, the Gauss-Newton eigenvalue beside it, and its class."""
        import pandas as pd

        rows: dict[str, list[float]] = {
            "eigenvalue": self.top.values.tolist(),
            "residual": self.top.residuals.tolist(),
        }
        if self.gauss_newton is not None:
            rows["gauss_newton"] = self.gauss_newton.values[: len(self.top.values)].tolist()
        if self.attribution is not None:
            rows["in_class_centres"] = self.attribution.centres.tolist()
            rows["in_class_means"] = self.attribution.pairs.tolist()
            rows["class"] = self.attribution.overlap.argmax(1).tolist()
        return pd.DataFrame(rows)

    def tables(self) -> "dict[str, pd.DataFrame]":
        """The tables by name: `eigenvalues` and `layers`."""
        return {"eigenvalues": self.eigenvalue_table(), "layers": self.layers.table()}

    def figure(self) -> "Figure":
        """The spectrum with its bulk, outliers and error band, the top of H beside that of G, and the layers."""
        from library.hessian.picture import spectrum_figure

        return spectrum_figure(self)

    def __str__(self) -> str:
        def number(estimate: Estimate) -> str:
            error = float(estimate.standard_error)
            return f"{float(estimate.value):.4g}" + (f" ± {error:.2g}" if error else "")

        kind = "all eigenvalues" if self.spectrum.exact else f"{self.spectrum.nodes.shape[-2]} Lanczos runs"
        lines = [
            f"Hessian of {self.parameters} parameters over {self.samples} samples, loss {self.loss:.4g} ({kind})",
            f"eigenvalues  {self.smallest:.4g} to {self.largest:.4g}; {100 * float(self.flat_share.value):.1f} % flat",
            f"outliers     {self.outliers.by_gap} above the largest gap (x{self.outliers.gap:.2g}), "
            f"{self.outliers.above_negative} above the negative side, {self.outliers.beyond_bulk} beyond the bulk",
            f"trace        {number(self.trace)}, effective rank {self.effective_rank:.3g}",
        ]
        if self.residual_share is not None:
            lines.append(f"H = G + R    ||R|| / ||H|| = {self.residual_share:.3g}")
        return "\n".join(lines + [f"note         {note}" for note in self.notes])
