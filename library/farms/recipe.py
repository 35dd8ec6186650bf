"""An image classifier whose layers learn at rates of their own (TempBalance, on FARMS' exponents)."""

from typing import ClassVar

from library.farms.balance import Balance, Balanced
from library.images.recipe import ClassifierRecipe


class BalancedClassifierRecipe(Balanced, ClassifierRecipe, frozen=True, extra="forbid"):
    """The image classifier's recipe with layer-wise rates, chosen anew about once an epoch of the shipped images.

    >>> BalancedClassifierRecipe(network="resnet20", balance=Balance(low=0.2)).balance.analysis.window
    100
    """

    kind: ClassVar[str] = "farms-classifier"

    balance: Balance = Balance(every=70)
    """Which rates layers get, and when; balance.analysis.method plain is TempBalance as first published."""
