"""The claims of FARMS measured again: `prism reproduce farms`. One Ray task per seed and experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, NonNegativeInt

from jobs.reproduce import Claim, Outcome, Reproduction, gather, mean_and_deviation, verdict
from library.drawing import blank, open_frame
from library.farms import study as experiments
from library.farms.study import ARMS, METHODS, Study, rank_correlation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "plain": "#8a8a8a",
    "FARMS": "#D55E00",
    "plain, least KS distance": "#0072B2",
    "uniform": "#009E73",
    "FARMS, shuffled": "#E69F00",
}
CLOSE = 0.1  # largest spread of FARMS' exponents over shapes that counts as no bias


class FarmsReproduction(Reproduction, frozen=True, extra="forbid"):
    """FARMS' claims at a laptop's scale."""

    job: ClassVar[str] = "reproduce-farms"
    method: ClassVar[str] = "farms"
    title: ClassVar[str] = "FARMS: fixed-aspect-ratio matrix subsampling"
    paper: ClassVar[str] = (
        "Hu, Goel, Killiakov, Yang, *Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias*, ICML 2025, "
        "arXiv 2506.06280"
    )

    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Seeds of the repetitions; means and deviations are over them."""
    study: Study = Study()
    """How large the experiments are."""

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """A run of seconds that goes through everything and shows nothing."""
        small = Study(
            window=16,
            ops=2,
            shapes=((32, 32), (64, 16)),
            matrices=4,
            rows=(24, 40),
            columns=(16, 24),
            widths=(32, 16),
            epochs=1,
            batch_size=512,
            calibration=64,
            epsilons=(0.1, 0.3),
        )
        return cls(**({"seeds": (0, 1), "study": small} | changes))

    def measure(self) -> Outcome:
        import pandas as pd
        import ray

        parts = {
            "shapes": experiments.shape_bias,
            "heaviness": experiments.planted_heaviness,
            "pruning": experiments.pruned_accuracy,
        }
        tasks = {
            f"{name}, seed {seed}": ray.remote(num_cpus=1)(part).remote(self.study, seed)
            for name, part in parts.items()
            for seed in self.seeds
        }
        found = gather(tasks, name=self.job)
        tables = {
            name: pd.DataFrame([row for seed in self.seeds for row in found[f"{name}, seed {seed}"]]) for name in parts
        }
        shapes, heaviness, pruning = tables.values()
        figures = {
            "farms": overview(shapes, heaviness),
            "farms-shapes": shapes_figure(shapes),
            "farms-heaviness": heaviness_figure(heaviness),
            "farms-pruning": pruning_figure(pruning),
        }
        return Outcome(
            metrics=headlines(shapes, heaviness, pruning),
            tables=tables,
            figures=figures,
            claims=[shapes_claim(shapes), heaviness_claim(heaviness), pruning_claim(pruning, self.study)],
            remarks=[
                f"Windows are {self.study.window} x {self.study.window}, {self.study.ops} per dimension; tails begin "
                "at the median unless said otherwise. The paper's gains for 7B and 13B language models are not "
                "measured here: `prism run farms-prune --model FOLDER` prunes such a model with either allocation."
            ],
        )


def spreads(shapes: "pd.DataFrame") -> "pd.DataFrame":
    """Largest minus least exponent over the shapes, per seed."""
    grouped = shapes.groupby("seed")[["plain", "FARMS"]]
    return grouped.max() - grouped.min()


def correlations(heaviness: "pd.DataFrame") -> "dict[str, list[float]]":
    """Spearman's correlation of planted heaviness and exponent, a value per seed, by method."""
    import torch

    seeds = heaviness["seed"].unique()
    by_seed = [heaviness[heaviness["seed"] == seed] for seed in seeds]
    return {
        name: [rank_correlation(*(torch.tensor(part[c].to_numpy()) for c in ("heaviness", name))) for part in by_seed]
        for name in METHODS
    }


def accuracies(pruning: "pd.DataFrame", pruner: str) -> "pd.DataFrame":
    """Test accuracy per seed (rows) and arm (columns)."""
    return pruning[pruning["pruner"] == pruner].pivot(index="seed", columns="arm", values="accuracy")


def headlines(shapes: "pd.DataFrame", heaviness: "pd.DataFrame", pruning: "pd.DataFrame") -> dict[str, float]:
    """One number per claim and arm."""
    import numpy as np

    found = {f"spread_{name}": float(value) for name, value in spreads(shapes).mean().items()}
    found |= {f"correlation_{name}": float(np.mean(values)) for name, values in correlations(heaviness).items()}
    for pruner in ("wanda", "magnitude"):
        found |= {f"accuracy_{pruner}_{arm}": float(v) for arm, v in accuracies(pruning, pruner).mean().items()}
    return found


def shapes_claim(shapes: "pd.DataFrame") -> Claim:
    """The bias of the shape is gone."""
    import pandas as pd

    spread = spreads(shapes)
    mean = shapes.groupby(["rows", "columns"], sort=False)
    rows = [
        {
            "shape": f"{size[0]} x {size[1]}",
            "plain": mean_and_deviation(part["plain"]),
            "law for that shape": f"{part['law'].iloc[0]:.3f}",
            "FARMS": mean_and_deviation(part["FARMS"]),
        }
        for size, part in mean
    ]
    off = (shapes["plain"] - shapes["law"]).abs().mean()
    return Claim(
        title="The bias of the layer's shape is gone",
        paper="The spectrum of an untrained matrix, and so its exponent, depends on its aspect ratio; windows of one "
        "aspect ratio take that away.",
        measured="Gaussian matrices of several shapes, whose exponents should all be alike.",
        verdict=verdict(list((spread["FARMS"] < CLOSE) & (spread["plain"] > 1)), "seeds"),
        findings=[
            f"Exponents differ between shapes by {mean_and_deviation(spread['plain'], 2)} for whole matrices and by "
            f"{mean_and_deviation(spread['FARMS'])} for windows (the rule: below {CLOSE:g} against above 1).",
            f"Whole matrices follow the law of Marchenko and Pastur, computed by quadrature, within {off:.2f} on "
            f"average; the square one's is 2.122.",
        ],
        tables={"Exponents of untrained matrices": pd.DataFrame(rows)},
        figure="farms-shapes",
    )


def heaviness_claim(heaviness: "pd.DataFrame") -> Claim:
    """The exponent orders layers of different shapes by their heaviness."""
    import pandas as pd

    found = correlations(heaviness)
    table = pd.DataFrame(
        [{"exponent": name, "rank correlation": mean_and_deviation(values, 2)} for name, values in found.items()]
    )
    better = [
        farms < min(rest)
        for farms, *rest in zip(found["FARMS"], *(v for k, v in found.items() if k != "FARMS"), strict=True)
    ]
    return Claim(
        title="Exponents of layers of different shapes can be compared",
        paper="With windows, exponents tell well trained from badly trained layers across shapes.",
        measured="Matrices of random shape in which a known share of heavy-tailed entries is planted. A heavier tail "
        "should have a smaller exponent: rank correlation -1 is perfect, 0 is none.",
        verdict=verdict(better, "seeds"),
        findings=[
            f"{name}: {mean_and_deviation(values, 2)} (seeds: {', '.join(f'{value:.2f}' for value in values)})."
            for name, values in found.items()
        ]
        + [
            "An outcome counts where FARMS' correlation is the strongest. The least KS distance is WeightWatcher's "
            "default rule. Planting is by heavy-tailed entries; where a power law is added to the singular values "
            "instead, no exponent is known to follow its strength, so this is no universal meter of quality."
        ],
        tables={"Correlation with the planted heaviness": table},
        figure="farms-heaviness",
    )


def pruning_claim(pruning: "pd.DataFrame", study: Study) -> Claim:
    """Windows repair part of what the bias breaks in pruning; beside uniform ratios, which need no exponents."""
    import pandas as pd

    rows, findings, repaired, known, kept = [], [], [], [], []
    for pruner in ("wanda", "magnitude"):
        table = accuracies(pruning, pruner)
        rows += [{"pruner": pruner, "ratios": arm, "accuracy": mean_and_deviation(table[arm])} for arm in ARMS]
        kept += [table[arm].mean() for arm in ARMS]
        repaired += list(table["FARMS"] > table["plain"])
        known += list(table["FARMS"] > table["FARMS, shuffled"])
        gains = {arm: table["FARMS"] - table[arm] for arm in ARMS if arm != "FARMS"}
        findings.append(
            f"{pruner}, FARMS minus "
            + "; minus ".join(
                f"{arm} {mean_and_deviation(100 * gain, 1)} points ({int((gain > 0).sum())} of {len(gain)} above 0)"
                for arm, gain in gains.items()
            )
            + "."
        )
    dense, images = pruning["dense"].mean(), int(pruning["images"].iloc[0])
    error = 100 * (0.25 / images) ** 0.5
    return Claim(
        title="Pruning ratios from windows instead of whole matrices",
        paper="With FARMS, layer-wise ratios prune language models to a lower perplexity than with plain exponents "
        "(LLaMA-7B at 80 %, SparseGPT: 79.42 instead of 96.02), and both better than uniform ratios.",
        measured=f"A fully connected network of widths {', '.join(map(str, study.widths))} on Fashion-MNIST (accuracy "
        f"{100 * dense:.1f} % before pruning), a ratio per layer, {100 * study.sparsity:g} % of all weights pruned, no "
        "training after it; epsilon chosen on validation images for both.",
        verdict=f"FARMS above plain: {verdict(repaired, 'cases')}; above the same exponents shuffled over the layers: "
        f"{verdict(known, 'cases')}",
        findings=[
            *findings,
            f"Accuracy is on {images} test images: its standard error is at most {error:.1f} points. Of the "
            f"{100 * dense:.1f} % before pruning the arms keep {100 * min(kept):.1f} to {100 * max(kept):.1f} %, on "
            "average over seeds.",
            "Shuffled is the control: FARMS' exponents given to the layers in a random order. It and the other "
            f"exponents choose among {len(study.epsilons)} epsilons on validation images, uniform has nothing to "
            "choose. What FARMS gains over plain is bias that is taken away; only what it gains over uniform and "
            "shuffled would be knowledge of the layers. The published gain over uniform is for language models of "
            "billions of weights and is not checked here.",
        ],
        tables={"Test accuracy after pruning": pd.DataFrame(rows)},
        figure="farms-pruning",
    )


def overview(shapes: "pd.DataFrame", heaviness: "pd.DataFrame") -> "Figure":
    """The picture of the method: exponents of untrained matrices by shape, and correlation with planted heaviness."""
    drawn = blank(9.6, 3.7)
    left, right = drawn.subplots(1, 2)
    _shapes(left, shapes)
    _correlations(right, correlations(heaviness))
    return drawn


def shapes_figure(shapes: "pd.DataFrame") -> "Figure":
    """Exponents over the aspect ratio, with the law's curve."""
    drawn = blank(7.2, 3.9)
    _shapes(drawn.subplots(), shapes)
    return drawn


def heaviness_figure(heaviness: "pd.DataFrame") -> "Figure":
    """Exponents over planted heaviness, a panel per method."""
    drawn = blank(9.6, 3.4)
    for axis, name in zip(drawn.subplots(1, len(METHODS), sharex=True), METHODS, strict=True):
        axis.plot(heaviness["heaviness"], heaviness[name], "o", ms=3, color=COLOURS[name])
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_xlabel("planted heaviness")
        open_frame(axis)
    drawn.axes[0].set_ylabel("exponent")
    return drawn


def pruning_figure(pruning: "pd.DataFrame") -> "Figure":
    """Test accuracy after pruning, a point per seed, lines join a seed's arms."""
    drawn = blank(8.4, 3.6)
    for axis, pruner in zip(drawn.subplots(1, 2, sharey=True), ("wanda", "magnitude"), strict=True):
        table = accuracies(pruning, pruner)[list(ARMS)]
        axis.plot(range(len(ARMS)), table.T.to_numpy(), color="0.8", lw=1)
        for place, arm in enumerate(ARMS):
            axis.plot([place] * len(table), table[arm], "o", color=COLOURS[arm])
        axis.set_xticks(range(len(ARMS)), [arm.replace(", ", "\n") for arm in ARMS])
        axis.set_title(pruner, loc="left", fontsize=10)
        open_frame(axis)
    drawn.axes[0].set_ylabel("test accuracy")
    return drawn


def _shapes(axis: "Axes", shapes: "pd.DataFrame") -> None:
    from library.spectral.marchenko_pastur import MarchenkoPastur

    ratio = shapes[["rows", "columns"]].max(axis=1) / shapes[["rows", "columns"]].min(axis=1)
    for name in ("plain", "FARMS"):
        axis.plot(ratio, shapes[name], "o", ms=4, color=COLOURS[name], label=name)
    curve = [1 + (ratio.max() - 1) * i / 60 for i in range(61)]
    law = [MarchenkoPastur(1 / value).hill_alpha() for value in curve]
    axis.plot(curve, law, color="0.4", lw=0.9, ls=":", label="law of Marchenko and Pastur")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("longer over shorter side")
    axis.set_ylabel("exponent of an untrained matrix")
    open_frame(axis)
    axis.legend(frameon=False)


def _correlations(axis: "Axes", found: Mapping[str, list[float]]) -> None:
    for place, (name, values) in enumerate(found.items()):
        axis.plot([place] * len(values), values, "o", color=COLOURS[name])
        axis.hlines(sum(values) / len(values), place - 0.2, place + 0.2, color=COLOURS[name], lw=2)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found])
    axis.set_ylim(-1.05, 0.6)
    axis.set_ylabel("rank correlation with planted heaviness")
    open_frame(axis)
