"""Batch normalisation whose training statistics are those of the whole batch, on any number of workers."""

import torch
from torch import Tensor, nn

from library import collective
from library.errors import InputError


class GlobalBatchNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the rows of x (rows, channels), as `torch.nn.BatchNorm1d`.

    In training, mean and variance are over the rows of all workers together, and gradients flow through them: the
    result does not depend on how many workers share the batch. On a CPU too, unlike torch's SyncBatchNorm. In
    evaluation the running statistics are used (momentum 0.1, unbiased variance). Raises InputError when a batch has
    one row in all, whose variance would be zero.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps, self.momentum = eps, momentum

    def forward(self, rows: Tensor) -> Tensor:
        """Normalised rows (rows, channels)."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return rows * scale + (self.bias - self.running_mean * scale)
        count = float(collective.all_sum(torch.tensor(float(len(rows)))))
        if count < 2:
            raise InputError("batch normalisation needs at least 2 samples in a training batch; enlarge batch_size")
        mean = collective.differentiable_sum(rows.sum(0)) / count
        centred = rows - mean
        variance = collective.differentiable_sum(centred.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` whose training statistics are over the images of all workers together.

    On one worker, and in evaluation, it is torch's own. Images are (batch, channels, h, w); statistics are in fp32 or
    better, and gradients flow through them.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images."""
        if not self.training or collective.world_size() == 1:
            return super().forward(images)
        x = images if images.dtype == torch.float64 else images.float()
        count = float(collective.all_sum(torch.tensor(float(x.numel() // x.shape[1]))))
        mean = collective.differentiable_sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = collective.differentiable_sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)
