"""Which recipe made an artifact, and the trained model that it holds."""

import importlib

from pydantic import ValidationError
from torch import nn

from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.recipe import Recipe

# Kind of artifact: its recipe. Not here are kinds that keep other weights than they train, such as packed integers.
RECIPES = {
    "send": "library.send.recipe:SendRecipe",
    "classifier": "library.images.recipe:ClassifierRecipe",
    "farms-classifier": "library.farms.recipe:BalancedClassifierRecipe",
    "rqgnn": "library.rqgnn.recipe:RqgnnRecipe",
    "spe": "library.spe.recipe:SpeRecipe",
    "diffspectra": "library.diffspectra.recipe:DiffSpectraRecipe",
    "diffspectra-pretrain": "library.diffspectra.pretraining_recipe:PretrainingRecipe",
}


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe that made an artifact.

    Raises InputError for a kind that no recipe trains, with those that one does, and ArtifactError for a recipe that
    does not fit its kind.
    """
    if artifact.kind not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        raise InputError(f"an artifact of {artifact.kind!r} is not the model of a recipe; those of {known} are")
    module, _, name = RECIPES[artifact.kind].partition(":")
    kind: type[Recipe] = getattr(importlib.import_module(module), name)
    try:
        return kind.model_validate(artifact.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "recipe"
        raise ArtifactError(
            f"{artifact.path}: its recipe does not fit {artifact.kind!r} ({field}: {first['msg']})"
        ) from error


def trained_model(artifact: Artifact) -> tuple[nn.Module, Recipe]:
    """The model of an artifact with its trained weights, and its recipe. Raises what `recipe_of` and loading raise."""
    recipe = recipe_of(artifact)
    return recipe.restored(artifact.weights(), source=str(artifact.path)), recipe
