"""Time quantum reservoirs against qiskit-aer, and classical ones against reservoirpy, on the same work in one run.

Aer runs the long circuit of a series, built before: exact with density matrices (measurements as dephasing, the
probabilities of each step saved), and with shots of state vectors. It gets its circuits as one job, and as many threads
as torch. What its user waits for counts; the part of it that is its simulator's own, without the conversion of circuits
and results, is shown beside it. Ours evolves 64 reservoirs at once; their exact features must agree with Aer's.

    python -m benchmarks.qrc [--steps N] [--shots N] [--threads N] [--repeat N] [--out FILE.json]

reservoirpy runs the same echo state networks one after the other, and fits its ridge once for each regularisation; ours
drives all in one batch, and solves all regularisations at once. States and predictions must agree.

qiskit-aer is a dependency of the project, and reservoirpy one of its tests: there is nothing else to install.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import median_seconds
from library.qrc.circuits import density_circuit, probability_features, series_circuit
from library.qrc.drive import drive_many
from library.qrc.esn import EchoState, drive_echo_states
from library.qrc.readout import ALPHAS, ridge_path
from library.qrc.reservoir import QuantumReservoir
from library.qrc.shots import SampledReservoir

BATCH = 64
UNITS, NETWORK_STEPS = 30, 1000  # of the echo state networks
GOALS = {"exact": 300.0, "shots": 10_000.0}


def batch(measured: int) -> list[QuantumReservoir]:
    """Reservoirs of four qubits, each with its own angles and scale of angles, driven by the same rotations."""
    sigmas = torch.logspace(-1.5, 0.3, BATCH).tolist()
    return [QuantumReservoir(measured=measured, sigma=sigma, seed=k) for k, sigma in enumerate(sigmas)]


def measure_aer(measured: int, options: argparse.Namespace) -> dict:
    """Seconds per step and reservoir of Aer and of this library, and the largest difference of exact features."""
    from qiskit_aer import AerSimulator

    parallel = {"max_parallel_threads": options.threads, "max_parallel_experiments": options.threads}
    reservoirs = batch(measured)
    inputs = torch.rand(options.steps, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = reservoirs[:: BATCH // 4]
    exact = AerSimulator(method="density_matrix", **parallel)
    circuits = [density_circuit(reservoir, inputs) for reservoir in few]
    data = exact.run(circuits, shots=1).result()
    ours, _ = drive_many(few, inputs[None])
    difference = max(
        float((probability_features(reservoir, data.data(k)) - ours[k][0]).abs().max())
        for k, reservoir in enumerate(few)
    )
    short = inputs[: options.shot_steps]
    sampled = AerSimulator(method="statevector", **parallel)
    shot_circuit = series_circuit(few[0], short)
    read = few[0].model_copy(update={"observed": "measured"})
    own = {
        kind: SampledReservoir(reservoir=read, shots=options.shots, sampling=kind)
        for kind in ("independent", "trajectory")
    }
    one = [reservoirs[0]]
    return {
        "measured": measured,
        "difference": difference,
        "aer kernel": sum(part.time_taken for part in data.results) / len(few) / len(inputs),
        "aer exact": median_seconds(lambda: exact.run(circuits, shots=1).result(), options.repeat)
        / len(few)
        / len(inputs),
        "aer shots": median_seconds(lambda: sampled.run(shot_circuit, shots=options.shots).result(), options.repeat)
        / len(short),
        "batch": median_seconds(lambda: drive_many(reservoirs, inputs[None]), options.repeat) / BATCH / len(inputs),
        "single precision": median_seconds(
            lambda: drive_many(reservoirs, inputs[None], dtype=torch.complex64), options.repeat
        )
        / BATCH
        / len(inputs),
        "alone": median_seconds(lambda: drive_many(one, inputs[None]), options.repeat) / len(inputs),
        "shots": median_seconds(lambda: own["independent"].drive(short[None]), options.repeat) / len(short),
        "trajectories": median_seconds(lambda: own["trajectory"].drive(short[None]), options.repeat) / len(short),
    }


def report_aer(rows: list[dict], options: argparse.Namespace, console: Console) -> dict[str, float]:
    """Print microseconds per step and reservoir, and ratios; the best of the measured settings for each goal."""
    table = Table(title=f"Microseconds per step and reservoir of 4 qubits, {options.threads} threads")
    for name in ("way", *(f"{row['measured']} measured" for row in rows)):
        table.add_column(name, justify="left" if name == "way" else "right")
    for label, name, peer in (
        ("Aer, exact", "aer exact", None),
        ("Aer, exact, its simulator's part", "aer kernel", None),
        (f"Aer, {options.shots} shots", "aer shots", None),
        (f"exact, {BATCH} at once", "batch", "aer exact"),
        (f"exact, {BATCH} at once, complex64", "single precision", "aer exact"),
        ("exact, one alone", "alone", "aer exact"),
        (f"{options.shots} shots per step, one alone", "shots", "aer shots"),
        (f"{options.shots} shots of one circuit, one alone", "trajectories", "aer shots"),
    ):
        cells = [f"{1e6 * row[name]:.2f}" + (f" ({row[peer] / row[name]:,.0f}x)" if peer else "") for row in rows]
        table.add_row(label, *cells)
    console.print(table)
    difference = max(row["difference"] for row in rows)
    console.print(f"exact features differ from Aer's by at most {difference:.1e}")
    ratios = {}
    for mode, goal in GOALS.items():
        each = {row["measured"]: row[f"aer {mode}"] / row["batch"] for row in rows}
        ratios[mode] = max(each.values())
        listed = ", ".join(f"{ratio:,.0f} with {m} measured" for m, ratio in each.items())
        console.print(f"{BATCH} exact reservoirs against Aer's {mode} mode: {listed} times faster (goal {goal:,.0f})")
    return ratios


def measure_reservoirpy(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of reservoirpy and of this library for the networks of a search, and largest differences."""
    from reservoirpy.nodes import Reservoir, Ridge

    networks = [EchoState(units=UNITS, spectral_radius=0.5 + 0.5 * k / BATCH, seed=k) for k in range(BATCH)]
    inputs = torch.rand(1, NETWORK_STEPS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = inputs[0, :, :1].roll(3, 0)
    drawn = [[part.numpy() for part in network.weights(2)] for network in networks]
    array = inputs[0].numpy()

    def theirs() -> list:
        return [Reservoir(W=w, Win=entry, bias=bias, lr=0.3).run(array) for w, entry, bias in drawn]

    ours, _ = drive_echo_states(networks, inputs)
    states = ours[0][0]
    array_states = states.numpy()

    def ridges() -> list:
        nodes = [Ridge(ridge=alpha * NETWORK_STEPS) for alpha in ALPHAS]
        return [node.fit(array_states, target.numpy()).run(array_states) for node in nodes]

    path = ridge_path(states, target, standardize=False)
    apart = max(float((torch.from_numpy(a) - b[0]).abs().max()) for a, b in zip(theirs(), ours, strict=True))
    fits = max(
        float((torch.from_numpy(a) - b).abs().max())
        for a, b in zip(ridges()[4:], path.predictions(states)[4:], strict=True)
    )
    return {
        "states difference": apart,
        "ridge difference": fits,
        "reservoirpy states": median_seconds(theirs, options.repeat),
        "states": median_seconds(lambda: drive_echo_states(networks, inputs), options.repeat),
        "reservoirpy ridge": median_seconds(ridges, options.repeat),
        "ridge": median_seconds(
            lambda: ridge_path(states, target, standardize=False).predictions(states), options.repeat
        ),
    }


def report_reservoirpy(found: dict[str, float], console: Console) -> dict[str, float]:
    """Print milliseconds and ratios."""
    ratios = {name: found[f"reservoirpy {name}"] / found[name] for name in ("states", "ridge")}
    work = {
        "states": f"{BATCH} echo state networks of {UNITS} units, {NETWORK_STEPS} steps",
        "ridge": f"ridge for {len(ALPHAS)} regularisations, {UNITS} features, {NETWORK_STEPS} steps",
    }
    for name, what in work.items():
        console.print(
            f"{what}: reservoirpy {1e3 * found[f'reservoirpy {name}']:.1f} ms, here {1e3 * found[name]:.1f} ms, "
            f"{ratios[name]:.1f} times faster; they differ by at most {found[f'{name} difference']:.1e}"
        )
    return ratios


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of the exact series")
    parser.add_argument("--shots", type=int, default=4096, help="shots where there are shots")
    parser.add_argument("--shot-steps", type=int, default=12, help="steps of the series with shots")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of Aer")
    parser.add_argument("--repeat", type=int, default=3, help="timings of each, whose median counts")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    rows = [measure_aer(measured, options) for measured in (1, 2)]
    ratios = report_aer(rows, options, console)
    networks = measure_reservoirpy(options)
    ratios |= report_reservoirpy(networks, console)
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(
            json.dumps({"machine": machine, "aer": rows, "reservoirpy": networks, "ratios": ratios}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
