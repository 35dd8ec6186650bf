"""The claims of SeND and EES measured again: `prism reproduce send`.

One Ray task per seed for the pre-training, then one per seed for claims A and D and one per seed and arm for claim B;
the times of claim C last and alone, so that nothing else runs beside them.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

from pydantic import Field, PositiveInt

from jobs import send_claims, send_figures
from jobs.reproduce import Outcome, Reproduction, gather, mean_and_deviation
from library.send import study as experiments
from library.send.detection import ClozeStudy, DetectionSettings
from library.send.recipe import SendRecipe
from library.send.study import ARMS, Arm, ArmRun, Study
from library.send.timing import score_times


class SendReproduction(Reproduction, frozen=True, extra="forbid"):
    """SeND's claims at a laptop's scale; the fields of recipe and study take it to any other.

    Of the recipe, `seed`, `selection` and `calibration_cases` are set by the study. `--lm pythia-70m --steps 20000
    --gpu` is a larger run, `--lm EleutherAI/pythia-1b` with the real tokeniser a larger one still.
    """

    job: ClassVar[str] = "reproduce-send"
    method: ClassVar[str] = "send"
    title: ClassVar[str] = "Sensitivity Dropout (SeND) and Efficient EigenScore (EES)"
    paper: ClassVar[str] = (
        "Mohammadzadeh, Guerra, Bonizzato, Rabbany, Farnadi, *Hallucination Detox: Sensitivity Dropout (SenD) for "
        "Large Language Model Training*, ACL 2025, arXiv 2410.15460"
    )

    recipe: SendRecipe = SendRecipe(
        steps=600,
        batch_size=12,
        context=64,
        vocab_size=1024,
        lr_floor=1.0,
        tracking_texts=32,
        prompts=24,
        answers=DetectionSettings(max_new_tokens=24),
    )
    """What is pre-trained, and how it goes on."""
    study: Study = Study()
    """How large the experiments are."""
    widths: tuple[int, ...] = Field((128, 512, 1024, 2048, 5120), min_length=2)
    """Widths d at which the scores are timed, with as many answers as the recipe draws (claim C)."""
    answer_counts: tuple[int, ...] = Field((10, 32, 100, 316, 1000, 3162), min_length=2)
    """Numbers of answers K at which the scores are timed, at one width (claim C)."""
    answers_width: PositiveInt = 2048
    """The width at which the number of answers varies (claim C)."""
    seconds_per_timing: float = Field(0.5, gt=0)
    """How long each form is repeated; the median counts."""
    gpu: bool = False
    """One GPU for each task of claims A, B and D."""

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """A run of seconds that goes through everything and shows nothing."""
        small = {
            "seeds": (0,),
            "recipe": SendRecipe(
                steps=6,
                batch_size=4,
                context=32,
                corpus="truthfulqa",
                tokenizer="bytes",
                window=2,
                epoch_steps=2,
                tracking_texts=4,
                prompts=2,
                answers=DetectionSettings(samples=3, max_new_tokens=4),
            ),
            "study": Study(
                checkpoints=2,
                checkpoint_steps=2,
                drop_fractions=(0.1, 0.2),
                random_sets=4,
                resampled_sets=2,
                epochs=4,
                last_epochs=2,
                held_out_blocks=4,
                cases=8,
            ),
            "widths": (16, 32),
            "answer_counts": (3, 6),
            "answers_width": 32,
            "seconds_per_timing": 0.001,
        }
        return cls(**(small | changes))

    def measure(self) -> Outcome:
        import pandas as pd

        self.study.check(self.recipe)
        found, losses = self._run_tasks()
        effects = pd.DataFrame([{"seed": seed} | row for seed in self.seeds for row in found[f"dropping, seed {seed}"]])
        runs = {seed: {arm: found[f"{arm} training, seed {seed}"] for arm in ARMS} for seed in self.seeds}
        epochs = pd.DataFrame([row for seed in self.seeds for row in self._epochs(seed, runs[seed])])
        arms = pd.DataFrame([row for seed in self.seeds for row in self._arms(seed, runs[seed], epochs)])
        areas = pd.DataFrame([row for seed in self.seeds for row in _areas(seed, found[f"detection, seed {seed}"])])
        times = pd.DataFrame(gather({"times": self._times()}, name=self.job)["times"])
        figures = {
            "send": send_figures.overview(effects, times),
            "send-dropping": send_figures.effects_figure(effects),
            "send-training": send_figures.training_figure(epochs, self.recipe.window),
            "send-times": send_figures.times_figure(times),
            "send-detection": send_figures.areas_figure(areas),
        }
        send_figures.tidy(list(figures.values()))
        return Outcome(
            metrics=send_claims.headlines(effects, arms, times, areas),
            tables={
                "dropping": effects,
                "training": arms.melt(["seed", "arm"], var_name="metric"),
                "epochs": epochs,
                "times": times,
                "detection": areas,
            },
            figures=figures,
            claims=[
                send_claims.dropping(effects, self.study, self.recipe),
                send_claims.training(arms, self.study, self.recipe),
                send_claims.times(times),
                send_claims.detection(areas, self.study, self.recipe),
            ],
            remarks=[self._setting(losses)],
        )

    def _run_tasks(self) -> tuple[dict[str, Any], list[float]]:
        import ray

        task = ray.remote(num_cpus=1, num_gpus=int(self.gpu))
        tasks, trained = {}, {}
        for seed in self.seeds:
            recipe = self.recipe.model_copy(update={"seed": seed})
            made, loss = task(_pretrain).options(num_returns=2).remote(recipe, self.study)
            trained[f"pre-training, seed {seed}"] = loss
            tasks[f"dropping, seed {seed}"] = task(experiments.drop_effects).remote(made, recipe, self.study)
            for arm in ARMS:
                tasks[f"{arm} training, seed {seed}"] = task(experiments.train_arm).remote(
                    made, recipe, self.study, arm
                )
            tasks[f"detection, seed {seed}"] = task(experiments.detect).remote(made, recipe, self.study)
        found = gather(trained | tasks, name=self.job)
        return found, [found[label] for label in trained]

    def _times(self) -> Any:
        import ray

        answers, width = self.recipe.answers.samples, self.answers_width
        sizes = sorted({*((d, answers) for d in self.widths), *((width, count) for count in self.answer_counts)})
        return ray.remote(num_cpus=1)(score_times).remote(sizes, seconds=self.seconds_per_timing)

    def _epochs(self, seed: int, runs: dict[Arm, ArmRun]) -> Iterator[dict[str, Any]]:
        """A row per arm and epoch; `eigenscore_same` is on the coordinates that SeND keeps, in every arm."""
        same = experiments.on_same_coordinates(runs, self.recipe)
        for arm, run in runs.items():
            for metrics, score in zip(run.epochs, same[arm], strict=True):
                yield {"seed": seed, "arm": arm, **metrics, "eigenscore_same": score}

    def _arms(self, seed: int, runs: dict[Arm, ArmRun], epochs: Any) -> Iterator[dict[str, Any]]:
        """A row per arm: means over the last epochs, and the deviations of the scores over them."""
        last = epochs[(epochs["seed"] == seed) & (epochs["epoch"] > self.study.epochs - self.study.last_epochs)]
        for arm, run in runs.items():
            own = last[last["arm"] == arm].drop(columns=["seed", "arm", "epoch"])
            swing = {f"{name}_swing": float(own[name].std()) for name in ("eigenscore", "ees")}
            yield {"seed": seed, "arm": arm, **own.mean().to_dict(), **swing, "accuracy": run.accuracy}

    def _setting(self, losses: list[float]) -> str:
        recipe, study = self.recipe, self.study
        return (
            f"Model: {recipe.lm}, tokeniser {recipe.tokenizer or 'the default'}, corpus {recipe.corpus}; pre-trained "
            f"for {recipe.steps} steps of {recipe.batch_size} x {recipe.context} tokens to a held-out loss of "
            f"{mean_and_deviation(losses)} nats per token. Sensitivity is change x variance over {study.checkpoints} "
            f"checkpoints of {recipe.tracking_texts} tracking texts, {study.checkpoint_steps} steps apart. EigenScore "
            f"is of {recipe.answers.samples} answers of at most {recipe.answers.max_new_tokens} tokens to "
            f"{recipe.prompts} prompts. A small model shows the mechanism; it knows no facts, so nothing here is about "
            f"factuality."
        )


def _pretrain(recipe: SendRecipe, study: Study) -> tuple[experiments.Snapshot, float]:
    """The snapshot, which goes from task to task without coming here, and its loss."""
    made = experiments.pretrain(recipe, study)
    return made, made.loss


def _areas(seed: int, found: ClozeStudy) -> Iterator[dict[str, Any]]:
    """A row per score; NaN where one label alone occurs."""
    both = bool(found.labels.any()) and not bool(found.labels.all())
    for score in found.scores:
        area = found.auroc(score) if both else None
        yield {
            "seed": seed,
            "score": score,
            "auroc": area.value if area else float("nan"),
            "standard_error": area.standard_error if area else float("nan"),
            "cases": found.cases,
            "decided": len(found.labels),
            "hallucinated": int(found.labels.sum()),
            "accuracy": found.accuracy,
        }
