"""Answers to questions about the Hessian of a loss, of the endpoint `spectrum`."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import InputError, NonFiniteError
from serving.hessian import (
    BOUND_PRODUCTS,
    PRODUCTS_PER_PAIR,
    Block,
    Counted,
    Density,
    Eigenvalue,
    HessianQuestion,
    HessianResponse,
    LineAnswer,
    Network,
    Uncertain,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.artifact import Artifact
    from library.spectral import CurvatureOperator, Estimate, Quadrature

EXACT = 2000  # most parameters whose eigenvalues are all computed
GRID = 200  # points of a density
ACTIVATIONS = 1 << 20  # of a network's samples that go through it at once: some 200 MB while it is differentiated twice
BANDWIDTH = 1 / 60  # of a density's Gaussians, as a share of the range of eigenvalues
TOLERANCE = 1e-3  # residual of an eigenvalue, as a share of the largest


class Point(NamedTuple):
    """A model with its loss and data; `targets` of a batch can be counted by `count`."""

    model: "nn.Module"
    loss: Callable[[Any, Any], "Tensor"]
    data: list[tuple[Any, Any]]
    count: Callable[[Any], int]


class HessianAnswers:
    """Answers questions, those about the served model with its own recipe and data."""

    def __init__(self, artifact: "Artifact", device: str):
        self.artifact, self.device = artifact, device

    @cached_property
    def parameters(self) -> int:
        """Entries of the served model's weights, as the files' heads say."""
        return sum(math.prod(shape) for shape in self.artifact.shapes().values())

    @cached_property
    def _served(self) -> tuple[Any, "nn.Module", Any]:
        from library.recipes import trained_model

        model, recipe = trained_model(self.artifact)
        return recipe, model.to(self.device).eval(), recipe.datasets()

    def answer(self, question: HessianQuestion, version: str) -> HessianResponse:
        """Raises InputError that begins with the field, also for numbers so large that the loss is not finite."""
        try:
            return self._answer(question, version)
        except NonFiniteError as error:
            raise InputError(f"hessian: {error}") from error

    def _answer(self, question: HessianQuestion, version: str) -> HessianResponse:
        import torch

        from library.spectral import Hessian

        point = self._point(question)
        operator = Hessian(point.model, point.loss, point.data, count=point.count)
        if "exact" in question.what and operator.size > EXACT:
            raise InputError(f"hessian.what: exact is for up to {EXACT} parameters, these are {operator.size}; ask slq")
        loss, gradient = operator.loss_and_gradient()
        norm = _finite("gradient", gradient.norm())
        probes = operator.probes(question.probes, generator=torch.Generator().manual_seed(question.seed))
        found: dict[str, Any] = dict.fromkeys(
            ("eigenvalues", "slq", "kpm", "top", "outliers", "trace", "layers", "line")
        )
        notes = (
            [] if operator.dtype == torch.float64 else ["float32: eigenvalues below 1e-6 of the largest are rounding"]
        )
        found |= _eigenvalues(operator, question, notes)
        found |= _densities(operator, question, probes)
        found |= _traces(operator, question, probes)
        if "towards" in question.model_fields_set:
            found["line"] = self._line(question, point)
        return HessianResponse(
            model=version,
            parameters=operator.size,
            samples=sum(point.count(target) for _, target in point.data),
            loss=loss,
            gradient_norm=norm,
            notes=notes,
            **found,
        )

    def _point(self, question: HessianQuestion) -> Point:
        import torch
        import torch.nn.functional as F

        if "network" not in question.model_fields_set:
            return self._served_point(question)
        targets = torch.tensor(question.targets)
        inputs = torch.tensor(question.inputs, dtype=torch.float64)
        targets = targets if question.loss == "cross_entropy" else targets.double()
        rows = max(1, ACTIVATIONS // sum(question.network.sizes()))
        data = list(zip(inputs.split(rows), targets.split(rows), strict=True))
        loss = F.cross_entropy if question.loss == "cross_entropy" else _squared_error
        return Point(question.network.module(), loss, data, len)

    def _served_point(self, question: HessianQuestion) -> Point:
        from library.hessian.recipes import curvature_batches, recipe_loss

        try:
            recipe, model, splits = self._served
        except InputError as error:
            raise InputError(f"hessian: {error}") from error
        batches = curvature_batches(splits, getattr(splits, question.part), question.samples, question.samples)
        return Point(*recipe_loss(recipe, model, batches))

    def _line(self, question: HessianQuestion, point: Point) -> LineAnswer:
        from library.hessian import interpolate

        if isinstance(question.towards, Network):
            last = question.towards.module().state_dict()
        else:
            last = self._weights(question.towards)
        inner = point.model if "network" in question.model_fields_set else point.model.model
        whole = point.model.state_dict()
        if inner is not point.model:
            last = {f"model.{name}": value for name, value in last.items()}
        line = interpolate(point.model, point.loss, point.data, whole, whole | last, points=question.points)
        return LineAnswer(
            positions=line.positions.tolist(),
            losses=line.losses.tolist(),
            accuracies=None if line.accuracies is None else line.accuracies.tolist(),
            barrier=line.barrier,
        )

    def _weights(self, reference: str) -> "dict[str, Tensor]":
        from cluster.registry import resolve
        from library.artifact import open_artifact
        from library.errors import ArtifactError
        from library.weights import state_tensors

        try:
            weights = open_artifact(resolve(reference, kind=self.artifact.kind)).weights()
        except (InputError, ArtifactError) as error:
            raise InputError(f"hessian.towards: {error}") from error
        own = {name: value.shape for name, value in state_tensors(self._served[1]).items()}
        if {name: value.shape for name, value in weights.items()} != own:
            raise InputError(f"hessian.towards: {reference} has other weights than the served model")
        return {name: value.to(self.device) for name, value in weights.items()}


def _squared_error(output: "Tensor", target: "Tensor") -> "Tensor":
    return (output - target).square().sum(-1).mean()


def _eigenvalues(operator: "CurvatureOperator", question: HessianQuestion, notes: list[str]) -> dict[str, Any]:
    import torch

    from library.hessian.outliers import above_the_negative_side, largest_gap
    from library.spectral import dense_matrix, extreme_eigenpairs

    found: dict[str, Any] = {}
    if "exact" in question.what:
        values = torch.linalg.eigvalsh(dense_matrix(operator))
        found["eigenvalues"] = values.tolist()
    if "top" in question.what:
        draw = torch.Generator().manual_seed(question.seed)
        count = min(question.top, operator.size)
        start = operator.probes(min(count, 4), generator=draw)
        pairs = extreme_eigenpairs(
            operator, start, largest=count, generator=draw, tolerance=TOLERANCE, limit=PRODUCTS_PER_PAIR * count
        )
        found["top"] = [
            Eigenvalue(value=value, residual=residual)
            for value, residual in zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
        ]
        if not bool(pairs.converged.all()):
            notes.append(f"top: {int((~pairs.converged).sum())} eigenvalues are less accurate than {TOLERANCE:g}")
    if "exact" in question.what or ("top" in question.what and question.top > 1 < operator.size):
        known = values if "exact" in question.what else pairs.values
        if len(known) > 1:
            count, gap = largest_gap(known, min(len(known) - 1, 2 * question.top + 2))
            negative = above_the_negative_side(known) if "exact" in question.what else None
            found["outliers"] = Counted(by_gap=count, gap=gap, above_negative=negative)
    return found


def _densities(operator: "CurvatureOperator", question: HessianQuestion, probes: "Tensor") -> dict[str, Any]:
    import torch

    from library.spectral import (
        Estimate,
        chebyshev_moments,
        kpm_density,
        lanczos_quadrature,
        smoothed_density,
        spectral_bounds,
    )

    found: dict[str, Any] = {}
    if "slq" in question.what:
        rule = lanczos_quadrature(operator, probes, question.steps)
        low, high = float(rule.nodes.min()), float(rule.nodes.max())
        width = BANDWIDTH * max(high - low, 1e-12)
        grid = torch.linspace(low - 3 * width, high + 3 * width, GRID, dtype=rule.nodes.dtype, device=rule.nodes.device)
        found["slq"] = _density(grid, smoothed_density(rule, grid, width), rule)
    if "kpm" in question.what:
        limit = min(BOUND_PRODUCTS, operator.size)
        low, high = (float(end) for end in spectral_bounds(operator, probes[:, :1], tolerance=TOLERANCE, limit=limit))
        half = max((high - low) / 2 * 1.01, 1e-12)
        centre = (low + high) / 2
        moments = chebyshev_moments(lambda block: (operator(block) - centre * block) / half, probes, question.steps)
        ends = centre - half, centre + half
        angles = torch.arange(GRID - 1, -1, -1, dtype=moments.dtype, device=moments.device) + 0.5
        grid = centre + half * torch.cos(math.pi * angles / GRID)  # dense at the ends, where the series may be steep
        each = kpm_density(moments, grid, *ends)
        found["kpm"] = _density(grid, Estimate.of_samples(each.mT), None)
    return found


def _density(grid: "Tensor", found: "Estimate", rule: "Quadrature | None") -> Density:
    return Density(
        grid=grid.tolist(),
        density=found.value.tolist(),
        standard_error=found.standard_error.tolist(),
        nodes=None if rule is None else rule.nodes.tolist(),
        weights=None if rule is None else rule.weights.tolist(),
    )


def _traces(operator: "CurvatureOperator", question: HessianQuestion, probes: "Tensor") -> dict[str, Any]:
    from library.spectral import Estimate

    if not {"trace", "layers"} & set(question.what):
        return {}
    terms = probes * operator(probes)
    blocks = [part.sum(0) for part in terms.split(list(operator.layout.sizes))]
    found: dict[str, Any] = {}
    if "trace" in question.what:
        found["trace"] = _uncertain(Estimate.of_samples(terms.sum(0)))
    if "layers" in question.what:
        found["layers"] = [
            Block(name=name, parameters=size, trace=_uncertain(Estimate.of_samples(block)))
            for name, size, block in zip(operator.layout.names, operator.layout.sizes, blocks, strict=True)
        ]
    return found


def _uncertain(found: "Estimate") -> Uncertain:
    return Uncertain(value=_finite("trace", found.value), standard_error=_finite("trace", found.standard_error))


def _finite(what: str, number: "Tensor") -> float:
    if not math.isfinite(number):
        raise InputError(f"hessian: its {what} is too large for {str(number.dtype).removeprefix('torch.')}")
    return float(number)
