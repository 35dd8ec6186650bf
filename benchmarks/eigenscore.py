"""Times of the exact EigenScore and of EES against the published form of the score, all in one run.

`python -m benchmarks.eigenscore [--sizes 2048x20 5120x100] [--out FILE.json]`, sizes being d x K. The peer is
`regular_eigenscore` of the SeND code, rewritten from its formula: (1/K) log det(X^T J X + alpha I) with the d x d
centring matrix J = I - 1 1^T / d formed and multiplied.
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

from library.send.ees import MOMENTS, PROBES, choose_method, ees, regularised_degree
from library.send.eigenscore import ALPHA, eigenscore

SIZES = ("128x10", "2048x10", "2048x20", "5120x100", "5120x1000", "4096x2500")
SECONDS_PER_TIMING = 1.0


def official_eigenscore(embeddings: Tensor, alpha: float = ALPHA) -> Tensor:
    """The score of embeddings (K, d) through the d x d centring matrix."""
    answers, features = embeddings.shape
    columns = embeddings.T
    centring = torch.eye(features, dtype=columns.dtype) - torch.ones(features, features, dtype=columns.dtype) / features
    covariance = columns.T @ centring @ columns
    return torch.linalg.slogdet(covariance + alpha * torch.eye(answers, dtype=columns.dtype)).logabsdet / answers


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call after one that is not counted, over 3 to 50 repeats within about a second."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SECONDS_PER_TIMING and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(features: int, answers: int) -> dict[str, object]:
    """Seconds of each form for one prompt of Gaussian embeddings, and how far two of them differ."""
    embeddings = torch.randn(
        answers, features, dtype=torch.float64, generator=torch.Generator().manual_seed(features + answers)
    )
    calls: dict[str, Callable[[], object]] = {
        "official": lambda: official_eigenscore(embeddings),
        "exact": lambda: eigenscore(embeddings),
        "ees exact": lambda: ees(embeddings, method="exact"),
        "ees kpm": lambda: ees(embeddings, method="kpm"),
        "ees slq": lambda: ees(embeddings, kind="regularised", method="slq"),
    }
    paper, regularised = ees(embeddings, method="kpm"), ees(embeddings, kind="regularised", method="slq")
    return {
        "d": features,
        "K": answers,
        "seconds": {name: median_seconds(call) for name, call in calls.items()},
        "exact minus official": float(eigenscore(embeddings) - official_eigenscore(embeddings)),
        "kpm error": float(paper.value - ees(embeddings, method="exact").value),
        "kpm standard error": float(paper.standard_error),
        "slq error": float(regularised.value - ees(embeddings, kind="regularised", method="exact").value),
        "slq standard error": float(regularised.standard_error),
        "rule": choose_method(answers, features).reason,
    }


def report(rows: list[dict], console: Console) -> None:
    """Print milliseconds, ratios to the official form, and the rule's choice."""
    table = Table(title="One prompt: milliseconds (times faster than official)")
    for name in ("d", "K", "official", "exact", "EES exact", "EES kpm", "EES slq", "EES rule"):
        table.add_column(name, justify="right" if name != "EES rule" else "left")
    for row in rows:
        seconds = row["seconds"]
        cells = [
            f"{1e3 * seconds[name]:.2f} ({seconds['official'] / seconds[name]:.2f})"
            for name in ("exact", "ees exact", "ees kpm", "ees slq")
        ]
        rule = row["rule"].split(":")[0]
        table.add_row(str(row["d"]), str(row["K"]), f"{1e3 * seconds['official']:.2f}", *cells, rule)
    console.print(table)
    for row in rows:
        console.print(
            f"d = {row['d']}, K = {row['K']}: exact - official {row['exact minus official']:.1e}; "
            f"kpm - exact {row['kpm error']:.4f} +- {row['kpm standard error']:.4f}; "
            f"slq - exact {row['slq error']:.4f} +- {row['slq standard error']:.4f}"
        )


def main() -> None:
    """Parse the command line, measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="DxK", help="feature and answer counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the linear algebra")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(*map(int, size.split("x"))) for size in options.sizes]
    report(rows, Console())
    if options.out:
        settings = {"moments": MOMENTS, "probes": PROBES, "alpha": ALPHA, "degree": regularised_degree(ALPHA)}
        machine = {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
