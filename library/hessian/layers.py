"""Curvature layer by layer: traces, largest eigenvalues, and how strongly layers act on each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.spectral.eigen import Eigenpairs, extreme_eigenpairs
from library.spectral.operators import CurvatureOperator
from library.spectral.trace import Estimate, block_traces

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Layers:
    """A row per parameter tensor, in the model's order: its name, number of entries, and the trace of its block."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    traces: Estimate

    def table(self) -> "pd.DataFrame":
        """Columns layer, parameters, trace, standard_error, mean_trace (per parameter: its sharpness), share."""
        import pandas as pd

        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        traces = self.traces.value.double().cpu()
        return pd.DataFrame(
            {
                "layer": self.names,
                "parameters": self.sizes,
                "trace": traces.tolist(),
                "standard_error": self.traces.standard_error.double().cpu().tolist(),
                "mean_trace": (traces / sizes).tolist(),
                "share": (traces / traces.sum()).tolist(),
            }
        )


def deflated_traces(operator: CurvatureOperator, pairs: Eigenpairs, probes: Tensor, images: Tensor) -> Layers:
    """The layers' traces from `images` = A times `probes` (n, p), with the eigenpairs' part exact.

    A = U L U^T + rest: the first part gives layer i sum_j lambda_j |u_j,i|^2, the rest is estimated. With the outliers
    gone the standard errors are those of the bulk.
    """
    scaled = pairs.vectors * pairs.values
    known = torch.stack([part.sum() for part in (scaled * pairs.vectors).sum(1).split(list(operator.layout.sizes))])
    rest = block_traces(lambda z: images - scaled @ (pairs.vectors.mT @ z), probes, operator.layout.sizes)
    traces = Estimate(rest.value + known, rest.standard_error, rest.probes)
    return Layers(operator.layout.names, operator.layout.sizes, traces)


def interaction_norms(operator: CurvatureOperator, probes: Tensor) -> Estimate:
    """||A_ij||_F^2 of all pairs of blocks: an estimate (blocks, blocks) with its standard error.

    A Rademacher probe z restricted to block j gives E ||(A z_j)_i||^2 = ||A_ij||_F^2; the L restrictions of a probe
    are products of one pass over the data. Their sum estimates ||A||_F^2. `probes` has shape (n, p).
    """
    sizes, count = list(operator.layout.sizes), probes.shape[1]
    pieces = torch.zeros(len(sizes), *probes.shape, dtype=probes.dtype, device=probes.device)
    for j, part in enumerate(operator.layout.slices.values()):
        pieces[j, part] = probes[part]
    images = operator(pieces.movedim(0, 1).flatten(1)).unflatten(1, (len(sizes), count))
    return Estimate.of_samples(torch.stack([image.square().sum(0) for image in images.split(sizes)]))


def top_eigenvalues(
    operator: CurvatureOperator, *, names: Sequence[str] | None = None, seed: int = 0, tolerance: float = 1e-3
) -> dict[str, float]:
    """The largest eigenvalue of each layer's diagonal block, which never exceeds that of the whole matrix."""
    found = {}
    for name in names or operator.layout.names:
        block, draw = operator.restrict(name), torch.Generator().manual_seed(seed)
        pairs = extreme_eigenpairs(
            block, block.probes(min(2, block.size), generator=draw), generator=draw, tolerance=tolerance
        )
        found[name] = float(pairs.values[0])
    return found
