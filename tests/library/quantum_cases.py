"""Reservoirs of every structure that there is, and those of the golden files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.qrc.noise import Noise
from library.qrc.reservoir import QuantumReservoir

GOLDEN = Path(__file__).parents[1] / "golden" / "qrc"
NOISE = Noise(depolarizing_1=0.002, depolarizing_2=0.013, damping=0.02, readout=0.03)

LINEAR = {
    "pairs on a ring": {"qubits": 3},
    "line, two reset": {"qubits": 4, "measured": 2, "pairs": "line"},
    "one measured qubit not reset": {"qubits": 3, "kind": "ising", "measured": 2, "reset": 1},
    "inputs on measured qubits": {"qubits": 3, "encoding": "rx_anc", "measured": 2},
    "nothing measured": {"qubits": 2, "measured": 0},
    "nothing reset": {"qubits": 3, "measured": 2, "reset": 0, "observed": "measured"},
}
PERIODIC = {
    "every second step": {"qubits": 3, "period": 2},
    "every third step": {"qubits": 3, "period": 3, "measured": 2, "reset": 1},
}
EXPECTATION = {
    "feedback": {"qubits": 3, "mode": "feedback"},
    "both": {"qubits": 4, "mode": "both", "measured": 2},
    "both, one not reset": {"qubits": 3, "mode": "both", "measured": 2, "reset": 1},
}
OUTCOME = {
    "outcomes": {"qubits": 3, "mode": "feedback", "feedback_by": "outcome"},
    "both with outcomes": {"qubits": 4, "mode": "both", "measured": 3, "reset": 1, "feedback_by": "outcome"},
}
NOISY = {
    "noise": {"qubits": 3, "noise": NOISE},
    "noise, ising": {"qubits": 3, "kind": "ising", "measured": 2, "reset": 1, "noise": NOISE},
    "noise, feedback": {"qubits": 3, "mode": "feedback", "noise": NOISE},
    "noise, both": {"qubits": 3, "mode": "both", "observed": "measured", "noise": NOISE},
    "noise, period": {"qubits": 3, "encoding": "rx_anc", "measured": 2, "period": 2, "noise": NOISE},
}
IDEAL = LINEAR | PERIODIC | EXPECTATION | OUTCOME
ALL_SAMPLED = {k: v for k, v in LINEAR.items() if v.get("measured") != 0} | OUTCOME


def reservoir(settings: dict, **changes) -> QuantumReservoir:
    """A case with angles large enough to matter."""
    return QuantumReservoir(**{"sigma": 0.7, "scale": 1.0, "feedback": 1.7, "seed": 3} | settings | changes)


def series(*shape: int, seed: int = 0) -> Tensor:
    """Uniform inputs in (0, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden(name: str) -> dict[str, np.ndarray]:
    """A golden file's arrays."""
    return dict(np.load(GOLDEN / f"{name}.npz"))


def golden_reservoir(case: dict[str, np.ndarray], **changes) -> QuantumReservoir:
    """The reservoir of a golden file."""
    qubits, kind = int(case["n_qubits"]), str(case.get("kind", "su2"))
    drawn = case["phi"].ravel() if kind == "su2" else case["J"][np.triu_indices(qubits, 1)]
    settings = {
        "qubits": qubits,
        "kind": kind,
        "reps": int(case["reps"]),
        "angles": tuple(drawn.tolist()),
        "sigma": float(case["sigma"]),
        "scale": float(case["a"]),
        "bias": float(case["b"]),
        "field": float(case["h"][0]) if "h" in case else 1.0,
    }
    if "f_b" in case:
        return QuantumReservoir(**settings, mode="feedback", feedback=float(case["f_b"]))
    return QuantumReservoir(
        **settings
        | {
            "measured": len(case["measured"]),
            "reset": len(case["reset"]),
            "pairs": "ring" if len(case.get("pairs", ())) == qubits else "line",
        }
        | changes
    )
