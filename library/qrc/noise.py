"""How far a device is from the ideal circuit: the noise that a reservoir may be evaluated with."""

from pydantic import BaseModel, Field


class Noise(BaseModel, frozen=True, extra="forbid"):
    """Errors of one step. All of them shorten the reservoir's longest time scale.

    >>> Noise(depolarizing_2=0.01).readout
    0.0
    """

    depolarizing_1: float = Field(0.0, ge=0, le=1)
    """p of the depolarising channel rho -> (1 - p) rho + p I/2 after every gate of one qubit."""
    depolarizing_2: float = Field(0.0, ge=0, le=1)
    """p of the same channel of two qubits after every CX; an RZZ counts as CX RZ CX."""
    damping: float = Field(0.0, ge=0, le=1)
    """Decay |1> -> |0> of each qubit per step, 1 - exp(-t / T1) for a step that takes t, before the measurement."""
    readout: float = Field(0.0, ge=0, le=0.5)
    """Probability that a measured bit is reported flipped: scales <Z> by 1 - 2 readout, <ZZ> by its square."""
