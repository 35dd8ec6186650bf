"""An artifact opens again whatever its metrics were."""

import math
from pathlib import Path

import torch

from library.artifact import open_artifact, write_artifact


def test_metrics_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    metrics = {"loss": 0.5, "auc": math.nan, "perplexity": math.inf, "margin": -math.inf}
    made = write_artifact(
        tmp_path / "a", kind="toy", recipe={}, weights={"w": torch.ones(3)}, metrics=metrics, data="none"
    )
    found = open_artifact(tmp_path / "a")
    assert found.metrics == made.metrics == {"loss": 0.5}
    assert found.version == made.version
