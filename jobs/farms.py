"""Heavy-tailedness of every layer of a model: one Ray task per layer, longest first; a restart skips what is done."""

import json
import math
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import NonNegativeInt, PositiveFloat

from cluster import connect, registry, storage
from jobs.job import Job
from jobs.report import Report
from library.drawing import blank, open_frame
from library.errors import InputError, PrismError
from library.farms.analysis import Settings, analyze_layer
from library.farms.layers import Layer, find_layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DEFAULT_MODEL = "models:/send@champion"
RESULTS = "layers"


class FarmsJob(Job, frozen=True, extra="forbid"):
    """Analyse a model's layers; the weights of one layer are in a worker's memory at a time."""

    job: ClassVar[str] = "farms"

    model: str = DEFAULT_MODEL
    """A safetensors file, a folder of them (a Hugging Face model, an artifact), models:/NAME@ALIAS, or OWNER/NAME."""
    analysis: Settings = Settings()
    """How spectra are taken and their tails fitted."""
    compare: bool = True
    """Analyse the whole matrices too, to show what the layers' shapes alone do."""
    out: str | None = None
    """Folder or URI where each layer's result is kept, and found again by a later run; None keeps nothing."""
    send_weights: bool = False
    """Send weights through Ray's object store, for nodes that do not see the model's folder."""
    cpus_per_task: PositiveFloat = 1.0
    """CPUs reserved for each layer."""
    gpu: bool = False
    """One GPU for each layer."""
    max_retries: NonNegativeInt = 2
    """How often a layer is tried again whose worker died."""

    def run(self) -> Report:
        """Analyse all layers. Raises InputError for a model that cannot be found or read, naming the layer at fault."""
        began = time.monotonic()
        layers = find_layers(place_of_model(self.model))
        connect()
        tables = {"layers": self._table(layers, self.analysis)}
        if self.compare and self.analysis.method == "farms":
            plain = self.analysis.model_copy(update={"method": "plain", "tolerance": None})
            tables["plain"] = self._table(layers, plain)
        table = tables["layers"]
        known = table.dropna(subset=["alpha"])
        metrics = {
            "layers": float(len(table)),
            "analysed": float(len(known)),
            "parameters": float(table["parameters"].sum()),
            "alpha_mean": float(known["alpha"].mean()),
            "alpha_min": float(known["alpha"].min()),
            "alpha_max": float(known["alpha"].max()),
            "standard_error_mean": float(known["standard_error"].mean()),
        }
        notes = [f"{row.layer}: no exponent ({row.warning})" for row in table[table["alpha"].isna()].itertuples()]
        report = Report(
            job=self.job,
            config=self.record(),
            metrics=metrics,
            tables=tables,
            figures={"layers": exponents_figure(tables)},
            notes=notes,
            seconds=time.monotonic() - began,
        )
        if self.out is not None and storage.is_local(self.out):
            report.folder = str(report.save(storage.local_path(self.out) / "report"))
        return report

    def _table(self, layers: list[Layer], settings: Settings) -> "pd.DataFrame":
        """The rows of all layers in the model's order."""
        import pandas as pd

        keys = [self._key(layer, settings) for layer in layers]
        rows = {number: row for number, key in enumerate(keys) if (row := self._kept(key)) is not None}
        waiting = sorted(set(range(len(layers))) - rows.keys(), key=lambda i: (-_work(layers[i]), i))
        rows |= dict(self._analysed([(i, layers[i], keys[i]) for i in waiting], settings))
        return pd.DataFrame([rows[number] for number in range(len(layers))])

    def _analysed(
        self, waiting: list[tuple[int, Layer, str]], settings: Settings
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows as tasks end; twice as many are in flight as the cluster has CPUs, so that few weights are held."""
        import ray

        task = ray.remote(num_cpus=self.cpus_per_task, num_gpus=1 if self.gpu else 0, max_retries=self.max_retries)(
            _analyse
        )
        room = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
        flying: dict[Any, tuple[int, Layer]] = {}
        while waiting or flying:
            while waiting and len(flying) < room:
                number, layer, key = waiting.pop(0)
                weight = layer.load() if self.send_weights else None
                flying[task.remote(layer, weight, settings, self.gpu, self.out, key)] = (number, layer)
            [done], _ = ray.wait(list(flying))
            number, layer = flying.pop(done)
            yield number, _got(done, layer)

    def _key(self, layer: Layer, settings: Settings) -> str:
        """Identifies a result: the file as it is now, the tensor in it, and the settings."""
        stat = layer.file.stat()
        about = [str(layer.file.resolve()), stat.st_size, stat.st_mtime_ns, layer.key, layer.expert]
        return sha256(json.dumps([about, settings.model_dump(mode="json")]).encode()).hexdigest()[:32]

    def _kept(self, key: str) -> dict[str, Any] | None:
        if self.out is None or not storage.exists(place := storage.join(self.out, RESULTS, f"{key}.json")):
            return None
        row = json.loads(storage.read_bytes(place))
        return {name: math.nan if value is None else value for name, value in row.items()}


def place_of_model(model: str) -> str | Path:
    """Where the weights of a named model are: a registered artifact's folder, or what was named."""
    remote = not storage.is_local(model) and not model.startswith("models:")
    try:
        return registry.resolve(model) if model.startswith("models:") or remote else model
    except InputError as error:
        if model != DEFAULT_MODEL:
            raise
        raise InputError(f"{error}; train that model with `prism run send`, or name another with --model") from error


def exponents_figure(tables: "dict[str, pd.DataFrame]") -> "Figure":
    """The exponent of each layer with two standard errors, beside what an untrained one of that shape would have."""

    drawn = blank(9.6, 3.6)
    axis = drawn.subplots()
    colours = {"layers": "#D55E00", "plain": "#8a8a8a"}
    names = {"layers": "windows", "plain": "whole matrices"}
    for name, table in tables.items():
        places = range(len(table))
        label = names[name] if len(tables) > 1 else None
        axis.errorbar(
            places, table["alpha"], 2 * table["standard_error"], fmt="o", ms=3, lw=0.8, color=colours[name], label=label
        )
        axis.plot(places, table["mp_alpha"], color=colours[name], lw=0.9, ls=":")
    axis.set_xlabel("layer, in the model's order (dotted: untrained, median rule)")
    axis.set_ylabel("alpha (larger: lighter tail)")
    open_frame(axis)
    if len(tables) > 1:
        axis.legend(frameon=False)
    return drawn


def _work(layer: Layer) -> int:
    return layer.parameters * min(layer.shape[:2])


def _analyse(
    layer: Layer, weight: Any, settings: Settings, gpu: bool, out: str | None, key: str
) -> dict[str, Any] | PrismError:
    """One task: the row of a layer, kept when asked. What trying again cannot mend is returned as an error."""
    from dataclasses import replace

    try:
        if weight is not None:
            layer = replace(layer, tensor=weight, transposed=False, expert=None)
        if gpu:
            layer = replace(layer, tensor=layer.load().to("cuda"), transposed=False, expert=None)
        row = analyze_layer(layer, settings, sketch=True)
    except PrismError as error:
        return error
    if out is not None:
        kept = {k: None if isinstance(value, float) and math.isnan(value) else value for k, value in row.items()}
        storage.write_bytes(storage.join(out, RESULTS, f"{key}.json"), json.dumps(kept).encode())
    return row


def _got(reference: Any, layer: Layer) -> dict[str, Any]:
    import ray

    try:
        found = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PrismError(f"layer {layer.name} could not be analysed: {lines[-1] if lines else type(error)}") from error
    if isinstance(found, PrismError):
        raise found
    return found
