"""What is asked: the spectra of an unknown molecule, some or all of them, and what else is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from library.diffspectra.broadening import network_input
from library.diffspectra.formulas import counted
from library.diffspectra.lines import MODALITIES, POINTS, known
from library.diffspectra.molecules import MOST_ATOMS
from library.errors import InputError


@dataclass(frozen=True, eq=False)
class Query:
    """An unknown molecule.

    spectra   modality -> intensities I on the grid of the modality, (points,), in the units of the training data
    atoms     how many atoms it has, hydrogens included, where that is known
    formula   how many of each element it has, where that is known; gives `atoms`
    key       from which, with the seed of the sampling, everything random is drawn
    warnings  what is to be known of how the spectra came about

    Raises InputError for no spectra, a modality or element that there is not, wrong lengths, and atoms that are not
    whole, outside 1 to 29 or at odds with the formula.
    """

    spectra: Mapping[str, Tensor]
    atoms: int | None = None
    formula: Mapping[str, int] | None = None
    key: int = 0
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.spectra:
            raise InputError(f"spectra: there are none; give one or more of {', '.join(MODALITIES)}")
        for modality, spectrum in self.spectra.items():
            if spectrum.shape != (POINTS[known(modality)],):
                raise InputError(f"spectra: {modality} {tuple(spectrum.shape)} must be ({POINTS[modality]},)")
        if self.atoms is not None and not isinstance(self.atoms, Integral):
            raise InputError(f"atoms: {self.atoms} is not a whole number")
        size = self.size
        if size is not None and not 1 <= size <= MOST_ATOMS:
            raise InputError(f"atoms: {size}; molecules of 1 to {MOST_ATOMS} atoms are allowed, hydrogens included")
        if self.formula is not None and self.atoms not in (None, size):
            raise InputError(f"atoms: {self.atoms} are given, but the formula has {size}")

    @property
    def size(self) -> int | None:
        """The number of atoms, where it is known. Raises InputError for a formula that cannot be."""
        return self.atoms if self.formula is None else sum(counted(self.formula).values())


def network_spectra(
    queries: Sequence[Query], modalities: tuple[str, ...], *, optional: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """log10(1 + I) of the modalities a network reads, each float32 (B, points), and which are there, (B, modalities).

    Spectra that are absent are zeros. The second is None where none may be absent, that is unless `optional`.
    Raises InputError for a query with none of the modalities, or without one that may not be absent.
    """
    present = torch.tensor([[modality in query.spectra for modality in modalities] for query in queries])
    for place, row in enumerate(present.tolist()):
        missing = [modality for modality, there in zip(modalities, row, strict=True) if not there]
        if len(missing) == len(modalities):
            given = ", ".join(queries[place].spectra)
            raise InputError(f"spectra: the model reads {', '.join(modalities)}, but {given} alone is given")
        if missing and not optional:
            raise InputError(
                f"spectra: {missing[0]} is missing; this model needs all of {', '.join(modalities)}, as it was "
                "trained without recipe.modality_dropout"
            )
    found = {
        modality: network_input(
            torch.stack([query.spectra.get(modality, torch.zeros(POINTS[modality])).float() for query in queries])
        )
        for modality in modalities
    }
    return found, present if optional else None
