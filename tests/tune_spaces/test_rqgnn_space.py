import pytest

from jobs.rqgnn import RqgnnJob
from jobs.trial import changed
from library.errors import InputError
from library.rqgnn.recipe import RqgnnRecipe
from tune_spaces import rqgnn


def test_every_value_of_the_space_is_one_that_the_job_takes():
    job = RqgnnJob()
    for path, domain in rqgnn.space(job.recipe).varies.items():
        for value in getattr(domain, "values", None) or (domain.low, domain.high):
            found = changed(job, {path: value})
            for name in path.split("."):
                found = getattr(found, name)
            assert found == value


def test_a_network_that_is_fixed_cannot_be_searched():
    for recipe in (RqgnnRecipe(preset="paper"), RqgnnRecipe(network="gin")):
        with pytest.raises(InputError, match="leave preset out"):
            rqgnn.space(recipe)
