"""All shots of one long circuit at once: state vectors that collapse with the outcomes that they draw.

Each shot carries the memory's state vector psi (2^r) and its last outcome. A step gives V psi with its columns V; an
outcome of the measured qubits is drawn from the squared amplitudes, the vector is projected on it and normalised, and
the reset qubits are dropped: exactly the law of the circuit run `shots` times.
"""

import torch
from torch import Tensor

from library.qrc import gates
from library.qrc.reservoir import QuantumReservoir
from library.qrc.steps import Steps


def start(reservoir: QuantumReservoir, series: int, shots: int) -> Tensor:
    """The state of all shots before the first input: float64 (series, shots * (2 * 2^r + 1)), all |0>, outcome 0.

    When expectations are fed back, their estimates z = 1/2 (series, measured) follow.
    """
    memory = 2**reservoir.memory_qubits
    vectors = torch.zeros(series, shots, memory, 2, dtype=torch.float64)
    vectors[:, :, 0, 0] = 1
    expectation = torch.full((series, _expectations(reservoir)), 0.5, dtype=torch.float64)
    return torch.cat([vectors.flatten(1), torch.zeros(series, shots, dtype=torch.float64), expectation], 1)


def evolve(
    reservoir: QuantumReservoir, inputs: Tensor, rows: Tensor, shots: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Estimated features (series, time, width) of the measured qubits, and the rows after."""
    series, time, channels = inputs.shape
    measured, reset = reservoir.measured_qubits, reservoir.reset_qubits
    full, memory = 2**reservoir.qubits, 2**reservoir.memory_qubits
    numbers = 2 * shots * memory
    vectors = torch.view_as_complex(rows[:, :numbers].reshape(series, shots, memory, 2).contiguous())
    last = rows[:, numbers : numbers + shots].long()
    expectation = rows[:, numbers + shots :]
    fed = reservoir.mode != "persistent"
    by_outcome = fed and reservoir.feedback_by == "outcome"
    steps = Steps(
        [reservoir], full if fed else memory, channels, device=inputs.device, dtype=torch.complex128, points=time
    )
    begin = torch.eye(full, dtype=torch.complex128, device=inputs.device)[:, :: full // memory]
    bits = (
        torch.arange(2**measured, device=inputs.device)[:, None] >> torch.arange(measured, device=inputs.device)
    ) & 1
    turned = gates.pair_rotations(begin, reservoir.feedback_pairs, reservoir.feedback * bits.double())
    parities = gates.parity_matrix(measured, range(measured)).to(inputs.device)
    rest = torch.arange(memory, device=inputs.device) & (2 ** (measured - reset) - 1)
    features = inputs.new_empty(series, time, reservoir.width)
    for step in range(time):
        columns = steps.block(inputs[:, step : step + 1])[0]  # (series, 2^n, 2^n or memory)
        if by_outcome:
            moved = (turned[last] @ vectors[..., None])[..., 0] @ columns.mT
        else:
            if fed:
                angles = reservoir.feedback * expectation
                columns = columns @ gates.pair_rotations(begin, reservoir.feedback_pairs, angles)
            moved = vectors @ columns.mT  # (series, shots, 2^n)
        moved = moved.unflatten(-1, (-1, 2**measured))
        outcome_share = moved.abs().square().sum(-2)
        last = torch.multinomial(outcome_share.flatten(0, 1), 1, generator=generator).reshape(series, shots)
        features[:, step] = parities[last].mean(1)
        expectation = bits[last].double().mean(1)[:, : expectation.shape[1]]
        vectors = _collapsed(moved.flatten(-2), last, rest, reset)
    after = [torch.view_as_real(vectors).flatten(1), last.double(), expectation]
    return features, torch.cat(after, 1)


def _collapsed(moved: Tensor, outcome: Tensor, rest: Tensor, reset: int) -> Tensor:
    """The memory after an outcome: amplitudes of its reset bits, zero where its other bits disagree, normalised."""
    split = moved.unflatten(-1, (len(rest), 2**reset))
    low = (outcome & (2**reset - 1))[..., None, None].expand(*outcome.shape, len(rest), 1)
    kept = split.gather(-1, low)[..., 0] * (rest == (outcome >> reset)[..., None])
    return kept / kept.norm(dim=-1, keepdim=True)


def _expectations(reservoir: QuantumReservoir) -> int:
    fed = reservoir.mode != "persistent" and reservoir.feedback_by == "expectation"
    return reservoir.measured_qubits if fed else 0
