"""Samples of one spectrum become ranked candidates: what was drawn most often comes first."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from library.diffspectra.building import Built, build
from library.diffspectra.molecules import Structure
from library.errors import InputError


class Candidate(NamedTuple):
    """A constitution that was drawn.

    smiles     canonical, without stereo
    count      how many samples have it
    score      count over all samples that were drawn, valid or not
    penalty    the least of its samples' penalties; None where there are none
    structure  the sample of it with the least penalty, else the first
    samples    the numbers of its samples
    """

    smiles: str
    count: int
    score: float
    penalty: float | None
    structure: Structure
    samples: tuple[int, ...]


class Ranking(NamedTuple):
    """Candidates, best first, and how often samples were none, by reason."""

    candidates: list[Candidate]
    failures: dict[str, int]


def rank(
    samples: Sequence[Structure], *, penalties: Tensor | None = None, formula: Mapping[str, int] | None = None
) -> Ranking:
    """Rank the samples of one spectrum by how often each constitution was drawn.

    Equal counts are ordered by the least of the samples' `penalties` (n,), such as denoising losses or distances of
    computed spectra, then by which came first. A sample is no candidate where RDKit refuses it, it falls into parts, it
    lacks hydrogens, or its formula is not the one that is given.

    Raises InputError for no samples, or penalties that are not as many.
    """
    if not samples:
        raise InputError("there are no samples to rank")
    if penalties is not None and len(penalties) != len(samples):
        raise InputError(f"{len(samples)} samples have {len(penalties)} penalties")
    weights = [0.0] * len(samples) if penalties is None else penalties.tolist()
    members: dict[str, list[int]] = {}
    failures: Counter[str] = Counter()
    for number, sample in enumerate(samples):
        built = build(sample)
        reason = failure(built) or _other_formula(sample, formula)
        if reason:
            failures[reason] += 1
        else:
            members.setdefault(built.smiles, []).append(number)
    found = []
    for smiles, numbers in members.items():
        best = min(numbers, key=weights.__getitem__)
        penalty = None if penalties is None else weights[best]
        share = len(numbers) / len(samples)
        found.append(Candidate(smiles, len(numbers), share, penalty, samples[best], tuple(numbers)))
    found.sort(key=lambda one: (-one.count, one.penalty or 0.0, one.samples[0]))
    return Ranking(found, dict(failures.most_common()))


def failure(built: Built) -> str:
    """Why a built molecule is no candidate, in few words; empty for one that is."""
    if built.mol is None:
        return "valence"
    if built.parts > 1:
        return "several parts"
    return "missing hydrogens" if built.radicals else ""


def _other_formula(sample: Structure, formula: Mapping[str, int] | None) -> str:
    if formula is None or sample.formula() == {element: count for element, count in formula.items() if count}:
        return ""
    return "another formula"
