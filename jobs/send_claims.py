"""What SeND's reproduction says: each claim's rule, applied to the table that was measured."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jobs.reproduce import Claim, mean_and_deviation, verdict
from library.send.recipe import SendRecipe
from library.send.study import ARMS, RANDOM, RESAMPLED, SENSITIVE, Study
from library.send.timing import EES, EXACT, OFFICIAL

if TYPE_CHECKING:
    import pandas as pd

CHANCE = 0.95  # a selection does better than chance when it beats at least this share of the random sets
JUDGED_FROM = 0.1  # the smallest fraction that claim A is judged on; a smaller set holds too few coordinates
EXPECTED_RATIO = "1.13 to 1.27"  # of four byte-level models of width 96 that were measured before this code existed
AUROCS = {
    "eigenscore": "EigenScore",
    "length_normalised_entropy": "length-normalised entropy",
    "perplexity": "perplexity",
}


def dropping(effects: "pd.DataFrame", study: Study, recipe: SendRecipe) -> Claim:
    """Claim A."""
    import pandas as pd

    fixed = effects[~effects["choice"].str.endswith(RESAMPLED)]
    change = fixed.pivot_table(index=["seed", "fraction"], columns="choice", values="change")
    beats = fixed[fixed["choice"] == SENSITIVE].set_index(["seed", "fraction"])["beats"]
    fractions = sorted(fixed["fraction"].unique())
    judged = [fraction for fraction in fractions if fraction >= JUDGED_FROM] or fractions
    ratio = change[SENSITIVE] / change[RANDOM]

    def cells(row: Callable[[float], str]) -> dict[str, str]:
        return {f"{100 * fraction:g} %": row(fraction) for fraction in fractions}

    def over_seeds(values: "pd.Series", fraction: float) -> str:
        return mean_and_deviation(values.xs(fraction, level="fraction"))

    rows = [
        {"dropped": choice, **cells(lambda f, choice=choice: over_seeds(change[choice], f))}
        for choice in dict.fromkeys(fixed["choice"])
    ]
    rows.append({"dropped": "log(1 - fraction)", **cells(lambda f: f"{np.log1p(-f):.3f}")})
    rows.append({"dropped": "sensitive / random", **cells(lambda f: over_seeds(ratio, f))})
    rows.append({"dropped": "random sets that sensitive beats", **cells(lambda f: over_seeds(100 * beats, f) + " %")})
    better = {f: [beat >= CHANCE for beat in beats.xs(f, level="fraction")] for f in fractions}
    simple = change["largest mean square"] <= change[SENSITIVE]
    drawn = effects[effects["choice"].str.endswith(RESAMPLED)].pivot_table(
        index="seed", columns="choice", values="change"
    )
    drawn.columns = [name.removesuffix(RESAMPLED) for name in drawn.columns]
    held = verdict([beat for f in judged for beat in better[f]], "comparisons (seeds and fractions)")
    lower = drawn[SENSITIVE] < drawn[RANDOM]
    return Claim(
        title="A. Dropping sensitive coordinates lowers EigenScore more than dropping random ones",
        paper="At every size of Pythia, on 80 texts; shown as a figure, without numbers.",
        measured=(
            f"Coordinates of the answers' embeddings are set to zero, the answers being held fixed, and the change of "
            f"the score is averaged over {recipe.prompts} prompts; random is the mean of {study.random_sets} sets. "
            f"Each seed and fraction from {100 * judged[0]:g} % counts as a success when the sensitive coordinates "
            f"lower the score more than at least {100 * CHANCE:g} % of the random sets do. Expected "
            f"beforehand, from byte-level models of width 96: {EXPECTED_RATIO} times what random ones do."
        ),
        verdict=held,
        findings=[
            *(
                f"{100 * f:g} %: more than chance in {sum(better[f])} of {len(better[f])} seeds; the sensitive "
                f"coordinates do {over_seeds(ratio, f)} times what random ones do."
                for f in fractions
            ),
            f"Scale: the coordinates of largest mean square, which need no checkpoints, lower the score at least as "
            f"much as the sensitive ones in {int(simple.sum())} of {len(simple)} comparisons. A random set multiplies "
            f"every eigenvalue by about 1 - fraction, hence the row log(1 - fraction).",
            f"With the mask in force while the answers are drawn, at {100 * recipe.drop_fraction:g} %, the score "
            f"changes by {mean_and_deviation(drawn[SENSITIVE])} for the sensitive coordinates and "
            f"{mean_and_deviation(drawn[RANDOM])} for {study.resampled_sets} random sets; the sensitive ones are lower "
            f"in {int(lower.sum())} of {len(lower)} seeds. These changes include that the model gives other answers "
            f"when coordinates are missing.",
        ],
        tables={"Change of EigenScore with the answers held fixed": pd.DataFrame(rows)},
        figure="send-dropping",
    )


def training(arms: "pd.DataFrame", study: Study, recipe: SendRecipe) -> Claim:
    """Claim B."""
    import pandas as pd

    rows = {
        "EigenScore, mask removed": "eigenscore",
        "its deviation over the last epochs": "eigenscore_swing",
        "EES, mask removed": "ees",
        "its deviation over the last epochs ": "ees_swing",
        "EigenScore on SeND's kept coordinates": "eigenscore_same",
        "held-out loss, mask removed": "loss",
        "next-token entropy, mask removed": "entropy",
        "entities named correctly, mask removed": "accuracy",
        "artefact: EigenScore under the arm's mask": "eigenscore_masked",
        "artefact: EES under the arm's mask": "ees_masked",
        "held-out loss under the arm's mask": "loss_masked",
    }
    values = {arm: arms[arms["arm"] == arm].set_index("seed") for arm in ARMS}
    table = pd.DataFrame(
        {"": name.strip(), **{arm: mean_and_deviation(values[arm][column]) for arm in ARMS}}
        for name, column in rows.items()
    ).rename(columns={"random": "random dropout"})

    def difference(column: str, other: str = "plain") -> "pd.Series":
        return values["SeND"][column] - values[other][column]

    def lower(column: str, other: str = "plain") -> str:
        return f"lower in {int((difference(column, other) < 0).sum())} of {len(values['SeND'])} seeds"

    def chance() -> str:
        """How far the difference of EigenScore is from 0, against its spread over the seeds."""
        own = difference("eigenscore")
        if len(own) < 2:
            return "One seed says nothing of chance."
        errors = abs(own.mean()) / (own.std() / len(own) ** 0.5)
        return (
            f"The difference of EigenScore is {errors:.1f} standard errors over {len(own)} seeds from 0. Were the arms "
            f"alike, all seeds would fall on one side by chance once in {2 ** (len(own) - 1)} such studies."
        )

    return Claim(
        title="B. Training with SeND gives a lower and steadier EigenScore",
        paper=(
            "Llama-3.1-8B on Wikipedia passages: FactScore 0.44 with SeND and 0.39 without, HaluEval 0.74 and 0.74, "
            "MMLU 0.65 and 0.67 (a loss), token entropy 0.79 and 0.95; plain fine-tuning beat random dropout."
        ),
        measured=(
            f"From each seed's snapshot three arms go on for {study.epochs} epochs of {recipe.epoch_steps} steps with "
            f"the same batches: plain training, SeND ({100 * recipe.drop_fraction:g} % dropped, chosen anew every "
            f"{recipe.window} epochs), and random dropout of as many coordinates. Numbers are means over the last "
            f"{study.last_epochs} epochs. What counts is measured with the mask removed, or on the same coordinates in "
            f"all arms. A score under an arm's own mask lacks the dropped coordinates by construction: an artefact, "
            f"shown and not counted. A seed is a success when SeND's EigenScore is lower than plain training's, and "
            f"one for steadiness when its deviation over those epochs is lower."
        ),
        verdict=(
            f"lower EigenScore: {verdict(list(difference('eigenscore') < 0), 'seeds')}; "
            f"steadier: {verdict(list(difference('eigenscore_swing') < 0), 'seeds')}"
        ),
        findings=[
            f"EigenScore, mask removed: SeND minus plain {mean_and_deviation(difference('eigenscore'))}, "
            f"{lower('eigenscore')}; than random dropout {lower('eigenscore', 'random')}.",
            chance(),
            f"Its deviation over epochs: SeND {lower('eigenscore_swing')} than plain, "
            f"{lower('eigenscore_swing', 'random')} than random dropout. EES: {lower('ees')} than plain, its deviation "
            f"{lower('ees_swing')}.",
            f"On the same kept coordinates: SeND minus plain {mean_and_deviation(difference('eigenscore_same'))}, "
            f"{lower('eigenscore_same')}.",
            f"The price: held-out loss, mask removed, SeND minus plain {mean_and_deviation(difference('loss'))} nats, "
            f"{lower('loss')}; entities named correctly {mean_and_deviation(100 * difference('accuracy'), 2)} "
            f"percentage points.",
            f"Next-token entropy: SeND {lower('entropy')} than plain, {lower('entropy', 'random')} than random "
            f"dropout.",
            f"Under the masks, as an artefact: SeND {lower('eigenscore_masked')} than plain, and "
            f"{lower('eigenscore_masked', 'random')} than random dropout.",
        ],
        tables={"Means over the last epochs": table},
        figure="send-training",
    )


def times(found: "pd.DataFrame") -> Claim:
    """Claim C."""
    import pandas as pd

    table = pd.DataFrame(
        {
            "d": found["d"],
            "K": found["K"],
            **{f"{name}, ms": [milliseconds(seconds) for seconds in found[name]] for name in (OFFICIAL, EXACT, EES)},
            "published / EES": [f"{ratio:.3g}" for ratio in found[OFFICIAL] / found[EES]],
            "exact / EES": [f"{ratio:.3g}" for ratio in found[EXACT] / found[EES]],
        }
    )
    beats_published, beats_exact = found[EES] < found[OFFICIAL], found[EES] < found[EXACT]
    small = found[found["K"] <= 100]
    factor = small[EES] / small[EXACT]
    won = ", ".join(f"(d {d}, K {k})" for d, k in zip(found["d"][beats_exact], found["K"][beats_exact], strict=True))
    large = (found["d"] >= 1024) & (found["K"] >= 1000)
    return Claim(
        title="C. EES is cheaper than EigenScore",
        paper="At a matrix of 1e8 entries about 4 s for EES and 7 s for EigenScore.",
        measured=(
            "One prompt of Gaussian embeddings (K answers of width d), float64, one thread, all forms in one run: the "
            "published form of EigenScore with its d x d centring matrix, the exact score from the K x K Gram matrix "
            "(the same value), and EES with 20 moments and 20 probes. The claim counts at each size: once against the "
            "published form, once against the exact one."
        ),
        verdict=(
            f"against the published form: {verdict(list(beats_published), 'sizes')}; "
            f"against the exact score: {verdict(list(beats_exact), 'sizes')}"
        ),
        findings=[
            f"EES is faster than the exact score at {int(beats_exact.sum())} of {len(found)} sizes: {won or 'none'}.",
            *(
                [
                    f"For K up to 100, more than anyone samples, EES takes {factor.min():.0f} to {factor.max():.0f} "
                    f"times as long as the exact score."
                ]
                if len(small)
                else []
            ),
            f"The largest difference between exact and published score is {found['difference'].abs().max():.1e}.",
            *(
                [
                    f"At d >= 1024 and K >= 1000 EES takes {(found[EES] / found[EXACT])[large].median():.2g} of the "
                    f"exact time."
                ]
                if large.any()
                else []
            ),
        ],
        tables={"Median time": table},
        figure="send-times",
    )


def detection(areas: "pd.DataFrame", study: Study, recipe: SendRecipe) -> Claim:
    """Claim D."""
    import pandas as pd

    value = areas.pivot_table(index="seed", columns="score", values="auroc", dropna=False)
    error = areas.pivot_table(index="seed", columns="score", values="standard_error", dropna=False)
    once = areas.drop_duplicates("seed")
    table = pd.DataFrame(
        {
            "seed": seed,
            **{label: f"{value[score][seed]:.3f} ± {error[score][seed]:.3f}" for score, label in AUROCS.items()},
            "decided": row["decided"],
            "hallucinated": row["hallucinated"],
            "accuracy": f"{100 * row['accuracy']:.2f} %",
        }
        for seed, row in once.set_index("seed").iterrows()
    )
    table.loc[len(table)] = ["mean", *(mean_and_deviation(value[score]) for score in AUROCS), "", "", ""]
    above = value["eigenscore"] - 2 * error["eigenscore"] > 0.5
    below = value["eigenscore"] + 2 * error["eigenscore"] < 0.5
    return Claim(
        title="D. EigenScore detects hallucinations",
        paper=(
            "INSIDE (Chen et al., ICLR 2024, arXiv 2402.03744) proposes the score for question answering with models "
            "of 7 billion parameters and more; nothing is published for a model of this size."
        ),
        measured=(
            f"{study.cases} test passages are cut before a named entity (the labels of MIND, Findings of ACL 2024). A "
            f"greedy continuation that begins with another entity is a hallucination, with the true one correct, with "
            f"none undecided. The area under the ROC curve (± standard error by passages) is over the decided; of "
            f"every score, larger means hallucinated. A seed is a success when EigenScore's area is above 0.5 by more "
            f"than two standard errors."
        ),
        verdict=verdict(list(above), "seeds")
        + (f", and is inverted in {int(below.sum())} of {len(below)}" if below.any() else ""),
        findings=[
            f"EigenScore is above chance by two standard errors in {int(above.sum())} of {len(above)} seeds, below it "
            f"in {int(below.sum())}.",
            *(
                f"It is above {AUROCS[score]} in {int((value['eigenscore'] > value[score]).sum())} of {len(value)} "
                f"seeds."
                for score in list(AUROCS)[1:]
            ),
            f"The model names the entity in {mean_and_deviation(100 * once['accuracy'], 2)} % of the cases.",
        ],
        tables={"AUROC": table},
        figure="send-detection",
    )


def milliseconds(seconds: float) -> str:
    """Three digits, and no exponent.

    >>> milliseconds(0.0001234), milliseconds(6.29)
    ('0.123', '6290')
    """
    value = 1e3 * seconds
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def headlines(
    effects: "pd.DataFrame", arms: "pd.DataFrame", times: "pd.DataFrame", areas: "pd.DataFrame"
) -> dict[str, float]:
    """Single numbers of the report: means over the seeds."""
    metrics = {}
    for (choice, fraction), rows in effects.groupby(["choice", "fraction"], sort=False):
        if choice in (SENSITIVE, RANDOM):
            metrics[f"change_{choice}_{100 * fraction:g}"] = float(rows["change"].mean())
    means = arms.groupby("arm").mean(numeric_only=True)
    for name in ("eigenscore", "ees", "loss", "entropy", "accuracy"):
        metrics |= {f"{name}_{arm.lower()}": float(means.loc[arm, name]) for arm in ARMS}
    metrics |= {f"auroc_{name}": float(rows.mean()) for name, rows in areas.groupby("score")["auroc"]}
    metrics["ees_over_exact_seconds"] = float((times[EES] / times[EXACT]).median())
    return metrics
