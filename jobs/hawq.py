"""HAWQ-V2 on Ray: train a classifier, measure its layers' curvature in parallel, choose bits, fine-tune, pack."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cluster import connect, registry, storage
from jobs.report import Report
from jobs.reproduce import gather
from jobs.training import TrainingJob, WholeBatchJob
from library.drawing import blank, open_frame
from library.hawq.recipe import HawqRecipe
from library.images.networks import is_pretrained
from library.images.recipe import ClassifierRecipe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from library.hawq.analysis import Sensitivity
    from library.hawq.plan import BitPlan
    from library.hawq.quantized_recipe import QuantizedRecipe


class ClassifierJob(WholeBatchJob, frozen=True, extra="forbid"):
    """Train the image classifier that HAWQ-V2 quantises; the same settings on a laptop and on a cluster."""

    job: ClassVar[str] = "hawq-classifier"

    recipe: ClassifierRecipe = ClassifierRecipe()
    """What is trained, and how."""


class HawqJob(TrainingJob, frozen=True, extra="forbid"):
    """Choose every layer's bits by HAWQ-V2 and fine-tune the quantised network.

    Without `weights` the classifier is trained first, with the same workers. Its curvature is measured by one Ray
    task per batch and round of probes, and kept in PRISM_HOME/hawq, where later runs find it by content.
    """

    job: ClassVar[str] = "hawq"

    recipe: HawqRecipe = HawqRecipe()
    """What is quantised, how bits are chosen, and how the result is fine-tuned."""
    model: Literal["resnet18-published", "resnet50-published"] | None = None
    """Only choose bits, from the published ImageNet measurements of that network, at three sizes of each budget."""

    def leaves_artifact(self) -> bool:
        return self.model is None

    def run(self) -> Report:
        """Train the classifier if there is none, choose the bits, fine-tune, pack, and register the artifact.

        The report shows the bits and the frontier. Raises PrismError; the last checkpoint stays in every case.
        """
        if self.model is not None:
            return self._published()
        connect()
        job = self.prepared()
        if job is None:
            return Report(job=self.job, config=self.record(), notes=["stopped while the classifier was trained"])
        return fine_tuned(job, more="--probe-images")

    def prepared(self) -> "HawqJob | None":
        """The job with weights that exist and a sensitivity that is known; None when training them was stopped."""
        recipe = self.recipe
        changes: dict[str, Any] = {"cache": recipe.cache or str(registry.home() / "hawq")}
        if recipe.weights is None and not is_pretrained(recipe.classifier.network):
            trained = self._classifier().run()
            if trained.artifact is None:
                return None
            changes["weights"] = trained.artifact
        elif recipe.weights is not None:
            changes["weights"] = str(registry.resolve(recipe.weights, kind=ClassifierRecipe.kind))
        recipe = recipe.model_copy(update=changes)
        measure_on_cluster(recipe)
        return self.model_copy(update={"recipe": recipe})

    def _published(self) -> Report:
        """The exact choices from published measurements, beside the published ones."""
        import pandas as pd

        from library.hawq.published import FRACTIONS, published_choice

        network = self.model.removesuffix("-published")
        rows, notes = [], []
        for kind in ("size", "bops", "latency"):
            for fraction in FRACTIONS:
                found = published_choice(network, kind, fraction)
                apart = [i for i, (a, b) in enumerate(zip(found.bits, found.published_bits, strict=True)) if a != b]
                row = {"budget": kind, "fraction": fraction, "omega": found.omega, "cost": found.cost}
                row |= {"limit": found.limit, "lower_bound": found.lower_bound, "published": found.published_omega}
                rows.append(row | {"bits": "".join(map(str, found.bits))})
                if apart:
                    notes.append(
                        f"{kind} {fraction:g}: the published bits differ in layer {', '.join(map(str, apart))}, and "
                        f"their Omega is {found.published_omega:.4f}; the best within that limit is {found.omega:.4f}"
                    )
        table = pd.DataFrame(rows)
        same = float((table["omega"] == table["published"]).sum())
        metrics = {"settings": float(len(rows)), "equal_to_published": same}
        return Report(self.job, self.record(), metrics=metrics, tables={"choices": table}, notes=notes)

    def _classifier(self) -> ClassifierJob:
        """The training of the classifier, with what this job takes of the cluster."""
        shared = ("scaling", "engine", "precision", "storage", "max_failures", "checkpoint_every")
        return ClassifierJob(recipe=self.recipe.classifier, **{name: getattr(self, name) for name in shared})


def fine_tuned(job: TrainingJob, *, more: str) -> Report:
    """Fine-tune with the bits that a measured recipe chooses; the report shows them on the frontier.

    `more` is the flag of more data to measure on, for when the choice is not sure.
    """
    from jobs.launch import launch
    from library.hawq.analysis import CONFIDENCE, selection_stability

    recipe: QuantizedRecipe = job.recipe
    plan = recipe.plan()
    report = launch(job)
    if not recipe.chosen:
        found = recipe.sensitivity()
        report.tables["bits"] = bits_table(found, plan)
        report.figures["frontier"] = frontier_figure(recipe, found, plan)
        report.notes += list(found.notes)
        stability = selection_stability(found, recipe.limit()) if recipe.power == 1 else None
        if stability is not None:
            report.metrics["stability"] = stability
            if stability < CONFIDENCE:
                report.notes.append(
                    f"only {stability:.0%} of resampled probes and batches choose these bits; more of {more} and "
                    "--probes make the choice surer"
                )
    if report.folder is not None and storage.is_local(report.folder):
        report.save(storage.local_path(report.folder))
    return report


def measure_on_cluster(recipe: "QuantizedRecipe") -> None:
    """Measure the sensitivity of a recipe's layers with Ray tasks, into its cache, where it needs one."""
    if not recipe.chosen or recipe.stages > 1:
        recipe.sensitivity(_forms_on_cluster(recipe))


def _forms_on_cluster(recipe: "QuantizedRecipe") -> Any:
    """A function that measures a round of probes with one Ray task per batch; None for metrics without probes."""
    import ray

    from library.hawq.analysis import TRACES

    if recipe.curvature not in TRACES:
        return None
    network = ray.put(recipe.network())
    batches = [ray.put(batch) for batch in recipe.measurement()]
    task = ray.remote(num_cpus=1, max_retries=2)(_forms)

    def measure(start: int, count: int) -> Any:
        import numpy as np
        import torch

        tasks = {
            f"probes {start} to {start + count - 1}, batch {number}": task.remote(
                network, batch, recipe.curvature, recipe.seed, start, count
            )
            for number, batch in enumerate(batches)
        }
        found = gather(tasks, name="curvature")
        return torch.tensor(np.stack([found[label] for label in tasks]))

    return measure


def _forms(network: Any, batch: Any, curvature: Any, seed: int, start: int, count: int) -> Any:
    """The quadratic forms of one batch, as an array."""
    import torch.nn.functional as F

    from library.hawq.curvature import quadratic_forms
    from library.hawq.layers import quantizable_layers

    weights = [f"{name}.weight" for name in quantizable_layers(network)]
    options = {"curvature": curvature, "seed": seed, "start": start, "count": count}
    return quadratic_forms(network, F.cross_entropy, batch, weights, **options).cpu().numpy()


def bits_table(found: "Sensitivity", plan: "BitPlan") -> "pd.DataFrame":
    """One row per layer: bits, weights, curvature with its errors, its part of Omega, and multiply-accumulates."""
    import pandas as pd

    bits = [choice.weight for choice in plan.choices]
    return pd.DataFrame(
        {
            "layer": plan.layers.names,
            "bits": bits,
            "weights": plan.layers.n_params,
            found.metric: found.curvature.tolist(),
            "omega": [float(found.omega[i, found.bits.index(b)]) for i, b in enumerate(bits)],
            "macs": plan.layers.macs,
            "probe_error": found.probe_error.tolist(),
            "data_error": found.data_error.tolist(),
        }
    )


def frontier_figure(recipe: "QuantizedRecipe", found: "Sensitivity", plan: "BitPlan") -> "Figure":
    """The exact frontier of Omega against cost, with the chosen setting and equal bits everywhere."""

    from library.hawq.costs import BitChoice
    from library.hawq.plan import explicit_plan, frontier

    activation = recipe.activation_bits or 32
    choices = [BitChoice(b, activation) for b in recipe.bits]
    budget = recipe.limit()
    front = frontier(found, budget, choices=choices)
    drawn = blank(6.4, 3.6)
    axis = drawn.subplots()
    axis.step(
        front.frontier.cost / front.most, front.frontier.omega, where="post", color="#D55E00", label="exact frontier"
    )
    uniform = [explicit_plan(found, [b] * len(found.layers.names), activation=activation) for b in recipe.bits]
    costs = budget.costs(found.layers, choices).sum(0) / front.most
    axis.scatter(costs, [each.omega for each in uniform], color="#56B4E9", zorder=3, label="equal bits")
    axis.scatter(
        [plan.selection.cost / front.most], [plan.omega], marker="*", s=120, color="black", zorder=4, label="chosen"
    )
    axis.set(yscale="log", xlabel=f"{budget.kind}, share of the most bits", ylabel="Omega")
    open_frame(axis)
    axis.legend(frameon=False, fontsize=8)
    return drawn
