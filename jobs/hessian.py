"""The Hessian experiments as one grid of small Ray tasks, or the Hessian of a trained artifact's loss."""

import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from cluster import connect
from jobs import hessian_figures
from jobs.hessian_analysis import Analysis, analyse_artifact
from jobs.hessian_grid import EXPERIMENTS, Grid, basin_table, estimate_table, network_table, run_grid
from jobs.job import Job
from jobs.report import Report


class HessianJob(Job, frozen=True, extra="forbid"):
    """Spectra of many tiny networks over size, classes and separability; or of an artifact's loss, with --artifact."""

    job: ClassVar[str] = "hessian"

    artifact: str | None = None
    """Analyse this artifact (a folder or models:/NAME/VERSION) instead of running the experiments."""
    experiments: tuple[str, ...] = Field(EXPERIMENTS, min_length=1)
    """Which experiments run: spectrum, growth, classes, separability, gauss-newton, batches, estimates."""
    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of data, weights and batches; the first also draws the probes of an analysis."""
    grid: Grid = Grid()
    """What the experiments vary."""
    analysis: Analysis = Analysis()
    """What is taken of an artifact."""
    seeds_per_task: PositiveInt = 3
    """Networks that one task trains as one."""
    workers: PositiveInt = 1
    """Workers that share an artifact's samples; changes nothing in the result. 1 for diffspectra-pretrain."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each task or worker."""
    gpu: bool = False
    """One GPU for each worker of an analysis."""
    max_retries: NonNegativeInt = 2
    """How often a task or an analysis is tried again whose worker died."""
    out: Path | None = None
    """Folder for `report`, with its tables and figures; None keeps nothing."""

    @field_validator("experiments")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in EXPERIMENTS:
                raise ValueError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
        return names

    def run(self) -> Report:
        """Run the tasks and gather. Raises InputError for what cannot be measured, with the reason."""
        began = time.monotonic()
        connect()
        report = self._analyse() if self.artifact is not None else self._experiment()
        report.seconds = time.monotonic() - began
        if self.out is not None:
            report.folder = str(report.save(self.out.absolute() / "report"))
        return report

    def _experiment(self) -> Report:
        found = run_grid(
            self.grid,
            self.experiments,
            self.seeds,
            name=self.job,
            seeds_per_task=self.seeds_per_task,
            cpus=self.cpus_per_task,
            retries=self.max_retries,
        )
        report = Report(job=self.job, config=self.record())
        if found.networks:
            ends = network_table(found.of(found.networks))
            report.tables["networks"] = network_table([one for ones in found.networks.values() for one in ones])
            report.metrics |= {
                "networks": float(len(ends)),
                "outliers_equal_classes": float((ends["outliers_by_gap"] == ends["classes"]).mean()),
                "flat_share": float(ends["flat_share"].mean()),
                "residual_share": float(ends["residual_share"].mean()),
            }
        if found.basins:
            lines = basin_table(found.basins)
            report.tables["lines"] = lines
            means = lines.groupby("line")["barrier"].mean()
            report.metrics |= {f"barrier, {name}": float(value) for name, value in means.items()}
        if found.estimates:
            report.tables["estimates"] = estimate_table(found.estimates)
        report.figures = hessian_figures.figures(self.grid, found, self.experiments)
        return report

    def _analyse(self) -> Report:
        found = analyse_artifact(
            self.artifact or "",
            self.analysis,
            seed=self.seeds[0],
            workers=self.workers,
            cpus=self.cpus_per_task,
            gpu=self.gpu,
            retries=self.max_retries,
        )
        return Report(
            job=self.job,
            config=self.record(),
            metrics=found.metrics(),
            tables=found.tables(),
            figures={"spectrum": found.figure()},
            notes=[*found.notes, *str(found).splitlines()[:1]],
        )
