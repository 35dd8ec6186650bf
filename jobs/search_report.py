"""A search's trials as a table and as figures: the metric against each field that varied."""

from typing import TYPE_CHECKING, Any

from jobs.pareto import costs, front, hypervolume
from jobs.search import TrialRecord, told
from tune_spaces.space import Choice, Real, Space

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

IMPORTANCE_TRIALS = 10  # with fewer finished ones an estimate of importance is noise


def table(space: Space, records: list[TrialRecord]) -> "pd.DataFrame":
    """One row per trial: how it ended, after how many steps, its last metrics, and its values."""
    import pandas as pd

    names = [space.metric, *space.others, *([space.limit.metric] if space.limit else []), "excess", "objective"]
    best = {record.number for record in front(space, records)} if space.others else set()
    rows = [
        {"trial": record.number}
        | ({"group": record.group or "search", "front": record.number in best} if space.others else {})
        | {"state": record.state, "step": max(record.curve, default=0)}
        | {name: record.last.get(name) for name in names}
        | {path: _cell(value) for path, value in record.values.items()}
        | {"fault": record.fault or ""}
        for record in sorted(records, key=lambda record: record.number)
    ]
    return pd.DataFrame(rows)


def importance(space: Space, records: list[TrialRecord]) -> "pd.DataFrame | None":
    """Share of each field in what sets the best trials apart (PED-ANOVA, Watanabe et al., IJCAI 2023).

    None below ten finished trials, and with several objectives.
    """
    import pandas as pd
    from optuna import create_study
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [record for record in records if record.state == "finished" and record.group is None]
    if len(finished) < IMPORTANCE_TRIALS or space.others:
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
                if record.curve and record.group is None and _group(record) == group
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


def front_figure(space: Space, records: list[TrialRecord]) -> "Figure":
    """The metric against the first further objective: search, its front, and the baselines, all to their end."""
    from matplotlib.figure import Figure

    other = next(iter(space.others))
    drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = drawn.subplots()
    ended = [record for record in records if record.state == "finished" and record.curve]

    def place(record: TrialRecord) -> tuple[float, float]:
        return record.last[other], record.last[space.metric]

    searched = [place(record) for record in ended if record.group is None]
    if searched:
        axis.scatter(*zip(*searched, strict=True), color="#b0b0b0", s=22, label="search")
    best = sorted(place(record) for record in front(space, records))
    if best:
        axis.plot(*zip(*best, strict=True), color="#D55E00", marker="o", ms=5, lw=1.6, label="front of the search")
    for colour, group in zip(("#0072B2", "#56B4E9", "#009E73", "#E69F00"), space.baselines, strict=False):
        points = sorted(place(record) for record in ended if record.group == group)
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="s", ms=4, lw=1.0, ls=":", label=group)
    axis.set_xscale("log")
    axis.set_xlabel(other.replace("_", " "))
    axis.set_ylabel(space.metric.replace("_", " "))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return drawn


def front_metrics(space: Space, records: list[TrialRecord]) -> dict[str, float]:
    """Trials on the front, and the area that search and each group of baselines dominate in the first two objectives.

    The area is relative to the box from the worst to the best that anything reached in either, so it is at most 1.
    """
    import numpy as np

    ended = [record for record in records if record.state == "finished" and record.curve]
    points = np.array([costs(space, record.last)[:2] for record in ended])
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    found = {"front": float(len(front(space, records)))}
    for group in (None, *space.baselines):
        own = [point for point, record in zip(scaled, ended, strict=True) if record.group == group]
        name = "search" if group is None else group.replace(" ", "_").replace("-", "_").lower()
        found[f"area_{name}"] = hypervolume(own, (1.0, 1.0)) if own else 0.0
    return found


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _group(record: TrialRecord) -> str:
    if record.state != "finished":
        return "stopped early"
    return "beyond the limit" if record.last["excess"] > 0 else "finished"
