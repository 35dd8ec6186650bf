"""The search over SPE: eigenpairs, the functions on eigenvalues, the outer network, how encodings are fed in, rates."""

from library.errors import InputError
from library.spe.recipe import SpeRecipe
from tune_spaces.space import Choice, Domain, Real, Space, Whole


def space(recipe: SpeRecipe) -> Space:
    """The least validation error: mean absolute, or 1 minus the area under the ROC curve.

    Eigenpairs are 8, 16 or as many as the recipe has. Splines have 4 to 64 pieces: more express more, and allow larger
    Lipschitz constants. Raises InputError for a recipe whose preset fixes what would be searched, and for a method that
    has no functions on eigenvalues.
    """
    if recipe.preset is not None:
        raise InputError(f"preset {recipe.preset} fixes what the search varies; search without a preset")
    if recipe.encoding.method != "spe":
        raise InputError(f"the search is over encodings of method spe, not {recipe.encoding.method}")
    most = recipe.encoding.eigenpairs
    varies: dict[str, Domain] = {
        "recipe.encoding.eigenpairs": Choice((*(pairs for pairs in (8, 16) if pairs < most), most)),
        "recipe.encoding.phi": Choice(("mlp", "deepsets", "spline")),
        "recipe.encoding.channels": Whole(4, 16),
        "recipe.encoding.phi_hidden": Whole(8, 64),
        "recipe.encoding.pieces": Whole(4, 64),
        "recipe.encoding.rho": Choice(("gin", "mlp", "gin_deepsets")),
        "recipe.encoding.rho_layers": Whole(2, 8),
        "recipe.encoding.rho_hidden": Whole(16, 128),
        "recipe.encoding.over_nodes": Choice(("mean", "sum")),
        "recipe.encoding.norm": Choice(("layer", "batch", "none")),
        "recipe.backbone.inject": Choice(("input", "every_layer")),
        "recipe.backbone.layers": Whole(3, 16),
        "recipe.backbone.dropout": Real(0.0, 0.2),
        "recipe.lr": Real(3e-4, 3e-3, log=True),
        "recipe.weight_decay": Real(1e-7, 1e-4, log=True),
        "recipe.lipschitz_penalty": Real(1e-6, 1e-2, log=True),
    }
    return Space("spe", varies, metric="validation_error", mode="min")
