"""Claim C of SeND: how long EigenScore and its efficient surrogate take, all forms timed in one run on one thread."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from library.send.ees import MOMENTS, PROBES, choose_method, ees
from library.send.eigenscore import ALPHA, eigenscore

OFFICIAL, EXACT, EES = "EigenScore as published", "EigenScore, exact", "EES"


def published_eigenscore(embeddings: Tensor, alpha: float = ALPHA) -> Tensor:
    """(1/K) log det(X^T J X + alpha I) of embeddings (K, d), where X is (d, K) and J = I - 1 1^T / d is formed.

    What the published code of SeND computes; `eigenscore` has the same value without the d x d matrix.
    """
    answers, features = embeddings.shape
    columns = embeddings.mT
    identity = torch.eye(features, dtype=columns.dtype)
    centring = identity - torch.ones_like(identity) / features
    covariance = columns.mT @ centring @ columns
    return torch.linalg.slogdet(covariance + alpha * torch.eye(answers, dtype=columns.dtype)).logabsdet / answers


def score_times(
    sizes: Sequence[tuple[int, int]], *, seconds: float = 0.5, moments: int = MOMENTS, probes: int = PROBES
) -> list[dict[str, Any]]:
    """Median seconds of each form for one prompt of Gaussian embeddings, a row per size (d, K).

    EES is the paper's kind by the kernel polynomial method with `moments` and `probes`; `difference` is the exact
    score minus the published form, and `rule` what `choose_method` would compute EES by. Each form is called once
    without being counted, then 1 to 50 times within about `seconds`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(features, answers, seconds, moments, probes) for features, answers in sizes]
    finally:
        torch.set_num_threads(threads)


def _row(features: int, answers: int, seconds: float, moments: int, probes: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(features + answers)
    embeddings = torch.randn(answers, features, dtype=torch.float64, generator=generator)
    forms: dict[str, Callable[[], Any]] = {
        OFFICIAL: lambda: published_eigenscore(embeddings),
        EXACT: lambda: eigenscore(embeddings),
        EES: lambda: ees(embeddings, method="kpm", moments=moments, probes=probes),
    }
    return {
        "d": features,
        "K": answers,
        **{name: _median_seconds(form, seconds) for name, form in forms.items()},
        "difference": float(eigenscore(embeddings) - published_eigenscore(embeddings)),
        "rule": choose_method(answers, features, moments=moments, probes=probes).method,
    }


def _median_seconds(form: Callable[[], Any], seconds: float) -> float:
    form()
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        form()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
