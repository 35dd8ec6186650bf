import pytest

from jobs.spe import SpeJob
from jobs.trial import changed
from library.errors import InputError
from library.spe.recipe import SpeRecipe
from library.spe.settings import Encoding
from tune_spaces import spe
from tune_spaces.space import Choice


def test_every_value_of_the_space_is_one_that_the_job_takes():
    job = SpeJob()
    for path, domain in spe.space(job.recipe).varies.items():
        for value in getattr(domain, "values", None) or (domain.low, domain.high):
            found = changed(job, {path: value})
            for name in path.split("."):
                found = getattr(found, name)
            assert found == value


def test_eigenpairs_go_up_to_those_of_the_recipe():
    for most, values in ((37, (8, 16, 37)), (16, (8, 16)), (6, (6,))):
        found = spe.space(SpeRecipe(encoding=Encoding(eigenpairs=most))).varies["recipe.encoding.eigenpairs"]
        assert found == Choice(values)


def test_recipes_that_cannot_be_searched_are_refused():
    with pytest.raises(InputError, match="preset counting fixes"):
        spe.space(SpeRecipe(preset="counting"))
    with pytest.raises(InputError, match="not signnet"):
        spe.space(SpeRecipe(encoding=Encoding(method="signnet")))
