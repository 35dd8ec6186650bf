"""Pre-training of DiffSpectra's encoder of spectra on Ray Train."""

from typing import ClassVar

from pydantic import field_validator

from jobs.training import TrainingJob
from library.diffspectra.pretraining_recipe import PretrainingRecipe


class DiffSpectraPretrainJob(TrainingJob, frozen=True, extra="forbid"):
    """Train the encoder of spectra to fill in hidden patches and to know the geometry that a spectrum belongs to."""

    job: ClassVar[str] = "diffspectra-pretrain"

    recipe: PretrainingRecipe = PretrainingRecipe()
    """What is trained, and how."""

    @field_validator("micro_batch")
    @classmethod
    def _whole_batches(cls, size: int | None) -> int | None:
        if size is not None:
            raise ValueError("spectra are told from all others of a step's batch, which cannot be cut; leave it out")
        return size
