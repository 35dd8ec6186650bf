"""The analysis of a trained network's curvature: everything in one call, exact when small and estimated when large."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import collective
from library.errors import InputError
from library.hessian.attribution import attribute, class_means
from library.hessian.layers import Layers, deflated_traces
from library.hessian.outliers import count_outliers
from library.hessian.report import HessianReport
from library.spectral.density import Quadrature
from library.spectral.eigen import Eigenpairs, extreme_eigenpairs
from library.spectral.operators import CurvatureOperator, GaussNewton, Hessian, dense_matrix, require_symmetric
from library.spectral.sharded import sharded_lanczos
from library.spectral.smoothing import deflated_quadrature
from library.spectral.trace import Estimate

MOST_CLASSES = 64  # with more (a vocabulary, say) eigenvectors are not attributed to classes
EVERY = 5.0  # seconds between two lines of progress
FLOAT32_FLOOR = 1e-6  # rounding of float32 products, as a share of the largest eigenvalue


def analyze(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    *,
    parameters: Iterable[str] | None = None,
    count: Callable[[Any], int] = len,
    top: int | None = None,
    steps: int = 64,
    probes: int = 8,
    exact_below: int = 1500,
    tolerance: float = 1e-4,
    seed: int = 0,
    chunk: int | None = None,
    gauss_newton: bool = True,
    checkpoint: str | Path | None = None,
    notify: Callable[[str], None] | None = None,
) -> HessianReport:
    """The Hessian spectrum of `loss(model(input), target)` over `data`: bulk, outliers, their origin, the layers.

    Up to `exact_below` parameters, or where nearly all eigenpairs are asked for, the matrices are formed and
    diagonalised. Above, the `top` largest eigenpairs (by
    default 2 k + 3 for k classes, else 12) and two smallest are found to a relative residual of `tolerance`, taken out,
    and the rest is estimated by `steps` steps of Lanczos from `probes` random vectors; traces come from the same number
    of probes, all with standard errors. The decomposition H = G + R needs a tensor as output (`gauss_newton` switches
    it off); class attribution integer labels and outputs (N, k) of at most 64 classes. The Lanczos basis is shared over
    the workers of a run; its steps are kept in the folder `checkpoint`, from which a run that was interrupted goes on.

    A long analysis calls `notify` with a line of progress every few seconds.

    `loss` is the mean over a batch; `data` holds pairs (input, target) or is one such pair, and may be sharded over
    workers. The model's weights, mode and dtype are left alone; a float64 model resolves smaller eigenvalues.
    Raises what `library.spectral.operators.CurvatureOperator` raises, with the reason.

    >>> from library.hessian.toy import blobs, perceptron
    >>> x, y = blobs(60, width=4, classes=3, generator=torch.Generator().manual_seed(0))
    >>> report = analyze(perceptron([4, 8, 3], seed=0), nn.functional.cross_entropy, (x, y))
    >>> report.parameters, report.spectrum.exact
    (67, True)
    """
    options = {"parameters": None if parameters is None else tuple(parameters), "count": count, "chunk": chunk}
    hessian = Hessian(model, loss, data, **options)
    draw = torch.Generator().manual_seed(seed)
    value, gradient = hessian.loss_and_gradient()
    samples, classes, labelled = _describe(hessian)
    newton = GaussNewton(model, loss, data, **options) if gauss_newton and labelled is not None else None
    if top is not None and top < 2:
        raise InputError(f"top must be at least 2, got {top}")
    wanted = min(hessian.size, top or (2 * classes + 3 if classes else 12))
    notes = []
    if hessian.dtype != torch.float64:
        notes.append(f"float32: eigenvalues below {FLOAT32_FLOOR:g} of the largest are rounding; use model.double()")
    if hessian.size <= max(exact_below, wanted + 2):
        found = _exact(hessian, newton, wanted)
    else:
        watch = _Watch(notify)
        found = _estimated(hessian, newton, wanted, steps, probes, tolerance, draw, checkpoint, watch)
        loose = int((~found["top"].converged).sum())
        if loose:
            notes.append(f"{loose} of the largest eigenvalues are less accurate than asked: see their residuals")
    attribution = None
    if newton is not None and classes:
        attribution = attribute(found["top"].vectors, class_means(newton, classes))
    spectrum, largest, lowest = found["spectrum"], found["top"], float(found["bottom"].values[-1])
    return HessianReport(
        parameters=hessian.size,
        samples=samples,
        loss=value,
        gradient_norm=float(gradient.norm()),
        outliers=count_outliers(spectrum, largest.values, lowest, hessian.size, classes),
        attribution=attribution,
        classes=classes,
        notes=notes,
        **found,
    )


def _describe(operator: CurvatureOperator) -> tuple[int, int | None, bool | None]:
    """Samples, classes (None without labels, or with too many), whether targets are labels (None: no tensor output).

    Looks at the first batch alone for the form of outputs and targets.
    """
    samples, classes, labelled = 0, None, None
    for source, target in operator.batches():
        if not samples:
            with torch.no_grad():
                output = operator.model(source)
            if isinstance(output, Tensor):
                labelled = (
                    isinstance(target, Tensor)
                    and target.ndim == 1
                    and not target.is_floating_point()
                    and output.ndim == 2
                )
                classes = output.shape[1] if labelled and 1 < output.shape[1] <= MOST_CLASSES else None
        samples += operator.count(target)
    return int(collective.all_sum(torch.tensor(samples))), classes, labelled


def _exact(hessian: Hessian, newton: GaussNewton | None, wanted: int) -> dict[str, Any]:
    h = dense_matrix(hessian)
    values, vectors = torch.linalg.eigh(h)
    spectrum = Quadrature(values[None], torch.full_like(values[None], 1 / len(values)), exact=True)
    traces = torch.stack([part.sum() for part in h.diag().split(list(hessian.layout.sizes))])
    found = {
        "spectrum": spectrum,
        "top": _pairs(values, vectors, wanted),
        "bottom": _pairs(values, vectors, -min(2, len(values))),
        "trace": Estimate.exact(values.sum()),
        "square": Estimate.exact(values.square().sum()),
        "layers": Layers(hessian.layout.names, hessian.layout.sizes, Estimate.exact(traces)),
    }
    if newton is not None:
        g = dense_matrix(newton)
        found["gauss_newton"] = _pairs(*torch.linalg.eigh(g), wanted)
        found["residual_share"] = _share((h - g).norm(), h.norm())
    return found


def _pairs(values: Tensor, vectors: Tensor, count: int) -> Eigenpairs:
    """The `count` largest of all pairs, or the -`count` smallest, in falling order."""
    chosen = slice(None, count) if count > 0 else slice(count, None)
    kept = values.flip(0)[chosen]
    rounding = torch.full_like(kept, len(values) * torch.finfo(values.dtype).eps * float(values.abs().max()))
    return Eigenpairs(kept, vectors.flip(1)[:, chosen], rounding, torch.ones_like(kept, dtype=torch.bool), len(values))


def _estimated(
    hessian: Hessian,
    newton: GaussNewton | None,
    wanted: int,
    steps: int,
    probes: int,
    tolerance: float,
    draw: torch.Generator,
    checkpoint: str | Path | None,
    watch: "_Watch",
) -> dict[str, Any]:
    start = hessian.probes(max(2, wanted // 2), generator=draw)
    require_symmetric(hessian, start)
    watched = watch(hessian, f"{wanted} largest and 2 smallest eigenvalues")
    pairs = extreme_eigenpairs(watched, start, largest=wanted, smallest=2, generator=draw, tolerance=tolerance)
    random = hessian.probes(probes, generator=draw)
    images = watch(hessian, f"traces of {probes} probes")(random)
    run = partial(sharded_lanczos, folder=checkpoint)
    watched = watch(hessian, f"density, {probes} x {steps} Lanczos steps")
    spectrum = deflated_quadrature(watched, pairs, random, steps, run=run)
    found = {
        "spectrum": spectrum,
        "top": pairs.select(slice(0, wanted)),
        "bottom": pairs.select(slice(wanted, None)),
        "trace": _scaled(spectrum.mean(lambda x: x), hessian.size),
        "square": _scaled(spectrum.mean(lambda x: x * x), hessian.size),
        "layers": deflated_traces(hessian, pairs, random, images),
    }
    if newton is not None:
        # H's eigenvectors are near G's, yet may be orthogonal to some of them: random columns are not
        start = torch.cat([found["top"].vectors, hessian.probes(wanted, generator=draw)], 1)
        found["gauss_newton"] = extreme_eigenpairs(
            watch(newton, "Gauss-Newton eigenvalues"),
            start,
            largest=wanted,
            generator=draw,
            tolerance=tolerance,
        )
        residual = (images - newton(random)).square().sum(0).mean()
        found["residual_share"] = _share(residual.sqrt(), found["square"].value.sqrt())
    return found


class _Watch:
    """Lets an operator tell how many products it has made, at the start and then at most every `EVERY` seconds."""

    def __init__(self, notify: Callable[[str], None] | None) -> None:
        self._notify = notify

    def __call__(self, operator: CurvatureOperator, what: str) -> Callable[[Tensor], Tensor]:
        notify = self._notify
        if notify is None:
            return operator
        products, said = 0, time.monotonic()
        notify(what)

        def counted(block: Tensor) -> Tensor:
            nonlocal products, said
            image = operator(block)
            products += block.shape[1]
            if time.monotonic() - said >= EVERY:
                notify(f"{what}: {products} products")
                said = time.monotonic()
            return image

        return counted


def _share(part: Tensor, whole: Tensor) -> float:
    """||R|| / ||H||; a zero R is no share of a zero H."""
    return float(part / whole) if float(part) else 0.0


def _scaled(estimate: Estimate, size: int) -> Estimate:
    return Estimate(size * estimate.value, size * estimate.standard_error, estimate.probes)
