"""A folder as QM9S comes, tables and graphs, becomes arrays on disk that give the same molecules and spectra."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data

from library.diffspectra.broadening import broaden
from library.diffspectra.building import build
from library.diffspectra.data import Collate, load_molecules
from library.diffspectra.lines import MODALITIES
from library.diffspectra.molecules import ATOMIC_NUMBERS
from library.diffspectra.qm9s import convert
from library.errors import InputError

NUMBERS = [11, 3, 25, 8, 40, 41, 52]
PLACES = [0, 100, 300, 500, 700, 900, 1300]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven molecules in QM9S's files, in other orders; the last has no Raman spectrum, one graph has no table row."""
    data = load_molecules()
    source = tmp_path / "qm9s"
    source.mkdir()
    graphs = []
    for number, place in zip(NUMBERS, PLACES, strict=True):
        structure = data.atoms.structure(place)
        z = torch.tensor(ATOMIC_NUMBERS)[structure.types]
        graphs.append(Data(z=z, pos=structure.positions, smile=data.smiles[place], number=number))
    graphs.append(Data(z=torch.tensor([9, 9]), pos=torch.zeros(2, 3), smile="FF", number=99))
    torch.save(graphs, source / "qm9s.pt")
    for name in MODALITIES:
        spectra = broaden([data.signals[name](place) for place in PLACES], name).numpy()
        rows = pd.DataFrame(spectra, index=NUMBERS)
        rows = rows.iloc[:-1] if name == "raman" else rows.iloc[::-1]
        rows.to_csv(source / f"{name}_boraden.csv")
    return source


def test_conversion_joins_by_number_and_keeps_half_precision(folder: Path, tmp_path: Path) -> None:
    found = convert(folder, tmp_path / "converted", fractions=(0.5, 0.25, 0.25))
    assert found.molecules == 6
    assert dict(found.left_out) == {52: "no raman spectrum", 99: "no uv spectrum"}
    data, shipped = load_molecules(str(tmp_path / "converted")), load_molecules()
    assert sorted(torch.cat(list(data.parts.values())).tolist()) == list(range(6))
    for index, place in enumerate(PLACES[:-1]):
        assert build(data.atoms.structure(index)).smiles == build(shipped.atoms.structure(place)).smiles
        for name in MODALITIES:
            exact = broaden([shipped.signals[name](place)], name)[0]
            torch.testing.assert_close(data.signals[name](index), exact, rtol=5e-4, atol=1e-7)
    samples = data.part("train")
    batch = Collate()([samples[i] for i in range(len(samples))], torch.arange(len(samples)))
    assert batch.spectra["ir"].shape == (len(samples), 3501)


def test_a_converted_folder_says_what_it_holds(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "a", fractions=(0.5, 0.25, 0.25))
    convert(folder, tmp_path / "b", fractions=(0.5, 0.25, 0.25))
    assert load_molecules(str(tmp_path / "a")).fingerprint == load_molecules(str(tmp_path / "b")).fingerprint
    (tmp_path / "a" / "ir.f16").unlink()
    load_molecules.cache_clear()
    with pytest.raises(InputError, match="a is no converted set of molecules"):
        load_molecules(str(tmp_path / "a"))


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    from rdkit import Chem

    from library.diffspectra.sdf import embedded

    (tmp_path / "mine").mkdir()
    with Chem.SDWriter(str(tmp_path / "mine" / "molecules.sdf")) as writer:
        for number, smiles in enumerate(("CCO", "CC=O", "CCN", "C#N")):
            mol = embedded(smiles)
            mol.SetProp("_Name", str(number))
            writer.write(mol)
    pd.DataFrame(np.ones((4, 3501))).to_csv(tmp_path / "mine" / "ir.csv")
    found = convert(tmp_path / "mine", tmp_path / "out", fractions=(0.5, 0.25, 0.25), simulated=False)
    data = load_molecules(str(tmp_path / "out"))
    assert found == (4, [])
    assert data.smiles == ["CCO", "CC=O", "CCN", "C#N"]
    assert list(data.signals) == ["ir"]
    assert not data.simulated


def edited(table: Path, change) -> None:
    frame = pd.read_csv(table, index_col=0)
    change(frame).to_csv(table)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ir", lambda frame: frame.iloc[:, :-1], "3501 columns; a number and 3501 points"),
        ("ir", lambda frame: -frame, "molecule 52 has intensities that are not within 0 to 65504"),
        ("raman", lambda frame: frame * np.inf, "molecule 11 has intensities"),
        ("uv", lambda frame: pd.concat([frame, frame]), "occurs twice"),
        ("uv", lambda frame: frame.astype(str) + "x", "no table of numbers"),
    ],
)
def test_tables_are_checked_and_nothing_is_left(folder: Path, tmp_path: Path, name: str, change, message: str) -> None:
    edited(folder / f"{name}_boraden.csv", change)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["qm9s"]


def test_missing_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has none of uv_boraden.csv"):
        convert(tmp_path, tmp_path / "converted")
    torch.save({"a": Path("x")}, folder / "qm9s.pt")
    with pytest.raises(InputError, match=r"qm9s.pt is no list of graphs that loads safely"):
        convert(folder, tmp_path / "converted")
    (folder / "qm9s.pt").unlink()
    with pytest.raises(InputError, match=r"neither qm9s.pt nor molecules.sdf"):
        convert(folder, tmp_path / "converted")
