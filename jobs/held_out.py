"""What a finished training run adds to its report: its artifact, measured on samples on which nothing was chosen."""

import os
from collections.abc import Callable
from typing import TypeVar

from cluster import registry, storage
from jobs.report import Report
from jobs.reproduce import gather
from jobs.workers import stand_in
from library.recipe import Recipe

TASK = "measuring the artifact on test samples"
R = TypeVar("R", bound=Recipe)
T = TypeVar("T")


def measured(report: Report, work: Callable[[str, R], T], recipe: R) -> T:
    """`work(artifact, recipe)` of the report's artifact, in a task of the cluster.

    Relative paths are this process's. Raises the work's own PrismError, or a PrismError that says what went wrong.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=2)(_in_folder)
    running = task.remote(work, str(report.artifact), recipe, os.getcwd())
    return gather({TASK: running}, name=report.job)[TASK]


def save_again(report: Report) -> None:
    """Write the report where the run wrote it, now that there is more in it. Nothing where that is no local folder."""
    if report.folder is not None and storage.is_local(report.folder):
        report.save(storage.local_path(report.folder))


def _in_folder(work: Callable[[str, R], T], artifact: str, recipe: R, cwd: str) -> T:
    stand_in(cwd)
    return work(str(registry.resolve(artifact)), recipe)
