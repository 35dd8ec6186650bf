"""Which classes the outliers of a classifier's curvature come from.

For cross-entropy with probabilities p, G is the second moment of g_{i,c'} = sqrt(p_{i,c'}) J_i^T (p_i - e_{c'}) over
samples i and possible labels c'. Its means over the samples of class c, g_{c,c'}, form k clusters around
g_c = mean over c' != c of g_{c,c'}: the k outliers lie along the g_c, a smaller bulk along the g_{c,c'}.
Source: Papyan, "Measurements of three-level hierarchical structure in the outliers in the spectrum of deepnet
Hessians", 2019, equations 7 to 12.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library import collective
from library.errors import InputError
from library.spectral.operators import GaussNewton


@dataclass(frozen=True)
class Attribution:
    """How far each of m eigenvectors lies in the span of class means.

    `centres` (m,) and `pairs` (m,): squared length within the span of the k means g_c, and of the k (k - 1) means
    g_{c,c'}; both are between 0 and 1. `overlap` (m, k): squared cosine with each g_c, so `overlap.argmax(1)` names
    the class that an eigenvector belongs to most.
    """

    centres: Tensor
    pairs: Tensor
    overlap: Tensor


def class_means(operator: GaussNewton, classes: int) -> Tensor:
    """The means g_{c,c'} as (n, k, k): parameters, true class c, possible label c'. Zero for a class without samples.

    Over the samples of all workers.

    The operator's loss must be cross-entropy of outputs (N, k) and labels (N,); InputError for other outputs or a
    label outside 0..k-1.
    """
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=operator.device)  # the last is for wrong labels
    for _, target in operator.batches():
        right = target.ndim == 1 and not target.is_floating_point()
        labels = target.long() if right else target.new_full((len(target),), classes, dtype=torch.int64)
        counts += torch.where((labels < 0) | (labels > classes), classes, labels).bincount(minlength=classes + 1)
    counts, wrong = collective.all_sum(counts).split([classes, 1])
    if int(wrong):
        raise InputError(f"class attribution needs integer labels (N,) in 0..{classes - 1}")

    def seeds(output: Tensor, target: Tensor) -> Tensor:
        if output.shape[1:] != (classes,):
            raise InputError(f"class attribution needs outputs (N, {classes}), got {tuple(output.shape)}")
        p = output.softmax(-1)
        slopes = p.sqrt()[:, :, None] * (p[:, None, :] - torch.eye(classes, dtype=p.dtype, device=p.device))
        members = F.one_hot(target, classes).to(p)
        return torch.einsum("ic,ids->cdis", members, slopes).flatten(0, 1)

    means = operator.pull_back(seeds, classes * classes).unflatten(1, (classes, classes))
    counts = counts.to(means)
    return means * (counts.sum() / counts.clamp(min=1))[:, None]


def attribute(vectors: Tensor, means: Tensor) -> Attribution:
    """The share of each unit eigenvector (n, m) that class means (n, k, k) explain."""
    classes = means.shape[1]
    other = ~torch.eye(classes, dtype=torch.bool, device=means.device)
    pairs = means[:, other]
    centres = pairs.unflatten(1, (classes, classes - 1)).mean(-1)
    directions = centres / torch.linalg.vector_norm(centres, dim=0).clamp(min=torch.finfo(centres.dtype).tiny)
    return Attribution(_within(vectors, centres), _within(vectors, pairs), (vectors.mT @ directions) ** 2)


def _within(vectors: Tensor, spanning: Tensor) -> Tensor:
    left, sizes, _ = torch.linalg.svd(spanning, full_matrices=False)
    basis = left[:, sizes > 1e-6 * sizes.max()]
    return (basis.mT @ vectors).square().sum(0)
