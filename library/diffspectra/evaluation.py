"""Honest evaluation: how often a molecule is found, samples grouped by molecule, failures counted.

Why not the paper's accuracy alone: spectra of mirror images are equal and the network cannot tell them apart, but the
released metrics do. Its SMILES never match for a molecule with stereo; its InChIKeys, made with 3D positions, match for
a chiral one by the toss of a coin. Both stand beside ours, named `paper_...`, over the samples that could be built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from library.diffspectra.alignment import align
from library.diffspectra.building import build, constitution_smiles, with_stereo
from library.diffspectra.mces import empty_distance, mces_distance
from library.diffspectra.molecules import Structure, check_finite
from library.diffspectra.ranking import failure, rank
from library.diffspectra.similarity import Similarity, connectivity, inchikey, similarity
from library.diffspectra.stability import released_smiles, stability_by_bonds
from library.diffspectra.stereo import same_stereo
from library.errors import InputError

if TYPE_CHECKING:
    from rdkit.Chem import Mol


class Judgement(NamedTuple):
    """What is said of one sample. Numbers are 0 or 1 unless they are similarities; None takes no part in a mean.

    valid         one connected molecule without unpaired electrons
    stable        all valences allowed, by the paper's table
    formula       the atoms are those of the truth
    connectivity  equal first blocks of the InChIKey, for which mobile hydrogens have no place
    constitution  the bonds are right: equal canonical SMILES without stereo
    stereo        its stereo centres and double bonds are too, or those of its mirror image are
    rmsd          in angstrom, of the better mirror image, over all symmetries; of a right constitution alone
    similarity    to the truth, in the paper's measures; zeros for a sample that is not valid
    mces          distance to the truth; of a sample that is not valid, that of nothing at all; None where not asked
    paper_smiles, paper_inchikey, paper_similarity  the released metrics; None where the molecule cannot be built
    """

    valid: bool
    stable: bool
    formula: bool
    connectivity: bool
    constitution: bool
    stereo: bool
    rmsd: float | None
    similarity: Similarity
    mces: float | None
    paper_smiles: bool | None
    paper_inchikey: bool | None
    paper_similarity: Similarity | None


@dataclass(frozen=True, eq=False)
class Truth:
    """The right answer, and what it is compared by. Raises InputError where it cannot be built."""

    structure: Structure

    @cached_property
    def mol(self) -> "Mol":
        """With stereo from its geometry."""
        built = build(self.structure)
        if failure(built):
            raise InputError(f"a true molecule cannot be built: {built.problem or failure(built)}")
        return with_stereo(built.mol)

    @cached_property
    def smiles(self) -> str:
        """Canonical, without stereo."""
        return constitution_smiles(self.mol)

    @cached_property
    def inchikey(self) -> str:
        """As the released code makes it, from the positions."""
        return inchikey(self.mol)

    def judge(self, sample: Structure, *, mces: bool = False) -> Judgement:
        """Compare a sample. `mces` asks for the distance too, which costs up to a second.

        Raises InputError for positions that are not finite.
        """
        check_finite(sample, "a sample")
        built = build(sample)
        valid = not failure(built)
        constitution = valid and built.smiles == self.smiles
        stereo = constitution and same_stereo(self.structure, sample)
        released = build(sample, filled=True, restrict_charges=True).mol
        distance = None
        if mces:
            distance = self._distance(built.mol) if valid else empty_distance(self.mol)
        return Judgement(
            valid=valid,
            stable=stability_by_bonds(sample).stable,
            formula=sample.formula() == self.structure.formula(),
            connectivity=valid and connectivity(built.mol) == self.inchikey[:14],
            constitution=constitution,
            stereo=stereo,
            rmsd=align(self.structure, sample, mirror=True).rmsd if constitution else None,
            similarity=self._similarity(built.mol) if valid else NOTHING,
            mces=distance,
            paper_smiles=None if released is None else released_smiles(released) == released_smiles(self.mol),
            paper_inchikey=None if released is None else inchikey(released) == self.inchikey,
            paper_similarity=None if released is None else self._similarity(released),
        )

    @cached_property
    def _compared(self) -> dict[tuple[str, str], Any]:
        """What was found of a constitution before: samples of one spectrum repeat."""
        return {}

    def _similarity(self, mol: "Mol") -> Similarity:
        key = ("similarity", released_smiles(mol))
        if key not in self._compared:
            self._compared[key] = similarity(self.mol, mol)
        return self._compared[key]

    def _distance(self, mol: "Mol") -> float:
        key = ("mces", constitution_smiles(mol))
        if key not in self._compared:
            self._compared[key] = mces_distance(self.mol, mol).distance
        return self._compared[key]


NOTHING = Similarity(*[0.0] * len(Similarity._fields))


class Evaluation(NamedTuple):
    """Means over molecules, their standard errors over molecules, and one row for each molecule."""

    metrics: dict[str, float]
    errors: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    truths: Mapping[int, Structure],
    samples: Mapping[int, Sequence[Structure]],
    *,
    at: Sequence[int] = (1, 5, 10),
    mces: bool = False,
) -> Evaluation:
    """Judge the samples of every molecule, by its number in `truths`.

    A molecule without samples counts as not found. Raises InputError for no molecules, no samples, or samples of a
    molecule that is not among the truths.
    """
    stray = samples.keys() - truths.keys()
    if stray:
        raise InputError(f"there are samples of molecule {min(stray)}, which is not among the true ones")
    judged = {}
    places = {}
    for number, structure in truths.items():
        truth, drawn = Truth(structure), list(samples.get(number, ()))
        judged[number] = [truth.judge(sample, mces=mces) for sample in drawn]
        ranked = [one.smiles for one in rank(drawn).candidates] if drawn else []
        places[number] = (truth.smiles, ranked.index(truth.smiles) + 1 if truth.smiles in ranked else None)
    return summarise(judged, places, at=at)


def summarise(
    judged: Mapping[int, Sequence[Judgement]],
    places: Mapping[int, tuple[str, int | None]],
    *,
    at: Sequence[int] = (1, 5, 10),
) -> Evaluation:
    """Put judgements together; `places` are each molecule's SMILES and its rank among the candidates, from 1.

    Metrics ending in @k say in how many molecules one of k samples is right, by the unbiased estimate
    1 - C(n - c, k) / C(n, k) from the c right ones of a molecule's n; k beyond the samples is left out.
    `independent@k` is 1 - (1 - mean)^k, what samples shuffled over molecules would give: more than the truth (Jensen).
    `top@k` is over ranked candidates.
    """
    drawn = [len(found) for found in judged.values()]
    if not drawn or not max(drawn):
        raise InputError("there are no samples to evaluate")
    rows = [_row(number, *places[number], found) for number, found in judged.items()]
    columns: dict[str, list[float | None]] = {}
    for name in rows[0]:
        if name not in ("number", "smiles", "samples", "place"):
            columns[name] = [row[name] for row in rows]
    for k in (k for k in at if k <= min(size for size in drawn if size)):
        for kind in ("constitution", "stereo"):
            right = [sum(getattr(one, kind) for one in found) for found in judged.values()]
            columns[f"{kind}@{k}"] = [right_of(n, c, k) if n else 0.0 for n, c in zip(drawn, right, strict=True)]
        columns[f"top@{k}"] = [float(row["place"] is not None and row["place"] <= k) for row in rows]
    metrics, errors = {}, {}
    for name, values in columns.items():
        known = np.array([value for value in values if value is not None], dtype=float)
        if len(known):
            metrics[name] = float(known.mean())
            errors[name] = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else float("nan")
    for k in (int(name.removeprefix("constitution@")) for name in list(metrics) if name.startswith("constitution@")):
        metrics[f"independent@{k}"] = 1 - (1 - metrics["constitution"]) ** k
    metrics |= {"molecules": float(len(rows)), "samples": float(sum(drawn))}
    return Evaluation(metrics, errors, rows)


def right_of(samples: int, right: int, k: int) -> float:
    """The chance that k of `samples`, drawn without return, hold one of the `right` ones: 1 - C(n - c, k) / C(n, k).

    Raises InputError for k outside 1 to the number of samples.

    >>> right_of(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise InputError(f"of {samples} samples, 1 to {samples} can be drawn, not {k}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def _row(number: int, smiles: str, place: int | None, found: Sequence[Judgement]) -> dict[str, Any]:
    """The means over one molecule's samples; without samples nothing was right."""
    row: dict[str, Any] = {"number": number, "smiles": smiles, "samples": len(found), "place": place}
    for name in ("valid", "stable", "formula", "connectivity", "constitution", "stereo"):
        row[name] = _mean([float(getattr(one, name)) for one in found]) or 0.0
    for name in Similarity._fields:
        values = [getattr(one.similarity, name) for one in found]
        row[name] = _mean(values) or 0.0
        if name == "morgan_tanimoto":
            row[f"best_{name}"] = max(values, default=0.0)
    row["mces"] = _mean([one.mces for one in found if one.mces is not None])
    row["rmsd"] = _mean([one.rmsd for one in found if one.rmsd is not None])
    for name in ("paper_smiles", "paper_inchikey"):
        row[name] = _mean([float(value) for one in found if (value := getattr(one, name)) is not None])
    for name in Similarity._fields:
        row[f"paper_{name}"] = _mean([getattr(s, name) for one in found if (s := one.paper_similarity) is not None])
    return row


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
