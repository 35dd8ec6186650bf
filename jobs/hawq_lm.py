"""HAWQ-V2 on a causal language model on Ray: measure its linear layers in parallel, choose bits, fine-tune, pack."""

from typing import ClassVar

from cluster import connect, registry, storage
from jobs.hawq import fine_tuned, measure_on_cluster
from jobs.report import Report
from jobs.training import TrainingJob
from library.errors import InputError
from library.hawq.language import HawqLanguageRecipe

DEFAULT = HawqLanguageRecipe.model_fields["lm"].default


class HawqLanguageJob(TrainingJob, frozen=True, extra="forbid"):
    """Choose the bits of every linear layer of a language model by HAWQ-V2, and fine-tune the quantised model.

    The curvature is measured by one Ray task per batch and round of probes, and kept in PRISM_HOME/hawq, where later
    runs find it by content.
    """

    job: ClassVar[str] = "hawq-lm"

    recipe: HawqLanguageRecipe = HawqLanguageRecipe()
    """What is quantised, how bits are chosen, and how the result is fine-tuned."""

    def run(self) -> Report:
        """Measure, choose the bits, fine-tune, pack, and register. Raises PrismError; the last checkpoint stays."""
        connect()
        return fine_tuned(self.prepared(), more="--probe-blocks")

    def prepared(self) -> "HawqLanguageJob":
        """The job with the model's folder and a sensitivity that is known."""
        recipe = self.recipe
        changes = {"lm": _place(recipe.lm), "cache": recipe.cache or str(registry.home() / "hawq")}
        recipe = recipe.model_copy(update=changes)
        measure_on_cluster(recipe)
        return self.model_copy(update={"recipe": recipe})


def _place(lm: str) -> str:
    """The folder of a registered or remote artifact, or what was named."""
    if not lm.startswith("models:") and storage.is_local(lm):
        return lm
    try:
        return str(registry.resolve(lm, kind="send"))
    except InputError as error:
        if lm != DEFAULT:
            raise
        raise InputError(f"{error}; train that model with `prism run send`, or name another with --lm") from error
