"""Time SPE against its first formulation with the same weights, and its input against PyTorch Geometric's transform.

The peer of a step is `library.spe.plain`: the released code's way, graph by graph to Q, all graphs padded to the
largest one, messages along edges. Outputs must agree: in float64 they do to 1e-12; in float32, batch statistics of
eight layers amplify the rounding of either form. The configuration is the paper's for ZINC-12k: d = 37, 16 functions,
an outer network of 8 layers of width 128, batches of 128 molecules; with batch norm as released, and with layer norm.
The peer of the eigenpairs is `AddLaplacianEigenvectorPE`, which calls SciPy graph by graph and gives no eigenvalues.

    python benchmarks/spe.py [--graphs N] [--repeat N] [--threads N] [--out FILE.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE

from library.spe.batch import SpeBatch
from library.spe.data import load_graphs, spectra_of
from library.spe.network import GraphNetwork
from library.spe.plain import plain_forward
from library.spe.presets import PRESETS
from library.spe.recipe import SpeRecipe
from library.spe.settings import Backbone, Encoding

GOAL = 10.0


def network(norm: str) -> tuple[GraphNetwork, SpeRecipe]:
    """The paper's network for ZINC-12k, with one norm in all its parts, and its recipe."""
    settings = PRESETS["zinc-full"]
    encoding = Encoding(**settings["encoding"] | {"norm": norm})
    backbone = Backbone(**settings["backbone"] | {"norm": norm})
    recipe = SpeRecipe(encoding=encoding, backbone=backbone)
    torch.manual_seed(0)
    return recipe.model(), recipe


def seconds(call: Callable[[], object], repeat: int) -> float:
    """The median processor time of a call."""
    times = []
    for _ in range(repeat):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)


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
    for part in ("evaluation", "forward in training", "training step"):
        net.train(part != "evaluation")
        fast, plain = (lambda: net(batch)), (lambda: plain_forward(net, batch))
        with torch.no_grad():
            difference = float((fast() - plain()).abs().max())
        calls = (fast, plain)
        if part == "training step":
            calls = tuple(lambda forward=forward: stepped(net, batch, forward) for forward in calls)
        with torch.set_grad_enabled(part != "evaluation"):
            ours, peer = seconds(calls[0], repeat), seconds(calls[1], max(1, repeat // 2))
        rows.append({"norm": norm, "part": part, "ours": ours, "plain": peer, "difference": difference})
    return rows


def eigenpairs_times(graphs: int) -> tuple[float, float]:
    """Seconds for all eigenpairs of molecules at once, and for 8 eigenvectors of each by PyTorch Geometric."""
    data = load_graphs("zinc12k")
    chosen = data.graphs.select((data.graphs.sizes > 9).nonzero().flatten()[:graphs])
    encoding = Encoding(eigenpairs=37)
    ours = seconds(lambda: spectra_of(chosen, encoding), 1)
    transform = AddLaplacianEigenvectorPE(8, is_undirected=True)
    single = [chosen.select([place]) for place in range(graphs)]
    objects = [Data(edge_index=torch.cat([g.edges, g.edges.flip(0)], 1), num_nodes=g.num_nodes) for g in single]
    return ours, seconds(lambda: [transform(item) for item in objects], 1)


def report(rows: list[dict], spectra: tuple[float, float], graphs: int, console: Console) -> float:
    """Print seconds and ratios; the ratio of a training step with batch norm, the released configuration."""
    table = Table(title=f"{graphs} molecules, processor seconds")
    for name in ("norm", "", "SPE here", "first formulation", "times faster", "largest difference"):
        table.add_column(name, justify="left" if name in ("norm", "") else "right")
    for row in rows:
        ratio = row["plain"] / row["ours"]
        numbers = (f"{row['ours']:.2f}", f"{row['plain']:.2f}", f"{ratio:.1f}", f"{row['difference']:.1e}")
        table.add_row(row["norm"], row["part"], *numbers)
    console.print(table)
    console.print(
        f"eigenpairs of 1000 molecules: all in {spectra[0]:.2f} s; PyTorch Geometric's transform, 8 eigenvectors of "
        f"each without eigenvalues: {spectra[1]:.2f} s ({spectra[1] / spectra[0]:.1f} times as long)"
    )
    steps = [row for row in rows if row["part"] == "training step"]
    ratio = max(row["plain"] / row["ours"] for row in steps)
    console.print(f"a training step: up to {ratio:.1f} times faster with equal outputs (goal {GOAL:g})")
    return ratio


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
