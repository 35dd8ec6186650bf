"""The claims about Hessian spectra measured again: `prism reproduce hessian`. One Ray task per cell of the grid."""

from typing import Any, ClassVar, Self

from pydantic import PositiveInt

from jobs import hessian_claims, hessian_figures
from jobs.hessian_grid import EXPERIMENTS, Grid, basin_table, describe, estimate_table, network_table, run_grid
from jobs.reproduce import Outcome, Reproduction
from library.hessian.basins import Basins
from library.hessian.study import Cell


class HessianReproduction(Reproduction, frozen=True, extra="forbid"):
    """The spectra of over-parametrised networks at a laptop's scale; the fields of the grid take it to any other."""

    job: ClassVar[str] = "reproduce-hessian"
    method: ClassVar[str] = "hessian"
    title: ClassVar[str] = "Hessian spectra of over-parametrised networks"
    paper: ClassVar[str] = (
        "Sagun, Evci, Güney, Dauphin, Bottou, *Empirical Analysis of the Hessian of Over-Parametrized Neural "
        "Networks*, ICLR 2018 workshop, arXiv 1706.04454"
    )

    grid: Grid = Grid()
    """What the experiments vary."""
    seeds_per_task: PositiveInt = 1
    """Networks that one task trains as one."""

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """A run of seconds that goes through everything and shows nothing."""
        small = {
            "seeds": (0, 1),
            "grid": Grid(
                base=Cell(classes=2, width=4, samples=40, hidden=(6,), steps=300, loss=0.1),
                classes=(2, 3),
                hidden=(4, 6),
                spreads=(0.5, 2.0),
                image_hidden=(3,),
                image_loss=1.0,
                image_steps=200,
                probes=(1, 2),
                lanczos_steps=(3, 6),
                basins=Basins(
                    images=60,
                    hidden_units=4,
                    large_batch=40,
                    large_steps=20,
                    continued_steps=10,
                    small_steps=20,
                    line_points=5,
                ),
            ),
            "seeds_per_task": 2,
        }
        return cls(**(small | changes))

    def measure(self) -> Outcome:
        found = run_grid(self.grid, EXPERIMENTS, self.seeds, name=self.job, seeds_per_task=self.seeds_per_task)
        drawn = hessian_figures.figures(self.grid, found)
        return Outcome(
            metrics=hessian_claims.headlines(self.grid, found),
            tables={
                "networks": network_table([one for ones in found.networks.values() for one in ones]),
                "lines": basin_table(found.basins),
                "estimates": estimate_table(found.estimates),
            },
            figures={
                "hessian": hessian_figures.overview(self.grid, found),
                **{f"hessian-{name}": figure for name, figure in drawn.items()},
            },
            claims=[
                hessian_claims.spectrum(self.grid, found),
                hessian_claims.growth(self.grid, found),
                hessian_claims.classes(self.grid, found),
                hessian_claims.separability(self.grid, found),
                hessian_claims.gauss_newton(self.grid, found),
                hessian_claims.batches(self.grid, found),
                hessian_claims.estimates(self.grid, found),
            ],
            remarks=[
                f"Centre of the grid: {describe(self.grid.base)}, {self.grid.base.width} dimensions, "
                f"{self.grid.base.samples} points (simulated clusters, as in the paper), {self.grid.base.activation}, "
                f"weights of deviation 0.1, step {self.grid.base.rate:g}, trained to loss {self.grid.base.loss:g}. "
                "All spectra are exact, in float64. The images are the shipped part of Fashion-MNIST, pooled to 7 x 7; "
                "the paper has MNIST and CIFAR-10 and larger networks."
            ],
        )
