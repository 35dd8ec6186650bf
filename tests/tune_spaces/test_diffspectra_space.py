from itertools import product

import pytest

from jobs.diffspectra import DiffSpectraJob
from jobs.trial import changed
from library.diffspectra.recipe import DiffSpectraRecipe
from library.errors import InputError
from tune_spaces import diffspectra


def test_every_value_of_the_space_is_one_that_the_job_takes():
    job = DiffSpectraJob()
    for path, domain in diffspectra.space(job.recipe).varies.items():
        for value in getattr(domain, "values", None) or (domain.low, domain.high):
            found = changed(job, {path: value})
            for name in path.split("."):
                found = getattr(found, name)
            assert found == value


def test_sizes_go_together():
    job = DiffSpectraJob()
    varies = diffspectra.space(job.recipe).varies
    names = [f"recipe.denoiser.{name}" for name in ("width", "pair_width", "heads")]
    for values in product(*(varies[name].values for name in names)):
        for blocks in (varies["recipe.denoiser.blocks"].low, varies["recipe.denoiser.blocks"].high):
            found = changed(job, {**dict(zip(names, values, strict=True)), "recipe.denoiser.blocks": blocks})
            assert found.recipe.denoiser.blocks == blocks


def test_a_preset_cannot_be_searched():
    with pytest.raises(InputError, match="preset paper fixes"):
        diffspectra.space(DiffSpectraRecipe(preset="paper"))
