"""Which searches there are: the space of each, and the job that it varies."""

from importlib import import_module
from typing import NamedTuple

from jobs.training import TrainingJob
from tune_spaces.space import Space


class SearchEntry(NamedTuple):
    """Where a search is found: the module with its `space(recipe)`, and the name of the job that it varies.

    A search that no single training job stands behind has a job of its `own`, named as in `jobs.JOBS`.
    """

    module: str
    job: str
    own: str | None = None

    def of(self, job: TrainingJob) -> Space:
        """The space for a job, whose ranges may depend on the recipe. Raises InputError for paths that do not fit."""
        space: Space = import_module(self.module).space(job.recipe)
        _check_paths(space, job)
        return space


SPACES: dict[str, SearchEntry] = {
    "send": SearchEntry("tune_spaces.send", "send"),
    "hawq": SearchEntry("tune_spaces.hawq", "hawq"),
    "farms": SearchEntry("tune_spaces.farms", "farms-balance"),
    "spe": SearchEntry("tune_spaces.spe", "spe"),
    "rqgnn": SearchEntry("tune_spaces.rqgnn", "rqgnn"),
    "diffspectra": SearchEntry("tune_spaces.diffspectra", "diffspectra"),
    "qrc": SearchEntry("tune_spaces.qrc", "qrc", own="jobs.qrc_search:QrcSearch"),
}


def _check_paths(space: Space, base: TrainingJob) -> None:
    """Raise InputError for a path that the job does not have."""
    from jobs.trial import changed

    examples = {path: domain.example for path, domain in space.varies.items()}
    changed(base, examples | dict(space.limit.reference if space.limit else {}))
    for settings in space.baselines.values():
        for values in settings:
            changed(base, values)
