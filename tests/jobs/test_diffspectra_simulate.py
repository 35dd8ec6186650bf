"""The job simulates every constitution once, wherever it runs, and sets aside what fails."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from jobs.diffspectra_simulate import DiffSpectraSimulateJob, read_smiles
from library.diffspectra.data import load_molecules
from library.errors import InputError
from tests.library.springs import SpringTheory

LINES = ["CCO ethanol", "# a comment", "", "OCC", "C=O", "CF", "C1CC", "CC", "C#N", "CCCl", "O", "N"]


class SpringJob(DiffSpectraSimulateJob, frozen=True, extra="forbid"):
    """The job with springs in place of quantum chemistry."""

    def theory(self) -> SpringTheory:
        return SpringTheory()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.smi"
    path.write_text("\n".join(LINES))
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_molecules_are_simulated_once_and_failures_set_aside(source: Path, tmp_path: Path) -> None:
    fractions = (0.5, 0.25, 0.25)
    report = SpringJob(source=(str(source),), out=str(tmp_path / "lines.npz"), fractions=fractions).run()
    data = load_molecules(str(tmp_path / "lines.npz"))
    assert data.smiles == ("CCO", "C=O", "CC", "C#N", "O", "N")
    assert report.metrics["molecules"] == len(data) == 6
    assert report.metrics["repeated"] == 1
    assert report.tables["molecules"]["molecules"].sum() == 6
    reasons = dict(report.tables["failures"].itertuples(index=False))
    assert reasons.keys() == {"C1CC", "CF", "CCCl"}
    assert reasons["CF"] == "there are no springs for fluorine"
    assert "not a SMILES" in reasons["C1CC"]
    assert "the element Cl" in reasons["CCCl"]
    again = SpringJob(
        source=(str(source),), out=str(tmp_path / "again.npz"), fractions=fractions, concurrency=1, limit=5
    ).run()
    other = load_molecules(str(tmp_path / "again.npz"))
    assert again.metrics["molecules"] == 4
    for index in range(4):
        for modality in ("uv", "ir", "raman"):
            one, two = data.signals[modality](index), other.signals[modality](index)
            torch.testing.assert_close(tuple(one), tuple(two), rtol=0, atol=0)
    (tmp_path / "fluorine.smi").write_text("CF\nFC(F)F\n")
    with pytest.raises(InputError, match=r"none of 2 molecules could be simulated; first: there are no springs"):
        SpringJob(source=(str(tmp_path / "fluorine.smi"),), out=str(tmp_path / "none.npz")).run()
    assert not (tmp_path / "none.npz").exists()


def test_tables_of_smiles_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"smiles": ["C", None, "CC"], "other": 1})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "b.parquet")
    assert read_smiles((str(tmp_path / "a.csv"), str(tmp_path / "b.parquet")), "smiles") == ["C", "CC", "C", "CC"]
    with pytest.raises(InputError, match=r"a.csv has no column 'SMILES'; it has .*smiles, other"):
        read_smiles((str(tmp_path / "a.csv"),), "SMILES")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", "C", r"ends in none of .smi, .txt, .csv, .parquet"),
        ("a.smi", "# nothing\n\n", "hold no SMILES"),
        ("a.parquet", "PAR1 nothing", "cannot be read"),
        ("b.smi", None, "b.smi"),
    ],
)
def test_bad_sources_are_one_clear_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_smiles((str(tmp_path / name),), "smiles")
    assert "\n" not in str(caught.value)


def test_missing_packages_are_said_before_anything_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.diffspectra.simulation.PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="no_such_package is not installed"):
        DiffSpectraSimulateJob(source=(str(source),), out=str(tmp_path / "lines.npz")).run()
