"""Times of the all-layer traces, the frontier and the perturbations against what a user would do otherwise, in one run.

`python -m benchmarks.hawq [--images 64] [--probes 10] [--out FILE.json]`. The peer for traces is PyHessian's loop, one
layer trainable at a time, rewritten from its formula: a gradient graph and a Hessian-vector product per layer and
probe. The peer for the choice of bits is `scipy.optimize.milp` at each budget, as HAWQ-V3 solves one; that for
perturbations is a loop over bit numbers.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.timing import median_seconds
from library.hawq.analysis import BITS
from library.hawq.costs import BitChoice, size_costs
from library.hawq.curvature import quadratic_forms
from library.hawq.layers import fold_batch_norm, quantizable_layers
from library.hawq.pareto import frontier
from library.hawq.programme import select
from library.hawq.published import published
from library.hawq.quantizers import WeightQuantizer
from library.images import image_network, image_splits, load_images
from library.images.data import stacked

BUDGETS = 20  # budgets that the integer programme is solved for; the frontier answers all of them


def per_layer_traces(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], probes: int) -> dict[str, float]:
    """Hutchinson's trace of each layer, one layer trainable at a time."""
    generator = torch.Generator().manual_seed(0)
    layers, found = quantizable_layers(model), {}
    for name, layer in layers.items():
        model.requires_grad_(False)
        layer.weight.requires_grad_(True)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        [gradient] = torch.autograd.grad(loss, layer.weight, create_graph=True)
        total = 0.0
        for _ in range(probes):
            z = (2 * torch.randint(0, 2, gradient.shape, generator=generator) - 1).to(gradient)
            [product] = torch.autograd.grad(gradient, layer.weight, z, retain_graph=True)
            total += float((z * product).sum())
        found[name] = total / probes
    model.requires_grad_(True)
    return found


def trace_row(network: str, images: int, probes: int, repeats: int) -> dict[str, object]:
    """Seconds for the traces of every layer of a network with `probes` probes on `images` real images."""
    torch.manual_seed(0)
    model = image_network(network, 1, 10).eval()
    fold_batch_norm(model, torch.zeros(2, 1, 28, 28))
    splits = image_splits(load_images())
    batch = stacked(splits, splits.train, images)
    weights = [f"{name}.weight" for name in quantizable_layers(model)]
    options = {"seed": 0, "start": 0, "count": probes}

    def joint(curvature: str) -> Callable[[], object]:
        return lambda: quadratic_forms(model, F.cross_entropy, batch, weights, curvature=curvature, **options)

    loop = median_seconds(lambda: per_layer_traces(model, batch, probes), repeats)
    ours = {name: median_seconds(joint(name), repeats) for name in ("hessian", "ggn", "fisher")}
    return {"network": network, "layers": len(weights), "per-layer loop": loop, **ours}


def frontier_row(repeats: int) -> dict[str, object]:
    """Seconds for the frontier of ResNet50's 52 layers and 6 bit numbers, and for one integer programme per budget.

    Perturbations between the published ones at 4 and 8 bits follow 4^-b, the error of a uniform quantiser.
    """
    found = published("resnet50").sensitivity
    omega = (found.curvature * found.perturbation[:, 1])[:, None].numpy() * 4.0 ** (8 - np.array(BITS))
    cost = size_costs(found.layers.n_params, [BitChoice(b) for b in BITS])
    limits = np.linspace(cost[:, 0].sum(), cost[:, -1].sum(), BUDGETS)
    front = frontier(omega, cost)
    worst = max(
        abs(front.choose(limit).omega / select(omega, {"size": cost}, {"size": limit}).omega - 1) for limit in limits
    )
    programme = median_seconds(lambda: select(omega, {"size": cost}, {"size": float(limits[BUDGETS // 2])}), repeats)
    return {
        "points": len(front),
        "frontier": median_seconds(lambda: frontier(omega, cost), max(5, repeats)),
        "one programme": programme,
        "largest relative difference": worst,
    }


def perturbation_row(repeats: int) -> dict[str, object]:
    """Seconds for ||Q_b(W) - W||^2 of one weight of a million entries at six bit numbers, at once and one by one."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer()

    def one_by_one() -> list[float]:
        return [float((quantizer.quantize(weight, b).values() - weight).double().square().sum()) for b in BITS]

    at_once = median_seconds(lambda: quantizer.squared_errors(weight, BITS), repeats)
    return {"at once": at_once, "one by one": median_seconds(one_by_one, repeats)}


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["cnn8", "resnet20"], help="networks whose traces are timed")
    parser.add_argument("--images", type=int, default=64, help="images of the batch")
    parser.add_argument("--probes", type=int, default=10, help="random probes")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, of which the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    traces = [trace_row(name, options.images, options.probes, options.repeats) for name in options.networks]
    table = Table(title=f"Traces of all layers, {options.probes} probes, {options.images} images: s (times faster)")
    for name in traces[0]:
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in traces:
        loop = row["per-layer loop"]
        cells = [f"{row[name]:.2f} ({loop / row[name]:.1f})" for name in ("hessian", "ggn", "fisher")]
        table.add_row(row["network"], str(row["layers"]), f"{loop:.2f}", *cells)
    console.print(table)
    front, errors = frontier_row(options.repeats), perturbation_row(options.repeats)
    console.print(
        f"frontier of 52 layers x {len(BITS)} bit numbers: {1e3 * front['frontier']:.1f} ms for {front['points']} "
        f"exact points; one integer programme {1e3 * front['one programme']:.1f} ms for one "
        f"(Omega differs by at most {front['largest relative difference']:.1e})"
    )
    console.print(
        f"perturbations of 1 M weights at {len(BITS)} bit numbers: {1e3 * errors['at once']:.0f} ms at once, "
        f"{1e3 * errors['one by one']:.0f} ms one by one"
    )
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        content = {"machine": machine, "traces": traces, "frontier": front, "perturbations": errors}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
