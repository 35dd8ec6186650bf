"""The search over quantum reservoirs: a pool of single ones, then onions of the best of them with a classical layer."""

import math

from library.errors import InputError
from library.qrc.reservoir import QuantumReservoir
from tune_spaces.space import Choice, Domain, Real, Whole

QUBITS = range(3, 7)
FIRST = (0.1, 0.3, 1.0)  # sigma of the configurations that are tried before any is drawn


def pool(most_qubits: int | None = None) -> dict[str, Domain]:
    """What a single reservoir varies in, within a number of qubits. Raises InputError when none is left.

    `size` is qubits:measured. sigma is of no effect where its layer has no angles, and feedback where none is fed back.
    """
    sizes = tuple(f"{n}:{m}" for n in QUBITS if most_qubits is None or n <= most_qubits for m in range(1, n))
    if not sizes:
        raise InputError(f"most_qubits {most_qubits}: a reservoir has at least {QUBITS[0]}")
    return {
        "mode": Choice(("persistent", "feedback", "both")),
        "kind": Choice(("su2", "ising")),
        "encoding": Choice(("pair", "rx_anc")),
        "size": Choice(sizes),
        "sigma": Real(0.03, 2.0, log=True),
        "feedback": Real(0.01, 3.0, log=True),
        "scale": Real(0.1, math.pi, log=True),
        "bias": Real(-math.pi, math.pi),
        "reps": Whole(1, 3),
        "seed": Whole(0, 7),
    }


def first_guesses(most_qubits: int | None = None) -> list[dict[str, str | int | float]]:
    """The members of the untuned onion, which begin the pool."""
    n = min(4, most_qubits or 4)
    common = {"mode": "persistent", "kind": "su2", "encoding": "pair", "size": f"{n}:1", "feedback": 1.0}
    return [common | {"sigma": s, "scale": 0.5, "bias": -0.31, "reps": 2, "seed": 0} for s in FIRST]


def reservoir(values: dict[str, str | int | float]) -> QuantumReservoir:
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


def unrefined(members: int) -> list[dict[str, str | int | float]]:
    """The chosen members as they are, without a layer and with the default one, which begin the refinement."""
    same: dict[str, str | int | float] = {}
    for number in range(members):
        same |= {f"{number}.sigma": 1.0, f"{number}.feedback": 1.0, f"{number}.scale": 1.0, f"{number}.bias": 0.0}
    layer = {"spectral_radius": 0.9, "leak": 0.3, "input_scale": 0.5, "wiring": "parallel"}
    return [same | {"units": units} | layer for units in (0, 30)]


def refined(members: list[QuantumReservoir], values: dict[str, str | int | float]) -> list[QuantumReservoir]:
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
