"""Calibrated probabilities of a classifier: one temperature for its logits. Source: Guo et al., ICML 2017."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST, MOST = 0.05, 20.0  # of a temperature
BINS = 15  # of confidence, for the calibration error


def fit_temperature(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The temperature T > 0 with the least cross-entropy of softmax(logits / T), on held-out (n, classes) and (n,).

    Returns `temperature`, and cross-entropy and expected calibration error with it and with 1: `cross_entropy`,
    `calibration_error`, and the same names with `_before`; `calibration_images` is n.
    """
    from scipy.optimize import minimize_scalar

    scores = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(scores / math.exp(log_temperature), labels))

    found = minimize_scalar(loss, bounds=(math.log(LEAST), math.log(MOST)), method="bounded")
    temperature = math.exp(float(found.x))
    return {
        "temperature": temperature,
        "cross_entropy": loss(math.log(temperature)),
        "cross_entropy_before": loss(0.0),
        "calibration_error": calibration_error((scores / temperature).softmax(1), labels),
        "calibration_error_before": calibration_error(scores.softmax(1), labels),
        "calibration_images": float(len(labels)),
    }


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean over 15 bins of |accuracy - confidence|, weighted by their share of images."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)[1:-1]
    place = torch.bucketize(confidence, edges)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right - confidence.double())
    return float(gaps.abs().sum()) / len(labels)
