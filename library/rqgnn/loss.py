"""The class-balanced focal loss: rare classes weigh more, and so do graphs that are still wrong."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import InputError


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """w_c proportional to (1 - beta) / (1 - beta^{n_c}), adding up to the number of classes: float64 (classes,).

    `counts` (classes,) are the training samples of each class; one without any weighs 0. beta 0 gives equal weights,
    beta near 1 weights proportional to 1 / n_c. Raises InputError for beta outside [0, 1) and when all counts are 0.
    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    >>> class_weights(torch.tensor([900, 100]), 0.999).round(decimals=4)
    tensor([0.2764, 1.7236], dtype=torch.float64)
    """
    counts = counts.double()
    if not 0 <= beta < 1:
        raise InputError(f"beta must be within [0, 1), got {beta}")
    if not bool((counts > 0).any()):
        raise InputError("no class has a training sample")
    effective = -torch.expm1(counts * (math.log(beta) if beta else -math.inf))
    inverse = torch.where(counts > 0, 1 / torch.where(counts > 0, effective, 1), 0)
    return len(counts) * inverse / inverse.sum()


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Mean over the graphs of w_y sum_j m_j BCE(z_j, [j = y]), two independent sigmoids per graph.

    The modulating factor m_j is (1 - p)^gamma for the true class and p^gamma for the other, p = sigmoid(z_j). With
    u = z for the true class and -z for the other, m = exp(-gamma softplus(u)) and BCE = softplus(-u), finite for every
    z. `logits` (graphs, classes), `labels` int64 (graphs,), `weights` (classes,). Raises InputError for a label that is
    no class. Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.

    >>> focal_loss(torch.zeros(1, 2), torch.tensor([1]), torch.ones(2), 0.0)  # 2 log 2
    tensor(1.3863)
    """
    classes = logits.shape[1]
    if labels.dtype != torch.int64 or bool(((labels < 0) | (labels >= classes)).any()):
        raise InputError(f"labels must be int64 from 0 to {classes - 1}, got {labels.dtype} {labels.unique().tolist()}")
    signs = 2 * F.one_hot(labels, classes).to(logits.dtype) - 1
    aligned = signs * logits
    losses = (torch.exp(-gamma * F.softplus(aligned)) * F.softplus(-aligned)).sum(1)
    return (weights.to(logits)[labels] * losses).mean()
