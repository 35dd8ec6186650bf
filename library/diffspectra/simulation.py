"""Line lists of a molecule from its SMILES, by quantum chemistry: how the shipped data set was made.

GFN2-xTB (tblite) for the geometry, the vibrations, IR and Raman; density-fitted B3LYP/6-31G orbitals (PySCF) with the
simplified Tamm-Dancoff approximation for UV-Vis. Both packages come with the extra `simulate`.
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from library.diffspectra.building import constitution_smiles
from library.diffspectra.excitations import Orbitals, excitations
from library.diffspectra.lines import Lines
from library.diffspectra.molecules import ATOMIC_NUMBERS, MOST_ATOMS, Structure
from library.diffspectra.sdf import check_distances, embedded, structure_of
from library.diffspectra.vibrations import BOHR, Point, Surface, relax, vibrations
from library.errors import InputError
from library.files import write_bytes

PACKAGES = ("tblite", "pyscf")
ARRAYS = {  # of a file of line lists: type, and values in a row
    "z": (np.int8, 1),
    "formal_charge": (np.int8, 1),
    "pos": (np.float32, 3),
    "bonds": (np.int8, 3),
    "freq": (np.float32, 1),
    "ir": (np.float32, 1),
    "raman": (np.float32, 1),
    "uv_energy": (np.float32, 1),
    "uv_strength": (np.float32, 1),
}
ACCURACY = 0.01  # of the charges of GFN2-xTB


class Theory(Protocol):
    """What is computed of a molecule: a surface for its vibrations, and orbitals at a geometry in bohr."""

    def surface(self, numbers: np.ndarray) -> Surface: ...

    def orbitals(self, numbers: np.ndarray, positions: np.ndarray) -> Orbitals: ...


class Simulated(NamedTuple):
    """A molecule at its minimum, and its lines by modality."""

    smiles: str
    structure: Structure
    lines: dict[str, Lines]

    def record(self) -> dict[str, str | np.ndarray]:
        """The molecule as flat arrays, named as in a file of line lists."""
        ends = torch.triu(self.structure.bonds).nonzero()
        bonds = torch.cat([ends, self.structure.bonds[ends[:, 0], ends[:, 1], None]], 1)
        infrared, raman, ultraviolet = (self.lines[name] for name in ("ir", "raman", "uv"))
        tensors = {
            "z": torch.tensor(ATOMIC_NUMBERS)[self.structure.types],
            "formal_charge": self.structure.charges,
            "pos": self.structure.positions.flatten(),
            "bonds": bonds.flatten(),
            "freq": infrared.positions,
            "ir": infrared.strengths,
            "raman": raman.strengths,
            "uv_energy": ultraviolet.positions,
            "uv_strength": ultraviolet.strengths,
        }
        return {"smiles": self.smiles} | {name: part.numpy() for name, part in tensors.items()}


def simulate(smiles: str, theory: Theory, *, seed: int = 7, most_atoms: int = MOST_ATOMS) -> Simulated:
    """The relaxed geometry and the lines of one conformer, the lowest of four by MMFF94.

    Raises InputError for what `library.diffspectra.sdf.from_smiles` refuses, a charged molecule, a geometry that does
    not converge, has other bonds when it does, or is no minimum.
    """
    mol = embedded(smiles, "molecule", seed=seed, most_atoms=most_atoms)
    start = structure_of(mol, most_atoms=most_atoms)
    if int(start.charges.sum()):
        raise InputError(f"the molecule has the charge {int(start.charges.sum()):+d}; neutral ones alone are simulated")
    numbers = np.array(ATOMIC_NUMBERS)[start.types.numpy()]
    surface = theory.surface(numbers)
    positions = relax(surface, start.positions.double().numpy() / BOHR)
    angstrom = torch.from_numpy(positions - positions.mean(0)) * BOHR
    structure = Structure(angstrom.float(), start.types, start.charges, start.bonds)
    check_distances(structure, "the relaxed geometry")
    lines = vibrations(surface, numbers, positions).lines()
    energies, strengths = excitations(theory.orbitals(numbers, positions))
    lines["uv"] = Lines(*(torch.from_numpy(part).float() for part in (energies, strengths)))
    return Simulated(constitution_smiles(mol), structure, lines)


def write_line_lists(path: Path, records: Sequence[Mapping[str, Any]], parts: Mapping[str, torch.Tensor]) -> None:
    """Write records of molecules to an NPZ file that `library.diffspectra.data.load_molecules` reads.

    `parts` are the numbers of records for train, validation and test. Raises InputError for no records.
    """
    if not records:
        raise InputError("there are no simulated molecules to write")
    split = np.zeros(len(records), dtype=np.int8)
    for place, numbers in enumerate(parts.values()):
        split[numbers.numpy()] = place
    found: dict[str, np.ndarray] = {"smiles": np.array([record["smiles"] for record in records]), "split": split}
    for offsets, rows, width in (("atom", "z", 1), ("bond", "bonds", 3), ("mode", "freq", 1), ("uv", "uv_energy", 1)):
        counts = [len(record[rows]) // width for record in records]
        found[f"{offsets}_offset"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for name, (kind, width) in ARRAYS.items():
        flat = np.concatenate([np.asarray(record[name], dtype=kind) for record in records])
        found[name] = flat.reshape(-1, width) if width > 1 else flat
    content = io.BytesIO()
    np.savez_compressed(content, **found)
    write_bytes(path, content.getvalue())


def check_packages() -> None:
    """Raise InputError that says what to install when tblite or PySCF are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{' and '.join(missing)} {verb} not installed: pip install 'prism-spectral[simulate]'")


@dataclass(frozen=True)
class Xtb:
    """GFN2-xTB by tblite, and B3LYP/6-31G orbitals by PySCF."""

    def surface(self, numbers: np.ndarray) -> Surface:
        """Energies of GFN2-xTB. A calculation that does not converge raises InputError."""
        from tblite.interface import Calculator

        def compute(positions: np.ndarray, field: np.ndarray | None = None) -> Point:
            calculator = Calculator("GFN2-xTB", numbers, positions)
            calculator.set("accuracy", ACCURACY)
            calculator.set("verbosity", 0)
            if field is not None:
                calculator.add("electric-field", field.tolist())
            try:
                found = calculator.singlepoint()
            except RuntimeError as error:
                raise InputError(f"GFN2-xTB does not converge: {str(error).splitlines()[0]}") from error
            return Point(float(found.get("energy")), found.get("gradient"), found.get("dipole"))

        return compute

    def orbitals(self, numbers: np.ndarray, positions: np.ndarray) -> Orbitals:
        """Kohn-Sham orbitals of B3LYP/6-31G with density fitting on PySCF's coarsest grid."""
        from pyscf import dft, gto

        atoms = [[int(number), tuple(place)] for number, place in zip(numbers, positions, strict=True)]
        molecule = gto.M(atom=atoms, unit="Bohr", basis="6-31g", verbose=0)
        field = dft.RKS(molecule).density_fit()
        field.xc, field.grids.level = "b3lyp", 0
        field.kernel()
        if not field.converged:
            raise InputError("B3LYP/6-31G does not converge")
        values, vectors = np.linalg.eigh(molecule.intor("int1e_ovlp"))
        root = (vectors * np.sqrt(values)) @ vectors.T
        dipoles = field.mo_coeff.T @ molecule.intor("int1e_r") @ field.mo_coeff
        owner = np.repeat(np.arange(len(numbers)), [end - start for *_, start, end in molecule.aoslice_by_atom()])
        return Orbitals(
            numbers,
            positions,
            field.mo_energy,
            root @ field.mo_coeff,
            owner,
            dipoles,
            int(molecule.nelectron // 2),
        )
