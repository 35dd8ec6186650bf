"""The experiments behind the results: what accuracies mean, what spectra tell, and networks with one difference."""

from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, PositiveInt

from library import files
from library.artifact import open_artifact
from library.diffspectra.alignment import align, released_mapping
from library.diffspectra.baselines import kernel_ridge
from library.diffspectra.data import load_molecules
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.evaluation import Truth
from library.diffspectra.generation import Elucidator
from library.diffspectra.geometry_encoder import GeometrySettings
from library.diffspectra.molecules import Structure
from library.diffspectra.noise import key_generators, random_rotations
from library.diffspectra.pretraining_recipe import PretrainingRecipe
from library.diffspectra.recipe import DiffSpectraRecipe
from library.diffspectra.specformer import SpecFormerSettings
from library.recipe import fit, make_batch

SPECTRA: dict[str, tuple[str, ...]] = {
    "UV-Vis": ("uv",),
    "IR": ("ir",),
    "Raman": ("raman",),
    "all": ("uv", "ir", "raman"),
}
ARMS = (*SPECTRA, "all, not equivariant", "all, pre-trained")


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    most_atoms: PositiveInt = 10
    """Atoms of the largest molecule that networks are trained on and tested with."""
    steps: PositiveInt = 240
    """Optimiser steps of each network."""
    pretraining: PositiveInt = 100
    """Optimiser steps of a pre-training."""
    batch_size: PositiveInt = 32
    """Molecules per step."""
    width: PositiveInt = 48
    """Channels of an atom in the denoiser; a pair has a quarter of them."""
    blocks: PositiveInt = 3
    """Its blocks."""


class Trained(NamedTuple):
    """What a network came to: one row of numbers and its learning curve."""

    row: dict[str, Any]
    curve: list[dict[str, Any]]


def right_answers() -> dict[str, float]:
    """Accuracies of the released metrics and ours, given the test molecules themselves and their mirror images.

    And RMSDs in angstrom between each molecule and its own rotated copy with its atoms in another order.
    """
    data = load_molecules()
    judged, released, ours = [], [], []
    for number in data.part("test").numbers.tolist():
        structure = data.atoms.structure(number)
        truth, generator = Truth(structure), key_generators([number])
        judged += [truth.judge(one) for one in (structure, _moved(structure, -torch.eye(3)))]
        order = torch.randperm(len(structure), generator=generator[0])
        turned = _moved(structure, random_rotations(generator)[0]).permuted(order)
        mapped = released_mapping(structure, turned)
        if mapped is not None:
            released.append(mapped[1])
            ours.append(align(structure, turned).rmsd)
    share = {
        name: [float(getattr(one, name)) for one in judged if getattr(one, name) is not None]
        for name in ("paper_smiles", "paper_inchikey", "constitution", "stereo")
    }
    found = {name: sum(values) / len(values) for name, values in share.items()}
    return found | {"rmsd_released": sum(released) / len(released), "rmsd": sum(ours) / len(ours)}


def ridge(spectra: str) -> dict[str, Any]:
    """A row: what kernel ridge regression reads off some of the spectra, on the test molecules of all sizes."""
    found = kernel_ridge(load_molecules(), SPECTRA[spectra])
    return {"spectra": spectra, "auc": found.auc, "composition": found.composition, "atoms": found.atoms}


def trained(study: Study, seed: int, arm: str) -> Trained:
    """Train a network that differs from the others in what `arm` says, and try it on molecules that it has not seen.

    Losses are means over fixed times and noise, the same for all arms and seeds. No choice is made by validation or
    test molecules; both are held out, and together they are what networks are tried on.
    """
    recipe = recipe_of(study, seed, arm)
    with files.scratch_folder() as folder:
        if arm == "all, pre-trained":
            before = pretraining_of(study, seed)
            recipe = recipe.model_copy(update={"pretrained": str(fit(before, path=folder / "before").path)})
        curve: list[dict[str, Any]] = []
        fit(
            recipe,
            path=folder / "artifact",
            callbacks=[lambda step, metrics: curve.append({"seed": seed, "arm": arm, "step": step, **metrics})],
        )
        artifact = open_artifact(folder / "artifact")
        elucidator, model = Elucidator.from_artifact(artifact), recipe.restored(artifact.weights(), source="the study")
    splits = recipe.datasets()
    batches = [
        make_batch(splits, part, range(len(part)), range(len(part))) for part in (splits.validation, splits.test)
    ]
    row = {"seed": seed, "arm": arm, **recipe.evaluate(model.eval(), batches)}
    return Trained(row | {"atoms_right": _atoms_right(elucidator, batches)}, curve)


def recipe_of(study: Study, seed: int, arm: str) -> DiffSpectraRecipe:
    """The recipe of an arm."""
    return DiffSpectraRecipe(
        seed=seed,
        most_atoms=study.most_atoms,
        steps=study.steps,
        batch_size=study.batch_size,
        encoder=_encoder(SPECTRA.get(arm, SPECTRA["all"])),
        denoiser=DenoiserSettings(
            width=study.width,
            pair_width=study.width // 4,
            blocks=study.blocks,
            condition=2 * study.width,
            dropout=0.0,
            equivariant=arm != "all, not equivariant",
        ),
        modality_dropout=0.0,
        condition_dropout=0.0,
        loss_weights=(0.3, 1.0, 0.3),
        lr=2e-3,
        warmup=study.steps // 10,
        average=0.98,
        size_groups=1,
        validation_times=8,
    )


def pretraining_of(study: Study, seed: int) -> PretrainingRecipe:
    """The recipe of a pre-training, on molecules of all sizes."""
    return PretrainingRecipe(
        seed=seed,
        steps=study.pretraining,
        encoder=_encoder(SPECTRA["all"]),
        geometry=GeometrySettings(width=16, layers=1),
        batch_size=study.batch_size,
        warmup=study.pretraining // 10,
    )


def _encoder(modalities: tuple[str, ...]) -> SpecFormerSettings:
    return SpecFormerSettings(modalities=modalities, patch_length=(50, 125, 125), stride=(50, 125, 125))


def _moved(structure: Structure, matrix: torch.Tensor) -> Structure:
    return Structure(structure.positions @ matrix.T, structure.types, structure.charges, structure.bonds)


@torch.no_grad()
def _atoms_right(elucidator: Elucidator, batches: list[Any]) -> float:
    """Share of the molecules whose number of atoms is the most likely one."""
    right = [(elucidator.network.encode(batch.spectra)[1].argmax(1) + 1 == batch.sizes).double() for batch in batches]
    return float(torch.cat(right).mean())
