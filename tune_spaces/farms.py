"""The search over layer-wise learning rates: how far they differ, by which map, and from which windows."""

from library.errors import InputError
from library.farms.recipe import BalancedClassifierRecipe
from tune_spaces.space import Choice, Domain, Real, Space


def space(recipe: BalancedClassifierRecipe) -> Space:
    """The best validation accuracy of an image classifier.

    The least factor goes from 0.1 to 0.9 and the largest is 2 minus it, as published; windows are those that fit small
    networks. Raises InputError for a recipe that gives the largest factor, which the search takes from the least.
    """
    if recipe.balance.high is not None:
        raise InputError("balance.high: the search takes the largest factor as 2 - low; leave it out")
    varies: dict[str, Domain] = {
        "recipe.lr": Real(0.01, 0.3, log=True),
        "recipe.balance.low": Real(0.1, 0.9),
        "recipe.balance.rule": Choice(("linear", "sqrt", "log2", "step", "sigmoid")),
        "recipe.balance.analysis.method": Choice(("farms", "plain")),
        "recipe.balance.analysis.rule": Choice(("median", "fixfinger")),
        "recipe.balance.last": Choice((True, False)),
    }
    return Space("farms", varies, metric="validation_accuracy", mode="max")
