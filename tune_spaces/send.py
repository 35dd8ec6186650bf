"""The search over SeND: how much is dropped, when, chosen how, and the learning rate."""

from pathlib import Path

from library.artifact import MANIFEST, open_artifact
from library.errors import InputError
from library.language import pythia
from library.language.hub import is_loadable, load_errors
from library.send.recipe import SendRecipe
from tune_spaces.space import Choice, Domain, Limit, Real, Space, Whole


def space(recipe: SendRecipe) -> Space:
    """The least EigenScore whose held-out loss stays within 1 % of training without dropping.

    EigenScore is that of sampled continuations with nothing dropped, so that a mask cannot lower it by construction.
    The reference is the same job with `selection` none. One percent of loss beyond the allowed one costs one nat of
    EigenScore, which is more than the settings differ by among each other.

    The learning rate is searched from 1e-5 to 1e-3 where a pre-trained model learns on. A new model starts from
    random weights, with which the lower half of that range learns next to nothing in a laptop's few hundred steps;
    there the range is 1e-4 to 1e-2, around the 1e-3 that the suite pre-trained its small models with. Frozen blocks
    go up to all but the last two, where there are any; in a new model they keep the weights that were drawn.

    Raises InputError for a recipe without prompts, because EigenScore is not measured then.
    """
    if not recipe.prompts:
        raise InputError("EigenScore is not measured with prompts=0, and the search needs it; use prompts=8, say")
    varies: dict[str, Domain] = {
        "recipe.drop_fraction": Real(0.05, 0.4),
        "recipe.window": Whole(2, 5),
        "recipe.lr": Real(1e-5, 1e-3, log=True) if is_loadable(recipe.lm) else Real(1e-4, 1e-2, log=True),
        "recipe.freeze_blocks": Whole(0, max(0, _blocks(recipe) - 2)),
        "recipe.layer": Choice(("middle", "penultimate")),
        "recipe.form": Choice(("slt", "last", "pooled")),
        "recipe.selection": Choice(("product", "change", "variance", "random")),
    }
    limit = Limit("validation_loss", slack=0.01, penalty=100.0, reference={"recipe.selection": "none"})
    return Space("send", varies, metric="eigenscore", limit=limit)


def _blocks(recipe: SendRecipe) -> int:
    if not is_loadable(recipe.lm):
        return pythia.named_size(recipe.lm).blocks
    if (Path(recipe.lm) / MANIFEST).is_file():
        return pythia.artifact_config(open_artifact(recipe.lm, kind="send", verify=False)).num_hidden_layers
    from transformers import AutoConfig

    with load_errors("model", recipe.lm, recipe.revision):
        return AutoConfig.from_pretrained(recipe.lm, revision=recipe.revision or "main").num_hidden_layers
