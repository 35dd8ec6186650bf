"""The claims of SeND as experiments on one pre-trained model; each function is one task of a reproduction.

A   dropping the sensitive coordinates of the answers' embeddings lowers EigenScore more than dropping as many others
B   training with Sensitivity Dropout gives a lower and steadier EigenScore than training without it
D   EigenScore tells hallucinated continuations from correct ones
The times of claim C are in `library.send.timing`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt, PrivateAttr
from torch import Tensor, nn
from torch.utils.data import Subset

from library import files
from library.artifact import Artifact, open_artifact
from library.errors import InputError
from library.language import material
from library.language.hub import is_loadable
from library.recipe import Splits, evaluation_batches, fit, to_device, unwrap
from library.send.detection import ClozeStudy, DetectionSettings, cloze_study
from library.send.dropout import SensitivityDropout, embed_texts
from library.send.ees import ees
from library.send.eigenscore import eigenscore, eigenscore_after_drop
from library.send.recipe import SendRecipe
from library.send.sensitivity import drop_count, random_indices, sensitivity, top_indices
from library.send.trained import load_send

Arm = Literal["plain", "SeND", "random"]
ARMS: dict[Arm, str] = {"plain": "none", "SeND": "product", "random": "random"}
SENSITIVE, RANDOM = "sensitive", "random"
RESAMPLED = ", sampled under the mask"
PROMPTS_AT_ONCE = 24
CONTINUED = 1000  # added to the seed of the pre-training, so that training goes on in another order of the blocks


class Study(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the experiments. The recipe beside it says what is trained, and how answers are drawn and scored."""

    checkpoints: int = Field(8, ge=2)
    """Late checkpoints of the pre-training, the last step being one, over which sensitivity is taken (claim A)."""
    checkpoint_steps: PositiveInt = 40
    """Optimiser steps between two of them."""
    drop_fractions: tuple[float, ...] = Field((0.05, 0.1, 0.2, 0.3), min_length=1)
    """Shares of the coordinates that claim A drops."""
    random_sets: int = Field(20, ge=2)
    """Random sets of coordinates that a selection is compared with."""
    resampled_sets: PositiveInt = 3
    """Of them, how many are also in force while the answers are drawn, at the recipe's drop_fraction."""
    epochs: PositiveInt = 8
    """Epochs, of the recipe's epoch_steps, that each arm of claim B goes on training."""
    last_epochs: int = Field(6, ge=2)
    """Over how many of the last epochs a score's mean and deviation are taken."""
    held_out_blocks: PositiveInt = 64
    """Test blocks of the held-out loss."""
    cases: PositiveInt = 400
    """Test documents that are cut before an entity, for the accuracy (claim B) and detection (claim D)."""

    def check(self, recipe: SendRecipe) -> None:
        """Raise InputError when these sizes and the recipe contradict each other."""
        spanned = self.checkpoint_steps * (self.checkpoints - 1)
        if recipe.steps <= spanned:
            raise InputError(f"steps: {recipe.steps} are too few for {self.checkpoints} checkpoints over {spanned}")
        if self.last_epochs > self.epochs:
            raise InputError(f"last_epochs: {self.last_epochs} of {self.epochs} epochs; use at most as many")
        if recipe.epoch_steps is None:
            raise InputError("epoch_steps: none given; a study needs a number")
        if self.resampled_sets > self.random_sets:
            raise InputError(f"resampled_sets: {self.resampled_sets} of {self.random_sets} random_sets")
        if wrong := [fraction for fraction in self.drop_fractions if not 0 < fraction < 1]:
            raise InputError(f"drop_fractions: {wrong[0]} is not strictly between 0 and 1")
        if recipe.prompts < 1:
            raise InputError("prompts: none; EigenScore is taken on at least 1")


@dataclass(frozen=True)
class Snapshot:
    """A pre-trained model, as the files of its artifact, and its record.

    `tracked` float32 (T, N, d): embeddings of the N tracking texts at the T late checkpoints. `loss` in nats per
    token on the held-out blocks.
    """

    files: dict[str, bytes]
    tracked: Tensor
    loss: float

    @contextmanager
    def opened(self) -> Iterator[Artifact]:
        """The artifact in a temporary folder."""
        with files.scratch_folder() as folder:
            for name, content in self.files.items():
                (folder / name).write_bytes(content)
            yield open_artifact(folder, kind=SendRecipe.kind)


@dataclass(frozen=True)
class ArmRun:
    """One arm of claim B, epoch by epoch.

    `epochs` holds for each epoch the held-out `loss` and `entropy` and the mean `eigenscore` and `ees` of the prompts,
    all with the mask removed, and `loss_masked`, `eigenscore_masked` and `ees_masked` under the mask that was in
    force during the epoch (the same numbers while there is none). `embeddings` float32 (epochs, prompts, K, d) are of
    the answers with the mask removed, `dropped` the coordinates of each epoch's mask, and `accuracy` the share of
    entities that the last model names, with the mask removed.
    """

    epochs: list[dict[str, float]]
    embeddings: Tensor
    dropped: list[Tensor]
    accuracy: float


def pretrain(recipe: SendRecipe, study: Study) -> Snapshot:
    """Train without dropping anything, and record the tracking texts at the late checkpoints.

    Raises InputError for sizes that contradict each other or the corpus.
    """
    study.check(recipe)
    texts = material.tracking_texts(recipe.material().validation, recipe.tracking_texts, recipe.context)
    tracked: list[Tensor] = []

    def look(model: SensitivityDropout, step: int) -> None:
        left = recipe.steps - step
        if left % study.checkpoint_steps == 0 and left // study.checkpoint_steps < study.checkpoints:
            tracked.append(embed_texts(model, *texts, form=recipe.form, batch_size=recipe.record_batch).cpu())

    with files.scratch_folder() as folder:
        artifact = _train(_observed(recipe, study, selection="none"), look, folder / "artifact")
        contents = {file.name: file.read_bytes() for file in artifact.path.iterdir()}
    return Snapshot(contents, torch.stack(tracked), artifact.metrics["loss"])


def drop_effects(snapshot: Snapshot, recipe: SendRecipe, study: Study) -> list[dict[str, Any]]:
    """Claim A: how EigenScore changes when coordinates are set to zero; a row per fraction and choice.

    The answers are held fixed, and `change` is the mean over prompts of the score with the coordinates at zero minus
    the score. Choices are the `sensitive` ones; `random` (mean of the sets, `deviation` between them); largest mean
    square and variance over the tracking texts at the last checkpoint; and, as an oracle, largest variance over the
    very answers. `beats` is the share of random sets whose change is less negative. At the recipe's drop_fraction
    there are further rows whose answers were drawn with the mask in force.
    """
    with snapshot.opened() as artifact:
        model, _, _ = load_send(artifact)
    model.to(_device())
    draw = partial(_answers, recipe, model)
    answers = draw().double()
    before = eigenscore(answers, **_form(recipe)).mean()
    last = snapshot.tracked[-1].double()
    scores = {
        SENSITIVE: sensitivity(snapshot.tracked, "product", normalise=recipe.normalise),
        "largest mean square": last.square().mean(0),
        "largest variance over texts": last.var(0, correction=0),
        "largest variance over answers": answers.var(1, correction=0).mean(0),
    }
    width = answers.shape[-1]

    def change(index: Tensor) -> float:
        return float(eigenscore_after_drop(answers, index, **_form(recipe)).mean() - before)

    def resampled(index: Tensor) -> float:
        model.masking = True
        model.drop(index)
        return float(eigenscore(draw(), **_form(recipe)).mean() - before)

    def row(choice: str, changes: Tensor, against: Tensor | None = None) -> dict[str, Any]:
        return {
            "fraction": fraction,
            "dropped": count,
            "choice": choice,
            "change": float(changes.mean()),
            "deviation": float(changes.std()) if len(changes) > 1 else 0.0,
            "beats": math.nan if against is None else float((changes.mean() < against).double().mean()),
        }

    rows = []
    generator = torch.Generator().manual_seed(recipe.seed)
    for fraction in sorted({*study.drop_fractions, recipe.drop_fraction}):
        count = drop_count(fraction, width)
        sets = [random_indices(width, count, generator=generator) for _ in range(study.random_sets)]
        chance = torch.tensor([change(index) for index in sets], dtype=torch.float64)
        rows.append(row(RANDOM, chance))
        rows += [row(name, torch.tensor([change(top_indices(s, count))]), chance) for name, s in scores.items()]
        if fraction == recipe.drop_fraction:
            drawn = torch.tensor([resampled(index) for index in sets[: study.resampled_sets]], dtype=torch.float64)
            rows.append(row(RANDOM + RESAMPLED, drawn))
            chosen = torch.tensor([resampled(top_indices(scores[SENSITIVE], count))])
            rows.append(row(SENSITIVE + RESAMPLED, chosen, drawn))
    return rows


def train_arm(snapshot: Snapshot, recipe: SendRecipe, study: Study, arm: Arm) -> ArmRun:
    """Claim B: go on training a snapshot for some epochs, with one way of dropping.

    All arms of a seed start from the same weights, see the same batches and draw answers with the same noise.
    """
    epochs: list[dict[str, float]] = []
    embeddings: list[Tensor] = []
    dropped: list[Tensor] = []
    accuracy: list[float] = []

    def look(model: SensitivityDropout, step: int) -> None:
        if step % going.epoch_steps:
            return
        metrics = {"epoch": step // going.epoch_steps, **_held_out(going, model)}
        metrics.setdefault("loss_masked", metrics["loss"])
        with model.without_mask():
            answers = _answers(recipe, model)
        metrics |= _spread(recipe, answers)
        masked = _spread(recipe, _answers(recipe, model)) if len(model.dropped) else metrics
        metrics |= {f"{name}_masked": masked[name] for name in ("eigenscore", "ees")}
        epochs.append(metrics)
        embeddings.append(answers.cpu())
        dropped.append(model.dropped.cpu())
        if step == going.steps:
            with model.without_mask():
                accuracy.append(_cases(recipe, model.lm, study, samples=2).accuracy)

    with snapshot.opened() as artifact, files.scratch_folder() as folder:
        going = _observed(
            recipe,
            study,
            lm=str(artifact.path),
            revision=None,
            tokenizer=recipe.tokenizer or (None if is_loadable(recipe.lm) else "bpe"),
            selection=ARMS[arm],
            steps=study.epochs * recipe.epoch_steps,
            seed=recipe.seed + CONTINUED,
            warmup_fraction=0.0,
            lr_floor=1.0,
        )
        _train(going, look, folder / "artifact")
    return ArmRun(epochs, torch.stack(embeddings), dropped, accuracy[0])


def on_same_coordinates(runs: dict[Arm, ArmRun], recipe: SendRecipe) -> dict[Arm, list[float]]:
    """Each arm's mean EigenScore per epoch with the coordinates that SeND had dropped in it at zero, in every arm.

    Between arms this difference is one of training, where that of scores under each arm's own mask is mostly one of how
    many coordinates count.
    """
    masks = runs["SeND"].dropped
    return {
        arm: [
            float(eigenscore_after_drop(answers, index, **_form(recipe)).mean())
            for answers, index in zip(run.embeddings, masks, strict=True)
        ]
        for arm, run in runs.items()
    }


def detect(snapshot: Snapshot, recipe: SendRecipe, study: Study) -> ClozeStudy:
    """Claim D: the pre-trained model's answers to the entity cases of the test documents, judged and scored."""
    with snapshot.opened() as artifact:
        model, _, _ = load_send(artifact)
    return _cases(recipe, model.lm.to(_device()), study)


class _Observed(SendRecipe, frozen=True, extra="forbid"):
    """The recipe with test blocks to validate on, and a function that looks at the model after each step.

    It looks before the recipe itself acts, so that at an epoch's end the mask is still the one that was in force.
    """

    _blocks: int = PrivateAttr()
    _look: Callable[[SensitivityDropout, int], None] = PrivateAttr()

    def datasets(self) -> Splits:
        splits = super().datasets()
        return replace(splits, validation=Subset(splits.test, range(min(self._blocks, len(splits.test)))))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        self._look(unwrap(model), step)
        return super().after_step(model, step)


def _observed(recipe: SendRecipe, study: Study, **changes: Any) -> _Observed:
    off = {"prompts": 0, "calibration_cases": 0, "loss_threshold": None, "ees_threshold": None}
    observed = _Observed(**(recipe.model_dump() | off | changes))
    observed._blocks = study.held_out_blocks
    return observed


def _train(recipe: _Observed, look: Callable[[SensitivityDropout, int], None], path: Path) -> Artifact:
    recipe._look = look
    return fit(recipe, device=_device(), path=path)


def _held_out(recipe: _Observed, model: SensitivityDropout) -> dict[str, float]:
    splits = recipe.datasets()
    batches = evaluation_batches(splits, splits.validation, recipe.batch_size)
    return recipe.evaluate(model, (to_device(batch, _device()) for batch in batches))


def _answers(recipe: SendRecipe, model: SensitivityDropout) -> Tensor:
    """Embeddings (prompts, K, d) of sampled answers, at the block whose coordinates are dropped."""
    made = recipe.material()
    prompts = material.prompts(made.test, recipe.prompts, recipe.prompt_tokens)
    settings = _settings(recipe)
    parts = [
        settings.draw(
            model.lm,
            prompts[start : start + PROMPTS_AT_ONCE],
            seed=recipe.seed,
            stop_token=made.tokenizer.end_of_text,
        ).sampled.embeddings
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return torch.cat(parts)


def _cases(recipe: SendRecipe, lm: nn.Module, study: Study, **changes: Any) -> ClozeStudy:
    cases = recipe.entity_cases("test", study.cases)
    settings = _settings(recipe).model_copy(update=changes)
    tokenizer = recipe.material().tokenizer
    return cloze_study(lm, tokenizer, cases, settings, seed=recipe.seed, batch_size=PROMPTS_AT_ONCE)


def _settings(recipe: SendRecipe) -> DetectionSettings:
    return recipe.answers.model_copy(update={"layer": recipe.layer})


def _spread(recipe: SendRecipe, answers: Tensor) -> dict[str, float]:
    return {"eigenscore": float(eigenscore(answers, **_form(recipe)).mean()), "ees": float(ees(answers).value.mean())}


def _form(recipe: SendRecipe) -> dict[str, Any]:
    return {"convention": recipe.answers.convention, "alpha": recipe.answers.alpha}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
