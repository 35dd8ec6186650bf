"""What recipes of HAWQ-V2 share: bits from the curvature of a trained network, and fine-tuning it quantised."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.errors import InputError
from library.hawq.activations import ActivationSettings
from library.hawq.analysis import BITS, Metric, Sensitivity, sensitivity
from library.hawq.costs import BitChoice
from library.hawq.layers import layer_table
from library.hawq.network import all_active, quantize, quantized_layers, set_active
from library.hawq.packing import LAYOUT, layout_text, packed_state, stated_bytes
from library.hawq.plan import BitPlan, Budget, BudgetKind, frontier
from library.hawq.quantizers import WeightQuantizer
from library.hawq.store import MEASURED, as_tensors, cached, content_key, tempered
from library.recipe import Batch, Recipe, unwrap


class QuantizedRecipe(Recipe, frozen=True, extra="forbid"):
    """HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852) on any trained network with a cross-entropy loss.

    The curvature of all layers is measured, the bits with the least Omega within the budget are chosen exactly, the
    input ranges are calibrated, and the quantised network is fine-tuned with straight-through gradients, the most
    sensitive layers first. A subclass says which network that is, and its data: `network`, `measurement`, `outputs`,
    `targets`, `teacher`.
    """

    cache: str | None = None
    """Folder where sensitivities are kept and found again by content; None measures anew in each process."""

    bits: tuple[int, ...] = BITS
    """What a layer's weights may have; also as a text of numbers with spaces."""
    budget: BudgetKind = "size"
    """What is limited: model size, bit operations, or the latency of `latency_table`."""
    fraction: float = Field(0.375, gt=0, le=1)
    """Share of the cost of the most bits everywhere; 0.375 of 8 bits is 3 bits per weight on average."""
    latency_table: str | None = None
    """CSV of seconds: a row per layer, a column per bit number in the order of `bits`."""
    curvature: Metric = "hessian"
    """What weighs the quantisation error: hessian (mean trace, the paper), ggn, fisher, top-eigenvalue (HAWQ-V1),
    second-order (exact), or unweighted."""
    power: float = Field(1.0, ge=0, le=4)
    """Exponent of that weight; 1 is the method."""
    probes: int = Field(50, ge=2)
    """Most random probes; fewer when the choice of bits is stable before."""
    ends: int | None = Field(None, ge=2, le=16)
    """Bits of the first and last layer; None lets them be chosen like the others."""
    ties: tuple[str, ...] = ()
    """Layers that must share bits, as NAME+NAME."""
    chosen: tuple[int, ...] = ()
    """The bits of each layer, in the network's order; empty chooses them."""

    quantizer: WeightQuantizer = WeightQuantizer()
    """How weights are quantised."""
    activation_bits: int | None = Field(8, ge=2, le=16)
    """Bits of the layers' inputs, in static ranges; None leaves inputs in full precision."""
    activations: ActivationSettings = ActivationSettings()
    """How the ranges are found."""

    lr: PositiveFloat = 5e-3
    """Learning rate of SGD."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Its momentum."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decay of all parameters."""
    decay_at: float = Field(0.7, gt=0, le=1)
    """Share of the steps after which the rate is a tenth."""
    distillation: float = Field(0.0, ge=0, le=1)
    """Weight of the divergence from the full-precision network's probabilities, against that of the labels."""
    temperature: PositiveFloat = 6.0
    """Of both networks' probabilities in that divergence."""
    stages: PositiveInt = 1
    """Groups in which layers are quantised, those of the largest Omega first; 1 quantises all from the start."""
    staged_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the steps by which the last group is quantised."""

    @field_validator("bits", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return value.split() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(not 2 <= b <= 16 for b in (*self.bits, *self.chosen)):
            raise ValueError("bits: whole numbers from 2 to 16")
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError("bits: at least one bit number, each once")
        if self.budget == "latency" and self.latency_table is None:
            raise ValueError("latency_table: budget=latency needs one")
        if self.stages > 1 and not set(self.chosen) <= set(self.bits):
            raise ValueError("chosen: with stages the chosen bits must be among `bits`, so that layers can be ranked")
        return self

    def network(self) -> nn.Module:
        """The full-precision network in evaluation mode: one per process, not to be changed."""
        raise NotImplementedError

    def measurement(self) -> list[tuple[Any, Tensor]]:
        """Batches (input, labels) of training data on which curvature and ranges are measured."""
        raise NotImplementedError

    def teacher(self, device: torch.device) -> nn.Module:
        """The full-precision network on a device, for distillation."""
        raise NotImplementedError

    def measured_on(self) -> dict[str, Any]:
        """What says which data `measurement` gives, beside the content of the data."""
        raise NotImplementedError

    def sensitivity(self, forms: Any = None) -> Sensitivity:
        """How sensitive the layers are: measured, or read from the cache. `forms` as in `hawq.sensitivity`."""
        network, batches = self.network(), self.measurement()
        options = {"quantizer": self.quantizer, "bits": self.bits}
        if self.curvature == "second-order":
            settings = self._measured_settings() | {"quantizer": self.quantizer.model_dump(), "bits": self.bits}
            measure = self._measure(network, batches, forms, **options)
            return tempered(cached(self.cache, content_key(network, settings), measure), self.power)
        measure = self._measure(network, batches, forms)
        known = cached(self.cache, content_key(network, self._measured_settings()), measure)
        found = sensitivity(network, F.cross_entropy, batches[:1], metric=self.curvature, known=known, **options)
        return tempered(found, self.power)

    def plan(self) -> BitPlan:
        """The bits of every layer: those that are `chosen`, or the least sensitive ones within the budget.

        Raises InputError for a budget that cannot be met, saying what can.
        """
        activation = self.activation_bits or 32
        if self.chosen:
            table = layer_table(self.network(), self.measurement()[0][0][:1])
            if len(self.chosen) != len(table.names):
                raise InputError(f"chosen: {len(self.chosen)} bit numbers for {len(table.names)} layers")
            return BitPlan(table, tuple(BitChoice(b, activation) for b in self.chosen), float("nan"))
        found = self.sensitivity()
        names = found.layers.names
        fixed = {} if self.ends is None else {names[0]: self.ends, names[-1]: self.ends}
        choices = [BitChoice(b, activation) for b in dict.fromkeys((*self.bits, *fixed.values()))]
        if self.ends is not None and self.ends not in self.bits:
            raise InputError(f"ends: {self.ends} bits must be among bits {self.bits}")
        ties = [tie.split("+") for tie in self.ties]
        return frontier(found, self.limit(), choices=choices, fixed=fixed, ties=ties).plan()

    def limit(self) -> Budget:
        """The budget, with the latency table read."""
        if self.budget != "latency":
            return Budget(kind=self.budget, fraction=self.fraction)
        return Budget(kind="latency", fraction=self.fraction, latency=_latencies(self.latency_table))

    def model(self) -> nn.Module:
        plan = self.plan()
        made = self.quantized(plan)
        made.costs = {"kib": stated_bytes(made) / 1024, "megabops": plan.bops / 1e6}
        layers = quantized_layers(made)
        if self.stages > 1:
            found = self.sensitivity()
            terms = {
                name: float(found.omega[place, found.bits.index(choice.weight)])
                for place, (name, choice) in enumerate(zip(plan.layers.names, plan.choices, strict=True))
            }
            for rank, name in enumerate(sorted(layers, key=lambda name: -terms[name])):
                layers[name].rank = rank
            self._set_stage(made, 0)
        return made

    def quantized(self, plan: BitPlan) -> nn.Module:
        """The network quantised by a plan, its input ranges calibrated, nothing fine-tuned yet."""
        return quantize(
            self.network(),
            plan,
            quantizer=self.quantizer,
            activations=self.activations if self.activation_bits else None,
            calibration=[source for source, _ in self.measurement()],
        ).requires_grad_(True)

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, partial(_dropped, edge=self.decay_at * self.steps))

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, or its mix with T^2 KL(p_T || q_T) of the full-precision p and the quantised q."""
        logits = self.outputs(model, batch).float()
        labels = F.cross_entropy(logits, self.targets(batch))
        parts = self.scores(logits.detach(), batch)
        if not self.distillation or not logits.requires_grad:
            return {"loss": labels, **parts}
        with torch.no_grad():
            teacher = self.outputs(self.teacher(logits.device), batch).float() / self.temperature
        apart = F.kl_div(
            (logits / self.temperature).log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
        )
        mixed = (1 - self.distillation) * labels + self.distillation * self.temperature**2 * apart
        return {"loss": mixed, "cross_entropy": labels.detach(), **parts}

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Further means over the batch's units that are worth a curve."""
        return {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The means of `losses` with every layer quantised; size in KiB as on disk, and 10^6 bit operations."""
        inner = unwrap(model)
        with all_active(inner):
            means = super().evaluate(model, batches)
        return means | inner.costs

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Quantise the next group of layers when its time has come; `quantized_layers` says how many are."""
        if self.stages == 1:
            return None
        self._set_stage(unwrap(model), step)
        return {"quantized_layers": float(sum(bool(m.active) for m in quantized_layers(unwrap(model)).values()))}

    def stored(self, model: nn.Module, state: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Packed integers, scales and the rest, in place of full-precision weights."""
        with all_active(model):
            return packed_state(model).items()

    def attachments(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The layers' bits, and what they were chosen from."""
        texts = {LAYOUT: layout_text(model)}
        if self.chosen:
            return {}, texts
        arrays, texts[MEASURED] = as_tensors(replace(self.sensitivity(), forms=None, shares=None))
        return arrays, texts

    def _measure(
        self, network: nn.Module, batches: list[tuple[Any, Tensor]], forms: Any, **options: Any
    ) -> Callable[[], Sensitivity]:
        def measure() -> Sensitivity:
            return sensitivity(
                network,
                F.cross_entropy,
                batches,
                metric=self.curvature,
                probes=self.probes,
                seed=self.seed,
                forms=forms,
                budget=self.limit() if self.budget != "latency" else None,
                **options,
            )

        return measure

    def _measured_settings(self) -> dict[str, Any]:
        names = ("curvature", "probes", "seed")
        return {"data": self.datasets().fingerprint} | self.measured_on() | {n: getattr(self, n) for n in names}

    def _set_stage(self, model: nn.Module, step: int) -> None:
        stage = min(self.stages, 1 + int(step * (self.stages - 1) / (self.staged_fraction * self.steps)))
        layers = quantized_layers(model)
        reached = -(-len(layers) * stage // self.stages)
        set_active(model, lambda name: layers[name].rank < reached)


def _dropped(step: int, *, edge: float) -> float:
    return 1.0 if step < edge else 0.1


def _latencies(file: str) -> tuple[tuple[float, ...], ...]:
    try:
        rows = [line.split(",") for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
        return tuple(tuple(map(float, row)) for row in rows)
    except (OSError, ValueError) as error:
        raise InputError(f"latency_table: {file} is not a CSV of numbers: {error}") from error
