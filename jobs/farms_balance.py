"""Training an image classifier with layer-wise learning rates from its spectra, on Ray Train."""

from typing import ClassVar

from jobs.training import WholeBatchJob
from library.farms.recipe import BalancedClassifierRecipe


class FarmsBalanceJob(WholeBatchJob, frozen=True, extra="forbid"):
    """Train an image classifier whose layers learn at rates of their own."""

    job: ClassVar[str] = "farms-balance"

    recipe: BalancedClassifierRecipe = BalancedClassifierRecipe()
    """What is trained, and how."""
