"""Pre-training of DiffSpectra's encoder of spectra on Ray Train."""

from typing import ClassVar

from jobs.training import WholeBatchJob
from library.diffspectra.pretraining_recipe import PretrainingRecipe


class DiffSpectraPretrainJob(WholeBatchJob, frozen=True, extra="forbid"):
    """Train the encoder of spectra to fill in hidden patches and to know the geometry that a spectrum belongs to."""

    job: ClassVar[str] = "diffspectra-pretrain"

    recipe: PretrainingRecipe = PretrainingRecipe()
    """What is trained, and how."""
