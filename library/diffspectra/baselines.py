"""What simpler methods read off the same spectra: nearest neighbours, and kernel ridge regression.

Retrieval answers with the known molecule whose spectra are most alike; the ridge tells functional groups, elements and
the number of atoms. Both are bars for a learned encoder; where the answer is among the known, retrieval is the ceiling.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.broadening import Broadening, broaden
from library.diffspectra.building import build
from library.diffspectra.data import MoleculeData
from library.diffspectra.lines import Lines, chosen
from library.diffspectra.molecules import ELEMENTS
from library.diffspectra.similarity import functional_groups
from library.errors import InputError

CELL = 5  # points of the grid that are averaged: 0.1 eV, 5 cm-1
UV_SCALE = 10.0  # of UV-Vis intensities before the logarithm, which are small
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
LEAST_OCCURRENCES = 5  # of a group and of its absence among test molecules, for an area to mean something
NUMBERS_PER_CALL = 256


class Properties(NamedTuple):
    """What can be read off a molecule. groups: bool (n, groups); counts: int64 (n, elements), in order of ELEMENTS."""

    names: tuple[str, ...]
    groups: Tensor
    counts: Tensor


class RidgeScores(NamedTuple):
    """On molecules that were not learned from.

    auc          area under the ROC curve, mean over functional groups
    composition  share whose counts of H, C, N and O are all right
    atoms        share whose number of atoms is right
    ridge        the ridge that did best on the validation molecules
    """

    auc: float
    composition: float
    atoms: float
    ridge: float


def features(data: MoleculeData, numbers: Tensor, modalities: Sequence[str]) -> Tensor:
    """Coarse log spectra of molecules, side by side: log10(1 + I) averaged over cells of the grid, float64 (n, cells).

    Raises InputError for a modality that the data have not.
    """
    parts = []
    for modality in chosen(tuple(modalities)):
        if modality not in data.signals:
            raise InputError(f"{data.name} has no {modality} spectra; it has {', '.join(data.signals)}")
        rows = []
        for some in numbers.split(NUMBERS_PER_CALL):
            signals = [data.signals[modality](int(number)) for number in some]
            lines = isinstance(signals[0], Lines)
            intensities = broaden(signals, modality, Broadening()) if lines else torch.stack(signals).float()
            scaled = torch.log10(1 + (UV_SCALE if modality == "uv" else 1.0) * intensities.double())
            cells = scaled.shape[1] // CELL
            rows.append(scaled[:, : cells * CELL].unflatten(1, (cells, CELL)).mean(2))
        parts.append(torch.cat(rows))
    return torch.cat(parts, 1)


def nearest(known: Tensor, asked: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each asked spectrum the known one of greatest cosine, and the cosine: features (m, f), (n, f) to (n,), (n,).

    `allowed` (n, m) says which known molecules may answer, such as those with the right number of atoms; where none may
    the cosine is -inf. Raises InputError for features that do not fit.
    """
    if known.shape[1] != asked.shape[1] or not len(known):
        raise InputError(f"{tuple(asked.shape)} features cannot be looked up among {tuple(known.shape)}")
    cosines = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(known, dim=1).mT
    if allowed is not None:
        cosines = cosines.masked_fill(~allowed, -torch.inf)
    best, place = cosines.max(1)
    return place, best


def properties(data: MoleculeData, numbers: Tensor) -> Properties:
    """Functional groups and element counts of molecules."""
    found, counts = [], []
    for number in numbers.tolist():
        structure = data.atoms.structure(number)
        found.append(functional_groups(build(structure).mol))
        counts.append(torch.bincount(structure.types, minlength=len(ELEMENTS)))
    names = tuple(sorted({name for groups in found for name in groups}))
    groups = torch.tensor([[name in groups for name in names] for groups in found])
    return Properties(names, groups, torch.stack(counts))


def kernel_ridge(
    data: MoleculeData, modalities: Sequence[str], *, parts: Mapping[str, Tensor] | None = None
) -> RidgeScores:
    """Ridge regression in the span of the training spectra, its ridge chosen on the validation molecules.

    Features are standardised over the training molecules and divided by the root of how many they are; targets are
    groups, counts, and atoms.
    """
    parts = data.parts if parts is None else parts
    inputs = {name: features(data, parts[name], modalities) for name in ("train", "validation", "test")}
    mean, deviation = inputs["train"].mean(0), inputs["train"].std(0).clamp(min=1e-8)
    inputs = {name: (x - mean) / deviation / x.shape[1] ** 0.5 for name, x in inputs.items()}
    whole = properties(data, torch.cat([parts[name] for name in inputs]))
    sizes = [len(parts[name]) for name in inputs]
    truth = {
        name: torch.cat([groups.double(), counts.double(), counts.sum(1, keepdim=True).double()], 1)
        for name, groups, counts in zip(inputs, whole.groups.split(sizes), whole.counts.split(sizes), strict=True)
    }
    learned = truth["train"].mean(0)
    kernel = inputs["train"] @ inputs["train"].mT
    values, vectors = torch.linalg.eigh(kernel)
    projected = vectors.mT @ (truth["train"] - learned)
    best: tuple[float, float] | None = None
    for ridge in RIDGES:
        weights = vectors @ (projected / (values + ridge)[:, None])
        guess = inputs["validation"] @ inputs["train"].mT @ weights + learned
        error = float(((guess - truth["validation"]) / truth["train"].std(0).clamp(min=1e-8)).square().mean())
        if best is None or error < best[0]:
            best = (error, ridge)
    weights = vectors @ (projected / (values + best[1])[:, None])
    guess = inputs["test"] @ inputs["train"].mT @ weights + learned
    return _scores(guess, truth["test"], len(whole.names), best[1])


def _scores(guess: Tensor, truth: Tensor, groups: int, ridge: float) -> RidgeScores:
    from sklearn.metrics import roc_auc_score

    have = truth[:, :groups].sum(0)
    told = ((have >= LEAST_OCCURRENCES) & (len(truth) - have >= LEAST_OCCURRENCES)).nonzero().flatten().tolist()
    areas = [roc_auc_score(truth[:, i].numpy(), guess[:, i].numpy()) for i in told]
    counts = slice(groups, groups + ELEMENTS.index("F"))
    right = (guess[:, counts].round() == truth[:, counts]).all(1)
    atoms = guess[:, -1].round() == truth[:, -1]
    return RidgeScores(float(np.mean(areas)), float(right.double().mean()), float(atoms.double().mean()), ridge)
