import pytest

from jobs.farms_balance import FarmsBalanceJob
from jobs.trial import changed
from library.errors import InputError
from library.farms.balance import Balance
from library.farms.recipe import BalancedClassifierRecipe
from tune_spaces import farms


def test_every_value_of_the_space_is_one_that_the_job_takes():
    job = FarmsBalanceJob()
    for path, domain in farms.space(job.recipe).varies.items():
        for value in getattr(domain, "values", None) or (domain.low, domain.high):
            found = changed(job, {path: value})
            for name in path.split("."):
                found = getattr(found, name)
            assert found == value


def test_a_recipe_that_cannot_be_searched_is_refused():
    with pytest.raises(InputError, match=r"balance\.high"):
        farms.space(BalancedClassifierRecipe(balance=Balance(high=1.9)))
