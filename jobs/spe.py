"""Training with stable and expressive positional encodings (SPE), or a baseline, on Ray Train."""

from typing import ClassVar

from jobs.held_out import measured, save_again
from jobs.report import Report
from jobs.training import TrainingJob
from library.spe.recipe import SpeRecipe

TESTED = ("test", "ood_test")  # parts on which nothing is chosen


class SpeJob(TrainingJob, frozen=True, extra="forbid"):
    """Train positional encodings and a graph network on graphs with targets.

    The report has the artifact's metrics on the test graphs, and on those of other scaffolds or sizes where the data
    set sets some apart.
    """

    job: ClassVar[str] = "spe"

    recipe: SpeRecipe = SpeRecipe()
    """What is trained, and how."""

    def run(self) -> Report:
        """Train, register, and measure on the test graphs. Raises PrismError; the last checkpoint stays."""
        report = super().run()
        if report.artifact is not None:
            report.metrics |= measured(report, held_out, self.recipe)
            save_again(report)
        return report


def held_out(artifact: str, recipe: SpeRecipe) -> dict[str, float]:
    """Metrics of an artifact on the parts of its recipe's graphs that are for tests: test_error, ood_test_auroc ..."""
    import torch

    from library.artifact import open_artifact
    from library.recipe import evaluation_batches
    from library.spe.recipe import load_network

    network, _, _ = load_network(open_artifact(artifact))
    splits, parts = recipe.datasets(), recipe.graph_data().parts
    with torch.no_grad():
        return {
            f"{part}_{name}": value
            for part in TESTED
            if part in parts
            for name, value in recipe.evaluate(
                network, evaluation_batches(splits, recipe.samples(part), recipe.batch_size)
            ).items()
        }
