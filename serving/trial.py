"""Small models for every endpoint, trained within a minute in all: for benchmarks, soak tests and a look around.

What they answer is fast and right for what they are, which is next to untrained.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from library.artifact import Artifact, write_artifact
from serving.app import named


def trial_artifacts(endpoints: Iterable[str], folder: Path) -> dict[str, str]:
    """Endpoint -> the folder of a small artifact that it can serve; each model is made once. Raises InputError."""
    models: dict[str, Artifact] = {}
    found = {}
    for name in endpoints:
        model = named(name).model
        if model not in models:
            models[model] = MAKERS[model](folder / model)
        found[name] = str(models[model].path)
    return found


def _send(folder: Path) -> Artifact:
    import torch

    from library.recipe import fit
    from library.send.detection import Calibration, DetectionSettings
    from library.send.recipe import SendRecipe

    recipe = SendRecipe(
        corpus="truthfulqa",
        tokenizer="bytes",
        context=32,
        batch_size=8,
        steps=8,
        epoch_steps=4,
        window=2,
        tracking_texts=6,
        prompts=0,
        answers=DetectionSettings(samples=4, max_new_tokens=6, temperature=1.0),
    )
    trained = fit(recipe, path=folder / "trained")
    risk = Calibration(torch.tensor([-5.0, 5.0]).double(), torch.tensor([0.0, 1.0]).double())
    return write_artifact(
        folder / "calibrated",
        kind=trained.kind,
        recipe=trained.recipe,
        weights=trained.weights(),
        metrics=trained.metrics,
        data=trained.manifest.data,
        arrays=risk.arrays(),
        texts={name: trained.text(name) for name in trained.manifest.files if not name.endswith(".safetensors")},
    )


def _farms(folder: Path) -> Artifact:
    import torch

    noise = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(256, 128, generator=noise) for i in range(3)}
    return write_artifact(folder, kind="farms", recipe={}, weights=weights, metrics={}, data="none")


def _hawq(folder: Path) -> Artifact:
    from library.hawq.recipe import HawqRecipe
    from library.images.recipe import ClassifierRecipe
    from library.recipe import fit

    classifier = ClassifierRecipe(steps=20, batch_size=64, train_images=1000, validation_fraction=0.05)
    weights = str(fit(classifier, path=folder / "classifier").path)
    recipe = HawqRecipe(
        classifier=classifier, weights=weights, steps=2, batch_size=32, probe_images=64, probe_batch=32, probes=4
    )
    return fit(recipe, path=folder / "hawq")


def _qrc(folder: Path) -> Artifact:
    from library.qrc.nowcast import Nowcast
    from library.qrc.recipe import QrcRecipe
    from library.qrc.schema import SIMULATED, Schema
    from library.qrc.spectra import about, time_scales
    from library.qrc.trained import save_forecaster

    task = Nowcast(hours=700)
    model = QrcRecipe(qubits=(3,), sigma=(0.3, 1.0), units=8, washout=60).forecaster(closed_loop=True)
    inputs, target = task.series(("EWR",))
    model.fit(inputs, target, validation=task.series(("LGA",)))
    scales = time_scales(model.reservoir_, model.driving(inputs))
    schema = Schema(inputs=("temperature", "humidity", "rain", "wind"), step=1.0, target=SIMULATED)
    return save_forecaster(model, folder, metrics={}, data="none", about=about(schema, scales))


def _rqgnn(folder: Path) -> Artifact:
    from library.recipe import fit
    from library.rqgnn.recipe import RqgnnRecipe

    return fit(RqgnnRecipe(steps=10, batch_size=256, hidden=16, depth=4), path=folder)


def _spe(folder: Path) -> Artifact:
    from library.recipe import fit
    from library.spe.recipe import SpeRecipe
    from library.spe.settings import Backbone, Encoding

    encoding = Encoding(eigenpairs=8, width=4, channels=2, rho_layers=1, rho_hidden=8, mlp_hidden=8)
    backbone = Backbone(layers=1, hidden=8)
    return fit(SpeRecipe(steps=2, batch_size=8, train_graphs=16, encoding=encoding, backbone=backbone), path=folder)


def _diffspectra(folder: Path) -> Artifact:
    from library.diffspectra.recipe import DiffSpectraRecipe
    from library.recipe import fit

    recipe = DiffSpectraRecipe(steps=2, batch_size=4, most_atoms=9, modality_dropout=0.3, condition_dropout=0.0)
    return fit(recipe, path=folder)


MAKERS: dict[str, Callable[[Path], Artifact]] = {
    "send": _send,
    "farms": _farms,
    "hawq": _hawq,
    "qrc": _qrc,
    "rqgnn": _rqgnn,
    "spe": _spe,
    "diffspectra": _diffspectra,
}
