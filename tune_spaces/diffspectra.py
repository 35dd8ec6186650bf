"""The search over DiffSpectra: the rate, sizes of encoder and denoiser, averages, and how often what is hidden."""

from library.diffspectra.recipe import DiffSpectraRecipe
from library.errors import InputError
from tune_spaces.space import Choice, Domain, Real, Space, Whole


def space(recipe: DiffSpectraRecipe) -> Space:
    """The least loss on held-out molecules, at fixed times and noise.

    The weights of the losses are not varied, since they are the unit of what is compared. Every number of heads divides
    every width. Raises InputError for a recipe whose preset fixes what would be searched.
    """
    if recipe.preset is not None:
        raise InputError(f"preset {recipe.preset} fixes what the search varies; search without a preset")
    varies: dict[str, Domain] = {
        "recipe.lr": Real(5e-5, 3e-3, log=True),
        "recipe.denoiser.width": Choice((48, 64, 96, 128)),
        "recipe.denoiser.pair_width": Choice((12, 16, 24, 32)),
        "recipe.denoiser.heads": Choice((4, 8, 16)),
        "recipe.denoiser.blocks": Whole(2, 8),
        "recipe.denoiser.dropout": Real(0.0, 0.2),
        "recipe.encoder.width": Choice((16, 32, 64)),
        "recipe.encoder.layers": Whole(1, 3),
        "recipe.encoder.features": Choice((32, 64, 128)),
        "recipe.average": Choice((0.9, 0.99, 0.999)),
        "recipe.self_condition": Choice((0.0, 0.5, 0.9)),
        "recipe.modality_dropout": Choice((0.0, 0.1, 0.3)),
        "recipe.condition_dropout": Choice((0.0, 0.1, 0.2)),
    }
    return Space("diffspectra", varies, metric="loss", mode="min")
