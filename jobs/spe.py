"""Training with stable and expressive positional encodings (SPE), or a baseline, on Ray Train."""

from typing import ClassVar

from jobs.training import TrainingJob
from library.spe.recipe import SpeRecipe


class SpeJob(TrainingJob, frozen=True, extra="forbid"):
    """Train positional encodings and a graph network on graphs with targets."""

    job: ClassVar[str] = "spe"

    recipe: SpeRecipe = SpeRecipe()
    """What is trained, and how."""
