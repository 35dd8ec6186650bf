import numpy as np
import pytest

from jobs.hawq import HawqJob
from jobs.trial import changed
from library.errors import InputError
from library.hawq.recipe import HawqRecipe
from library.images.recipe import ClassifierRecipe
from tune_spaces import hawq


def test_every_value_of_the_space_is_one_that_the_job_takes():
    space = hawq.space(HawqRecipe())
    assert (space.metric, space.mode) == ("validation_accuracy", "max")
    assert space.others == {"validation_kib": "min", "validation_megabops": "min"}
    for path, domain in space.varies.items():
        for value in getattr(domain, "values", None) or (domain.low, domain.high):
            changed(HawqJob(), {path: value})
    sets = [changed(HawqJob(), {"recipe.bits": v}).recipe.bits for v in space.varies["recipe.bits"].values]
    assert sets[0] == HawqRecipe().bits
    assert all(min(bits) / max(bits) <= space.varies["recipe.fraction"].low for bits in sets)


@pytest.mark.parametrize(("network", "layers"), [("cnn8", 8), ("resnet20", 22)])
def test_baselines_name_bits_for_every_layer(network, layers):
    space = hawq.space(HawqRecipe(classifier=ClassifierRecipe(network=network)))
    assert list(space.baselines) == ["exact Omega", "equal bits", "random bits"]
    for group in ("equal bits", "random bits"):
        for values in space.baselines[group]:
            assert len(changed(HawqJob(), values).recipe.chosen) == layers
    drawn = [values["recipe.chosen"] for values in space.baselines["random bits"]]
    assert len(set(drawn)) == len(drawn)
    assert set(np.ravel(drawn)) <= set(HawqRecipe().bits)


def test_bits_that_are_chosen_already_are_not_searched():
    with pytest.raises(InputError, match="the bits are given, and the search is over them"):
        hawq.space(HawqRecipe(chosen=(8,) * 8))
