"""The questions of the closed set: perturbed anew, alike for a seed, and exchanged without losing a molecule."""

import torch

from library.diffspectra.closed_set import ClosedSet, exchanged, perturbed_queries, recipe_of
from library.diffspectra.generation import Elucidator
from library.diffspectra.queries import Query

SMALL = ClosedSet(most_atoms=6, steps=2, width=24, blocks=1)


def test_spectra_are_perturbed_by_draws_of_their_own():
    recipe = recipe_of(SMALL, seed=0)
    data = recipe.molecules()
    elucidator = Elucidator(recipe.network(), recipe, areas={})
    numbers = data.parts["train"][:3].tolist()
    clean = elucidator.queries(data, numbers)
    first, again, other = (perturbed_queries(elucidator, data, numbers, seed) for seed in (0, 0, 1))
    for place, number in enumerate(numbers):
        assert first[place].key == number
        assert first[place].size == clean[place].size == data.sizes[number]
        for name, spectrum in first[place].spectra.items():
            assert torch.equal(spectrum, again[place].spectra[name])
            assert not torch.equal(spectrum, other[place].spectra[name])
            assert not torch.equal(spectrum, clean[place].spectra[name])


def test_every_molecule_is_asked_by_anothers_spectra_of_the_closest_size():
    sizes = (5, 4, 5, 4, 9)
    queries = [Query({"ir": torch.full((3501,), float(key))}, size, key=key) for key, size in enumerate(sizes)]
    found = exchanged(queries)
    assert {one.key: one.size for one in found} == {one.key: one.size for one in queries}
    lenders = {one.key: int(one.spectra["ir"][0]) for one in found}
    assert sorted(lenders.values()) == [0, 1, 2, 3, 4]
    assert all(key != lender for key, lender in lenders.items())
    assert (lenders[1], lenders[0]) == (3, 2)
