"""The claims about Hessian spectra, each a rule over what the grid found, with its numbers filled in."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jobs.hessian_grid import Findings, Grid, basin_table, describe, estimate_table, network_table
from jobs.reproduce import Claim, mean_and_deviation, verdict
from library.hessian.basins import LINES
from library.hessian.report import FLAT

CLOSE = 0.25  # how much the k-th eigenvalue may move when only the size of the network changes
SAME_SHARE = 0.15  # how much the share of flat directions may move when only the data change
FLAT_BARRIER = 1e-3  # of the loss: a line that rises no more above its chord has no barrier
EXPLAINED = 0.15  # how far G's largest eigenvalues may lie from H's


def spectrum(grid: Grid, found: Findings) -> Claim:
    """E1: training leaves a bulk at zero and a few positive outliers."""
    starts, ends = (network_table(found.of([grid.base], moment)) for moment in ("start", "end"))
    ratio = [(-rows["smallest"] / rows["largest"]).tolist() for rows in (starts, ends)]
    holds = [
        after < before / 2 and share > 0.5 for before, after, share in zip(*ratio, ends["flat_share"], strict=True)
    ]
    table = pd.DataFrame(
        {
            "": ["before training", "after training"],
            "largest eigenvalue": [mean_and_deviation(rows["largest"]) for rows in (starts, ends)],
            "smallest": [mean_and_deviation(rows["smallest"]) for rows in (starts, ends)],
            "-smallest / largest": [mean_and_deviation(values) for values in ratio],
            "share of flat directions": [mean_and_deviation(rows["flat_share"], 2) for rows in (starts, ends)],
        }
    )
    return Claim(
        title="A. Training leaves a bulk at zero and a few positive outliers",
        paper="Negative eigenvalues shrink in training; at its end nearly all eigenvalues are close to zero and a few "
        "are large and positive; shown as figures.",
        measured=f"All eigenvalues of the Hessian for {describe(grid.base)}, at the random start and at loss "
        f"{grid.base.loss:g}. A seed counts as a success when -smallest/largest falls to less than half and more than "
        f"half of the eigenvalues end within {FLAT:g} of the largest.",
        verdict=verdict(holds, "seeds"),
        findings=[
            f"-smallest/largest falls from {mean_and_deviation(ratio[0])} to {mean_and_deviation(ratio[1])}.",
            f"{100 * ends['flat_share'].mean():.0f} % of the {ends['parameters'].iloc[0]:.0f} directions end flat.",
        ],
        tables={"Extreme eigenvalues": table},
        figure="hessian-spectrum",
    )


def _flatter(networks: pd.DataFrame) -> bool:
    """Whether the share of flat directions never falls from one network to the next larger one."""
    return networks.sort_values("parameters")["flat_share"].is_monotonic_increasing


def growth(grid: Grid, found: Findings) -> Claim:
    """E2: more parameters on the same data change the bulk only."""
    rows = network_table(found.of(grid.cells("growth")))
    by_seed = [part for _, part in rows.groupby("seed")]
    spans = [part["kth"].max() / part["kth"].min() - 1 for part in by_seed]
    holds = [
        part["outliers_by_gap"].nunique() == 1 and span <= CLOSE and _flatter(part)
        for part, span in zip(by_seed, spans, strict=True)
    ]
    table = pd.DataFrame(
        [
            {
                "hidden": hidden,
                "parameters": f"{part['parameters'].iloc[0]:.0f}",
                "outliers": mean_and_deviation(part["outliers_by_gap"], 1),
                "largest eigenvalue": mean_and_deviation(part["largest"]),
                f"eigenvalue {grid.base.classes}": mean_and_deviation(part["kth"]),
                "flat": mean_and_deviation(part["flat_share"], 2),
                "not flat": mean_and_deviation(part["steep"], 0),
            }
            for hidden, part in rows.groupby("hidden", sort=False)
        ]
    )
    growth_of = rows["parameters"].max() / rows["parameters"].min()
    return Claim(
        title="B. More parameters on the same data enlarge the bulk, and leave the outliers",
        paper="With the data fixed, a larger network adds eigenvalues to the bulk near zero; the large ones stay; "
        "shown as figures.",
        measured=f"The same points, one hidden layer of growing size, all trained to loss {grid.base.loss:g}. A seed "
        f"counts as a success when all sizes have equally many outliers, the k-th eigenvalue moves by at most "
        f"{100 * CLOSE:.0f} % between sizes, and the share of flat directions grows with every size.",
        verdict=verdict(holds, "seeds"),
        findings=[
            f"While the parameters grow {growth_of:.1f}-fold, eigenvalue {grid.base.classes} moves by "
            f"{mean_and_deviation([100 * span for span in spans], 0)} %.",
            f"Outliers seen: {_listed(rows['outliers_by_gap'])}.",
        ],
        tables={"By the size of the hidden layer": table},
        figure="hessian-growth",
    )


def classes(grid: Grid, found: Findings) -> Claim:
    """E3: about as many outliers as classes."""
    rows = network_table(found.of(grid.cells("classes")))
    rows["holds"] = (rows["outliers_by_gap"] == rows["classes"]) | (rows["outliers_by_gap"] == rows["classes"] - 1)
    kinds = {"gradient descent": rows["batch"] == 0, f"batches of {grid.batch}": rows["batch"] > 0}
    table = pd.DataFrame(
        [
            {
                "classes": k,
                **{name: mean_and_deviation(part[chosen]["outliers_by_gap"], 1) for name, chosen in kinds.items()},
                "ratio at the gap": mean_and_deviation(part["gap"], 1),
                "beyond the bulk of the density": mean_and_deviation(part["outliers_beyond_bulk"], 1),
                "above -2 x smallest": mean_and_deviation(part["outliers_above_negative"], 1),
            }
            for (k, part), kinds in (
                ((k, part), {name: chosen.loc[part.index] for name, chosen in kinds.items()})
                for k, part in rows.groupby("classes")
            )
        ]
    )
    findings = [
        f"{name}: {int(rows[chosen]['holds'].sum())} of {int(chosen.sum())} networks have k or k - 1 outliers."
        for name, chosen in kinds.items()
    ]
    return Claim(
        title="C. There are about as many outliers as classes",
        paper="For clusters of points the number of outliers is the number of clusters k, or k - 1, by the largest "
        "gap between consecutive eigenvalues, with gradient descent and with its stochastic form.",
        measured="The gap is taken on the logarithmic scale among the first 2k + 2 eigenvalues, since plain "
        "differences nearly always find it after the first. Two other rules stand beside it. Each network counts as a "
        "success when it has k or k - 1 outliers by the gap.",
        verdict=verdict(rows["holds"].tolist(), "networks"),
        findings=findings,
        tables={"Number of outliers": table},
        figure="hessian-classes",
    )


def separability(grid: Grid, found: Findings) -> Claim:
    """E4: harder data move the outliers, not the bulk."""
    rows = network_table(found.of(grid.cells("separability")))
    by_seed = [part.sort_values("spread") for _, part in rows.groupby("seed")]
    holds = [
        abs(part["kth"].iloc[-1] / part["kth"].iloc[0] - 1) > CLOSE
        and part["flat_share"].max() - part["flat_share"].min() <= SAME_SHARE
        for part in by_seed
    ]
    table = pd.DataFrame(
        [
            {
                "spread": f"{spread:g}",
                "outliers": mean_and_deviation(part["outliers_by_gap"], 1),
                "largest eigenvalue": mean_and_deviation(part["largest"]),
                f"eigenvalue {grid.base.classes}": mean_and_deviation(part["kth"]),
                "smallest": mean_and_deviation(part["smallest"]),
                "flat": mean_and_deviation(part["flat_share"], 2),
            }
            for spread, part in rows.groupby("spread")
        ]
    )
    moved, after = ([part[name].iloc[-1] / part[name].iloc[0] for part in by_seed] for name in ("kth", "next"))
    return Claim(
        title="D. Data that are harder to separate move the outliers, and leave the bulk",
        paper="With the network fixed, changing the data changes the large eigenvalues; the bulk stays; shown as "
        "figures.",
        measured=f"Clusters of growing spread, the same network, all trained to loss {grid.base.loss:g}. A seed counts "
        f"as a success when the k-th eigenvalue moves by more than {100 * CLOSE:.0f} % from the least to the greatest "
        f"spread while the share of flat directions stays within {100 * SAME_SHARE:.0f} points.",
        verdict=verdict(holds, "seeds"),
        findings=[
            f"Eigenvalue {grid.base.classes} at the greatest spread is {mean_and_deviation(moved, 2)} times that at "
            "the least.",
            f"Eigenvalue {grid.base.classes + 1}, the first below the gap, is {mean_and_deviation(after, 2)} times "
            "that at the least.",
            f"The share of flat directions lies between {rows['flat_share'].min():.2f} and "
            f"{rows['flat_share'].max():.2f}.",
        ],
        tables={"By the clusters' spread": table},
        figure="hessian-separability",
    )


def gauss_newton(grid: Grid, found: Findings) -> Claim:
    """E5: the Gauss-Newton part makes the outliers."""
    rows = network_table(found.of(grid.cells("gauss-newton")))
    holds = (rows["gauss_newton_excess"].abs() <= EXPLAINED).tolist()
    table = pd.DataFrame(
        [
            {
                "data": data,
                "hidden": hidden,
                "loss": mean_and_deviation(part["loss"]),
                "G above H, first k (%)": mean_and_deviation(100 * part["gauss_newton_excess"], 2),
                "‖H - G‖ / ‖H‖": mean_and_deviation(part["residual_share"]),
                "outliers": mean_and_deviation(part["outliers_by_gap"], 1),
            }
            for (data, hidden), part in rows.groupby(["data", "hidden"], sort=False)
        ]
    )
    images = rows[rows["data"] == "images"]
    findings = [
        f"On {data} G's first k eigenvalues lie {mean_and_deviation(100 * part['gauss_newton_excess'], 2)} % above "
        f"H's, and ‖H - G‖/‖H‖ is {mean_and_deviation(part['residual_share'])}."
        for data, part in rows.groupby("data", sort=False)
    ]
    if len(images):
        findings.append(
            f"On real images the top has no clean break at 10 classes: outliers seen are "
            f"{_listed(images['outliers_by_gap'])}; the spectrum falls off gradually."
        )
    return Claim(
        title="E. The outliers are those of the Gauss-Newton part",
        paper="H = G + R; where the residuals are small R is small, and the top of H is that of G; the covariance of "
        "the gradients shows the same edge.",
        measured=f"The largest k eigenvalues of H and of G at the end of training. A network counts as a success when "
        f"G's lie within {100 * EXPLAINED:.0f} % of H's on average. The covariance of the gradients is drawn in the "
        "figure; at a fit point it is much smaller than G, because its labels are the given ones.",
        verdict=verdict(holds, "networks"),
        findings=findings,
        tables={"At the end of training": table},
        figure="hessian-gauss-newton",
    )


def batches(grid: Grid, found: Findings) -> Claim:
    """E6: large and small batches lie in one basin."""
    rows = basin_table(found.basins)
    first, *others = LINES
    continued = rows[rows["line"] == first]
    table = pd.DataFrame(
        [
            {
                "line": line,
                "training loss at its ends": f"{mean_and_deviation(part['train_first'])} → "
                f"{mean_and_deviation(part['train_last'])}",
                "test loss": f"{mean_and_deviation(part['test_first'])} → {mean_and_deviation(part['test_last'])}",
                "barrier": mean_and_deviation(part["barrier"], 4),
                "monotone": f"{int(part['monotone'].sum())} of {len(part)}",
            }
            for line, part in rows.groupby("line", sort=False)
        ]
    )
    settings = grid.basins
    return Claim(
        title="F. Small batches go on from a large-batch solution without a barrier",
        paper="Training with large batches until the loss is flat and then with small ones lowers the loss further, "
        "and the straight line between the two solutions has no barrier (CIFAR-10); the usual pictures of separate "
        "basins compare two separate runs.",
        measured=f"{settings.images} real images (Fashion-MNIST), one hidden layer of {settings.hidden_units}; "
        f"{settings.large_steps} steps of {settings.large_batch}, then {settings.small_steps} steps of "
        f"{settings.small_batch}. A seed counts as a success when the loss falls further and the line rises at "
        f"most {FLAT_BARRIER:g} above its chord. The last weights of small-batch training fluctuate, so that the line "
        "to them need not be monotone.",
        verdict=verdict(
            ((continued["barrier"] <= FLAT_BARRIER) & (continued["train_last"] < continued["train_first"])).tolist(),
            "seeds",
        ),
        findings=[
            f"Barrier, {line}: {mean_and_deviation(rows[rows['line'] == line]['barrier'], 4)}."
            for line in (first, *others)
        ],
        tables={"Lines between the ends of the runs": table},
        figure="hessian-batches",
    )


def estimates(grid: Grid, found: Findings) -> Claim:
    """Densities of large networks: how near the estimates come, and what deflation gains."""
    rows = estimate_table(found.estimates)
    holds = (rows["deflated"] < rows["plain"]).tolist()
    table = pd.DataFrame(
        [
            {
                "probes": count,
                "Lanczos steps": steps,
                "plain (1e-3)": mean_and_deviation(1e3 * part["plain"], 2),
                "outliers taken out (1e-3)": mean_and_deviation(1e3 * part["deflated"], 2),
            }
            for (count, steps), part in rows.groupby(["probes", "steps"])
        ]
    )
    return Claim(
        title="G. Taking the outliers out first makes an estimated density better",
        paper="Not in the paper. Densities of large networks come from stochastic Lanczos quadrature (Ghorbani, "
        "Krishnan, Xiao, 2019), where an outlier's weight is random, with mean one over the number of parameters.",
        measured=f"Wasserstein-1 distance to the exact spectrum of {describe(grid.base)}, as a share of the largest "
        f"eigenvalue; the {grid.base.classes} largest eigenpairs are found by Lanczos and taken out. Each seed, number "
        "of probes and of steps counts as a success when the distance is smaller with them taken out.",
        verdict=verdict(holds, "estimates"),
        findings=[
            f"On average the distance is {rows['plain'].mean() / rows['deflated'].mean():.1f} times smaller.",
        ],
        tables={"Distance from the exact spectrum": table},
        figure="hessian-estimates",
    )


def headlines(grid: Grid, found: Findings) -> dict[str, float]:
    """The numbers of the report."""
    counted = network_table(found.of(grid.cells("classes")))
    counted = counted[counted["batch"] == 0]
    grown = network_table(found.of(grid.cells("growth"))).groupby("parameters")
    lines = basin_table(found.basins)
    return {
        "outliers_equal_classes": float((counted["outliers_by_gap"] == counted["classes"]).mean()),
        "flat_share_smallest": float(grown["flat_share"].mean().iloc[0]),
        "flat_share_largest": float(grown["flat_share"].mean().iloc[-1]),
        "kth_largest_over_smallest": float(grown["kth"].mean().iloc[-1] / grown["kth"].mean().iloc[0]),
        "barrier_of_continuation": float(lines[lines["line"] == next(iter(LINES))]["barrier"].mean()),
    }


def _listed(counts: "pd.Series") -> str:
    found, times = np.unique(counts.astype(int), return_counts=True)
    return _joined([f"{number} ({often} times)" for number, often in zip(found, times, strict=True)])


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
