"""A search's trials as a table and as figures: the metric against each field that varied."""

from typing import TYPE_CHECKING

from jobs.search import TrialRecord, told
from tune_spaces.space import Choice, Real, Space

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

IMPORTANCE_TRIALS = 10  # with fewer finished ones an estimate of importance is noise


def table(space: Space, records: list[TrialRecord]) -> "pd.DataFrame":
    """One row per trial: how it ended, after how many steps, its last metrics, and its values."""
    import pandas as pd

    names = [space.metric] + ([space.limit.metric] if space.limit else []) + ["excess", "objective"]
    rows = [
        {"trial": record.number, "state": record.state, "step": max(record.curve, default=0)}
        | {name: record.last.get(name) for name in names}
        | record.values
        | {"fault": record.fault or ""}
        for record in sorted(records, key=lambda record: record.number)
    ]
    return pd.DataFrame(rows)


def importance(space: Space, records: list[TrialRecord]) -> "pd.DataFrame | None":
    """Share of each field in what sets the best trials apart (PED-ANOVA, Watanabe et al., IJCAI 2023).

    None below ten finished trials.
    """
    import pandas as pd
    from optuna import create_study
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [record for record in records if record.state == "finished"]
    if len(finished) < IMPORTANCE_TRIALS:
        return None
    study = told(space, finished, create_study(direction=f"{space.mode}imize"))
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return pd.DataFrame({"field": list(shares), "importance": list(shares.values())})


def figure(space: Space, records: list[TrialRecord]) -> "Figure":
    """One panel per field: finished trials filled, stopped ones hollow, those beyond the limit crossed."""
    from matplotlib.figure import Figure

    columns = min(3, len(space.varies))
    rows = -(-len(space.varies) // columns)
    drawn = Figure(figsize=(4.0 * columns, 2.8 * rows), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    groups = {
        "finished": ("o", "C0", "C0"),
        "beyond the limit": ("x", "C3", "C3"),
        "stopped early": ("o", "none", "0.6"),
    }
    for axis, (path, domain) in zip(axes, space.varies.items(), strict=False):
        places = {value: place for place, value in enumerate(domain.values)} if isinstance(domain, Choice) else None
        for group, (marker, face, edge) in groups.items():
            points = [
                (places[record.values[path]] if places else record.values[path], record.last[space.metric])
                for record in records
                if record.curve and _group(record) == group
            ]
            if points:
                face = edge if marker == "x" else face
                colours = {"color": edge} if marker == "x" else {"facecolors": face, "edgecolors": edge}
                axis.scatter(*zip(*points, strict=True), marker=marker, s=26, label=group, **colours)
        if places:
            axis.set_xticks(list(places.values()), [str(value) for value in places])
        elif isinstance(domain, Real) and domain.log:
            axis.set_xscale("log")
        axis.set_xlabel(path.rpartition(".")[2].replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel(space.metric, fontsize=8)
    for axis in axes[len(space.varies) :]:
        axis.set_visible(False)
    if axes[0].has_data():
        axes[0].legend(fontsize=7, frameon=False)
    return drawn


def _group(record: TrialRecord) -> str:
    if record.state != "finished":
        return "stopped early"
    return "beyond the limit" if record.last["excess"] > 0 else "finished"
