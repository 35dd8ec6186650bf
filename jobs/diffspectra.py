"""Training of DiffSpectra on Ray Train."""

from typing import ClassVar, Self

from pydantic import model_validator

from cluster import registry
from jobs.report import Report
from jobs.training import WholeBatchJob
from library.diffspectra.pretraining_recipe import PretrainingRecipe
from library.diffspectra.recipe import DiffSpectraRecipe


class DiffSpectraJob(WholeBatchJob, frozen=True, extra="forbid"):
    """Train the diffusion that finds molecules from UV-Vis, IR and Raman spectra."""

    job: ClassVar[str] = "diffspectra"

    recipe: DiffSpectraRecipe = DiffSpectraRecipe()
    """What is trained, and how."""

    @model_validator(mode="after")
    def _averages(self) -> Self:
        if self.engine.startswith("zero") and self.precision == "bf16":
            raise ValueError("the running average needs weights in fp32: use engine ddp or fsdp, or precision fp32")
        return self

    def prepared(self) -> "DiffSpectraJob":
        """The job with its pre-trained encoder as a folder. Raises InputError when there is none of that name."""
        if self.recipe.pretrained is None:
            return self
        found = str(registry.resolve(self.recipe.pretrained, kind=PretrainingRecipe.kind))
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"pretrained": found})})

    def run(self) -> Report:
        """Train, write the artifact of averaged weights, register it. Raises PrismError; the last checkpoint stays."""
        return WholeBatchJob.run(self.prepared())
