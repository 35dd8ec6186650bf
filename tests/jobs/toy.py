"""A recipe that trains in milliseconds, and worker processes without Ray, for tests of the loop itself."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from jobs import checkpoint as checkpoints
from jobs.board import Poster
from jobs.history import read_history
from jobs.training import TrainingJob, train
from library.errors import InputError
from library.recipe import Recipe, Splits, unwrap


class Toy(nn.Module):
    """A residual network with a module list, a buffer, a frozen part, and row counts that no world size divides."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inp = nn.Linear(7, 33)
        self.layers = nn.ModuleList([nn.Linear(33, 33) for _ in range(3)])
        self.out = nn.Linear(33, 1)
        self.frozen = nn.Linear(33, 5).requires_grad_(False)
        self.dropout = dropout
        self.register_buffer("counter", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(layer(x)), self.dropout, self.training)
        return self.out(x) + self.frozen(x).mean(1, keepdim=True)


class Samples:
    """Rows (x, y) of a noisy function, with different weights, so that means over unequal shares would show."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 7, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class ToyRecipe(Recipe, frozen=True, extra="forbid"):
    """Regression with noise from the sample keys; units are the samples whose first value is positive, and one."""

    kind: ClassVar[str] = "toy"

    steps: int = 50
    batch_size: int = 16
    clip_norm: float | None = 1.0
    lr: float = 1e-2
    samples: int = 70
    dropout: float = 0.0
    poison_at: int | None = None
    die_at: int | None = None
    slow: float = 0.0
    break_evaluation: bool = False
    mark: str = ""
    corpus: str = ""
    explode_at: int | None = None

    def datasets(self) -> Splits:
        if self.corpus and not Path(self.corpus).exists():
            raise InputError(f"corpus {self.corpus} is not there")
        splits = [Samples(self.samples, 1), Samples(30, 2), Samples(30, 3)]
        return Splits(*splits, collate=_collate, fingerprint=f"toy-{self.samples}")

    def model(self) -> nn.Module:
        return Toy(self.dropout)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.lr)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.05 * step))

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (model(batch["x"]) - batch["y"]).square().mean(1)
        loss = (error * batch["weight"]).sum() / batch["weight"].sum()
        return {"loss": loss, "absolute": error.detach().sqrt().mul(batch["weight"]).sum() / batch["weight"].sum()}

    def count(self, batch: dict[str, Tensor]) -> int:
        return int(batch["weight"].sum())

    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
        if self.break_evaluation:
            raise RuntimeError("the evaluation is broken on purpose")
        found = super().evaluate(model, batches)
        if self.explode_at is not None and float(unwrap(model).counter) >= self.explode_at:
            found["loss"] = float("inf")
        return found

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        import time

        unwrap(model).counter.add_(1.0)
        time.sleep(self.slow)
        if step == self.poison_at:
            with torch.no_grad():
                unwrap(model).out.bias.fill_(float("nan"))
        if step == self.die_at and not Path(self.mark).exists():
            Path(self.mark).write_text("died once")
            if self.corpus:
                Path(self.corpus).unlink()
            os.kill(os.getpid(), 9)
        return {"steps_seen": float(unwrap(model).counter)}


def _collate(samples: list[tuple[Tensor, Tensor]], keys: Tensor) -> dict[str, Tensor]:
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    noise = torch.stack([torch.randn(7, generator=torch.Generator().manual_seed(int(key))) for key in keys])
    return {"x": x + 0.01 * noise, "y": y, "weight": 1 + (x[:, 0] > 0).long()}


class StopAt(Poster):
    """Asks the loop to stop at a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(None)
        self.step = step

    def post(self, **event: object) -> None:
        self.stop_requested = event.get("step", 0) == self.step


def run_stopped(job: TrainingJob, stop_at: int | None) -> tuple[dict[str, Tensor], dict]:
    """Weights and history of a worker's run, stopped and resumed when asked."""
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    for step in [stop_at, None] if stop_at else [None]:
        outcome = train(job, box[0], torch.device("cpu"), StopAt(step))
    assert outcome.reason == "finished", outcome.message
    found = checkpoints.Checkpoint(checkpoints.complete(Path(box[0]) / "checkpoints")[0])
    tensors = {key: found.tensor(key) for key in found.index.tensors if key.startswith("model/")}
    return tensors, read_history(box[0])


def run_workers(workers: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in `workers` processes of one gloo group, no Ray; what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(workers, folder, work, arguments), nprocs=workers)
        return torch.load(Path(folder) / "result", weights_only=False)


def _worker(rank: int, workers: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in names.items()} | {"DS_ACCELERATOR": "cpu"})
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    result = work(*arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


class ToyJob(TrainingJob, frozen=True, extra="forbid"):
    """A training job over the toy recipe."""

    job: ClassVar[str] = "toy"

    recipe: ToyRecipe = ToyRecipe()
