"""Pictures of searches for reservoirs: every configuration's error against what varied."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.qrc_trials import Batch, Evaluated
from library.drawing import blank, open_frame
from tune_spaces.qrc import reservoir
from tune_spaces.space import Choice, Domain, Real

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BEST = 64  # configurations that are drawn in colour


def pool_metrics(batches: Sequence[Batch], whole: int) -> dict[str, float]:
    """How many configurations there were, how many a processor evaluates in a minute, and the least error.

    The rate of the first rung is of all of them; the other one has in it what those that went on took.
    """
    trials = [trial for batch in batches for trial in batch.trials]
    first = sum(batch.seconds[min(batch.seconds)] for batch in batches)
    return {
        "configurations": float(len(trials)),
        "first_rung_configurations_per_cpu_minute": 60 * len(trials) / first,
        "configurations_per_cpu_minute": 60 * len(trials) / sum(sum(batch.seconds.values()) for batch in batches),
        "best_single_validation_nrmse": min(trial.errors.get(whole, float("inf")) for trial in trials),
    }


def pool_table(trials: Sequence[Evaluated]) -> "pd.DataFrame":
    """A row per configuration, the best first: its error, the rung that it came to, its memory, and what it is."""
    import pandas as pd

    rows = []
    for trial in trials:
        rung = max(trial.errors)
        member = reservoir(trial.values)
        row = {"validation_nrmse": trial.errors[rung], "rung": rung} | trial.about | trial.values
        rows.append(row | {"features": member.width, "cx_per_step": member.cx_per_step})
    return pd.DataFrame(rows).sort_values(["rung", "validation_nrmse"], ascending=[False, True], ignore_index=True)


def pool_figure(trials: Sequence[Evaluated], whole: int, varies: Mapping[str, Domain]) -> "Figure":
    """A panel per field: validation NRMSE of the configurations that came to the last rung, the best in colour."""
    import numpy as np
    from matplotlib.ticker import NullFormatter

    ended = sorted((trial for trial in trials if whole in trial.errors), key=lambda trial: trial.errors[whole])
    errors = [trial.errors[whole] for trial in ended]
    drawn = blank(12.0, 5.2)
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(ended))
    for axis, (name, domain) in zip(drawn.subplots(2, 5, sharey=True).flat, varies.items(), strict=True):
        values = [trial.values[name] for trial in ended]
        if isinstance(domain, Choice):
            options = sorted(set(map(str, values)))
            values = [options.index(str(value)) + shift for value, shift in zip(values, jitter, strict=True)]
            slanted = {"rotation": 60} if len(options) > 4 else {}
            axis.set_xticks(
                range(len(options)), [option.replace("persistent", "persist.") for option in options], **slanted
            )
        elif isinstance(domain, Real):
            if domain.log:
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlim(domain.low, domain.high)
        else:
            axis.set_xticks(range(domain.low, domain.high + 1))
        axis.scatter(values[BEST:], errors[BEST:], s=6, color="0.8")
        axis.scatter(values[:BEST], errors[:BEST], s=9, color="#D55E00")
        axis.set_xlabel(name, fontsize=9)
        axis.tick_params(labelsize=8)
        open_frame(axis)
    for axis in drawn.axes[::5]:
        axis.set_ylabel("validation NRMSE", fontsize=9)
    return drawn
