"""A run that nobody disturbs, to compare disturbed ones with."""

from pathlib import Path

import pytest

from tests.faults.runs import driver


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = driver(folder, "run", "start")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return folder
