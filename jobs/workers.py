"""The workers of a training job on Ray Train: whether they fit the cluster, and what they post until they end."""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.board import Board, Poster
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    from jobs.training import Outcome, TrainingJob

LOOK_S = 0.2  # between two looks at the board


def check_room(job: "TrainingJob") -> None:
    """Raise InputError when the cluster cannot hold the job's workers, or the batch has no sample for each."""
    import ray

    workers = job.scaling.workers if isinstance(job.scaling.workers, int) else job.scaling.workers[0]
    if job.recipe.batch_size < workers:
        raise InputError(f"batch_size {job.recipe.batch_size} is less than the {workers} workers; each needs a sample")
    if job.scaling.autoscale:
        return
    there = ray.cluster_resources()
    needs = {"CPU": job.scaling.cpus_per_worker} | ({"GPU": 1.0} if job.scaling.gpu else {})
    for kind, each in needs.items():
        room = int(there.get(kind, 0) // each)
        if room < workers:
            raise InputError(
                f"{workers} workers of {each:g} {kind} do not fit: the cluster has {there.get(kind, 0):g} {kind}, "
                f"enough for {room}; use fewer workers, or scaling.autoscale to wait for nodes"
            )


class Workers:
    """A job's workers, which a thread of this process runs through Ray Train while the iteration goes on."""

    def __init__(self, job: "TrainingJob", folder: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.outcome: Outcome | None = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self._ended: list[BaseException | None] = []
        self._thread = threading.Thread(target=self._fit, args=(job, folder), daemon=True)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Start the workers, and yield what they posted since the last look, often an empty list, until they end.

        `outcome` is set after that. Raises what Ray Train raised.
        """
        import ray

        self._thread.start()
        over = False
        while not over:
            over = bool(self._ended)
            events = ray.get(self._board.take.remote())
            for event in events:
                self.outcome = event.get("outcome", self.outcome)
            yield events
            if not over:
                time.sleep(LOOK_S)
        ray.kill(self._board)
        if self._ended[0] is not None:
            raise self._ended[0]
        if self.outcome is None:
            raise PrismError("the workers ended without saying how; see Ray's logs")

    def stop(self) -> None:
        """Ask the workers to save after the step they are in, and to end."""
        self._board.stop.remote()

    def _fit(self, job: "TrainingJob", folder: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        scaling = job.scaling
        try:
            TorchTrainer(
                _worker,
                train_loop_config={"job": job, "folder": folder, "board": self._board, "cwd": os.getcwd()},
                torch_config=TorchConfig(timeout_s=1800),
                scaling_config=ScalingConfig(
                    num_workers=scaling.workers,
                    use_gpu=scaling.gpu,
                    resources_per_worker={"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.gpu else {}),
                    elastic_resize_monitor_interval_s=10.0,
                ),
                run_config=RunConfig(
                    name=f"ray-{uuid.uuid4().hex[:8]}",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=job.max_failures),
                ),
            ).fit()
            self._ended.append(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._ended.append(error)


def stand_in(cwd: str) -> None:
    """Work in the driver's folder where this machine has it, so that a relative path means the same file there."""
    if os.path.isdir(cwd):
        os.chdir(cwd)


def _worker(config: dict[str, Any]) -> None:
    """One worker of the training: the loop, and its outcome on the board."""
    from ray.train import get_context
    from ray.train.torch import get_device

    from jobs.training import train

    stand_in(config["cwd"])
    device = get_device()
    poster = Poster(config["board"] if get_context().get_world_rank() == 0 else None)
    outcome = train(config["job"], config["folder"], device, poster)
    poster.post(outcome=outcome)
    poster.flush()
