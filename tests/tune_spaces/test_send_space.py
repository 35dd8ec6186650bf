import pytest

from library.artifact import write_artifact
from library.errors import InputError
from library.language import pythia
from library.language.tokens import ByteTokenizer
from library.recipe import seeded_model
from library.send.recipe import SendRecipe
from library.weights import state_tensors
from tune_spaces import send
from tune_spaces.space import Real, Whole


def test_a_new_model_is_searched_at_higher_rates_and_by_its_own_depth():
    for size, blocks in (("pythia-tiny", 4), ("pythia-160m", 12), ("pythia-1b", 16)):
        space = send.space(SendRecipe(lm=size))
        assert space.varies["recipe.freeze_blocks"] == Whole(0, blocks - 2)
        assert space.varies["recipe.lr"] == Real(1e-4, 1e-2, log=True)
    assert space.limit.reference == {"recipe.selection": "none"}
    assert (space.metric, space.mode) == ("eigenscore", "min")


def test_weights_that_learn_on_are_searched_at_the_papers_rates(tmp_path):
    pythia.load("pythia-tiny", vocab_rows=257).save_pretrained(tmp_path / "lm")
    recipe = SendRecipe(lm=str(tmp_path / "lm"), tokenizer="bytes", corpus="truthfulqa")
    model = seeded_model(recipe)
    texts = {"tokenizer.json": ByteTokenizer().to_json(), "config.json": model.lm.config.to_json_string(use_diff=False)}
    content = {"recipe": recipe.model_dump(mode="json"), "weights": state_tensors(model), "texts": texts}
    write_artifact(tmp_path / "artifact", kind="send", metrics={}, data="", **content)
    for place in ("lm", "artifact"):
        space = send.space(SendRecipe(lm=str(tmp_path / place)))
        assert space.varies["recipe.lr"] == Real(1e-5, 1e-3, log=True)
        assert space.varies["recipe.freeze_blocks"] == Whole(0, 2)


def test_every_value_of_the_space_is_one_that_the_recipe_takes():
    recipe = SendRecipe()
    for path, domain in send.space(recipe).varies.items():
        name = path.removeprefix("recipe.")
        values = getattr(domain, "values", None) or (domain.low, domain.high)
        for value in values:
            assert getattr(SendRecipe.model_validate(recipe.model_dump() | {name: value}), name) == value


def test_a_recipe_that_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(InputError, match="EigenScore is not measured with prompts=0"):
        send.space(SendRecipe(prompts=0))
    with pytest.raises(InputError, match="unknown model 'pythia-huge'"):
        send.space(SendRecipe(lm="pythia-huge"))
    with pytest.raises(InputError, match="cannot be loaded"):
        send.space(SendRecipe(lm=str(tmp_path)))
