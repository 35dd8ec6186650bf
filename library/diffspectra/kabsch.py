"""The rotation that lays one molecule on another, for batches, without a NaN in degenerate cases."""

import torch
from torch import Tensor


@torch.no_grad()
def rotations_onto(target: Tensor, source: Tensor) -> Tensor:
    """R = argmin over SO(3) of ||target - source R^T||: float64 (B, 3, 3) for (B, N, 3) about their means, padded by 0.

    With U S V^T the singular value decomposition of target^T source, R = U diag(1, 1, det(U V^T)) V^T. Both factors are
    orthogonal whatever the rank, so R is a proper rotation for collinear, coincident and single atoms too.
    Source: Kabsch, Acta Cryst. A 32 (1976).
    """
    covariance = target.double().transpose(1, 2) @ source.double()
    u, _, vt = torch.linalg.svd(covariance)
    sign = torch.det(u @ vt)
    u = torch.cat([u[..., :2], u[..., 2:] * torch.where(sign < 0, -1.0, 1.0)[:, None, None]], -1)
    return u @ vt


def aligned(target: Tensor, source: Tensor) -> Tensor:
    """`source` (B, N, 3) rotated onto `target`, in the dtype of `source`."""
    return (source.double() @ rotations_onto(target, source).transpose(1, 2)).to(source.dtype)
