"""How a search for reservoirs evaluates a batch: all configurations driven together, the poor ones stopped early.

The rungs of the halving are hours of the series, or numbers of seeds of the circuits' angles. What only decides who
goes on is computed in single precision; the last rung, which is reported, in double precision from the start.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from cluster import storage
from jobs.qrc_trials import Batch
from library.qrc.nowcast import Nowcast
from library.qrc.recipe import SEEDS_APART
from library.qrc.reservoir import QuantumReservoir
from tune_spaces.qrc import Values, refined, reservoir

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.qrc.hybrid import HybridReservoir
    from library.qrc.pool import Part

MEMORY_STEPS, MEMORY_DELAYS = 1500, 41


class Plan(BaseModel, frozen=True):
    """What the batches of a stage have in common.

    rungs       hours, or seeds, after which poor configurations are stopped; `whole` is the last of all
    reduction   at each rung the best of so many go on
    members     of the onion whose variants are tried; none are single reservoirs
    spared      configurations at the beginning of batch 0 that are never stopped
    shots       behind each feature; None gives exact expectation values. With shots the read-out sees the inputs too
    """

    nowcast: Nowcast
    halving: Literal["hours", "seeds"]
    rungs: tuple[int, ...]
    whole: int
    reduction: int
    washout: int
    members: tuple[QuantumReservoir, ...] = ()
    spared: int = 0
    shots: int | None = None
    gpu: bool = False

    def built(self, values: Values, seed: int = 0) -> "HybridReservoir":
        """The reservoir of a point in the stage's space; further seeds draw other angles and weights."""
        from library.qrc.hybrid import HybridReservoir
        from library.qrc.shots import SampledReservoir

        found = hybrid(self.members, values) if self.members else HybridReservoir(members=(reservoir(values),))
        apart = SEEDS_APART * seed
        members = [member.model_copy(update={"seed": member.seed + apart}) for member in found.members]
        if self.shots:
            members = [
                SampledReservoir(reservoir=member, shots=self.shots, seed=apart + number)
                for number, member in enumerate(members)
            ]
        layer = found.layer and found.layer.model_copy(update={"seed": seed})
        return found.model_copy(update={"members": tuple(members), "layer": layer})


def evaluate(batch: Batch, plan: Plan, seen: Mapping[int, Sequence[float]], features_at: str | None = None) -> Batch:
    """Evaluate a batch by successive halving: at each rung the best of all that came there go on.

    `seen` are the errors at the rungs of other batches. Features of those that came to the end are kept at
    `features_at`, with what is known of them as single reservoirs.
    """
    import torch

    from library.qrc.pool import Part, parts_of

    device = torch.device("cuda" if plan.gpu else "cpu")
    found = parts_of(plan.nowcast, ("train", "validation"))
    parts = {name: Part(part.inputs.to(device), part.targets.to(device)) for name, part in found.items()}
    alive = list(range(len(batch.trials)))
    sides: list[dict[str, Tensor]] = []
    for rung in [*plan.rungs, plan.whole]:
        began = time.process_time()
        hours, seeds = (rung, 1) if plan.halving == "hours" else (plan.nowcast.hours, rung)
        dtype = torch.complex128 if rung == plan.whole else torch.complex64
        errors = torch.zeros(len(alive), dtype=torch.float64)
        for seed in reversed(range(seeds)):
            built = [plan.built(batch.trials[i].values, seed) for i in alive]
            own, sides = measured(built, {name: part.first(hours) for name, part in parts.items()}, plan, dtype)
            errors += own / seeds
        for i, error in zip(alive, errors.tolist(), strict=True):
            batch.trials[i].errors[rung] = error
        batch.seconds[rung] = time.process_time() - began
        if rung < plan.whole:
            first = plan.spared if batch.number == 0 else 0
            going = halved(errors.tolist(), seen.get(rung, ()), plan.reduction)
            alive = [i for place, i in enumerate(alive) if place in going or i < first]
    if features_at is not None:
        from safetensors.torch import save

        kept = {}
        for i, each in zip(alive, sides, strict=True):
            batch.trials[i].about = about(reservoir(batch.trials[i].values), found["train"].inputs)
            kept |= {f"{i}.{name}": side.float().cpu().contiguous() for name, side in each.items()}
        storage.write_bytes(features_at, save(kept))
    batch.state = "finished"
    return batch


def halved(errors: Sequence[float], seen: Sequence[float], reduction: int) -> set[int]:
    """The places of those that go on: the best 1 / `reduction` of the batch that are so among all that were `seen` too.

    The least error goes on in any case. Late batches are better than early ones, so that without a share of the batch
    itself nearly all of a late one would go on.
    """
    every = sorted([*seen, *errors])
    limit = every[max(0, len(every) // reduction - 1)]
    ranked = sorted(range(len(errors)), key=errors.__getitem__)[: max(1, len(errors) // reduction)]
    return {ranked[0], *(place for place in ranked if errors[place] <= limit)}


def measured(
    built: "Sequence[HybridReservoir]", parts: "Mapping[str, Part]", plan: Plan, dtype: "torch.dtype"
) -> "tuple[Tensor, list[dict[str, Tensor]]]":
    """Validation NRMSE of each reservoir, and its features by part; the members of all are driven together."""
    import torch

    from library.qrc.hybrid import drive_members
    from library.qrc.pool import fit_pool

    inputs = torch.cat([part.inputs for part in parts.values()])
    cut = len(parts["train"].inputs)
    driven, _ = drive_members([member for each in built for member in each.members], inputs, dtype=dtype)
    features = []
    for each in built:
        first = torch.cat(driven[: len(each.members)], -1).double()
        del driven[: len(each.members)]
        joined = each.calibrated(first[:cut]).joined(inputs, first)
        features.append(torch.cat([joined, inputs], -1) if plan.shots else joined)
    targets = (parts["train"].targets, parts["validation"].targets)
    washout = min(plan.washout, inputs.shape[1] // 2)
    errors = fit_pool([f[:cut] for f in features], [f[cut:] for f in features], targets, washout=washout).errors
    return errors, [{"train": f[:cut], "validation": f[cut:]} for f in features]


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


def about(member: QuantumReservoir, inputs: "Tensor") -> dict[str, float]:
    """The longest time scale at the mean input, and memory of independent inputs."""
    from library.errors import InputError
    from library.qrc.channel import slowest_time_scale
    from library.qrc.tasks import memory_capacity, uniform_signal

    signal = uniform_signal(MEMORY_STEPS)
    features, _ = member.drive(signal[..., None])
    memory = memory_capacity(features[0], signal[0], delays=MEMORY_DELAYS)
    found = {"memory_capacity": memory.total, "mean_delay": memory.mean_delay}
    try:
        slowest = float(slowest_time_scale(member, inputs.flatten(0, 1).mean(0, keepdim=True))[0])
    except InputError:
        return found  # fed back, and without a fixed point
    return found | ({"tau": slowest} if slowest < float("inf") else {})
