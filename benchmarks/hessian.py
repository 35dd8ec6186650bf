"""Curvature of a 20-layer network: this project against PyHessian and curvlinops, all in one run on the same batch.

`python -m benchmarks.hessian [--probes 16] [--layers 20] [--out FILE.json]`; `pip install -e .[bench]` brings the
peers, and what is not installed is left out. Traces: the trace of every layer's diagonal block by Hutchinson's estimate
with the same number of probes. PyHessian and curvlinops know the trace of one set of parameters, so their users loop
over layers; here one product per probe serves all. Density: Lanczos runs of the whole network. Top: five eigenvalues.
Times are those of the processor in one thread.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import median_seconds
from library.spectral import Hessian, block_traces, extreme_eigenpairs, lanczos_quadrature

OURS, PYHESSIAN, CURVLINOPS = "prism", "PyHessian", "curvlinops"
TOP, DENSITY_STEPS, DENSITY_PROBES = 5, 30, 4


def network(kind: str, layers: int) -> nn.Sequential:
    """`layers` layers with weights: convolutions of 16 channels on 14 x 14 positions, or fully connected of 64."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    if kind == "convolutional":
        parts += [nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.ReLU()]
        for _ in range(layers - 2):
            parts += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU()]
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10, bias=False))
    parts += [nn.Flatten(), nn.Linear(784, 64, bias=False), nn.Tanh()]
    for _ in range(layers - 2):
        parts += [nn.Linear(64, 64, bias=False), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(64, 10, bias=False))


def our_traces(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> Tensor:
    """All layers' traces from one product per probe."""
    operator = Hessian(model, F.cross_entropy, (x, y))
    return block_traces(
        operator, operator.probes(probes, generator=torch.Generator().manual_seed(0)), operator.layout.sizes
    ).value


def pyhessian_traces(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> list[float]:
    """PyHessian once per layer, with the other layers frozen; it stops by its rule only after `probes` probes."""
    from pyhessian import hessian

    found = []
    parameters = list(model.parameters())
    for layer in parameters:
        for other in parameters:
            other.requires_grad_(other is layer)
        found.append(float(np.mean(hessian(model, F.cross_entropy, data=(x, y), cuda=False).trace(probes, tol=0))))
    for layer in parameters:
        layer.requires_grad_()
        layer.grad = None
    return found


def curvlinops_traces(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> list[float]:
    """curvlinops once per layer."""
    from curvlinops import HessianLinearOperator, hutchinson_trace

    data = [(x, y)]
    return [
        float(
            hutchinson_trace(
                HessianLinearOperator(
                    model, nn.CrossEntropyLoss(), [value], data, check_deterministic=False, progressbar=False
                ),
                probes,
            )
        )
        for value in model.parameters()
    ]


def tasks(probes: int) -> dict[str, dict[str, Callable[[nn.Module, Tensor, Tensor], object]]]:
    """What is timed, by task and tool."""

    def our_density(model: nn.Module, x: Tensor, y: Tensor) -> object:
        operator = Hessian(model, F.cross_entropy, (x, y))
        start = operator.probes(DENSITY_PROBES, generator=torch.Generator().manual_seed(0))
        return lanczos_quadrature(operator, start, DENSITY_STEPS)

    def our_top(model: nn.Module, x: Tensor, y: Tensor) -> object:
        operator, draw = Hessian(model, F.cross_entropy, (x, y)), torch.Generator().manual_seed(0)
        return extreme_eigenpairs(
            operator, operator.probes(TOP, generator=draw), largest=TOP, generator=draw, tolerance=1e-3
        )

    def peer(model: nn.Module, x: Tensor, y: Tensor) -> object:
        from pyhessian import hessian

        return hessian(model, F.cross_entropy, data=(x, y), cuda=False)

    found: dict[str, dict[str, Callable[[nn.Module, Tensor, Tensor], object]]] = {
        f"traces of all layers, {probes} probes": {OURS: lambda m, x, y: our_traces(m, x, y, probes)},
        f"density, {DENSITY_PROBES} x {DENSITY_STEPS} Lanczos steps": {OURS: our_density},
        f"top {TOP} eigenvalues, tolerance 1e-3": {OURS: our_top},
    }
    traces, density, top = found.values()
    if importlib.util.find_spec("pyhessian"):
        traces[PYHESSIAN] = lambda m, x, y: pyhessian_traces(m, x, y, probes)
        density[PYHESSIAN] = lambda m, x, y: peer(m, x, y).density(iter=DENSITY_STEPS, n_v=DENSITY_PROBES)
        top[PYHESSIAN] = lambda m, x, y: peer(m, x, y).eigenvalues(tol=1e-3, top_n=TOP)
    if importlib.util.find_spec("curvlinops"):
        traces[CURVLINOPS] = lambda m, x, y: curvlinops_traces(m, x, y, probes)
    return found


def main() -> None:
    """Measure, print the ratios, and write the numbers as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    draw = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(asked.samples, 1, 28, 28, generator=draw),
        torch.randint(10, (asked.samples,), generator=draw),
    )
    console, rows, faults = Console(), [], {}
    table = Table(title=f"{asked.layers} layers, {asked.samples} images, one thread: processor seconds (times ours)")
    for name in ("network", "task", OURS, PYHESSIAN, CURVLINOPS):
        table.add_column(name, justify="left" if name in ("network", "task") else "right")
    for kind in ("fully connected", "convolutional"):
        model = network(kind, asked.layers)
        for task, tools in tasks(asked.probes).items():
            took: dict[str, float] = {}
            for tool, call in tools.items():
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        took[tool] = median_seconds(partial(call, model, x, y), asked.repeats, clock=time.process_time)
                except RuntimeError as error:
                    if tool == OURS:
                        raise
                    faults[tool] = str(error).splitlines()[0]
            rows.append({"network": kind, "task": task, "seconds": took})
            shown = {tool: f"{took[tool]:.2f} ({took[tool] / took[OURS]:.1f}x)" for tool in took}
            cells = [shown.get(tool, "fails" if tool in tools else "-") for tool in (PYHESSIAN, CURVLINOPS)]
            table.add_row(kind, task, f"{took[OURS]:.2f}", *cells)
    console.print(table)
    for tool, fault in faults.items():
        console.print(f"{tool} with torch {torch.__version__}: {fault}", highlight=False)
    if asked.out is not None:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.processor()}
        asked.out.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
