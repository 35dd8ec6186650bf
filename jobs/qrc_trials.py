"""What a search for reservoirs remembers: batches of configurations, a file for each, drawn by Optuna.

A batch is one trial of Ray Tune. It is written down when it is drawn and again when it has ended, so that a search
that is killed does those batches again that were running, with the same configurations, and no other.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ValidationError

from cluster import storage
from library.errors import PrismError
from tune_spaces.qrc import Values
from tune_spaces.space import Domain

TRIES = 1000, 100  # draws of one batch, those that do not fit among them: some, and for each of its configurations


class Evaluated(BaseModel):
    """One configuration: what it is, and what it showed.

    errors   validation NRMSE by rung (hours of the series, or seeds); the last is that of the whole, unless it was
             stopped
    about    of those that came to the end: longest time scale, memory capacity, mean delay
    """

    values: Values
    errors: dict[int, float] = {}
    about: dict[str, float] = {}


class Batch(BaseModel):
    """Configurations that are evaluated together."""

    number: int
    state: Literal["running", "finished"] = "running"
    trials: list[Evaluated]
    seconds: dict[int, float] = {}
    """Processor time by rung."""


class Ledger:
    """The batches of one stage of a search, in memory and in its folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        names = sorted(name for name in storage.list(folder) if name.endswith(".json"))
        self.batches = [read_batch(folder, int(name.removesuffix(".json"))) for name in names]

    @property
    def trials(self) -> list[Evaluated]:
        """The configurations of all batches that have ended."""
        return [trial for batch in self.batches if batch.state == "finished" for trial in batch.trials]

    def add(self, batch: Batch) -> None:
        """Keep a batch that is new, in memory and in the folder."""
        self.batches.append(batch)
        write_batch(self.folder, batch)

    def reload(self, number: int) -> None:
        """Take a batch as the folder has it."""
        place = next(k for k, batch in enumerate(self.batches) if batch.number == number)
        self.batches[place] = read_batch(self.folder, number)


def read_batch(folder: str, number: int) -> Batch:
    """A batch as it is written down. Raises PrismError for one that is no record."""
    place = batch_place(folder, number, "json")
    try:
        return Batch.model_validate_json(storage.read_bytes(place))
    except ValidationError as error:
        raise PrismError(f"{place} is corrupt or foreign; remove it to run this batch again") from error


def write_batch(folder: str, batch: Batch) -> None:
    """Write a batch down."""
    storage.write_bytes(batch_place(folder, batch.number, "json"), batch.model_dump_json(indent=1).encode())


def batch_place(folder: str, number: int, kind: str) -> str:
    """Where a batch has its record (json) or its features (safetensors)."""
    return storage.join(folder, f"{number:05d}.{kind}")


def draw(
    varies: Mapping[str, Domain],
    ledger: Ledger,
    number: int,
    size: int,
    *,
    searcher: Literal["tpe", "random"],
    seed: int,
    whole: int,
    first: Sequence[Values] = (),
    shared: Sequence[str] = (),
    startup: int = 2,
    fits: Callable[[Values], bool] = lambda values: True,
) -> list[Values]:
    """The configurations of batch `number`: a function of the seed, the number, and the batches that have ended.

    All of a batch have the `shared` fields of its first one, so that they evolve together. `first` begin batch 0.
    `whole` is the last rung: what was stopped before counts as pruned. What does not `fits` is drawn
    again. With `tpe` all of a batch come from one posterior of Optuna's multivariate tree-structured Parzen estimator,
    the first `startup` batches from none; with `random` all do.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own = (seed * 1_000_003 + number) % 2**32
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=own)
    if searcher == "tpe":
        sampler = optuna.samplers.TPESampler(seed=own, multivariate=True, n_startup_trials=startup * size)
    study = optuna.create_study(sampler=sampler)
    distributions = {name: domain.distribution() for name, domain in varies.items()}
    states = optuna.trial.TrialState
    study.add_trials(
        optuna.trial.create_trial(
            state=states.COMPLETE if whole in trial.errors else states.PRUNED,
            params=trial.values,
            distributions=distributions,
            value=trial.errors.get(whole),
            intermediate_values=trial.errors,
        )
        for trial in ledger.trials
    )
    drawn = list(first) if number == 0 else []
    for _ in range(TRIES[0] + TRIES[1] * size):
        if len(drawn) >= size:
            return drawn[:size]
        if drawn and shared:
            fixed = {name: drawn[0][name] for name in shared}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.sampler = optuna.samplers.PartialFixedSampler(fixed, sampler)
        values = study.ask(distributions).params
        if fits(values):
            drawn.append(values)
    raise PrismError("next to no configuration keeps to the limits; allow more qubits or CX gates")
