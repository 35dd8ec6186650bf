"""The search over quantum reservoirs: a pool of single ones, then onions of the best of them with a classical layer."""

import math
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from library.errors import InputError
from library.qrc.reservoir import QuantumReservoir
from tune_spaces.space import Choice, Domain, Real, Whole

FEWEST_QUBITS, MOST_QUBITS = 2, 8
FIRST = (0.1, 0.3, 1.0)  # sigma of the configurations that are tried before any is drawn
Values = dict[str, str | int | float]


class PoolRanges(BaseModel, frozen=True, extra="forbid"):
    """What single reservoirs are drawn from: one of some values, or between a least and a greatest one."""

    mode: tuple[Literal["persistent", "feedback", "both"], ...] = Field(
        ("persistent", "feedback", "both"), min_length=1
    )
    """Where memory lives."""
    kind: tuple[Literal["su2", "ising"], ...] = Field(("su2", "ising"), min_length=1)
    """Fixed gates."""
    encoding: tuple[Literal["pair", "rx_anc"], ...] = Field(("pair", "rx_anc"), min_length=1)
    """How inputs rotate qubits."""
    qubits: tuple[int, ...] = Field((3, 4, 5), min_length=1)
    """Qubits, 2 to 8; with each further one a step takes up to eight times as long. Measured are 1 to all but one."""
    sigma: tuple[float, float] = (0.03, 2.0)
    """Scale of the fixed angles, uniform in its logarithm; of no effect where its layer has no angles."""
    feedback: tuple[float, float] = (0.01, 3.0)
    """Angle of the feedback, uniform in its logarithm; of no effect in mode persistent."""
    scale: tuple[float, float] = (0.1, math.pi)
    """a of the input angle a s + b, uniform in its logarithm."""
    bias: tuple[float, float] = (-math.pi, math.pi)
    """b of the input angle."""
    reps: tuple[int, int] = (1, 3)
    """Layers of the fixed gates."""
    seed: tuple[int, int] = (0, 7)
    """Seeds of the fixed angles."""

    @model_validator(mode="after")
    def _makes_reservoirs(self) -> "PoolRanges":
        wrong = [n for n in self.qubits if not FEWEST_QUBITS <= n <= MOST_QUBITS]
        if wrong:
            raise InputError(f"qubits {wrong[0]}: allowed are {FEWEST_QUBITS} to {MOST_QUBITS}")
        domains = self.domains()
        for edge in ("low", "high"):
            values = {name: getattr(domain, edge, domain.example) for name, domain in domains.items()}
            reservoir(values)
        return self

    def domains(self, most_qubits: int | None = None) -> dict[str, Domain]:
        """The same as a space, within a number of qubits. Raises InputError when none is left.

        `size` is qubits:measured.
        """
        sizes = [f"{n}:{m}" for n in sorted(set(self.qubits)) if n <= (most_qubits or n) for m in range(1, n)]
        if not sizes:
            raise InputError(f"most_qubits {most_qubits}: a reservoir has at least {min(self.qubits)}")
        logarithmic = {name: Real(*getattr(self, name), log=True) for name in ("sigma", "feedback", "scale")}
        return {
            "mode": Choice(self.mode),
            "kind": Choice(self.kind),
            "encoding": Choice(self.encoding),
            "size": Choice(tuple(sizes)),
            **logarithmic,
            "bias": Real(*self.bias),
            "reps": Whole(*self.reps),
            "seed": Whole(*self.seed),
        }

    def first_guesses(self, most_qubits: int | None = None) -> list[Values]:
        """Those members of the untuned onion that lie in the ranges; they begin the pool."""
        varies = self.domains(most_qubits)
        size = "4:1" if "4:1" in varies["size"].values else varies["size"].values[-1]
        common = {"mode": "persistent", "kind": "su2", "encoding": "pair", "size": size, "feedback": 1.0}
        guesses = [common | {"sigma": s, "scale": 0.5, "bias": -0.31, "reps": 2, "seed": 0} for s in FIRST]
        return [guess for guess in guesses if all(holds(varies[name], value) for name, value in guess.items())]


def holds(domain: Domain, value: str | int | float) -> bool:
    """Whether a value lies in a domain."""
    return value in domain.values if isinstance(domain, Choice) else domain.low <= value <= domain.high


def reservoir(values: Values) -> QuantumReservoir:
    """The reservoir of a point in the pool's space."""
    qubits, measured = map(int, str(values["size"]).split(":"))
    own = {name: value for name, value in values.items() if name != "size"}
    return QuantumReservoir(qubits=qubits, measured=None if own["mode"] == "feedback" else measured, **own)


def onion(members: int) -> dict[str, Domain]:
    """What is refined jointly of chosen members, as factors and shifts of what they are, and the classical layer."""
    angles: dict[str, Domain] = {}
    for number in range(members):
        angles |= {
            f"{number}.sigma": Real(0.5, 2.0, log=True),
            f"{number}.feedback": Real(0.5, 2.0, log=True),
            f"{number}.scale": Real(0.5, 2.0, log=True),
            f"{number}.bias": Real(-0.5, 0.5),
        }
    layer: dict[str, Domain] = {
        "units": Choice((0, 10, 30, 100)),
        "spectral_radius": Real(0.3, 1.1),
        "leak": Real(0.02, 1.0, log=True),
        "input_scale": Real(0.05, 1.0, log=True),
        "wiring": Choice(("parallel", "stacked")),
    }
    return angles | layer


def unrefined(members: int) -> list[Values]:
    """The chosen members as they are, without a layer and with the default one, which begin the refinement."""
    same: Values = {}
    for number in range(members):
        same |= {f"{number}.sigma": 1.0, f"{number}.feedback": 1.0, f"{number}.scale": 1.0, f"{number}.bias": 0.0}
    layer = {"spectral_radius": 0.9, "leak": 0.3, "input_scale": 0.5, "wiring": "parallel"}
    return [same | {"units": units} | layer for units in (0, 30)]


def refined(members: list[QuantumReservoir], values: Values) -> list[QuantumReservoir]:
    """The members of a point in the onion's space."""
    return [
        member.model_copy(
            update={
                "sigma": member.sigma * float(values[f"{number}.sigma"]),
                "feedback": member.feedback * float(values[f"{number}.feedback"]),
                "scale": member.scale * float(values[f"{number}.scale"]),
                "bias": member.bias + float(values[f"{number}.bias"]),
            }
        )
        for number, member in enumerate(members)
    ]
