"""What HAWQ-V2's reproduction says: each claim's rule, applied to the table that was measured."""

from typing import TYPE_CHECKING

from jobs.reproduce import Claim, mean_and_deviation, verdict
from library.hawq.recipe import HawqRecipe
from library.hawq.study import FIRST, INVERSE, METHOD, PLAIN, RANDOM, UNIFORM, Study
from library.hawq.validity import TRUSTED

if TYPE_CHECKING:
    import pandas as pd

RANKED = (METHOD, FIRST, PLAIN, INVERSE)
CHOSEN = (METHOD, FIRST, PLAIN, UNIFORM, INVERSE, RANDOM)


def ranking(ranks: "pd.DataFrame", study: Study) -> Claim:
    """Does the metric rank settings of equal size by their true loss?"""
    import pandas as pd

    value = ranks.pivot_table(index=["mean_bits", "seed"], columns="metric", values="spearman")
    first = value.loc[study.mean_bits[0]]
    table = pd.DataFrame(
        {
            "metric": metric,
            **{f"{mean:g} bits": mean_and_deviation(value.loc[mean, metric]) for mean in study.mean_bits},
        }
        for metric in RANKED
    )
    better = first[METHOD] > first[[FIRST, PLAIN]].max(axis=1)
    ordered = [first[metric].mean() for metric in RANKED]
    return Claim(
        title="A. Omega ranks settings of one size by their loss better than other metrics do",
        paper=(
            "The average trace times the squared perturbation is argued from the second-order change of the loss, and "
            "drawn against model size; no rank correlation is published."
        ),
        measured=(
            f"{study.random_settings} random settings of the same size (within {100 * study.tolerance:g} %) per seed, "
            f"evaluated on test images without fine-tuning. Spearman's correlation between each metric and the true "
            f"loss. A seed is a success when Omega's is above both the top eigenvalue's and the unweighted error's, at "
            f"{study.mean_bits[0]:g} bits per weight."
        ),
        verdict=verdict(list(better), "seeds"),
        findings=[
            f"{study.mean_bits[0]:g} bits, means over seeds: " + "; ".join(
                f"{metric} {mean:.2f}" for metric, mean in zip(RANKED, ordered, strict=True)
            ) + ".",
            f"Omega ranks better than HAWQ-V1's metric in {int((first[METHOD] > first[FIRST]).sum())} of {len(first)} "
            f"seeds, better than the unweighted error in {int((first[METHOD] > first[PLAIN]).sum())}, and better than "
            f"the inverse trace in {int((first[METHOD] > first[INVERSE]).sum())}.",
        ],
        tables={"Spearman's correlation with the true loss": table},
        figure="hawq",
    )  # fmt: skip


def choosing(settings: "pd.DataFrame", study: Study) -> Claim:
    """Does the setting with the least Omega have the least loss?"""
    import pandas as pd

    tables = {}
    for mean in study.mean_bits:
        rows = []
        for choice in CHOSEN:
            own = settings[(settings["mean_bits"] == mean) & (settings["choice"] == choice)]
            if len(own):
                row = {
                    "choice": choice,
                    "bits (first seed)": own["bits"].iloc[0],
                    "test accuracy": mean_and_deviation(own["accuracy"]),
                    "test loss": mean_and_deviation(own["loss"]),
                }
                if mean == study.mean_bits[0]:
                    tuned = own["tuned_accuracy"].dropna()
                    row["accuracy after fine-tuning"] = mean_and_deviation(tuned) if len(tuned) else ""
                rows.append(row)
        tables[f"{mean:g} bits per weight"] = pd.DataFrame(rows)
    first = settings[settings["mean_bits"] == study.mean_bits[0]]
    loss = first.pivot_table(index="seed", columns="choice", values="loss")
    accuracy = first.pivot_table(index="seed", columns="choice", values="accuracy")
    tuned = first.pivot_table(index="seed", columns="choice", values="tuned_accuracy")
    rivals = [choice for choice in (FIRST, UNIFORM) if choice in loss]
    compared = "HAWQ-V2, HAWQ-V1 and uniform bits" if UNIFORM in rivals else "HAWQ-V2 and HAWQ-V1"
    spread = tuned[[METHOD, *rivals]].mean()
    others = {
        mean: settings[settings["mean_bits"] == mean].pivot_table(index="seed", columns="choice", values="loss")
        for mean in study.mean_bits[1:]
    }
    return Claim(
        title="B. At equal size the bits with the least Omega lose least",
        paper=(
            "ResNet50 on ImageNet, 2-bit mixed precision: 75.76 % at 7.99 MB with HAWQ-V2, 75.48 % at 7.96 MB with "
            "HAWQ, and 75.30 % at 9.17 MB with 3 bits everywhere (PACT), all after fine-tuning."
        ),
        measured=(
            f"Each choice fills the same size budget; accuracy and cross-entropy are of all test images, once before "
            f"and once after {study.finetune_steps} steps of quantisation-aware fine-tuning. A seed is a success when "
            f"HAWQ-V2's loss before fine-tuning is the least of {compared}, at {study.mean_bits[0]:g} bits."
        ),
        verdict=verdict(list(loss[METHOD] < loss[rivals].min(axis=1)), "seeds"),
        findings=[
            *(
                f"Loss before fine-tuning, HAWQ-V2 minus {rival}: {mean_and_deviation(loss[METHOD] - loss[rival])}, "
                f"lower in {int((loss[METHOD] < loss[rival]).sum())} of {len(loss)} seeds; accuracy "
                f"{mean_and_deviation(100 * (accuracy[METHOD] - accuracy[rival]), 1)} points."
                for rival in rivals
            ),
            *(
                f"At {mean:g} bits the loss is lower than HAWQ-V1's in {int((found[METHOD] < found[FIRST]).sum())} of "
                f"{len(found)} seeds, by {mean_and_deviation(found[FIRST] - found[METHOD])}."
                for mean, found in others.items()
            ),
            f"The inverse trace is {mean_and_deviation(100 * (accuracy[METHOD] - accuracy[INVERSE]), 1)} points below "
            f"HAWQ-V2, random settings {mean_and_deviation(100 * (accuracy[METHOD] - accuracy[RANDOM]), 1)}.",
            f"After fine-tuning the {'three' if UNIFORM in rivals else 'two'} differ by "
            f"{100 * (spread.max() - spread.min()):.1f} points on average. A single seed may order them otherwise.",
        ],
        tables=tables,
        figure="hawq",
    )


def limits(checks: "pd.DataFrame", traces: "pd.DataFrame", recipe: HawqRecipe) -> Claim:
    """Is half of Omega the change of the loss?"""
    import pandas as pd

    table = pd.DataFrame(
        {
            "mean bits": f"{mean:g}",
            "choice": choice,
            "true change": mean_and_deviation(rows["true"]),
            "Omega / 2": mean_and_deviation(rows["predicted"]),
            "exact quadratic term": mean_and_deviation(rows["quadratic"]),
            "slope term": mean_and_deviation(rows["linear"]),
        }
        for (mean, choice), rows in checks.groupby(["mean_bits", "choice"], sort=False)
    )
    ratio = checks["true"] / checks["predicted"]
    within = (ratio >= TRUSTED[0]) & (ratio <= TRUSTED[1])
    apart = float((checks["predicted"] / checks["quadratic"]).median())

    def share(part: str) -> float:
        return 100 * float((checks[part] / checks["true"]).median())

    negative = traces[traces["mean_trace"] <= 0]
    probe, data = (float((traces[n] / traces["mean_trace"].abs()).median()) for n in ("probe_error", "data_error"))
    return Claim(
        title="C. Half of Omega predicts the change of the loss",
        paper=(
            "The model assumes a minimum (no slope), and errors that spread evenly over the eigenvectors of a layer's "
            "Hessian. Neither is tested in the paper."
        ),
        measured=(
            f"On the {recipe.probe_images} images of the traces: the true change of the mean loss when weights are "
            f"quantised, Omega / 2, the exact dW' H dW / 2 over all layers together, and the slope term g' dW that a "
            f"minimum would not have. A comparison is a success when true over predicted lies within {TRUSTED[0]:g} "
            f"to {TRUSTED[1]:g}, the range outside which the validity check of this room warns."
        ),
        verdict=verdict(list(within), "comparisons"),
        findings=[
            f"True over predicted: median {ratio.median():.1f}, from {ratio.min():.1f} to {ratio.max():.1f}; "
            + "; ".join(f"{mean:g} bits {rows.median():.1f}" for mean, rows in ratio.groupby(checks["mean_bits"]))
            + ".",
            f"Medians of the shares of the true change: exact quadratic term {share('quadratic'):.0f} %, slope term "
            f"{share('linear'):.0f} %; the rest is of higher order. Omega / 2 is {100 * apart:.0f} % of the exact "
            f"quadratic term (median).",
            f"Relative standard errors of a layer's trace: {100 * probe:.0f} % from probes and {100 * data:.0f} % from "
            f"which images were taken (medians over layers and seeds).",
            f"Traces that are not positive: {len(negative)} of {len(traces)}; they count as 0 and are reported.",
            "Limit: where one layer holds most of the weights, the least Omega gives that layer 2 bits, at which the "
            "second-order model no longer holds, and uniform bits can be much better. Heed the check's warning, or fix "
            "that layer's bits.",
        ],
        tables={"Change of the loss": table},
        figure="hawq-validity",
    )


def headlines(settings: "pd.DataFrame", ranks: "pd.DataFrame", study: Study) -> dict[str, float]:
    """Single numbers of the report: means over the seeds at the first budget."""
    short = {METHOD: "v2", FIRST: "v1", PLAIN: "unweighted", INVERSE: "inverse", UNIFORM: "uniform", RANDOM: "random"}
    own = settings[settings["mean_bits"] == study.mean_bits[0]].groupby("choice")
    metrics = {f"loss_{short[name]}": float(rows["loss"].mean()) for name, rows in own if name in short}
    metrics |= {f"accuracy_{short[name]}": float(rows["accuracy"].mean()) for name, rows in own if name in short}
    ranked = ranks[ranks["mean_bits"] == study.mean_bits[0]].groupby("metric")["spearman"].mean()
    return metrics | {f"spearman_{short[name]}": float(value) for name, value in ranked.items()}
