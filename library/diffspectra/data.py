"""Data sets of molecules with their spectra: ragged arrays, samples by number, and batches broadened on the fly."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.broadening import Augmentation, Broadening, augmented, broaden, network_input, noisy
from library.diffspectra.line_arrays import ARRAYS, check_arrays
from library.diffspectra.lines import MODALITIES, Lines, chosen
from library.diffspectra.molecules import ATOMIC_NUMBERS, Atoms, MoleculeBatch, Structure, batch_of
from library.errors import InputError
from library.samples import sample_file

SAMPLE = "simulated_gfn2_lines.npz"
PARTS = ("train", "validation", "test")
Signal = Lines | Tensor
"""A spectrum as it is stored: lines, or intensities on the grid of its modality, (points,)."""


class Sample(NamedTuple):
    """A molecule, its spectra by modality, its number in the data set, and whether spectra are to be perturbed."""

    structure: Structure
    signals: dict[str, Signal]
    index: int
    perturbed: bool


@dataclass(frozen=True, eq=False)
class MoleculeData:
    """Molecules, their spectra, and which are for what.

    signals    modality -> what gives the stored spectrum of a molecule by its number
    smiles     of each molecule
    parts      train, validation and test: numbers of molecules, int64
    content    SHA-256 of the stored arrays
    simulated  whether spectra come from computations and not from measurements
    """

    name: str
    atoms: Atoms
    signals: Mapping[str, Callable[[int], Signal]]
    smiles: Sequence[str]
    parts: Mapping[str, Tensor]
    content: str
    simulated: bool

    def __len__(self) -> int:
        return len(self.atoms)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of content, parts and modalities."""
        found = sha256(" ".join((self.content, *self.signals)).encode())
        for name, part in self.parts.items():
            found.update(name.encode() + part.numpy().tobytes())
        return found.hexdigest()

    @property
    def sizes(self) -> Tensor:
        """Atoms of each molecule, int64."""
        return self.atoms.sizes

    def part(self, name: str, *, perturbed: bool = False) -> "MoleculeSamples":
        """The samples of a part. Raises InputError that lists the parts."""
        if name not in self.parts:
            raise InputError(f"{self.name} has no part {name!r}; it has {', '.join(self.parts)}")
        return MoleculeSamples(self, self.parts[name], perturbed=perturbed)

    def limited(self, *, most_atoms: int | None = None, modalities: tuple[str, ...] = MODALITIES) -> "MoleculeData":
        """The same with the molecules of at most `most_atoms` alone, and some of the modalities.

        Raises InputError when a part would be empty, or has not the modality.
        """
        missing = [name for name in chosen(modalities) if name not in self.signals]
        if missing:
            raise InputError(f"{self.name} has no {missing[0]} spectra; it has {', '.join(self.signals)}")
        parts = dict(self.parts)
        if most_atoms is not None:
            parts = {name: part[self.sizes[part] <= most_atoms] for name, part in parts.items()}
            empty = [name for name, part in parts.items() if not len(part)]
            if empty:
                raise InputError(f"no molecule of {self.name} for {empty[0]} has at most {most_atoms} atoms")
        return replace(self, parts=parts, signals={name: self.signals[name] for name in chosen(modalities)})


class MoleculeSamples:
    """A map-style data set over some of the molecules; `sizes` are their atoms, `numbers` their places in the data."""

    def __init__(self, data: MoleculeData, numbers: Tensor, *, perturbed: bool) -> None:
        self.data, self.numbers, self.perturbed = data, numbers, perturbed
        self.sizes = data.sizes[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.numbers[index])
        signals = {name: read(number) for name, read in self.data.signals.items()}
        return Sample(self.data.atoms.structure(number), signals, number, self.perturbed)


@dataclass(frozen=True)
class Collate:
    """Samples to a `MoleculeBatch`: the `collate` of a recipe.

    Lines are broadened, where the sample says so with perturbations drawn from its key; stored spectra get the noise
    alone. Then log10(1 + I).
    """

    modalities: tuple[str, ...] = MODALITIES
    broadening: Broadening = field(default_factory=Broadening)
    augmentation: Augmentation | None = None

    def __call__(self, samples: Sequence[Sample], keys: Tensor) -> MoleculeBatch:
        """One batch. Raises InputError for no samples or a modality that they have not."""
        if not samples:
            raise InputError("a batch needs at least one molecule")
        spectra = self.spectra([sample.signals for sample in samples], keys, samples[0].perturbed)
        return batch_of(
            [sample.structure for sample in samples], spectra, keys=keys, index=[sample.index for sample in samples]
        )

    def spectra(self, signals: Sequence[dict[str, Signal]], keys: Tensor, perturbed: bool = False) -> dict[str, Tensor]:
        """log10(1 + I) of each modality, float32 (B, points)."""
        return {name: network_input(one) for name, one in self.intensities(signals, keys, perturbed).items()}

    def intensities(
        self, signals: Sequence[dict[str, Signal]], keys: Tensor, perturbed: bool = False
    ) -> dict[str, Tensor]:
        """The intensities I of each modality, float32 (B, points)."""
        modalities = chosen(self.modalities)
        for modality in modalities:
            if modality not in signals[0]:
                raise InputError(f"the samples have no {modality} spectra; they have {', '.join(signals[0])}")
        rendered: dict[str, Tensor] = {}
        with_lines = [m for m in modalities if isinstance(signals[0][m], Lines)]
        augmentation = self.augmentation if perturbed else None
        if with_lines and augmentation:
            rendered |= augmented(signals, with_lines, self.broadening, augmentation, keys)
        for modality in modalities:
            if modality not in with_lines:
                stored = torch.stack([one[modality] for one in signals]).float()
                if augmentation:
                    place = MODALITIES.index(modality)
                    seeds = [torch.Generator().manual_seed((int(key) + place) % 2**63) for key in keys]
                    stored = noisy(stored, augmentation.noise, seeds)
                rendered[modality] = stored
            elif not augmentation:
                rendered[modality] = broaden([one[modality] for one in signals], modality, self.broadening)
        return {modality: rendered[modality] for modality in modalities}


@lru_cache(maxsize=4)
def load_molecules(source: str = "simulated") -> MoleculeData:
    """Molecules with spectra, by name or place.

    * `simulated`, shipped: 1335 molecules of QM9 with at most 7 heavy atoms, line lists by GFN2-xTB and sTDA;
    * an NPZ file in that layout, as the job `diffspectra-simulate` writes it;
    * a folder in the layout of QM9S after `library.diffspectra.qm9s.convert`.

    Raises InputError that says what is missing or malformed.

    >>> data = load_molecules()
    >>> len(data), len(data.parts["test"]), data.smiles[0]
    (1335, 133, 'C#C')
    """
    if source == "simulated":
        with sample_file("diffspectra", SAMPLE).open("rb") as stream:
            return read_lines(stream, "simulated")
    place = Path(source)
    if place.suffix == ".npz" and place.is_file():
        with place.open("rb") as stream:
            return read_lines(stream, place.name)
    if place.is_dir():
        from library.diffspectra.qm9s import read_folder

        return read_folder(place)
    raise InputError(
        f"no molecules at {source!r}; there are simulated, an NPZ file of line lists, and a converted folder"
    )


def split_by_constitution(
    smiles: Sequence[str], fractions: tuple[float, float, float], seed: int = 0
) -> dict[str, Tensor]:
    """Train, validation and test: numbers of molecules, equal SMILES never in two of them.

    Constitutions are permuted by NumPy's generator of that seed and cut. Raises InputError for fractions that do not
    sum to 1, or a part that stays empty.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions: {fractions} must be three positive numbers that sum to 1")
    _, group = np.unique(np.asarray(smiles, dtype=str), return_inverse=True)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(group.max() + 1 if len(group) else 0)
    edges = (np.cumsum(fractions)[:2] * len(order)).round().astype(int)
    part_of_group = np.empty(len(order), dtype=int)
    for part, groups in enumerate(np.split(order, edges)):
        if not len(groups):
            raise InputError(
                f"{len(order)} constitutions are too few for fractions {fractions}: {PARTS[part]} is empty"
            )
        part_of_group[groups] = part
    return {part: torch.from_numpy(np.flatnonzero(part_of_group[group] == i)) for i, part in enumerate(PARTS)}


def read_lines(stream: object, name: str) -> MoleculeData:
    """The data set of an NPZ of line lists, in the layout of the shipped sample's README.

    Raises InputError when it is no such file, or a part of it is missing or does not fit.
    """
    try:
        with np.load(stream, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{name} is no NPZ file of line lists: {str(error).splitlines()[0]}") from error
    check_arrays(found, name)
    content = sha256(b"".join(np.ascontiguousarray(found[key]).tobytes() for key in ARRAYS)).hexdigest()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in found.items() if value.dtype.kind in "fiu"}
    atoms = Atoms(
        tensors["atom_offset"].long(),
        tensors["pos"].float(),
        torch.from_numpy(np.searchsorted(ATOMIC_NUMBERS, found["z"])).to(torch.uint8),
        tensors["formal_charge"].to(torch.int8),
        tensors["bond_offset"].long(),
        tensors["bonds"].to(torch.uint8),
    )
    lines = {
        "uv": ("uv_offset", "uv_energy", "uv_strength"),
        "ir": ("mode_offset", "freq", "ir"),
        "raman": ("mode_offset", "freq", "raman"),
    }
    signals = {modality: _reader(*(tensors[key] for key in keys)) for modality, keys in lines.items()}
    parts = {part: torch.from_numpy(np.flatnonzero(found["split"] == i)) for i, part in enumerate(PARTS)}
    return MoleculeData(name, atoms, signals, tuple(map(str, found["smiles"])), parts, content, simulated=True)


def _reader(offsets: Tensor, positions: Tensor, strengths: Tensor) -> Callable[[int], Lines]:
    ends = offsets.tolist()
    positions, strengths = positions.float(), strengths.float()
    return lambda i: Lines(positions[ends[i] : ends[i + 1]], strengths[ends[i] : ends[i + 1]])
