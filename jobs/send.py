"""Training with Sensitivity Dropout (SeND) on Ray Train."""

from typing import ClassVar

from jobs.training import TrainingJob
from library.send.recipe import SendRecipe


class SendJob(TrainingJob, frozen=True, extra="forbid"):
    """Train a causal language model with Sensitivity Dropout; the same settings on a laptop and on a cluster."""

    job: ClassVar[str] = "send"

    recipe: SendRecipe = SendRecipe()
    """What is trained, and how."""
