"""The cost of the training loop: its throughput against the same model in a bare DistributedDataParallel loop.

Two gloo workers train SendRecipe's default model, plain, on the shipped passages: first the bare loop (batches from
the same data in the same order, forward, backward, clip, step; nothing else), then `jobs.training.train`, then both
again, in the same processes. Checkpoints and evaluations, which the bare loop lacks, lie outside the timed steps.

    python -m benchmarks.train_loop --steps 60 --rounds 3
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from jobs.board import Poster
from jobs.training import TrainingJob, train
from library import order
from library.recipe import Recipe, make_batch, seeded_model
from library.send.recipe import SendRecipe

WARM_UP = 10  # steps of each run that are not timed


class Clock(Poster):
    """Notes when each step ended."""

    def __init__(self) -> None:
        super().__init__(None)
        self.times: list[float] = []

    def post(self, **event: object) -> None:
        self.times.append(time.perf_counter())


def bare(recipe: Recipe) -> float:
    """Seconds per step of a loop that does nothing but train."""
    splits = recipe.datasets()
    model = seeded_model(recipe)
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model)
    share = order.split(recipe.batch_size, dist.get_world_size())[dist.get_rank()]
    times = []
    for step in range(recipe.steps):
        indices = order.global_batch(recipe.seed, step, recipe.batch_size, len(splits.train))[share.start : share.stop]
        batch = make_batch(splits, splits.train, indices, list(indices))
        recipe.losses(wrapped, batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        times.append(time.perf_counter())
    return (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def ours(recipe: Recipe) -> float:
    """Seconds per step of the training loop, its last step (which saves and evaluates) left out."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(recipe=recipe, checkpoint_every=10 * recipe.steps)
        folders = [folder]
        dist.broadcast_object_list(folders)
        train(job, folders[0], torch.device("cpu"), clock)
        dist.barrier()
    times = clock.times[:-1]
    return (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def work(rank: int, workers: int, folder: str, steps: int, rounds: int) -> None:
    """One worker: both loops in turn, `rounds` times; rank 0 writes the times."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    recipe = SendRecipe(steps=steps, selection="none", prompts=0)
    measured: dict[str, list[float]] = {"bare DistributedDataParallel": [], "jobs.training.train": []}
    for _ in range(rounds):
        measured["bare DistributedDataParallel"].append(bare(recipe))
        measured["jobs.training.train"].append(ours(recipe))
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark and print the ratio."""
    parser = argparse.ArgumentParser(description="The training loop against a bare DDP loop.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.workers, folder, options.steps, options.rounds)
        torch.multiprocessing.spawn(work, args=arguments, nprocs=options.workers)
        measured = json.loads(Path(folder, "times.json").read_text())
    medians = {name: statistics.median(values) for name, values in measured.items()}
    peer = medians["bare DistributedDataParallel"]
    table = Table("loop", "ms per step", "throughput of the bare loop", title=f"{options.workers} workers, pythia-tiny")
    for name, seconds in medians.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{peer / seconds:.1%}")
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps({"seconds": measured, "ratio": peer / medians["jobs.training.train"]}))


if __name__ == "__main__":
    main()
