"""RQGNN on Ray: train a graph-level anomaly detector, and measure it on graphs that it has not seen."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from jobs.held_out import measured, save_again
from jobs.report import Report
from jobs.training import WholeBatchJob
from library.drawing import blank, open_frame
from library.rqgnn.data import load_graphs
from library.rqgnn.recipe import RqgnnRecipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RqgnnJob(WholeBatchJob, frozen=True, extra="forbid"):
    """Train a detector of anomalous graphs; the weights of the best validation AUC become the artifact.

    Probability and threshold are fitted on the validation graphs. The report shows what they are worth on the test
    graphs, on which nothing was chosen.
    """

    job: ClassVar[str] = "rqgnn"

    recipe: RqgnnRecipe = RqgnnRecipe()
    """What is trained, and on which graphs."""
    checkpoint_every: PositiveInt = 20
    """Steps between two checkpoints, each with an evaluation; the last step always has one."""
    artifact_from: Literal["last", "best"] = "best"
    """Which weights become the artifact: those of the last step, or of the best validation AUC."""

    def prepared(self) -> "RqgnnJob":
        """The job once its graphs are there: what is downloaded by name is downloaded here, not by every worker."""
        if self.recipe.tu_root is not None:
            load_graphs(self.recipe.data, tu_root=self.recipe.tu_root)
        return self

    def run(self) -> Report:
        """Train, register, and measure on the test graphs. Raises PrismError; the last checkpoint stays."""
        self.prepared()
        report = super().run()
        if report.artifact is not None:
            found, curve = measured(report, held_out, self.recipe)
            report.metrics |= {f"test_{name}": value for name, value in found.items()}
            report.figures["reliability"] = reliability_figure(curve)
            save_again(report)
        return report


def held_out(artifact: str, recipe: RqgnnRecipe) -> "tuple[dict[str, float], list[tuple[float, float, int]]]":
    """Metrics of an artifact on its recipe's test graphs, and (mean probability, share of anomalies, graphs) in bins.

    The ten bins hold equally many graphs each.
    """
    from library.artifact import open_artifact
    from library.rqgnn.detector import GraphAnomalyDetector
    from library.rqgnn.metrics import detection_metrics

    detector = GraphAnomalyDetector.from_artifact(open_artifact(artifact))
    material = recipe.material()
    margins = detector.margins(material.prepared, material.test)
    labels = material.prepared.labels[material.test]
    probabilities = detector.decision.scaling.probability(margins)
    order = probabilities.argsort()
    bins = [
        (float(probabilities[part].mean()), float(labels[part].double().mean()), len(part))
        for part in order.tensor_split(10)
        if len(part)
    ]
    return detection_metrics(probabilities, labels, threshold=detector.decision.threshold), bins


def reliability_figure(bins: "list[tuple[float, float, int]]") -> "Figure":
    """Share of anomalies over calibrated probability, with two standard errors; on the diagonal it keeps its word."""

    drawn = blank(4.4, 4.0)
    axis = drawn.subplots()
    predicted, seen, counts = zip(*bins, strict=True)
    errors = [2 * (max(share * (1 - share), 1e-9) / count) ** 0.5 for share, count in zip(seen, counts, strict=True)]
    top = 1.05 * max(*predicted, *(share + error for share, error in zip(seen, errors, strict=True)))
    axis.plot([0, top], [0, top], color="0.7", lw=1)
    axis.errorbar(predicted, seen, errors, fmt="o", color="#D55E00", ms=4, lw=1)
    axis.set_xlabel("calibrated probability, mean of a tenth of the graphs")
    axis.set_ylabel("share of anomalous test graphs")
    open_frame(axis)
    return drawn
