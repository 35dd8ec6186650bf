"""Line lists of any number of molecules by quantum chemistry, one molecule per task, on Ray Data."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster import connect, storage
from jobs.job import Job
from jobs.report import Report
from library.diffspectra.molecules import MOST_ATOMS
from library.errors import InputError, PrismError

if TYPE_CHECKING:
    import pandas as pd

    from library.diffspectra.simulation import Theory

TEXTS = (".smi", ".txt")
TABLES = (".csv", ".parquet")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class DiffSpectraSimulateJob(Job, frozen=True, extra="forbid"):
    """Simulate UV-Vis, IR and Raman line lists of molecules into an NPZ file that `recipe.source` then names.

    GFN2-xTB and simplified Tamm-Dancoff calculations, about a second for a molecule of 15 atoms, with the extra
    `simulate` installed on all nodes. What fails is set aside, with the reason, in `failures` of the report.
    """

    job: ClassVar[str] = "diffspectra-simulate"

    source: tuple[str, ...] = Field(min_length=1)
    """Files: .smi or .txt with a SMILES at the start of each line, .csv or .parquet with a column of them."""
    out: str
    """The NPZ file that is written; an existing one is replaced."""
    column: str = "smiles"
    """The column of tables that holds the SMILES."""
    limit: PositiveInt | None = None
    """Simulate only the first so many constitutions; None takes all."""
    most_atoms: PositiveInt = MOST_ATOMS
    """Molecules with more atoms, hydrogens included, are set aside."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the constitutions to train, validate and test on."""
    seed: NonNegativeInt = 0
    """Seed of the split."""
    conformer_seed: NonNegativeInt = 7
    """Seed of the embedding that geometries start from."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each molecule."""
    concurrency: PositiveInt | None = None
    """Most molecules at a time; None leaves it to Ray. Changes nothing in the result."""

    def run(self) -> Report:
        """Simulate and write, whole or not at all.

        Raises InputError for sources that cannot be read or hold no SMILES, for missing packages, and when too few
        molecules are left for three parts.
        """
        import pandas as pd

        from library.diffspectra.data import split_by_constitution
        from library.diffspectra.simulation import write_line_lists

        began = time.monotonic()
        theory = self.theory()
        smiles, repeated, bad = _distinct(read_smiles(self.source, self.column))
        smiles = smiles[: self.limit]
        connect()
        records, failures = self._simulated(smiles, theory)
        failures = bad + failures
        if not records:
            raise InputError(
                f"source: none of {len(smiles)} molecules could be simulated; first: {failures[0]['reason']}"
            )
        parts = split_by_constitution([record["smiles"] for record in records], self.fractions, self.seed)
        write_line_lists(storage.local_path(self.out), records, parts)
        seconds = time.monotonic() - began
        report = Report(
            job=self.job,
            config=self.record(),
            metrics={
                "molecules": float(len(records)),
                "failures": float(len(failures)),
                "repeated": float(repeated),
                "molecules_per_second": len(records) / seconds,
            },
            tables={"molecules": _summary(records, parts)},
            folder=str(storage.local_path(self.out)),
            seconds=seconds,
        )
        if failures:
            report.tables["failures"] = pd.DataFrame(failures)
            report.notes.append(f"{len(failures)} molecules failed, such as {failures[0]['smiles']}")
        return report

    def theory(self) -> "Theory":
        """What computes a molecule. Raises InputError when its packages are missing."""
        from library.diffspectra.simulation import Xtb, check_packages

        check_packages()
        return Xtb()

    def _simulated(self, smiles: Sequence[str], theory: "Theory") -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Records of the molecules in the order of `smiles`, and what failed."""
        import ray

        _hush()
        rows = [{"number": number, "smiles": text} for number, text in enumerate(smiles)]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        compute = partial(simulate_row, theory=theory, seed=self.conformer_seed, most_atoms=self.most_atoms)
        try:
            found = dataset.map(compute, num_cpus=self.cpus_per_task, concurrency=self.concurrency).take_all()
        except Exception as error:  # Ray wraps what killed a task
            raise PrismError(f"the simulation failed: {_first_line(error)}") from error
        found.sort(key=lambda row: row["number"])
        good = [row["record"] for row in found if not row["reason"]]
        return good, [{"smiles": row["smiles"], "reason": row["reason"]} for row in found if row["reason"]]


def simulate_row(row: dict[str, Any], *, theory: "Theory", seed: int, most_atoms: int) -> dict[str, Any]:
    """The row with `record`, or why there is none in `reason`. Anything that one molecule raises stays with it."""
    from library.diffspectra.simulation import simulate

    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        found = simulate(row["smiles"], theory, seed=seed, most_atoms=most_atoms)
        record, reason = {key: _plain(value) for key, value in found.record().items()}, ""
    except Exception as error:  # foreign programs raise what they like
        record, reason = None, _first_line(error)
    return row | {"record": record, "reason": reason}


def read_smiles(sources: Sequence[str], column: str) -> list[str]:
    """The SMILES of all files, in order. Raises InputError for a file that cannot be read or has none."""
    found = [text for source in sources for text in _of_file(source, column)]
    if not found:
        raise InputError(f"source: {', '.join(sources)} hold no SMILES")
    return found


def _of_file(source: str, column: str) -> Iterator[str]:
    suffix = Path(source).suffix
    if suffix not in TEXTS + TABLES:
        raise InputError(f"source: {source} ends in none of {', '.join(TEXTS + TABLES)}")
    if suffix in TABLES:
        table = _table(source)
        if column not in table:
            raise InputError(f"source: {source} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
        yield from (str(text) for text in table[column].dropna())
        return
    try:
        with storage.open_input(source) as stream:
            lines = stream.read().decode().splitlines()
    except (PrismError, UnicodeDecodeError) as error:
        raise InputError(f"source: {source} cannot be read: {_first_line(error)}") from error
    yield from (line.split()[0] for line in lines if line.strip() and not line.startswith("#"))


def _table(source: str) -> "pd.DataFrame":
    import pandas as pd

    try:
        with storage.open_input(source) as stream:
            return pd.read_csv(stream) if source.endswith(".csv") else pd.read_parquet(stream)
    except Exception as error:  # pandas and pyarrow raise many kinds for what they cannot read
        raise InputError(f"source: {source} cannot be read: {_first_line(error)}") from error


def _distinct(smiles: Sequence[str]) -> tuple[list[str], int, list[dict[str, str]]]:
    """Each constitution once, how many were repeated, and what is no molecule, with the reason."""
    from rdkit import Chem

    from library.molecules import Molecule

    seen: dict[str, str] = {}
    bad, repeated = [], 0
    for text in smiles:
        try:
            Molecule.from_smiles(text)
        except InputError as reason:
            bad.append({"smiles": text, "reason": str(reason)})
            continue
        key = Chem.MolToSmiles(Chem.MolFromSmiles(text), isomericSmiles=False)
        repeated += key in seen
        seen.setdefault(key, text)
    return list(seen.values()), repeated, bad


def _summary(records: Sequence[dict[str, Any]], parts: dict[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for name, numbers in parts.items():
        chosen = [records[i] for i in numbers.tolist()]
        modes, states = (sum(len(one[key]) for one in chosen) for key in ("freq", "uv_energy"))
        atoms = sum(len(one["z"]) for one in chosen)
        rows.append({"part": name, "molecules": len(chosen), "atoms": atoms, "modes": modes, "states": states})
    return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.tolist()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _hush() -> None:
    """Ray Data's progress bars and its own messages stay off the terminal."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
