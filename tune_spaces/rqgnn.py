"""The search over RQGNN: quotients, filters, pooling, sizes, loss and rates, for the best validation macro-F1."""

from library.errors import InputError
from library.rqgnn.recipe import RqgnnRecipe
from tune_spaces.space import Choice, Domain, Real, Space, Whole


def space(recipe: RqgnnRecipe) -> Space:
    """The best macro-F1 on the validation graphs, at the threshold that is best for each trial.

    Ranges are those around the published settings. Raises InputError for a recipe whose network is fixed by a preset,
    or is one of the plain ones.
    """
    if recipe.preset is not None or recipe.network != "rqgnn":
        raise InputError("the search varies RQGNN's network: leave preset out, and network rqgnn")
    varies: dict[str, Domain] = {
        "recipe.rq_on": Choice(("raw", "latent")),
        "recipe.normalise_rq": Choice((False, True)),
        "recipe.filters": Choice(("frozen", "learned")),
        "recipe.pooling": Choice(("rq", "rq-mean", "attention", "mean", "sum")),
        "recipe.hidden": Choice((32, 64, 128)),
        "recipe.width": Whole(1, 8),
        "recipe.depth": Whole(2, 10),
        "recipe.dropout": Real(0.0, 0.6),
        "recipe.beta": Choice((0.99, 0.999, 0.9999)),
        "recipe.gamma": Real(0.0, 3.0),
        "recipe.lr": Real(1e-4, 2e-2, log=True),
        "recipe.weight_decay": Choice((0.0, 1e-5, 1e-4)),
        "recipe.batch_size": Choice((128, 256, 512)),
    }
    return Space("rqgnn", varies, metric="validation_best_macro_f1", mode="max")
