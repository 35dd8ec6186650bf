"""A fitted forecaster as an artifact, and back to the last bit."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from library.artifact import Artifact, write_artifact
from library.errors import ArtifactError
from library.qrc.closed_loop import Residuals
from library.qrc.esn import EchoState
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir
from library.qrc.readout import ReadOut
from library.qrc.reservoir import QuantumReservoir
from library.qrc.shots import SampledReservoir

KIND = "qrc"
SETTINGS = ("alphas", "choose", "washout", "repeats", "start", "skip", "scale", "clip", "closed_loop", "standardize")
RESERVOIRS: TypeAdapter[Any] = TypeAdapter(HybridReservoir | QuantumReservoir | SampledReservoir | EchoState)


def save_forecaster(
    model: Forecaster, path: str | Path, *, metrics: dict[str, float], data: str, about: dict[str, Any] | None = None
) -> Artifact:
    """Write a fitted forecaster to the folder `path`; `about` joins its recipe, `data` identifies what it learned from.

    Raises NotFittedError before anything is written.
    """
    model.begin(1)
    settings = {name: getattr(model, name) for name in SETTINGS}
    recipe = {
        "reservoir": model.reservoir_.model_dump(mode="json"),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "targets": model.n_targets_,
        "flat": model.flat_,
    }
    weights = {
        "low": model.low_,
        "high": model.high_,
        "typical": model.typical_,
        "weights": model.readout_.weights,
        "intercept": model.readout_.intercept,
        "alpha": model.readout_.alpha,
        "residuals": model.residuals_.rows,
        "residual_ends": model.residuals_.ends,
        "target_range": model.target_range_,
    }
    return write_artifact(
        path, kind=KIND, recipe={"forecaster": recipe, **(about or {})}, weights=weights, metrics=metrics, data=data
    )


def load_forecaster(artifact: Artifact, *, device: str = "cpu") -> Forecaster:
    """The fitted forecaster of an artifact: its predictions are those of the one that was saved, bit by bit.

    Raises ArtifactError for parts that are missing or do not fit together.
    """
    try:
        recipe = dict(artifact.recipe["forecaster"])
        reservoir = RESERVOIRS.validate_python(recipe["reservoir"])
        settings = {name: recipe[name] for name in SETTINGS}
        arrays = {name: value.to(device) for name, value in artifact.weights().items()}
        model = Forecaster(reservoir, device=device, **{**settings, "clip": tuple(settings["clip"])})
        model.n_targets_, model.flat_ = int(recipe["targets"]), bool(recipe["flat"])
        model.low_, model.high_, model.typical_ = (arrays[name] for name in ("low", "high", "typical"))
        model.target_range_ = arrays["target_range"]
        model.readout_ = ReadOut(*(arrays[name] for name in ("weights", "intercept", "alpha")))
        model.residuals_ = Residuals(arrays["residuals"], arrays["residual_ends"])
    except (KeyError, TypeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"{artifact.path} is no forecaster: {type(error).__name__} {first}") from error
    model.reservoir_, model.n_features_in_ = reservoir, len(model.low_)
    width = reservoir.width + (model.n_features_in_ if model.skip else 0)
    outputs = model.n_targets_ + (model.n_features_in_ if model.loops else 0)
    expected = {
        "weights": (width, outputs),
        "typical": tuple(reservoir.start(1).shape),
        "residuals": (len(model.residuals_.rows), outputs),
        "target_range": (2, outputs),
    }
    for name, shape in expected.items():
        if tuple(arrays[name].shape) != shape:
            raise ArtifactError(
                f"{artifact.path}: {name} is {tuple(arrays[name].shape)}; these reservoirs need {shape}"
            )
    return model
