"""What a score says about a label: the area under its ROC curve with an error, and a calibrated risk."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import ArtifactError, InputError


@dataclass(frozen=True)
class Auroc:
    """An area under the ROC curve, its standard error, and how many samples of either label it is over."""

    value: float
    standard_error: float
    positives: int
    negatives: int


def auroc(scores: Tensor, labels: Tensor, groups: Tensor | None = None) -> Auroc:
    """The probability that a positive scores higher than a negative (a tie counts half), with its standard error.

    `scores` (n,), `labels` bool (n,), `groups` int (n,): samples of one group (passage) may depend on each other.
    With the placements V_i of each positive among the negatives and W_j of each negative among the positives, whose
    means are the area A, and their sums a_g, b_g of V - A and W - A over group g,

        var A = I1/(I1-1) sum_g a_g^2 / M^2 + I0/(I0-1) sum_g b_g^2 / N^2 + 2 I/(I-1) sum_g a_g b_g / (M N)

    for M positives in I1 groups, N negatives in I0, I groups in all (Obuchowski, Biometrics 1997). Without groups
    this is DeLong's estimate (Biometrics 1988). The error is NaN when all positives or all negatives are of one group.

    Raises InputError when a score is not finite or a label is missing.
    """
    scores, labels = _checked(scores, labels)
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        raise InputError(f"an ROC curve needs both labels; there are {len(positive)} positives of {len(scores)}")
    ranks = _midranks(scores)
    above = (ranks[labels] - _midranks(positive)) / len(negative)
    below = 1 - (ranks[~labels] - _midranks(negative)) / len(positive)
    area = above.mean()
    groups = torch.arange(len(scores)) if groups is None else groups.cpu()
    members, place = groups.unique(return_inverse=True)
    a = torch.zeros(len(members), dtype=torch.float64).index_add(0, place[labels], above - area)
    b = torch.zeros(len(members), dtype=torch.float64).index_add(0, place[~labels], below - area)
    scale_a, scale_b, scale_ab = (
        n / (n - 1) if n > 1 else float("nan")
        for n in (len(place[labels].unique()), len(place[~labels].unique()), len(members))
    )
    variance = (
        scale_a * (a @ a) / len(positive) ** 2
        + scale_b * (b @ b) / len(negative) ** 2
        + 2 * scale_ab * (a @ b) / (len(positive) * len(negative))
    )
    return Auroc(float(area), float(variance.clamp(min=0).sqrt()), len(positive), len(negative))


@dataclass(frozen=True)
class Calibration:
    """A nondecreasing map from scores to the risk of a positive label: straight lines between knots, flat outside.

    `scores` float64 (n,) rising, `risks` float64 (n,) nondecreasing within [0, 1].
    """

    scores: Tensor
    risks: Tensor

    @classmethod
    def fit(cls, scores: Tensor, labels: Tensor) -> "Calibration":
        """Isotonic regression of bool `labels` (n,) on `scores` (n,): the best monotone map in squared error.

        Raises InputError when a score is not finite or only one label occurs.
        """
        from sklearn.isotonic import IsotonicRegression

        scores, labels = _checked(scores, labels)
        if labels.all() or not labels.any():
            raise InputError(f"calibration needs both labels; all {len(labels)} are {bool(labels[0])}")
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(scores.numpy(), labels.double().numpy())
        return cls(torch.tensor(fitted.X_thresholds_).double(), torch.tensor(fitted.y_thresholds_).double())

    def risk(self, scores: Tensor | float) -> Tensor:
        """The risk in [0, 1] of each score, float64, of the shape of `scores`."""
        scores = torch.as_tensor(scores).detach().cpu().double()
        if len(self.scores) == 1:
            return torch.full_like(scores, float(self.risks[0]))
        right = torch.searchsorted(self.scores, scores).clamp(1, len(self.scores) - 1)
        left = right - 1
        weight = ((scores - self.scores[left]) / (self.scores[right] - self.scores[left])).clamp(0, 1)
        return torch.lerp(self.risks[left], self.risks[right], weight)

    def arrays(self) -> dict[str, Tensor]:
        """The knots as named tensors of an artifact."""
        return {"calibration.scores": self.scores, "calibration.risks": self.risks}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> "Calibration | None":
        """The calibration among an artifact's arrays; None when there is none. Raises ArtifactError for a bad one."""
        if "calibration.scores" not in arrays and "calibration.risks" not in arrays:
            return None
        scores, risks = arrays.get("calibration.scores"), arrays.get("calibration.risks")
        if scores is None or risks is None or scores.dim() != 1 or scores.shape != risks.shape or not len(scores):
            raise ArtifactError("the calibration is corrupt: it needs two vectors, scores and risks, of one length")
        scores, risks = scores.double(), risks.double()
        if not ((scores.diff() > 0).all() and (risks.diff() >= 0).all() and risks[0] >= 0 and risks[-1] <= 1):
            raise ArtifactError("the calibration is corrupt: scores must rise, and risks must not fall within [0, 1]")
        return cls(scores, risks)


@dataclass(frozen=True)
class PlattScaling:
    """A strictly rising map from margins to probabilities, `sigmoid(slope * margin + offset)`: keeps every ranking."""

    slope: float
    offset: float

    @classmethod
    def fit(cls, margins: Tensor, labels: Tensor, *, least_slope: float = 1e-3) -> "PlattScaling":
        """The logistic regression of bool `labels` (n,) on `margins` (n,), by Newton's method.

        Targets are (positives + 1) / (positives + 2) and 1 / (negatives + 2) instead of 1 and 0, as if one more of each
        label had been seen: few positives then give no probability of 0 or 1. Where higher margins do not mean more
        positives, the slope is `least_slope` per standard deviation of the margins, around the share of positives.
        Raises InputError when a margin is not finite or only one label occurs.
        Source: Platt, "Probabilistic outputs for support vector machines", 1999; Lin, Lin, Weng, 2007.

        >>> scaling = PlattScaling.fit(torch.tensor([-2.0, -1.0, 0.5, 2.0]), torch.tensor([False, False, True, True]))
        >>> scaling.slope > 0, 0 < float(scaling.probability(-2.0)) < float(scaling.probability(2.0)) < 1
        (True, True)
        """
        margins, labels = _checked(margins, labels)
        positives = int(labels.sum())
        negatives = len(labels) - positives
        if not positives or not negatives:
            raise InputError(f"calibration needs both labels; {positives} of {len(labels)} are positive")
        targets = torch.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
        centre, spread = margins.mean(), margins.std(correction=0)
        spread = spread if spread > 1e-12 else torch.ones_like(spread)
        inputs = torch.stack([(margins - centre) / spread, torch.ones_like(margins)], 1)
        point = torch.stack([torch.zeros(()), torch.tensor((positives + 1) / (negatives + 1)).log()]).double()

        def cost(candidate: Tensor) -> Tensor:
            logits = inputs @ candidate
            return (torch.nn.functional.softplus(logits) - targets * logits).sum()

        for _ in range(100):
            chances = torch.sigmoid(inputs @ point)
            gradient = inputs.mT @ (chances - targets)
            hessian = inputs.mT @ (inputs * (chances * (1 - chances))[:, None]) + 1e-9 * torch.eye(2).double()
            step = torch.linalg.solve(hessian, gradient)
            while cost(point - step) > cost(point) and float(step.abs().max()) > 1e-12:
                step = step / 2
            point = point - step
            if float(step.abs().max()) < 1e-10:
                break
        if point[0] < least_slope:
            point = torch.stack([torch.tensor(least_slope).double(), targets.mean().logit()])
        slope = float(point[0] / spread)
        return cls(slope, float(point[1]) - slope * float(centre))

    def probability(self, margins: Tensor | float) -> Tensor:
        """The probability of a positive for each margin, float64."""
        return torch.sigmoid(self.slope * torch.as_tensor(margins).detach().cpu().double() + self.offset)


def expected_calibration_error(risks: Tensor, labels: Tensor, bins: int = 10) -> float:
    """`sum_b (n_b / n) |mean risk - share of positives|` over `bins` equal parts of [0, 1] (Guo et al., ICML 2017)."""
    risks, labels = _checked(risks, labels)
    if risks.min() < 0 or risks.max() > 1:
        raise InputError(f"risks lie within [0, 1]; these within [{float(risks.min())}, {float(risks.max())}]")
    place = (risks * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, risks - labels.double())
    return float(gaps.abs().sum() / len(risks))


def _midranks(values: Tensor) -> Tensor:
    """Ranks from 1 in float64; equal values share the mean of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def _checked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores, labels = torch.as_tensor(scores).detach().cpu().double(), torch.as_tensor(labels).cpu().bool()
    if scores.dim() != 1 or scores.shape != labels.shape or not len(scores):
        raise InputError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must be vectors of one length")
    if not scores.isfinite().all():
        raise InputError(f"scores[{int((~scores.isfinite()).nonzero()[0])}] is not finite")
    return scores, labels
