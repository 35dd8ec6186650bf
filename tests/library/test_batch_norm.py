"""Batch normalisation over the whole batch: torch's on one process, the same on two, gradients included."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from library.batch_norm import GlobalBatchNorm, GlobalBatchNorm2d
from library.errors import InputError


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1


def outcome(norm: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Output, gradients by input and weight of sum(out^3), and running statistics, in one vector."""
    inputs = inputs.clone().requires_grad_()
    out = norm(inputs)
    out.pow(3).sum().backward()
    parts = (out, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)
    return torch.cat([part.detach().flatten() for part in parts])


def test_one_process_has_torchs_batch_norm() -> None:
    ours, theirs = GlobalBatchNorm(3).double(), nn.BatchNorm1d(3).double()
    assert torch.allclose(outcome(ours, rows(7)), outcome(theirs, rows(7)), atol=1e-12)
    assert torch.allclose(ours.eval()(rows(5)), theirs.eval()(rows(5)), atol=1e-12)
    with pytest.raises(InputError, match="at least 2"):
        ours.train()(rows(1))


def worker(rank: int, meet: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    own = rows(7)[:3] if rank == 0 else rows(7)[3:]
    torch.save(outcome(GlobalBatchNorm(3).double(), own), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_their_statistics(tmp_path) -> None:
    mp.spawn(worker, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    whole = outcome(GlobalBatchNorm(3).double(), rows(7))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for start, size in ((0, 21), (21, 21)):  # outputs, gradients by inputs: 3 rows on the first, 4 on the second
        offsets = (0, 0) if start == 0 else (9, 12)
        found = torch.cat([part[o : o + n] for part, o, n in zip(parts, offsets, (9, 12), strict=True)])
        assert torch.allclose(found, whole[start : start + size], atol=1e-12)
    shared = [part[-12:] for part in parts]
    assert torch.allclose(shared[0][:6] + shared[1][:6], whole[-12:-6], atol=1e-12)
    assert torch.allclose(shared[0][6:], whole[-6:], atol=1e-12)
    assert torch.equal(shared[0][6:], shared[1][6:])


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 - 1


def image_worker(rank: int, meet: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    own = images(5)[:2] if rank == 0 else images(5)[2:]
    found = {factor: outcome(GlobalBatchNorm2d(2, momentum=factor).double(), own) for factor in (0.1, None)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_statistics_of_images(tmp_path) -> None:
    mp.spawn(image_worker, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for factor in (0.1, None):
        whole = outcome(nn.BatchNorm2d(2, momentum=factor).double(), images(5))
        first, second = (part[factor] for part in parts)
        for start, n in ((0, 18), (90, 18)):  # outputs, gradients by inputs: 2 images on the first, 3 on the second
            here = start * 2 // 5
            there = start * 3 // 5
            found = torch.cat([first[here : here + 2 * n], second[there : there + 3 * n]])
            assert torch.allclose(found, whole[start : start + 5 * n], atol=1e-12)
        assert torch.allclose(first[-8:-4] + second[-8:-4], whole[-8:-4], atol=1e-12)
        for part in (first, second):
            assert torch.allclose(part[-4:], whole[-4:], atol=1e-12)
