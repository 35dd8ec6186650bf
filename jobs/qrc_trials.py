"""What a search for reservoirs evaluates and remembers: batches of configurations, a file for each, drawn by Optuna.

A batch is one Ray task. It is written down when it is drawn and again when it has ended, so that a search that is
killed does those batches again that were running, with the same configurations, and no other.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ValidationError

from cluster import storage
from library.errors import PrismError
from library.qrc.nowcast import Nowcast
from tune_spaces.qrc import refined, reservoir
from tune_spaces.space import Domain

if TYPE_CHECKING:
    from torch import Tensor

    from library.qrc.hybrid import HybridReservoir
    from library.qrc.reservoir import QuantumReservoir

Values = dict[str, str | int | float]
MEMORY_STEPS, MEMORY_DELAYS = 1500, 41
TRIES = 20_000  # draws of one batch, those that do not fit among them


class Evaluated(BaseModel):
    """One configuration: what it is, and what it showed.

    errors   validation NRMSE by hours of the series that it had seen; the last is that of the whole series, unless it
             was stopped
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
    seconds: float = 0.0


class Ledger:
    """The batches of one stage of a search, in memory and in its folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.batches: list[Batch] = []
        for name in sorted(storage.list(folder)):
            if name.endswith(".json"):
                place = storage.join(folder, name)
                try:
                    self.batches.append(Batch.model_validate_json(storage.read_bytes(place)))
                except ValidationError as error:
                    raise PrismError(f"{place} is corrupt or foreign; remove it to run this batch again") from error

    @property
    def trials(self) -> list[Evaluated]:
        """The configurations of all batches that have ended."""
        return [trial for batch in self.batches if batch.state == "finished" for trial in batch.trials]

    def write(self, batch: Batch) -> None:
        """Keep a batch that is new or has ended."""
        places = {known.number: place for place, known in enumerate(self.batches)}
        if batch.number in places:
            self.batches[places[batch.number]] = batch
        else:
            self.batches.append(batch)
        storage.write_bytes(self.place(batch.number, "json"), batch.model_dump_json(indent=1).encode())

    def place(self, number: int, kind: str) -> str:
        """Where a batch keeps its record (json) or its features (safetensors)."""
        return storage.join(self.folder, f"{number:05d}.{kind}")


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
    `whole` is the hours of the whole series: what was stopped before counts as pruned. What does not `fits` is drawn
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
    for _ in range(TRIES):
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


def evaluate_pool(
    batch: Batch,
    task: Nowcast,
    rungs: Sequence[int],
    seen: Mapping[int, Sequence[float]],
    reduction: int,
    washout: int,
    place: str,
) -> Batch:
    """Evaluate a batch of single reservoirs by successive halving over hours; features of the last are kept.

    At each of `rungs` those go on that are among the best 1 / `reduction` of all that came to it, `seen` before or
    here. Runs in a Ray task.
    """
    import time

    import torch
    from safetensors.torch import save

    from library.qrc.drive import drive_many
    from library.qrc.pool import fit_pool, parts_of

    began = time.monotonic()
    parts = parts_of(task, ("train", "validation"))
    inputs = torch.cat([part.inputs for part in parts.values()])
    cut = len(parts["train"].inputs)
    members = [reservoir(trial.values) for trial in batch.trials]
    alive, features, states = list(range(len(members))), [inputs[:, :0]] * len(members), None
    before = 0
    for hours in [*rungs, task.hours]:
        found, states = drive_many([members[i] for i in alive], inputs[:, before:hours], states)
        features = [torch.cat([old, new], 1) if before else new for old, new in zip(features, found, strict=True)]
        targets = tuple(parts[name].targets[:, :hours] for name in ("train", "validation"))
        halves = [[each[:cut] for each in features], [each[cut:] for each in features]]
        errors = fit_pool(*halves, targets, washout=min(washout, hours // 2)).errors.tolist()
        for i, error in zip(alive, errors, strict=True):
            batch.trials[i].errors[hours] = error
        if hours < task.hours:
            every = sorted([*seen.get(hours, ()), *errors])
            limit = max(every[max(0, len(every) // reduction - 1)], min(errors))
            kept = [k for k, error in enumerate(errors) if error <= limit]
            alive, features, states = ([each[k] for k in kept] for each in (alive, features, states))
        before = hours
    kept_features = {}
    for i, values in zip(alive, features, strict=True):
        batch.trials[i].about = _about(members[i], parts["train"].inputs)
        sides = {"train": values[:cut], "validation": values[cut:]}
        kept_features |= {f"{i}.{name}": side.float().contiguous() for name, side in sides.items()}
    storage.write_bytes(place, save(kept_features))
    batch.state, batch.seconds = "finished", time.monotonic() - began
    return batch


def evaluate_onions(batch: Batch, members: "Sequence[QuantumReservoir]", task: Nowcast, washout: int) -> Batch:
    """Evaluate a batch of variants of one onion, all reservoirs of all variants driven together. Runs in a Ray task."""
    import time

    import torch

    from library.qrc.drive import drive_many
    from library.qrc.pool import fit_pool, parts_of

    began = time.monotonic()
    parts = parts_of(task, ("train", "validation"))
    inputs = torch.cat([part.inputs for part in parts.values()])
    cut = len(parts["train"].inputs)
    hybrids = [hybrid(members, trial.values) for trial in batch.trials]
    driven, _ = drive_many([member for each in hybrids for member in each.members], inputs)
    features = []
    for number, each in enumerate(hybrids):
        first = torch.cat(driven[number * len(members) : (number + 1) * len(members)], -1)
        features.append(each.calibrated(first[:cut]).joined(inputs, first))
    targets = tuple(parts[name].targets for name in ("train", "validation"))
    errors = fit_pool([f[:cut] for f in features], [f[cut:] for f in features], targets, washout=washout).errors
    for trial, error in zip(batch.trials, errors.tolist(), strict=True):
        trial.errors[task.hours] = error
    batch.state, batch.seconds = "finished", time.monotonic() - began
    return batch


def hybrid(members: "Sequence[QuantumReservoir]", values: Values) -> "HybridReservoir":
    """The onion with its layer of a point in the onion's space."""
    from library.qrc.esn import EchoState
    from library.qrc.hybrid import HybridReservoir

    layer = None
    if values["units"]:
        names = ("units", "spectral_radius", "leak", "input_scale")
        layer = EchoState(**{name: values[name] for name in names})
    wiring = values["wiring"] if layer is not None else "parallel"
    return HybridReservoir(members=tuple(refined(list(members), values)), layer=layer, wiring=wiring)


def _about(member: "QuantumReservoir", inputs: "Tensor") -> dict[str, float]:
    """The longest time scale at the mean input, and memory of independent inputs."""
    from library.errors import InputError
    from library.qrc.channel import channel_spectrum
    from library.qrc.tasks import memory_capacity, uniform_signal

    signal = uniform_signal(MEMORY_STEPS)
    features, _ = member.drive(signal[..., None])
    memory = memory_capacity(features[0], signal[0], delays=MEMORY_DELAYS)
    found = {"memory_capacity": memory.total, "mean_delay": memory.mean_delay}
    try:
        slowest = float(channel_spectrum(member, inputs.flatten(0, 1).mean(0, keepdim=True)).slowest[0])
    except InputError:
        return found  # fed back, and without a fixed point
    return found | ({"tau": slowest} if slowest < float("inf") else {})
