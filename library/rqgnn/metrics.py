"""How well probabilities find anomalies: areas, F1 at a threshold, and the threshold that is best on given graphs."""

import torch
from torch import Tensor

from library.calibration import auroc, expected_calibration_error
from library.errors import InputError


def macro_f1(found: Tensor, labels: Tensor) -> float:
    """The mean of the two classes' F1, for bool decisions and labels (n,); a class never decided for counts 0.

    >>> macro_f1(torch.tensor([True, False, False]), torch.tensor([True, True, False]))
    0.6666666666666666
    """
    found, labels = found.bool(), labels.bool()
    scores = []
    for decided, true in ((found, labels), (~found, ~labels)):
        hits = int((decided & true).sum())
        scores.append(2 * hits / max(1, int(decided.sum()) + int(true.sum())))
    return sum(scores) / 2


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """The area under the precision-recall curve by steps: sum over thresholds of precision times gain in recall.

    Equal scores are one threshold. Raises InputError when there is no positive.
    """
    labels = labels.bool()
    if not bool(labels.any()):
        raise InputError("a precision-recall curve needs a positive label")
    values, place = scores.double().unique(return_inverse=True)
    falling = len(values) - 1 - place
    hits = torch.bincount(falling, weights=labels.double(), minlength=len(values))
    decided = torch.bincount(falling, minlength=len(values)).double()
    precision = hits.cumsum(0) / decided.cumsum(0)
    return float((precision * hits).sum() / hits.sum())


def best_threshold(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """The threshold of largest macro-F1, and that F1; at or above the threshold a graph is called anomalous.

    Thresholds tried lie midway between neighbouring probabilities; of equally good ones the middle one is taken.
    Raises InputError when a class is missing.
    """
    labels = labels.bool()
    if bool(labels.all()) or not bool(labels.any()):
        raise InputError(f"a threshold needs both classes; all {len(labels)} graphs are of one")
    values, place = probabilities.double().unique(return_inverse=True)
    positives = torch.bincount(place, weights=labels.double(), minlength=len(values))
    every = torch.bincount(place, minlength=len(values)).double()
    hits, called = (part.flip(0).cumsum(0).flip(0) for part in (positives, every))  # at or above each value
    rejected = len(labels) - called
    right = rejected - (positives.sum() - hits)
    anomalous = 2 * hits / (called + positives.sum())
    normal = 2 * right / (rejected + len(labels) - positives.sum())
    scores = (anomalous + normal) / 2
    best = (scores >= scores.max() - 1e-12).nonzero().flatten()
    chosen = int(best[len(best) // 2])
    below = float(values[chosen - 1]) if chosen else 0.0
    return (below + float(values[chosen])) / 2, float(scores[chosen])


def detection_metrics(probabilities: Tensor, labels: Tensor, *, threshold: float | None = None) -> dict[str, float]:
    """auc with its standard error, auprc, macro_f1, best_macro_f1 and ece.

    macro_f1 calls a graph anomalous that reaches `threshold` or, without one, whose probability is above 0.5: the more
    likely class, normal where both are equally likely, as published. best_macro_f1 is at the best threshold on these
    very graphs; ece is the expected calibration error in 10 parts.
    Raises InputError when a class is missing.
    """
    area = auroc(probabilities, labels)
    called = probabilities > 0.5 if threshold is None else probabilities >= threshold
    return {
        "auc": area.value,
        "auc_error": area.standard_error,
        "auprc": average_precision(probabilities, labels),
        "macro_f1": macro_f1(called, labels),
        "best_macro_f1": best_threshold(probabilities, labels)[1],
        "ece": expected_calibration_error(probabilities, labels),
    }
