"""The workers of a training job on Ray Train: whether they fit the cluster, and what they post until they end."""

import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from jobs.board import Board, Poster
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    from jobs.training import Scaling, TrainingJob

LOOK_S = 0.2  # between two looks at the board
ROUNDING = 1e-6  # 0.3 CPUs are room for three workers of 0.1


def check_room(job: "TrainingJob") -> None:
    """Raise InputError when the cluster cannot hold the job's workers, or the batch has no sample for each."""
    _, most = _range(job.scaling)
    if job.recipe.batch_size < most:
        raise InputError(f"batch_size {job.recipe.batch_size} is less than the {most} workers; each needs a sample")
    check_fits(job.scaling)


def check_fits(scaling: "Scaling") -> None:
    """Raise InputError that says what there is when the cluster cannot hold the workers and does not grow for them."""
    if scaling.autoscale:
        return
    (workers, _), room = _range(scaling), room_for(scaling)
    if room < workers:
        needs, nodes = _needs(scaling), _living_nodes()
        has = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in needs)
        raise InputError(
            f"{workers} workers of {' and '.join(f'{each:g} {kind}' for kind, each in needs.items())} do not fit: the "
            f"cluster has {has}{f' on {len(nodes)} nodes' if nodes[1:] else ''}, enough for {room}; use fewer workers, "
            "or scaling.autoscale to wait for nodes"
        )


def room_for(scaling: "Scaling") -> int:
    """How many of the workers the cluster's nodes hold at a time; each is on one node."""
    needs = _needs(scaling)
    return sum(
        min(math.floor(node.get(kind, 0) / each + ROUNDING) for kind, each in needs.items()) for node in _living_nodes()
    )


def _living_nodes() -> list[dict[str, float]]:
    """The resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _needs(scaling: "Scaling") -> dict[str, float]:
    """What one worker takes of a node."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.gpu else {})


def _range(scaling: "Scaling") -> tuple[int, int]:
    """The least and the greatest number of workers."""
    return (scaling.workers, scaling.workers) if isinstance(scaling.workers, int) else scaling.workers


class Workers:
    """A function run by Ray Train on several workers, in a thread of this process while the iteration goes on."""

    def __init__(
        self,
        work: Callable[[dict[str, Any], Poster], None],
        settings: dict[str, Any],
        *,
        scaling: "Scaling",
        folder: str,
        max_failures: int,
    ) -> None:
        """`work(settings, poster)` is called on every worker; rank 0's poster reaches the iteration."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.outcome: Any = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self._ended: list[BaseException | None] = []
        config = {"work": work, "settings": settings, "board": self._board, "cwd": os.getcwd()}
        self._thread = threading.Thread(target=self._fit, args=(config, scaling, folder, max_failures), daemon=True)

    @classmethod
    def of(cls, job: "TrainingJob", folder: str) -> Self:
        """The workers of a training job, whose `outcome` is the loop's."""
        return cls(
            _train, {"job": job, "folder": folder}, scaling=job.scaling, folder=folder, max_failures=job.max_failures
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Start the workers, and yield what they posted since the last look, often an empty list, until they end.

        `outcome` is set once one was posted. Raises what Ray Train raised, and PrismError when none was.
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

    def _fit(self, config: dict[str, Any], scaling: "Scaling", folder: str, max_failures: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        try:
            TorchTrainer(
                _work,
                train_loop_config=config,
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
                    failure_config=FailureConfig(max_failures=max_failures),
                ),
            ).fit()
            self._ended.append(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._ended.append(error)


def stand_in(cwd: str) -> None:
    """Work in the driver's folder where this machine has it, so that a relative path means the same file there."""
    if os.path.isdir(cwd):
        os.chdir(cwd)


def _work(config: dict[str, Any]) -> None:
    """One worker's part: its board is rank 0's alone."""
    from ray.train import get_context

    stand_in(config["cwd"])
    poster = Poster(config["board"] if get_context().get_world_rank() == 0 else None)
    config["work"](config["settings"], poster)
    poster.flush()


def _train(settings: dict[str, Any], poster: Poster) -> None:
    """One worker of a training: the loop, and its outcome on the board."""
    from ray.train.torch import get_device

    from jobs.training import train

    poster.post(outcome=train(settings["job"], settings["folder"], get_device(), poster))
