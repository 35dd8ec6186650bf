"""Whether samples follow their spectrum: molecules of the training, asked by spectra that are perturbed anew.

A small network learns in minutes what the molecules of its training look like, long before it can build new ones. Which
of them it builds is then for the spectra to say. The control is the same network asked by another molecule's spectra.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, PositiveInt

from library import files
from library.artifact import open_artifact
from library.diffspectra import study
from library.diffspectra.data import Collate, MoleculeData
from library.diffspectra.evaluation import Truth, evaluate
from library.diffspectra.generation import Elucidator, Found
from library.diffspectra.noise import stream
from library.diffspectra.queries import Query
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.sampling import Sampling
from library.recipe import fit

OWN, OTHER, FORMULA, UNSEEN = "own spectra", "another's spectra", "own, told the formula", "own, never seen"
ASKED = (OWN, OTHER, FORMULA, UNSEEN)
MEASURES = ("valid", "stable", "formula", "constitution", "morgan_tanimoto", "best_morgan_tanimoto")


class ClosedSet(BaseModel, frozen=True, extra="forbid"):
    """How large the network of the closed set is, and what it is asked."""

    most_atoms: PositiveInt = 9
    """Atoms of the largest molecule."""
    steps: PositiveInt = 1200
    """Optimiser steps of 32 molecules."""
    width: PositiveInt = 64
    """Channels of an atom in the denoiser; a pair has a quarter of them."""
    blocks: PositiveInt = 4
    """Its blocks."""
    molecules: PositiveInt = 60
    """Molecules that candidates are sampled for, of those that were trained on and of those that were not."""
    samples: PositiveInt = 4
    """Samples of each."""
    sampler_steps: PositiveInt = 30
    """Steps of the sampler."""


class Asked(NamedTuple):
    """A row of numbers for each way of asking, and the never seen spectrum with the most candidates, plainly."""

    rows: list[dict[str, Any]]
    shown: dict[str, Any]


def closed_set(settings: ClosedSet, seed: int) -> Asked:
    """Train a network and ask it in each way of `ASKED`; all tell the molecule's number of atoms."""
    recipe = recipe_of(settings, seed)
    with files.scratch_folder() as folder:
        elucidator = Elucidator.from_artifact(open_artifact(fit(recipe, path=folder / "artifact").path))
    data = recipe.molecules()
    seen = data.parts["train"][: settings.molecules].tolist()
    unseen = torch.cat([data.parts["test"], data.parts["validation"]])[: settings.molecules].tolist()
    own = perturbed_queries(elucidator, data, seen, seed)
    formulas = [Query(one.spectra, formula=data.atoms.structure(one.key).formula(), key=one.key) for one in own]
    questions = {
        OWN: own,
        OTHER: exchanged(own),
        FORMULA: formulas,
        UNSEEN: perturbed_queries(elucidator, data, unseen, seed),
    }
    sampling = Sampling(samples=settings.samples, steps=settings.sampler_steps, seed=seed)
    found = {asked: elucidator.find(queries, sampling) for asked, queries in questions.items()}
    rows = [
        {"seed": seed, "asked": asked, **_measures(data, queries, found[asked], settings.samples)}
        for asked, queries in questions.items()
    ]
    query, answer = max(zip(questions[UNSEEN], found[UNSEEN], strict=True), key=lambda pair: len(pair[1].candidates))
    shown = {
        "number": query.key,
        "spectra": {name: torch.log10(1 + one).tolist() for name, one in query.spectra.items()},
        "candidates": [(one.smiles, one.count, one.score) for one in answer.candidates],
        "truth": Truth(data.atoms.structure(query.key)).smiles,
    }
    return Asked(rows, shown)


def recipe_of(settings: ClosedSet, seed: int) -> DiffSpectraRecipe:
    """The recipe of the network; its spectra are perturbed in training."""
    sizes = settings.model_dump(include={"most_atoms", "steps", "width", "blocks"})
    recipe = study.recipe_of(study.Study(**sizes), seed, "all")
    return recipe.model_copy(update={"warmup": settings.steps // 12, "average": 0.995})


def perturbed_queries(elucidator: Elucidator, data: MoleculeData, numbers: Sequence[int], seed: int) -> list[Query]:
    """Queries by spectra as in training, perturbed by draws of their own."""
    reader = Collate(elucidator.modalities, elucidator.recipe.broadening, elucidator.recipe.augmentation)
    signals = [{name: read(number) for name, read in data.signals.items()} for number in numbers]
    keys = torch.tensor([stream(seed, number) for number in numbers])
    spectra = reader.intensities(signals, keys, perturbed=True)
    return [
        Query({name: rows[place] for name, rows in spectra.items()}, int(data.sizes[number]), key=number)
        for place, number in enumerate(numbers)
    ]


def exchanged(queries: Sequence[Query]) -> list[Query]:
    """Each query with the spectra of the next one in order of size, the last with those of the first."""
    order = sorted(queries, key=lambda query: query.size)
    return [
        Query(other.spectra, one.size, key=one.key) for one, other in zip(order, order[1:] + order[:1], strict=True)
    ]


def _measures(data: MoleculeData, queries: Sequence[Query], found: Sequence[Found], samples: int) -> dict[str, float]:
    truths = {query.key: data.atoms.structure(query.key) for query in queries}
    answers = {query.key: own.samples for query, own in zip(queries, found, strict=True)}
    metrics = evaluate(truths, answers, at=(samples,)).metrics
    return {name: metrics[name] for name in MEASURES} | {"found": metrics[f"constitution@{samples}"]}
