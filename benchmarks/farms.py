"""Time FARMS against WeightWatcher on the same matrices, in one run.

WeightWatcher analyses the plain matrices with its defaults: the power-law fit of least KS distance over all thresholds.
The same rule here is the like-for-like comparison, and its exponents must agree; the median rule and FARMS' windows are
what a user of this project runs, and are shown beside it.

    python -m benchmarks.farms [--sizes 512x512 1024x256 ...] [--repeat N] [--threads N] [--out FILE.json]

WeightWatcher comes with the extra `bench`; `make bench` installs it.
"""

import argparse
import importlib.util
import json
import logging
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.timing import median_seconds
from library import farms

if TYPE_CHECKING:
    import pandas as pd

SIZES = ("512x512", "1024x256", "256x1024", "1024x1024", "2048x512", "2048x2048")
GOAL = 10.0


def layer(size: str, number: int) -> nn.Linear:
    """A linear layer of rows x columns: Gaussian, for an odd number with a power law added to its singular values."""
    rows, columns = map(int, size.split("x"))
    made = nn.Linear(columns, rows, bias=False)
    generator = torch.Generator().manual_seed(number)
    weight = torch.randn(rows, columns, generator=generator) / max(rows, columns) ** 0.5
    if number % 2:
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        weight = weight + u * torch.arange(1, min(rows, columns) + 1).pow(-0.7) @ v
    made.weight = nn.Parameter(weight)
    return made


def weightwatcher_table(net: nn.Module) -> "pd.DataFrame":
    """WeightWatcher's own table with its defaults."""
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    return weightwatcher.WeightWatcher(model=net).analyze()


def measure(sizes: list[str], repeat: int) -> list[dict]:
    """Seconds of each way for each size, and the exponents of the two that must agree."""
    rows = []
    for number, size in enumerate(sizes):
        net = nn.Sequential(layer(size, number))
        ours = farms.analyze(net, method="plain", rule="ks")
        theirs = weightwatcher_table(net)
        rows.append(
            {
                "size": size,
                "weightwatcher": median_seconds(lambda net=net: weightwatcher_table(net), repeat, warm=False),
                "plain ks": median_seconds(
                    lambda net=net: farms.analyze(net, method="plain", rule="ks"), repeat, warm=False
                ),
                "plain median": median_seconds(lambda net=net: farms.analyze(net, method="plain"), repeat, warm=False),
                "farms median": median_seconds(
                    lambda net=net: farms.analyze(net, window=256, ops=5), repeat, warm=False
                ),
                "alpha": float(ours["alpha"][0]),
                "alpha difference": abs(float(ours["alpha"][0]) - float(theirs["alpha"][0])),
            }
        )
    return rows


def report(rows: list[dict], console: Console) -> float:
    """Print seconds and ratios; the ratio of the sums like for like."""
    table = Table(title="Seconds (times faster than WeightWatcher)")
    for name in ("size", "WeightWatcher", "same fit", "plain, median", "FARMS 256, 5 x 5", "alpha", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        peer = row["weightwatcher"]
        ours = [f"{row[name]:.3f} ({peer / row[name]:.1f})" for name in ("plain ks", "plain median", "farms median")]
        table.add_row(row["size"], f"{peer:.3f}", *ours, f"{row['alpha']:.3f}", f"{row['alpha difference']:.1e}")
    console.print(table)
    ratio = sum(row["weightwatcher"] for row in rows) / sum(row["plain ks"] for row in rows)
    console.print(f"the same fit on all matrices: {ratio:.1f} times faster (goal {GOAL:g})")
    return ratio


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="RxC", help="rows and columns of the matrices")
    parser.add_argument("--repeat", type=int, default=3, help="timings of each, whose median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    if importlib.util.find_spec("weightwatcher") is None:
        print("WeightWatcher is not installed beside this project, there is nothing to compare with: nothing measured")
        return
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = measure(list(options.sizes), options.repeat)
    ratio = report(rows, Console())
    if options.out:
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
