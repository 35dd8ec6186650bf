"""Sharded Lanczos is Lanczos: the same recurrence on any number of workers, and after any interruption."""

import pytest
import torch
import torch.multiprocessing as mp

from library.errors import ArtifactError, InputError
from library.spectral.density import lanczos
from library.spectral.sharded import sharded_lanczos
from library.spectral.trace import random_probes


def problem(n: int = 41, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return a + a.mT, random_probes(n, columns, generator=generator)


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found.diagonal, expected.diagonal, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.off_diagonal, expected.off_diagonal, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 12, 60])
def test_one_worker_is_the_plain_recurrence(steps):
    a, start = problem()
    assert_same(sharded_lanczos(a, start, steps), lanczos(a, start, steps))


def test_columns_that_end_early_leave_the_others_alone():
    a = torch.diag(torch.arange(1.0, 9, dtype=torch.float64))
    start = torch.ones(8, 2, dtype=torch.float64)
    start[1:, 0] = 0
    assert_same(sharded_lanczos(a, start, 6), lanczos(a, start, 6))


def _worker(rank: int, store: str, folder: str, results: object) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    a, start = problem()
    sharded_lanczos(a, start, 7, folder=folder)
    calls: list[int] = []
    found = sharded_lanczos(lambda v: (calls.append(1), a @ v)[1], start, 12, folder=folder)
    results[rank] = (found, len(calls))
    torch.distributed.destroy_process_group()


def test_two_workers_share_the_basis_and_go_on_after_an_interruption(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (str(tmp_path / "store"), str(tmp_path / "run"), results), nprocs=2)
        found = [results[0], results[1]]
    a, start = problem()
    for run, calls in found:
        assert_same(run, lanczos(a, start, 12))
        assert calls == 1 + 5
    assert len(list((tmp_path / "run").iterdir())) == 2 * 12


def test_another_operator_start_or_a_damaged_file_is_refused(tmp_path):
    a, start = problem()
    sharded_lanczos(a, start, 5, folder=tmp_path / "run")
    for other in ((2 * a, start), (a, start.flip(0) + 0.5), problem(30), (a, start[:, :2])):
        with pytest.raises(InputError, match=r"run holds the Lanczos run of another operator or start"):
            sharded_lanczos(*other, 8, folder=tmp_path / "run")
    file = sorted((tmp_path / "run").iterdir())[2]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"lanczos-00002-.* cannot be read"):
        sharded_lanczos(a, start, 8, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("start", "steps", "message"), [(torch.zeros(4, 1), 2, "zero"), (torch.ones(4, 1), 0, "one step")]
)
def test_bad_input(start, steps, message):
    with pytest.raises(InputError, match=message):
        sharded_lanczos(torch.eye(4), start, steps)
