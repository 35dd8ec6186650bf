"""Answers as plain values, which JSON keeps: candidates with geometries, failures, and judgements where truth is known.

One answer is a dict: name; error (why the spectra could not be read, else empty); modalities, warnings, failures,
atom_counts; candidates (rank, smiles, count, score, penalty, elements, charges, bonds, positions); truth (SMILES) and
judged (one judgement for each sample), or None where nothing is known.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from library.diffspectra.building import build
from library.diffspectra.data import MoleculeData
from library.diffspectra.entries import checked
from library.diffspectra.evaluation import Evaluation, Judgement, Truth, summarise
from library.diffspectra.generation import Elucidator, Found
from library.diffspectra.molecules import ELEMENTS, Structure
from library.diffspectra.queries import Query
from library.diffspectra.ranking import Candidate
from library.diffspectra.sampling import Sampling
from library.diffspectra.similarity import Similarity
from library.errors import InputError

COLUMNS = ("molecule", "rank", "smiles", "count", "score", "penalty", "truth", "right")


def answer_entries(
    elucidator: Elucidator, entries: Sequence[dict[str, Any]], sampling: Sampling, *, keep: int, first: int = 0
) -> list[dict[str, Any]]:
    """Answers to entries of a file, in order; one that cannot be read has the reason in `error`.

    The key of an entry, from which its noise is drawn, is its place, counted from `first`.
    """
    queries: dict[int, Query] = {}
    errors: dict[int, str] = {}
    for place, values in enumerate(entries):
        try:
            entry = checked(values)
            told = {"atoms": entry.atoms, "formula": entry.formula, "key": first + place}
            queries[place] = elucidator.query(entry.spectra, **told)
            elucidator.check(queries[place])
        except InputError as error:
            queries.pop(place, None)
            errors[place] = str(error)
    found = elucidator.find(list(queries.values()), sampling) if queries else []
    answers = dict(zip(queries, found, strict=True))
    return [
        _answer(str(values["name"]), answers.get(place), errors.get(place, ""), keep)
        for place, values in enumerate(entries)
    ]


def answer_molecules(
    elucidator: Elucidator,
    data: MoleculeData,
    numbers: Sequence[int],
    sampling: Sampling,
    *,
    told: str,
    keep: int,
    mces: bool = False,
) -> list[dict[str, Any]]:
    """Answers to the spectra of molecules of a data set, judged; `told` is nothing, atoms or formula."""
    queries = elucidator.queries(data, numbers, sized=told == "atoms")
    structures = [data.atoms.structure(number) for number in numbers]
    if told == "formula":
        queries = [
            Query(query.spectra, formula=structure.formula(), key=query.key)
            for query, structure in zip(queries, structures, strict=True)
        ]
    answers = []
    for number, structure, found in zip(numbers, structures, elucidator.find(queries, sampling), strict=True):
        truth = Truth(structure)
        judged = [_plain(truth.judge(sample, mces=mces)) for sample in found.samples]
        answers.append(_answer(str(number), found, "", keep) | {"truth": truth.smiles, "judged": judged})
    return answers


def evaluated(answers: Mapping[int, Mapping[str, Any]], at: Sequence[int]) -> Evaluation:
    """The metrics of judged answers, as `evaluation.evaluate` has them."""
    judged, places = {}, {}
    for number, answer in answers.items():
        ranked = [one["smiles"] for one in answer["candidates"]]
        place = ranked.index(answer["truth"]) + 1 if answer["truth"] in ranked else None
        judged[number], places[number] = [_judgement(values) for values in answer["judged"]], (answer["truth"], place)
    return summarise(judged, places, at=at)


def candidate_rows(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each candidate, with the COLUMNS; `right` is None where nothing is known."""
    return [
        {
            "molecule": answer["name"],
            "truth": answer["truth"],
            "right": None if answer["truth"] is None else one["smiles"] == answer["truth"],
            **{name: one[name] for name in ("rank", "smiles", "count", "score", "penalty")},
        }
        for answer in answers
        for one in answer["candidates"]
    ]


def sdf_blocks(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The candidates as entries of an SD file, with geometry, and molecule, rank and score as properties."""
    from rdkit import Chem

    for answer in answers:
        for one in answer["candidates"]:
            mol = build(structure_of(one)).mol
            mol.SetProp("_Name", f"{answer['name']} candidate {one['rank']}")
            block = Chem.MolToMolBlock(mol)
            properties = {"molecule": answer["name"]} | {name: one[name] for name in ("rank", "smiles", "score")}
            lines = [f">  <{name}>\n{value}\n" for name, value in properties.items()]
            yield "\n".join([block.rstrip("\n"), *lines, "$$$$\n"])


def structure_of(candidate: Mapping[str, Any]) -> Structure:
    """The structure of a candidate."""
    n = len(candidate["elements"])
    bonds = torch.zeros(n, n, dtype=torch.int64)
    for i, j, order in candidate["bonds"]:
        bonds[i, j] = bonds[j, i] = order
    types = torch.tensor([ELEMENTS.index(element) for element in candidate["elements"]])
    return Structure(torch.tensor(candidate["positions"]), types, torch.tensor(candidate["charges"]), bonds)


def _answer(name: str, found: Found | None, error: str, keep: int) -> dict[str, Any]:
    plain = {
        "modalities": list(found.modalities) if found else [],
        "warnings": list(found.warnings) if found else [],
        "failures": found.failures if found else {},
        "atom_counts": found.atom_counts if found else None,
        "candidates": [_candidate(one, rank) for rank, one in enumerate(found.candidates[:keep], 1)] if found else [],
    }
    return {"name": name, "error": error, **plain, "truth": None, "judged": None}


def _candidate(candidate: Candidate, rank: int) -> dict[str, Any]:
    structure = candidate.structure
    pairs = torch.triu(structure.bonds, 1).nonzero()
    orders = structure.bonds[pairs[:, 0], pairs[:, 1], None]
    return {
        "rank": rank,
        **{name: getattr(candidate, name) for name in ("smiles", "count", "score", "penalty")},
        "elements": [ELEMENTS[place] for place in structure.types.tolist()],
        "charges": structure.charges.tolist(),
        "bonds": torch.cat([pairs, orders], 1).tolist(),
        "positions": [[round(value, 4) for value in row] for row in structure.positions.tolist()],
    }


def _plain(judgement: Judgement) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, Similarity) else value for name, value in judgement._asdict().items()
    }


def _judgement(values: Mapping[str, Any]) -> Judgement:
    return Judgement(
        **{name: Similarity(*value) if isinstance(value, list) else value for name, value in values.items()}
    )
