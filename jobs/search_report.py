"""A search's trials as a table and as figures: the metric against each field that varied."""

from typing import TYPE_CHECKING, Any

from jobs.pareto import costs, front, front_ranks, hypervolume
from jobs.search import TrialRecord, told
from library.drawing import blank, open_frame
from tune_spaces.space import Choice, Real, Space

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

NAMES = {"validation_kib": "size on disk, KiB", "validation_megabops": "10^6 bit operations"}
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

    columns = min(3, len(space.varies))
    rows = -(-len(space.varies) // columns)
    drawn = blank(4.0 * columns, 2.8 * rows)
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
        open_frame(axis)
    for axis in axes[::columns]:
        axis.set_ylabel(space.metric, fontsize=8)
    for axis in axes[len(space.varies) :]:
        axis.set_visible(False)
    if axes[0].has_data():
        axes[0].legend(fontsize=7, frameon=False)
    return drawn


def front_figure(space: Space, records: list[TrialRecord]) -> "Figure":
    """The metric against the first further objective: search, its front, and the baselines, all to their end.

    The line joins the trials that no other one beats in these two; those that are on the front for a further objective
    are open circles. Trials far worse than the baselines and most others are triangles at the edge.
    """
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    other = next(iter(space.others))
    drawn = blank(7.2, 4.2)
    axis = drawn.subplots()
    ended = [record for record in records if record.state == "finished" and record.curve]

    def place(record: TrialRecord) -> tuple[float, float]:
        return record.last[other], record.last[space.metric]

    searched = np.array([place(record) for record in ended if record.group is None]).reshape(-1, 2)
    groups = {
        group: np.array(points).reshape(-1, 2)
        for group in space.baselines
        if (points := sorted(place(record) for record in ended if record.group == group))
    }
    low, high = _metric_range(space, searched[:, 1], [value for points in groups.values() for value in points[:, 1]])
    edge = low if space.mode == "max" else high
    within = (searched[:, 1] >= low) & (searched[:, 1] <= high)
    axis.scatter(*searched[within].T, color="#b0b0b0", s=22, label="search")
    if not within.all():
        marker = "v" if space.mode == "max" else "^"
        beyond = searched[~within, 0]
        axis.scatter(beyond, np.full(len(beyond), edge), color="#b0b0b0", s=30, marker=marker, label="far worse")
    best = np.array(sorted(place(record) for record in front(space, records))).reshape(-1, 2)
    signs = {"min": 1.0, "max": -1.0}
    ranks = front_ranks(best * [signs[space.others[other]], signs[space.mode]])
    axis.plot(*best[ranks == 0].T, color="#D55E00", marker="o", ms=5, lw=1.6, label="front of the search")
    further = best[(ranks > 0) & (best[:, 1] >= low) & (best[:, 1] <= high)]
    if len(further):
        kind = {"facecolors": "none", "edgecolors": "#D55E00"}
        axis.scatter(*further.T, s=28, zorder=3, label="on the front for a further objective", **kind)
    for colour, (group, points) in zip(("#0072B2", "#56B4E9", "#009E73", "#E69F00"), groups.items(), strict=False):
        axis.plot(*points.T, color=colour, marker="s", ms=4, lw=1.0, ls=":", label=group)
    margin = 0.04 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    if ended:  # a logarithmic axis needs something on it
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(NAMES.get(other, other.replace("_", " ")))
    axis.set_ylabel(space.metric.replace("_", " "))
    open_frame(axis)
    axis.legend(frameon=False, fontsize=8)
    return drawn


def _metric_range(space: Space, searched: "np.ndarray", baselines: list[float]) -> tuple[float, float]:
    """From the best of all to the worst baseline or the upper quartile of the search, whichever is worse.

    (0, 1) where nothing has ended.
    """
    import numpy as np

    if not len(searched) and not baselines:
        return 0.0, 1.0
    sign = 1.0 if space.mode == "min" else -1.0
    costs_of = sign * np.concatenate([searched, baselines])
    worst = max([*(sign * np.array(baselines)), *np.quantile(sign * searched, [0.75])] if len(searched) else costs_of)
    low, high = sorted((sign * float(costs_of.min()), sign * float(worst)))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


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
