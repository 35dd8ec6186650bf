"""A trained SeND model, read back from its artifact."""

from pydantic import ValidationError

from library.artifact import Artifact
from library.errors import ArtifactError
from library.language import material, pythia
from library.language.tokens import Tokenizer, from_json
from library.send.dropout import SensitivityDropout
from library.send.recipe import SendRecipe
from library.weights import load_tensors


def load_send(artifact: Artifact) -> tuple[SensitivityDropout, Tokenizer, SendRecipe]:
    """The model of an artifact of kind `send`, in evaluation mode with nothing dropped, its tokeniser and recipe.

    Needs neither corpus nor network. `model.lm` is the language model as transformers knows it, and `model.dropped`
    what was dropped last. Raises ArtifactError when the artifact is of another kind or its parts do not fit.
    """
    if artifact.kind != SendRecipe.kind:
        raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'send'")
    try:
        recipe = SendRecipe.model_validate(artifact.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{artifact.path}: its recipe does not fit: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    tokenizer = from_json(artifact.text(material.TOKENIZER))
    model = recipe.wrap(pythia.from_config(pythia.artifact_config(artifact)), tokenizer)
    load_tensors(model, artifact.weights(), source=str(artifact.path))
    model.masking = False
    return model.eval(), tokenizer, recipe
