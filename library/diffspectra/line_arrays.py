"""Whether the arrays of an NPZ of line lists fit together: what is wrong is named before it is learned from."""

from collections.abc import Mapping

import numpy as np

from library.diffspectra.molecules import ATOMIC_NUMBERS, MOST_CHARGE, MOST_ORDER
from library.errors import InputError

CUTS = {
    "atom_offset": ("z", "formal_charge", "pos"),
    "bond_offset": ("bonds",),
    "mode_offset": ("freq", "ir", "raman"),
    "uv_offset": ("uv_energy", "uv_strength"),
}
"""Where each molecule's rows of some arrays begin; the last entry is their number."""
WHOLE = ("split", *CUTS, "z", "formal_charge", "bonds")
ARRAYS = ("smiles", "split", *(name for cut, rows in CUTS.items() for name in (cut, *rows)))
COLUMNS = {"pos": 3, "bonds": 3}
LARGEST = float(np.finfo(np.float32).max)
PART_NUMBERS = (0, 1, 2)


def check_arrays(arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Raise InputError, beginning with `name`, for arrays that are missing or do not fit.

    Checked are types, shapes, offsets, parts, elements, charges beyond ±1, finite positions, bonds between two atoms of
    a molecule with orders 1 to 3, that each molecule is connected, and that lines are finite with strengths from 0 on.
    """
    missing = [key for key in ARRAYS if key not in arrays]
    if missing:
        raise InputError(f"{name} has no array {missing[0]!r}; line lists have {', '.join(ARRAYS)}")
    for key in ARRAYS:
        _check_kind(arrays[key], key, name)
    _check_cuts(arrays, name)
    wrong = ~np.isin(arrays["split"], PART_NUMBERS)
    _refuse(wrong, np.arange(len(wrong)), f"{name}: split must be 0, 1 or 2")
    _check_atoms(arrays, name)
    _check_bonds(arrays, name)
    for cut in ("mode_offset", "uv_offset"):
        owner, (positions, *strengths) = _owners(arrays[cut]), CUTS[cut]
        _refuse(~_finite(arrays[positions]), owner, f"{name}: {positions} is not finite")
        for key in strengths:
            _refuse(~(_finite(arrays[key]) & (arrays[key] >= 0)), owner, f"{name}: {key} is negative or not finite")


def _check_kind(array: np.ndarray, key: str, name: str) -> None:
    kinds, what = ("iu", "whole numbers") if key in WHOLE else ("fiu", "numbers")
    if key == "smiles":
        kinds, what = "U", "text"
    tail = (COLUMNS[key],) if key in COLUMNS else ()
    if not array.shape or array.shape[1:] != tail or array.dtype.kind not in kinds:
        rows = f"(rows, {tail[0]})" if tail else "(rows,)"
        raise InputError(f"{name}: {key} is {array.dtype} {array.shape}; it must hold {what}, {rows}")


def _check_cuts(arrays: Mapping[str, np.ndarray], name: str) -> None:
    molecules = len(arrays["smiles"])
    if not molecules:
        raise InputError(f"{name} holds no molecules")
    if len(arrays["split"]) != molecules:
        raise InputError(f"{name}: {molecules} molecules have {len(arrays['split'])} entries of 'split'")
    for cut, keys in CUTS.items():
        ends = arrays[cut].astype(np.int64)
        for key in keys:
            rows = len(arrays[key])
            if len(ends) != molecules + 1 or ends[0] != 0 or ends[-1] != rows or (np.diff(ends) < 0).any():
                raise InputError(f"{name}: {cut} does not cut the {rows} rows of {key!r} into molecules")


def _check_atoms(arrays: Mapping[str, np.ndarray], name: str) -> None:
    sizes = np.diff(arrays["atom_offset"])
    _refuse(sizes < 1, np.arange(len(sizes)), f"{name}: a molecule needs at least one atom")
    owner, charges = _owners(arrays["atom_offset"]), arrays["formal_charge"]
    unknown = ~np.isin(arrays["z"], ATOMIC_NUMBERS)
    if unknown.any():
        _refuse(unknown, owner, f"{name}: atomic number {arrays['z'][unknown][0]} is none of {ATOMIC_NUMBERS}")
    beyond = (charges < -MOST_CHARGE) | (charges > MOST_CHARGE)
    _refuse(beyond, owner, f"{name}: formal charges of -{MOST_CHARGE} to {MOST_CHARGE} are allowed")
    _refuse(~_finite(arrays["pos"]).all(1), owner, f"{name}: a position is not finite")


def _check_bonds(arrays: Mapping[str, np.ndarray], name: str) -> None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    starts = arrays["atom_offset"].astype(np.int64)
    sizes, owner, bonds = np.diff(starts), _owners(arrays["bond_offset"]), arrays["bonds"].astype(np.int64)
    ends, orders = bonds[:, :2], bonds[:, 2]
    outside = ((ends < 0) | (ends >= sizes[owner][:, None])).any(1)
    _refuse(outside, owner, f"{name}: a bond is to an atom that is not there; atoms count from 0 in each molecule")
    _refuse(ends[:, 0] == ends[:, 1], owner, f"{name}: an atom is bonded to itself")
    _refuse((orders < 1) | (orders > MOST_ORDER), owner, f"{name}: bond orders must be 1 to {MOST_ORDER}, kekulized")
    first, second = (np.sort(ends, 1) + starts[owner][:, None]).T
    again = np.ones(len(bonds), dtype=bool)
    again[np.unique(first * starts[-1] + second, return_index=True)[1]] = False
    _refuse(again, owner, f"{name}: a bond is listed twice")
    graph = coo_array((np.ones(len(bonds)), (first, second)), shape=(starts[-1], starts[-1]))
    seen = np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]
    parts = np.bincount(_owners(starts)[seen], minlength=len(sizes))
    _refuse(parts != 1, np.arange(len(sizes)), f"{name}: bonds must join the atoms of a molecule into one part")


def _finite(values: np.ndarray) -> np.ndarray:
    """Whether each is, in single precision."""
    return np.abs(values) <= LARGEST


def _owners(ends: np.ndarray) -> np.ndarray:
    """The molecule of each row."""
    return np.repeat(np.arange(len(ends) - 1), np.diff(ends.astype(np.int64)))


def _refuse(wrong: np.ndarray, owner: np.ndarray, message: str) -> None:
    if wrong.any():
        raise InputError(f"{message} (molecule {owner[wrong][0]})")
