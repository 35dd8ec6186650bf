"""The claims of HAWQ-V2 measured again: `prism reproduce hawq`. One Ray task per seed."""

from typing import Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, model_validator

from jobs import hawq_claims, hawq_figures
from jobs.reproduce import Outcome, Reproduction, gather, mean_and_deviation
from library import files
from library.errors import InputError
from library.hawq.recipe import HawqRecipe
from library.hawq.study import Compared, Study, compare
from library.images.recipe import ClassifierRecipe
from library.recipe import fit


class HawqReproduction(Reproduction, frozen=True, extra="forbid"):
    """HAWQ-V2's claims on a small network and real images; the fields of recipe and study take it to any other.

    Of the recipe, `weights`, `curvature` and `chosen` are set by the study, and inputs stay in full precision.
    """

    job: ClassVar[str] = "reproduce-hawq"
    method: ClassVar[str] = "hawq"
    title: ClassVar[str] = "HAWQ-V2: trace-weighted mixed-precision quantisation"
    paper: ClassVar[str] = (
        "Dong, Yao, Arfeen, Cai, Gholami, Mahoney, Keutzer, *HAWQ-V2: Hessian Aware trace-Weighted Quantization of "
        "Neural Networks*, NeurIPS 2020, arXiv 1911.03852"
    )

    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Seeds of the repetitions; means and deviations are over them."""
    recipe: HawqRecipe = HawqRecipe(
        classifier=ClassifierRecipe(steps=600, validation_fraction=0.05), probe_images=512, probes=50
    )
    """The network, and how it is measured and quantised."""
    study: Study = Study()
    """How large the experiments are."""
    gpu: bool = False
    """One GPU for each seed."""

    @model_validator(mode="after")
    def _uniform_bits_are_measured(self) -> Self:
        for mean in self.study.mean_bits:
            if mean.is_integer() and int(mean) not in self.recipe.bits:
                allowed = ", ".join(map(str, self.recipe.bits))
                raise InputError(f"study.mean_bits: {mean:g} is whole, but none of the recipe's bits, {allowed}")
        return self

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """A run of seconds that goes through everything and shows nothing."""
        small = {
            "seeds": (0,),
            "recipe": HawqRecipe(
                classifier=ClassifierRecipe(steps=20, train_images=2000, batch_size=64, validation_fraction=0.05),
                probe_images=64,
                probe_batch=32,
                probes=10,
            ),
            "study": Study(mean_bits=(3.0,), random_settings=4, finetune_steps=2, test_images=200),
        }
        return cls(**(small | changes))

    def measure(self) -> Outcome:
        import pandas as pd
        import ray

        task = ray.remote(num_cpus=1, num_gpus=int(self.gpu))(_compare)
        tasks = {f"seed {seed}": task.remote(self._seeded(seed), self.study) for seed in self.seeds}
        found: dict[str, Compared] = gather(tasks, name=self.job)
        tables = {
            name: pd.DataFrame(
                [{"seed": seed} | row for seed in self.seeds for row in getattr(found[f"seed {seed}"], name)]
            )
            for name in ("settings", "ranks", "validity", "traces")
        }
        figures = {
            "hawq": hawq_figures.overview(tables["ranks"], tables["settings"], self.study),
            "hawq-validity": hawq_figures.validity(tables["validity"]),
        }
        return Outcome(
            metrics=hawq_claims.headlines(tables["settings"], tables["ranks"], self.study),
            tables=tables,
            figures=figures,
            claims=[
                hawq_claims.ranking(tables["ranks"], self.study),
                hawq_claims.choosing(tables["settings"], self.study),
                hawq_claims.limits(tables["validity"], tables["traces"], self.recipe),
            ],
            remarks=[self._setting(tables["settings"])],
        )

    def _seeded(self, seed: int) -> HawqRecipe:
        classifier = self.recipe.classifier.model_copy(update={"seed": seed})
        return self.recipe.model_copy(update={"seed": seed, "classifier": classifier})

    def _setting(self, settings: Any) -> str:
        recipe = self.recipe
        full = settings[settings["choice"] == "full precision"]
        return (
            f"Network: {recipe.classifier.network} on {recipe.classifier.images}, {recipe.classifier.steps} steps of "
            f"{recipe.classifier.batch_size} images, test accuracy {mean_and_deviation(full['accuracy'])} in full "
            f"precision; batch norms folded. Weights alone are quantised, {recipe.quantizer.granularity}-wise by "
            f"{recipe.quantizer.clipping}, with {', '.join(map(str, recipe.bits))} bits to choose from. Curvature on "
            f"{recipe.probe_images} training images, at most {recipe.probes} probes. The published accuracies are on "
            f"ImageNet and COCO (ResNet50 75.76 % at 7.99 MB against 77.39 % at 97.8 MB, for one); what is measured "
            f"here is whether the metric that chose them is a good one, at a size that a laptop can repeat."
        )


def _compare(recipe: HawqRecipe, study: Study) -> Compared:
    """Train the seed's network, and compare settings on it."""
    with files.scratch_folder() as folder:
        trained = fit(recipe.classifier, path=folder / "classifier")
        return compare(trained, recipe.model_copy(update={"cache": str(folder / "cache")}), study)
