"""Searches over the toy recipe: a learning rate that decides, with and without a limit."""

from tests.jobs.toy import ToyRecipe
from tune_spaces.space import Choice, Limit, Real, Space


def space(recipe: ToyRecipe) -> Space:
    """The least validation loss; a trial whose dropout costs more than 5 % of absolute error is not feasible."""
    limit = Limit("validation_absolute", slack=0.05, penalty=10.0, reference={"recipe.dropout": 0.0})
    varies = {"recipe.lr": Real(1e-5, 1e-1, log=True), "recipe.dropout": Choice((0.0, 0.5))}
    return Space("toy", varies, metric="validation_loss", limit=limit, samples=6)
