"""What a user calls: spectra in, ranked candidate molecules out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from library.artifact import Artifact
from library.diffspectra.conditioned import Conditioned
from library.diffspectra.data import Collate, MoleculeData
from library.diffspectra.measured import Recording
from library.diffspectra.molecules import Structure
from library.diffspectra.noise import stream
from library.diffspectra.queries import Query, network_spectra
from library.diffspectra.ranking import Candidate, rank
from library.diffspectra.recipe import AREAS, DiffSpectraRecipe, load_diffspectra
from library.diffspectra.samplers import Progress
from library.diffspectra.sampling import Sampling, draw_counts, draw_samples
from library.diffspectra.schedule import noise_schedule
from library.diffspectra.scoring import denoising_penalties
from library.errors import ArtifactError, InputError

PENALTY = 3  # what a key is for, beside those of `sampling`
LEAST_CHANCE = 0.005  # of a number of atoms that is still told


@dataclass(frozen=True, eq=False)
class Found:
    """The answer to a query.

    candidates   constitutions, best first; none where no sample is a whole molecule
    failures     how many samples are no candidates, by reason
    samples      all that was drawn, in order; `Candidate.samples` are places here
    atom_counts  chances of numbers of atoms by the spectra, from 0.5 % on; None where the network has not learned that
    modalities   the spectra that were read
    warnings     what is to be known of them
    """

    candidates: list[Candidate]
    failures: dict[str, int]
    samples: list[Structure]
    atom_counts: dict[int, float] | None
    modalities: tuple[str, ...]
    warnings: tuple[str, ...]


class Elucidator:
    """A trained network that answers spectra with candidate molecules.

    Example:
        >>> from library.recipe import fit
        >>> recipe = DiffSpectraRecipe(steps=2, batch_size=4, most_atoms=8)
        >>> elucidator = Elucidator.from_artifact(fit(recipe, device="cpu"))
        >>> ir = Recording(x=(500.0, 1700.0, 1720.0, 1740.0, 4000.0), y=(0.0, 0.0, 1.0, 0.0, 0.0))
        >>> query = elucidator.query({"ir": ir}, formula={"C": 1, "H": 2, "O": 1})
        >>> [found] = elucidator.find([query], Sampling(samples=2, steps=2))
        >>> len(found.samples), sum(found.failures.values()) + sum(one.count for one in found.candidates)
        (2, 2)
    """

    def __init__(self, network: Conditioned, recipe: DiffSpectraRecipe, areas: Mapping[str, float]) -> None:
        """`areas`: the typical integral of a spectrum of each modality, to which recordings are scaled."""
        self.network, self.recipe, self.areas = network.eval(), recipe, dict(areas)
        self.schedule = noise_schedule(recipe.noise)

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: torch.device | str = "cpu") -> Self:
        """The network of an artifact of kind `diffspectra`; needs no data set. Raises ArtifactError."""
        network, recipe = load_diffspectra(artifact)
        areas = artifact.arrays().get(AREAS)
        if areas is None or len(areas) != len(recipe.encoder.modalities):
            raise ArtifactError(f"{artifact.path} does not say what areas the spectra it has learned from have")
        return cls(network.to(device), recipe, dict(zip(recipe.encoder.modalities, areas.tolist(), strict=True)))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The spectra that the network reads."""
        return self.recipe.encoder.modalities

    @property
    def optional(self) -> bool:
        """Whether it can do with some of them."""
        return self.network.encoder.settings.absent

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def query(
        self,
        recordings: Mapping[str, Recording],
        *,
        atoms: int | None = None,
        formula: Mapping[str, int] | None = None,
        key: int = 0,
    ) -> Query:
        """A query from spectra as they were recorded, by modality, on any axis and in any unit.

        Raises InputError that names the modality for what cannot be a spectrum, and what `Query` raises.
        """
        found = {name: one.on_grid(name, self.areas.get(name)) for name, one in recordings.items()}
        warnings = [text for one in found.values() for text in one.warnings]
        warnings += [f"{name}: this model does not read it" for name in found if name not in self.modalities]
        return Query({name: one.intensities for name, one in found.items()}, atoms, formula, key, tuple(warnings))

    def queries(self, data: MoleculeData, numbers: Sequence[int], *, sized: bool = True) -> list[Query]:
        """Queries from molecules of a data set, whose numbers are their keys; with their sizes where `sized`."""
        reader = Collate(self.modalities, self.recipe.broadening)
        signals = [{name: read(number) for name, read in data.signals.items()} for number in numbers]
        spectra = reader.intensities(signals, torch.as_tensor(numbers))
        return [
            Query(
                {name: rows[place] for name, rows in spectra.items()},
                int(data.sizes[number]) if sized else None,
                key=int(number),
            )
            for place, number in enumerate(numbers)
        ]

    def check(self, query: Query) -> None:
        """Raise InputError for what `find` would refuse of a query: spectra, or a size that nobody knows."""
        network_spectra([query], self.modalities, optional=self.optional)
        if self.network.counts is None and query.size is None:
            raise InputError(
                "atoms: the network has not learned to tell their number; give it or a formula, or a model trained "
                "with recipe.count_weight"
            )

    @torch.no_grad()
    def find(
        self,
        queries: Sequence[Query],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        progress: Progress | None = None,
    ) -> list[Found]:
        """Ranked candidates for each query, in their order.

        A sample depends on its query, its place, `sampling.seed` and the number of atoms, and not on other queries.
        Queries with atoms or a formula get samples of that size; others of sizes drawn from what the network says of
        the spectrum. With a formula every sample has it: predictions of elements are brought to its counts at every
        step (`formulas.py`), and all else is found around them. No training is needed for that.

        `progress` is called with (done, all) after every pass of the network, on the calling thread. What it raises
        comes through and ends the work: that is how to cancel.

        Raises InputError for no queries, spectra that the network cannot do without, a size that is neither given nor
        learned, and guidance that was not learned.
        """
        if not queries:
            raise InputError("there are no queries")
        for query in queries:
            self.check(query)
        spectra, present = network_spectra(queries, self.modalities, optional=self.optional)
        condition, logits = self.network.encode(
            {name: one.to(self.device) for name, one in spectra.items()},
            None if present is None else present.to(self.device),
        )
        keys = [query.key for query in queries]
        samples = draw_samples(
            self.network,
            condition,
            self._counts(queries, logits, sampling),
            self.schedule,
            sampling,
            keys=keys,
            formulas=[query.formula for query in queries],
            progress=progress,
        )
        found = []
        for row, (query, drawn) in enumerate(zip(queries, samples, strict=True)):
            penalties = self._penalties(condition[row], drawn, sampling, query.key) if sampling.penalties else None
            ranking = rank(drawn, penalties=penalties, formula=query.formula)
            counts = None if logits is None else _told(logits[row].double().softmax(-1))
            read = tuple(modality for modality in self.modalities if modality in query.spectra)
            found.append(Found(ranking.candidates, ranking.failures, drawn, counts, read, query.warnings))
        return found

    def _counts(self, queries: Sequence[Query], logits: Tensor | None, sampling: Sampling) -> Tensor:
        """Atoms of each sample, int64 (B, samples)."""
        known = torch.tensor([query.size or 0 for query in queries])[:, None].expand(-1, sampling.samples)
        if logits is None:
            return known
        drawn = draw_counts(logits, sampling.samples, sampling.seed, [query.key for query in queries])
        return torch.where(known > 0, known, drawn)

    def _penalties(self, condition: Tensor, samples: Sequence[Structure], sampling: Sampling, key: int) -> Tensor:
        """How badly each sample is denoised; all meet the noise of the query's key."""
        parts = [samples[start : start + sampling.at_once] for start in range(0, len(samples), sampling.at_once)]
        noise = stream(sampling.seed, PENALTY, key)
        return torch.cat(
            [
                denoising_penalties(
                    self.network,
                    condition.expand(len(part), -1),
                    part,
                    self.schedule,
                    keys=[noise] * len(part),
                    factors=self.recipe.loss_weights,
                )
                for part in parts
            ]
        ).cpu()


def _told(chances: Tensor) -> dict[int, float]:
    """Numbers of atoms from 1 and their chances, those that matter."""
    return {number: chance for number, chance in enumerate(chances.tolist(), 1) if chance >= LEAST_CHANCE}
