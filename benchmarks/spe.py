"""Time SPE against its first formulation with the same weights, and its input against PyTorch Geometric's transform.

The peer of a step is `library.spe.plain`, the released code's way: graph by graph to Q, all graphs padded to the
largest one, messages along edges, PyTorch's batch norm. Outputs must agree: in float64 they do to 1e-12; in float32,
batch statistics of eight layers amplify the rounding of either form. The configuration is the paper's for ZINC-12k:
d = 37, 16 functions, an outer network of 8 layers of width 128, batches of 128 molecules; with batch norm as released,
and with layer norm. The released model's forward pass over such a batch was once timed at 34 s, on a core that others
used too; it is named beside the step here, and the peer of the same run is what to compare. The matrix products that
the fast form cannot do without are timed alone: no arrangement of it is faster than they are.

The peer of the eigenpairs is `AddLaplacianEigenvectorPE`, which calls SciPy graph by graph and gives no eigenvalues.

    python -m benchmarks.spe [--graphs N] [--repeat N] [--threads N] [--out FILE.json]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE

from benchmarks.timing import median_seconds
from library.spe.batch import SpeBatch
from library.spe.columns import CHUNK_VALUES
from library.spe.data import load_graphs, spectra_of
from library.spe.network import GraphNetwork
from library.spe.plain import plain_forward
from library.spe.presets import PRESETS
from library.spe.recipe import SpeRecipe
from library.spe.settings import Backbone, Encoding

RELEASED_FORWARD = 34.0  # seconds of the released model's forward pass, 128 molecules, one shared core
GOAL = 10.0  # times as fast as that a whole training step is to be
PARTS = {"evaluation": 1, "forward in training": 1, "training step": 3}  # and their matrix products in forward passes


def network(norm: str) -> tuple[GraphNetwork, SpeRecipe]:
    """The paper's network for ZINC-12k, with one norm in all its parts, and its recipe."""
    settings = PRESETS["zinc-full"]
    encoding = Encoding(**settings["encoding"] | {"norm": norm})
    backbone = Backbone(**settings["backbone"] | {"norm": norm})
    recipe = SpeRecipe(encoding=encoding, backbone=backbone)
    torch.manual_seed(0)
    return recipe.model(), recipe


def stepped(net: GraphNetwork, batch: SpeBatch, forward: Callable[[], Tensor]) -> None:
    """Forward and backward of the loss."""
    (forward() - batch.targets).abs().mean().backward()
    net.zero_grad()


def measure(norm: str, graphs: int, repeat: int) -> list[dict[str, float | str]]:
    """Seconds of evaluation and of a training step, fast and plain, and the largest difference of outputs."""
    net, recipe = network(norm)
    splits = recipe.datasets()
    batch = splits.collate([splits.train[i] for i in range(graphs)], torch.arange(graphs))
    rows = []
    for part in PARTS:
        net.train(part != "evaluation")
        fast, plain = (lambda: net(batch)), (lambda: plain_forward(net, batch))
        with torch.no_grad():
            difference = float((fast() - plain()).abs().max())
        calls = (fast, plain)
        if part == "training step":
            calls = tuple(lambda forward=forward: stepped(net, batch, forward) for forward in calls)
        with torch.set_grad_enabled(part != "evaluation"):
            ours, peer = processor_seconds(calls[0], repeat), processor_seconds(calls[1], max(1, repeat // 2))
        floor = PARTS[part] * products(net, batch, repeat)
        row = {"norm": norm, "part": part, "ours": ours, "plain": peer, "products": floor, "difference": difference}
        rows.append(row)
    return rows


def processor_seconds(call: Callable[[], object], repeat: int) -> float:
    """Processor time of a call that was just made once."""
    return median_seconds(call, repeat, warm=False, clock=time.process_time)


def products(net: GraphNetwork, batch: SpeBatch, repeat: int) -> float:
    """Processor seconds of the outer network's square products in one forward pass, and of nothing else.

    Every node pair of a graph is a row that each layer takes through two hidden layers; the first of them all is done
    by factors, and the last linear layers are parts of the next ones.
    """
    rows, width = int(batch.counts.square().sum()), net.encoder.rho.gin.last.in_features
    count = sum(len(layer.mlp.hidden) for layer in net.encoder.rho.gin.layers) - 1
    x, weight = torch.rand(CHUNK_VALUES // width, width), torch.rand(width, width)
    return count * rows / len(x) * processor_seconds(lambda: x @ weight, 10 * repeat)


def eigenpairs_times(graphs: int) -> tuple[float, float]:
    """Seconds for all eigenpairs of molecules at once, and for 8 eigenvectors of each by PyTorch Geometric."""
    data = load_graphs("zinc12k")
    chosen = data.graphs.select((data.graphs.sizes > 9).nonzero().flatten()[:graphs])
    encoding = Encoding(eigenpairs=37)
    ours = processor_seconds(lambda: spectra_of(chosen, encoding), 1)
    transform = AddLaplacianEigenvectorPE(8, is_undirected=True)
    single = [chosen.select([place]) for place in range(graphs)]
    objects = [Data(edge_index=torch.cat([g.edges, g.edges.flip(0)], 1), num_nodes=g.num_nodes) for g in single]
    return ours, processor_seconds(lambda: [transform(item) for item in objects], 1)


def report(rows: list[dict], spectra: tuple[float, float], graphs: int, console: Console) -> float:
    """Print seconds and ratios; the ratio of a training step with batch norm, the released configuration."""
    caption = "products: the matrix products of the outer network alone; difference: the largest of outputs"
    table = Table(title=f"SPE, {graphs} molecules, processor seconds", caption=caption)
    names = ("norm", "", "here", "first form", "faster", "products", "difference")
    for name in names:
        table.add_column(name, justify="left" if name in ("norm", "") else "right")
    for row in rows:
        seconds = [f"{row[name]:.2f}" for name in ("ours", "plain")]
        ratio, floor = f"{row['plain'] / row['ours']:.1f}", f"{row['products']:.2f}"
        table.add_row(row["norm"], row["part"], *seconds, ratio, floor, f"{row['difference']:.1e}")
    console.print(table)
    step = next(row for row in rows if row["part"] == "training step" and row["norm"] == "batch")
    if graphs == 128:
        console.print(
            f"the released model's forward pass: {RELEASED_FORWARD:g} s on a shared core; a whole training step here, "
            f"forward and backward: {step['ours']:.2f} s ({RELEASED_FORWARD / step['ours']:.1f} times faster, goal "
            f"{GOAL:g})"
        )
    console.print(
        f"eigenpairs of 1000 molecules: all in {spectra[0]:.2f} s; PyTorch Geometric's transform, 8 eigenvectors of "
        f"each without eigenvalues: {spectra[1]:.2f} s ({spectra[1] / spectra[0]:.1f} times as long)"
    )
    return step["plain"] / step["ours"]


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=128, help="molecules in the batch")
    parser.add_argument("--repeat", type=int, default=3, help="timings of each, whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for norm in ("batch", "layer") for row in measure(norm, options.graphs, options.repeat)]
    ratio = report(rows, eigenpairs_times(1000), options.graphs, Console())
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
