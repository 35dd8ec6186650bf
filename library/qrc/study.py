"""The experiments behind the results: nowcast, closed loop, known time scales, finite shots, all with their controls.

Every row says among how many configurations it was chosen. Choices are by validation; the median over a row's
candidates shows what a choice at random would have given.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from library.qrc.esn import THIRDS, EchoState
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir, Member
from library.qrc.nowcast import Curves, Nowcast
from library.qrc.pool import Part, features_of, fit_pool, joint_moments, parts_of
from library.qrc.reservoir import QuantumReservoir
from library.qrc.scores import scores
from library.qrc.selection import forward_selection
from library.qrc.shots import SampledReservoir
from library.qrc.tasks import multi_scale, narma10

SEEDS_APART = 1000
LAYER = 30  # units of a hybrid's classical layer
LOOP_LAYER = 20  # the same in the closed loop
RAW_ALPHA = 1e-6  # of the closed loop: absolute, on features as they are


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    nowcast: Nowcast = Nowcast()
    """The places and the condition of the nowcast."""
    curves: Curves = Curves()
    """The courses of the closed loop."""
    washout: NonNegativeInt = 300
    """Hours of a nowcast from which nothing is learned, nor measured."""
    qubits: int = Field(4, ge=3, le=6)
    """Qubits of every reservoir."""
    random_triples: PositiveInt = 36
    """Onions that are drawn at random from the pool."""
    steps: int = Field(6000, ge=200)
    """Length of the series with known time scales, and of NARMA-10."""
    shots: tuple[PositiveInt, ...] = Field((16384, 4096, 1024), min_length=1)
    """Shots per step of the sampled rows."""
    scales: tuple[float, ...] = Field((0.5, 1.5), min_length=1)
    """Input scales a of the sampled rows."""

    @property
    def width(self) -> int:
        """Features of one reservoir; an onion of three has three times as many."""
        return QuantumReservoir(qubits=self.qubits).width

    @property
    def networks(self) -> tuple[int, ...]:
        """Units of the echo state networks: a reservoir's features, the layer's, an onion's, a hybrid's; rising."""
        return tuple(sorted({self.width, LAYER, 3 * self.width, 3 * self.width + LAYER}))


@dataclass(frozen=True)
class Result:
    """Rows of a table, and the squared errors on the test (steps,) of its models by name."""

    rows: list[dict[str, Any]]
    squares: dict[str, Tensor]


class Bench:
    """Candidates on one task: their features once, then any combination of them as a ridge solve."""

    def __init__(self, parts: Mapping[str, Part], washout: int) -> None:
        self.parts, self.washout = parts, washout
        self.features: dict[str, list[Tensor]] = {name: [] for name in parts}
        self.rows: list[dict[str, Any]] = []
        self.squares: dict[str, Tensor] = {}

    def add(self, members: Sequence[Member]) -> list[int]:
        """Drive further candidates; their numbers."""
        first = len(self.features["train"])
        for name, values in features_of(members, self.parts).items():
            self.features[name] += values
        return list(range(first, first + len(members)))

    def add_features(self, features: Mapping[str, Tensor]) -> int:
        """A candidate whose features were made elsewhere."""
        for name, values in features.items():
            self.features[name].append(values)
        return len(self.features["train"]) - 1

    def joined(self, name: str, chosen: Sequence[int]) -> Tensor:
        """The features of some candidates side by side."""
        return torch.cat([self.features[name][number] for number in chosen], -1)

    def best(self, model: str, candidates: Sequence[Sequence[int]], *, budget: int | None = None) -> Sequence[int]:
        """Of some combinations that of the least validation error, as a row of the table named `model`.

        `budget` is among how many it was chosen where that is more than the combinations that are given.
        """
        sides = {name: [self.joined(name, chosen) for chosen in candidates] for name in self.parts}
        targets = (self.parts["train"].targets, self.parts["validation"].targets)
        fitted = fit_pool(sides["train"], sides["validation"], targets, washout=self.washout, test=sides["test"])
        wanted = self.parts["test"].targets[:, self.washout :]
        squares = [(each[:, self.washout :] - wanted).square() for each in fitted.predictions]
        errors = [float((each.mean() / wanted.var(correction=0)).sqrt()) for each in squares]
        place = int(fitted.errors.argmin())
        self.rows.append(
            {
                "model": model,
                "features": sides["train"][place].shape[-1],
                "budget": budget or len(candidates),
                "validation": float(fitted.errors[place]),
                "nrmse": errors[place],
                "median": float(torch.tensor(errors).median()),
            }
        )
        self.squares[model] = squares[place].flatten()
        return candidates[place]

    def greedy(self, pool: Sequence[int], most: int) -> list[int]:
        """The greedy choice among some candidates, from the moments of their features."""
        moments = {
            name: joint_moments([self.features[name][k] for k in pool], self.parts[name].targets, self.washout)
            for name in ("train", "validation")
        }
        whole, _, columns = moments["train"]
        return [pool[step.candidate] for step in forward_selection(whole, moments["validation"][1], columns, most=most)]

    def result(self) -> Result:
        """The table so far."""
        return Result(self.rows, self.squares)


def nowcast(study: Study, seed: int) -> Result:
    """The nowcast's table, of reservoirs whose angles depend on the seed."""
    bench = Bench(parts_of(study.nowcast), study.washout)
    linear = bench.add_features({name: part.inputs for name, part in bench.parts.items()})
    bench.best("linear, no memory", [[linear]])
    most = range(1, min(3, study.qubits - 1) + 1)
    settings = [
        {"kind": kind, "measured": measured, "scale": scale, "sigma": sigma}
        for kind, measured, scale, sigma in itertools.product(("su2", "ising"), most, (0.5, 1.5), (0.1, 0.3, 1.0))
    ]
    pool = _triples(bench, settings, study.qubits, seed)
    onion = _onion_rows(bench, pool, study.random_triples, seed)
    untuned = [
        QuantumReservoir(qubits=study.qubits, sigma=sigma, seed=SEEDS_APART * seed + 500 + k)
        for k, sigma in enumerate((0.1, 0.3, 1.0))
    ]
    bench.best("onion, untuned: sigma 0.1, 0.3, 1", [bench.add(untuned)])
    networks = {units: bench.best(f"ESN {units}", _networks(bench, units, seed)) for units in study.networks}
    onion_network = _networks(bench, 3 * study.width, seed, annuli=THIRDS, radii=(0.99, 0.8))
    bench.best(f"onion ESN {3 * study.width}", onion_network)
    budget = len(pool) * len(pool[0]) + 16
    bench.best(f"hybrid, parallel: greedy onion 3 + ESN {LAYER}", [[*onion, *networks[LAYER]]], budget=budget)
    bench.best(f"hybrid, stacked: greedy onion 3, ESN {LAYER} above", _stacked(bench, onion, seed), budget=budget)
    return bench.result()


def known_scales(study: Study, seed: int) -> Result:
    """The series whose target is a sum of three known averages, the product of two, and NARMA-10."""
    rows: list[dict[str, Any]] = []
    squares: dict[str, Tensor] = {}
    options = {"bias": -0.31, "encoding": "rx_anc"}
    settings = [
        {"kind": kind, "measured": measured, "scale": scale, "sigma": sigma} | options
        for kind, measured, scale, sigma in itertools.product(
            ("su2", "ising"), (1, 2), (0.5, 1.0), (0.15, 0.3, 0.5, 0.8, 1.2)
        )
        if measured < study.qubits
    ]
    tasks: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "sum of three averages": lambda: multi_scale(study.steps, seed=seed),
        "product of two averages": lambda: multi_scale(study.steps, product=True, seed=seed),
        "NARMA-10": lambda: narma10(study.steps, seed=seed),
    }
    made: dict[str, list[Tensor]] | None = None
    for task, series in tasks.items():
        signal, target = series()
        signal = signal * 2 if task == "NARMA-10" else signal  # its inputs are below 1/2
        bench = Bench(_cut(signal[..., None], target[..., None]), study.steps // 24)
        if task == "product of two averages" and made is not None:
            bench.features = made  # the same inputs as the sum's
            pool = [list(range(3 * k, 3 * k + 3)) for k in range(len(settings))]
        else:
            pool = _triples(bench, settings, study.qubits, seed)
            made = {name: list(values) for name, values in bench.features.items()}
        onion = _onion_rows(bench, pool, study.random_triples, seed)
        networks = {units: bench.best(f"ESN {units}", _networks(bench, units, seed)) for units in study.networks}
        budget = len(pool) * len(pool[0]) + 16
        bench.best(f"hybrid, parallel: greedy onion 3 + ESN {LAYER}", [[*onion, *networks[LAYER]]], budget=budget)
        rows += [{"task": task, **row} for row in bench.rows]
        squares |= {f"{task}: {model}": values for model, values in bench.squares.items()}
    return Result(rows, squares)


def closed_loop(study: Study, seed: int) -> Result:
    """Courses forecast from their beginning alone; nothing is chosen, so every budget is 1."""
    train, test = study.curves.series(seed)
    end = study.curves.primed + study.curves.horizon
    primed, wanted = test[:, : study.curves.primed], test[:, study.curves.primed : end]
    strengths = (0.1, 1.0, 2.0)
    own = {"mode": "feedback", "qubits": study.qubits}
    sizes = sorted({study.width, 3 * study.width, 3 * study.width + LOOP_LAYER})

    def members(values: Sequence[float]) -> tuple[QuantumReservoir, ...]:
        return tuple(QuantumReservoir(feedback=f, seed=SEEDS_APART * seed + k, **own) for k, f in enumerate(values))

    def network(units: int) -> EchoState:
        return EchoState(units=units, seed=seed)

    models: dict[str, HybridReservoir] = {
        "simple, feedback 1": HybridReservoir(members=members((1.0,))),
        "3 of equal feedback 1": HybridReservoir(members=members((1.0, 1.0, 1.0))),
        "onion, feedback 0.1, 1, 2": HybridReservoir(members=members(strengths)),
        **{f"ESN {units}": HybridReservoir(members=(network(units),)) for units in sizes},
        f"hybrid, onion + ESN {LOOP_LAYER}": HybridReservoir(members=members(strengths), layer=network(LOOP_LAYER)),
    }
    held = primed[:, -1:].expand_as(wanted)
    steps = torch.arange(1, study.curves.horizon + 1, dtype=torch.float64)
    slope = (primed[:, -1] - primed[:, -min(20, study.curves.primed)]) / (min(20, study.curves.primed) - 1)
    found = {"persistence": held, "linear extrapolation": held + slope[:, None] * steps[:, None]}
    features = {"persistence": 0, "linear extrapolation": 0}
    for name, reservoir in models.items():
        model = Forecaster(
            reservoir,
            alphas=(RAW_ALPHA / (len(train) * (study.curves.points - 1)),),
            washout=0,
            repeats=2,
            start="reset",
            scale=False,
            clip=(-1.0, 2.0),
            standardize=False,
        ).fit(train)
        found[name] = torch.from_numpy(model.forecast(primed, study.curves.horizon).mean)
        features[name] = reservoir.width
    rows = [
        {"model": name, "features": features[name], "budget": 1}
        | {"nrmse": scores(each, wanted)["nrmse"], "last_nrmse": scores(each[:, -1], wanted[:, -1])["nrmse"]}
        for name, each in found.items()
    ]
    return Result(rows, {name: (each - wanted).square().mean(2).flatten() for name, each in found.items()})


def finite_shots(study: Study, seed: int) -> Result:
    """The untuned onion's nowcast from sampled features, with and without the inputs shown to the read-out."""
    bench = Bench(parts_of(study.nowcast), study.washout)
    linear = bench.add_features({name: part.inputs for name, part in bench.parts.items()})
    bench.best("linear, no memory", [[linear]])
    for scale in study.scales:
        exact = [
            QuantumReservoir(qubits=study.qubits, sigma=sigma, scale=scale, seed=SEEDS_APART * seed + 500 + k)
            for k, sigma in enumerate((0.1, 0.3, 1.0))
        ]
        for shots in (None, *study.shots):
            members: Sequence[Member] = exact
            if shots is not None:
                members = [SampledReservoir(reservoir=each, shots=shots, seed=each.seed) for each in exact]
            numbers = bench.add(members)
            for skip in (False, True):
                model = f"a {scale:g}, {shots or 'exact'}{' + inputs' if skip else ''}"
                bench.best(model, [[*numbers, linear] if skip else numbers])
                bench.rows[-1] |= {"scale": scale, "shots": shots, "inputs": skip}
    return bench.result()


def _triples(bench: Bench, settings: Sequence[Mapping[str, Any]], qubits: int, seed: int) -> list[list[int]]:
    """Each setting with three seeds, driven: their numbers by setting."""
    members = [
        QuantumReservoir(qubits=qubits, seed=SEEDS_APART * seed + 3 * k + number, **setting)
        for k, setting in enumerate(settings)
        for number in range(3)
    ]
    numbers = bench.add(members)
    return [numbers[3 * k : 3 * k + 3] for k in range(len(settings))]


def _onion_rows(bench: Bench, pool: Sequence[Sequence[int]], triples: int, seed: int) -> list[int]:
    """Rows of single reservoirs, the equal-sigma control, random and greedy onions; the greedy one of three."""
    every = list(itertools.chain.from_iterable(pool))
    singles = [[number] for setting in pool for number in setting[:2]]
    bench.best("simple QRC", singles)
    bench.best("control: 3 of equal sigma, m, a", [list(setting) for setting in pool])
    generator = torch.Generator().manual_seed(seed)
    drawn = [[every[i] for i in torch.randperm(len(every), generator=generator)[:3]] for _ in range(triples)]
    bench.best("onion, random triples", drawn)
    chosen = bench.greedy(every, 4)
    bench.best("onion, greedy 3", [chosen[:3]], budget=len(every))
    bench.best("onion, greedy 4", [chosen[:4]], budget=len(every))
    return chosen[:3]


def _networks(
    bench: Bench,
    units: int,
    seed: int,
    *,
    annuli: tuple[tuple[float, float], ...] = (),
    radii: Sequence[float] = (0.7, 0.95),
) -> list[list[int]]:
    """Sixteen echo state networks, driven: two radii, leaks, input scales, and seeds."""
    members = [
        EchoState(
            units=units,
            spectral_radius=radius,
            leak=leak,
            input_scale=scale,
            annuli=annuli,
            seed=SEEDS_APART * seed + number,
        )
        for radius, leak, scale, number in itertools.product(radii, (0.1, 0.3), (0.25, 0.5), range(2))
    ]
    return [[number] for number in bench.add(members)]


def _stacked(bench: Bench, onion: Sequence[int], seed: int) -> list[list[int]]:
    """The onion with each of sixteen networks driven by its standardised features."""
    first = {name: bench.joined(name, onion) for name in bench.parts}
    rows = first["train"].flatten(0, 1)
    deviation = rows.std(0, correction=0)
    spread = torch.where(deviation > 1e-9, deviation, 1.0)
    above = {name: Part((values - rows.mean(0)) / spread, bench.parts[name].targets) for name, values in first.items()}
    layer = Bench(above, bench.washout)
    numbers = _networks(layer, LAYER, seed)
    return [
        [*onion, bench.add_features({name: layer.features[name][number] for name in bench.parts})]
        for [number] in numbers
    ]


def _cut(inputs: Tensor, targets: Tensor) -> dict[str, Part]:
    """One series in training, validation and test, at 60 and 77 % of its length."""
    ends = [0, int(0.6 * inputs.shape[1]), int(0.77 * inputs.shape[1]), inputs.shape[1]]
    return {
        name: Part(inputs[:, begin:end], targets[:, begin:end])
        for name, (begin, end) in zip(("train", "validation", "test"), itertools.pairwise(ends), strict=True)
    }
