import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from library.errors import InputError
from tune_spaces.space import Choice, Limit, Real, Space, Whole

LIMIT = Limit("validation_loss", slack=0.01, penalty=100.0, reference={"recipe.selection": "none"})


def test_domains_are_what_optuna_draws_from():
    assert Real(1e-5, 1e-3, log=True).distribution() == FloatDistribution(1e-5, 1e-3, log=True)
    assert Whole(2, 5).distribution() == IntDistribution(2, 5)
    assert Choice(("a", None)).distribution() == CategoricalDistribution(("a", None))
    for domain in (Real(0.05, 0.4), Whole(0, 0), Choice((True, 3))):
        assert domain.distribution()._contains(domain.distribution().to_internal_repr(domain.example))


@pytest.mark.parametrize(
    "made",
    [
        lambda: Real(1.0, 1.0),
        lambda: Real(0.0, 1.0, log=True),
        lambda: Real(0.0, math.inf),
        lambda: Real(math.nan, 1.0),
        lambda: Whole(3, 2),
        lambda: Choice(()),
    ],
)
def test_empty_and_unfit_domains_are_refused(made):
    with pytest.raises(InputError, match=r"range .* is empty|at least one value"):
        made()


def test_an_excess_begins_where_the_slack_ends_and_is_relative():
    assert LIMIT.excess(2.0, 2.0) == 0.0
    assert LIMIT.excess(1.0, 2.0) == 0.0
    assert LIMIT.excess(2.015, 2.0) == 0.0
    assert LIMIT.excess(2.1, 2.0) == pytest.approx(0.04)
    assert LIMIT.excess(21.0, 20.0) == pytest.approx(LIMIT.excess(2.1, 2.0))
    assert LIMIT.excess(-1.0, -2.0) == pytest.approx(0.49)
    assert LIMIT.excess(0.5, 0.0) == pytest.approx(0.49)


def test_a_penalty_worsens_in_either_direction():
    least = Space("s", {}, metric="m", limit=LIMIT)
    most = Space("s", {}, metric="m", mode="max", limit=LIMIT)
    assert least.objective(3.0, 0.02) == pytest.approx(5.0)
    assert most.objective(3.0, 0.02) == pytest.approx(1.0)
    assert Space("s", {}, metric="m").objective(3.0) == 3.0
