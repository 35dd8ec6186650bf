"""What the two recipes of DiffSpectra share: molecules with spectra, how these are rendered, and their encoder."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from library.diffspectra.broadening import Augmentation, Broadening
from library.diffspectra.data import Collate, MoleculeData, load_molecules
from library.diffspectra.specformer import SpecFormerSettings
from library.recipe import Recipe, Splits


class SpectraRecipe(Recipe, frozen=True, extra="forbid"):
    """A network that learns from molecules and their spectra. `published` is what the preset `paper` sets."""

    metric: ClassVar[str] = "loss"
    unit: ClassVar[str] = "molecules"
    published: ClassVar[Mapping[str, Any]] = {}

    preset: Literal["paper"] | None = None
    """The published training and sizes, whatever the fields of these say; data, modalities and groups stay."""
    data: str = "simulated"
    """simulated (shipped), an NPZ file of line lists, or a converted folder of QM9S."""
    most_atoms: PositiveInt | None = None
    """Leave out molecules of more atoms; None keeps all."""
    broadening: Broadening = Broadening()
    """How lines become spectra."""
    augmentation: Augmentation | None = Augmentation()
    """How training spectra are perturbed; None leaves them clean, as in the paper."""
    encoder: SpecFormerSettings = SpecFormerSettings()
    """The encoder of spectra."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("preset") != "paper":
            return data
        encoder = data.get("encoder") or {}
        given = encoder.modalities if isinstance(encoder, SpecFormerSettings) else encoder.get("modalities")
        sizes = SpecFormerSettings.paper(tuple(given)) if given else SpecFormerSettings.paper()
        return {**data, **cls.published, "encoder": sizes}

    def molecules(self) -> MoleculeData:
        """The data; kept in memory for the next call."""
        return load_molecules(self.data).limited(most_atoms=self.most_atoms, modalities=self.encoder.modalities)

    def splits(self, collate: Callable[[Collate], Callable[..., Any]]) -> Splits:
        """The parts of the data, training perturbed; `collate` makes batches with what renders their spectra."""
        data = self.molecules()
        return Splits(
            data.part("train", perturbed=self.augmentation is not None),
            data.part("validation"),
            data.part("test"),
            collate=collate(Collate(self.encoder.modalities, self.broadening, self.augmentation)),
            fingerprint=data.fingerprint,
        )
