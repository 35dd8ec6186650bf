"""The sensitivity of a trained network's layers to quantisation: HAWQ-V2's Omega and its relatives.

Omega_i(b) = Tbar_i ||Q_b(W_i) - W_i||^2 with Tbar_i = Tr(H_i) / n_i, the mean curvature of the loss along the weights
of layer i. Half of it is the second-order change of the loss when quantisation errors spread evenly over the
eigenvectors of H_i at a minimum. Source: HAWQ-V2, Dong et al., NeurIPS 2020, equation 2.11.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from library.errors import InputError
from library.hawq.activation_traces import activation_forms
from library.hawq.activations import ActivationQuantizer, ActivationSettings, activation_errors
from library.hawq.costs import BitChoice
from library.hawq.curvature import Loss, quadratic_forms, second_order_terms, top_eigenvalues
from library.hawq.layers import LayerTable, layer_table, quantizable_layers
from library.hawq.pareto import frontier
from library.hawq.plan import Budget
from library.hawq.quantizers import WeightQuantizer, bit_numbers
from library.recipe import to_device
from library.spectral.differentiation import evaluation_mode
from library.spectral.operators import as_batches, as_pair, output_and_loss

Metric = Literal["hessian", "ggn", "fisher", "top-eigenvalue", "second-order", "unweighted"]
TRACES = ("hessian", "ggn", "fisher")
BITS = (2, 3, 4, 5, 6, 8)
ROUND = 10  # probes between two looks at the stopping rule
RESAMPLES = 64  # of probes and batches behind the stability of a selection
CONFIDENCE = 0.95  # share of resamples that must give the same bits
TOLERANCE = 0.05  # or the relative standard error of every trace that is enough
LEAST = 1e-9  # of the largest trace, stands for one that is not positive: ||dW||^2 decides among those

Forms = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What quantising each layer would cost. Layers in the network's order.

    `curvature` (layers,) is the mean trace Tbar_i (for metrics `hessian`, `ggn`, `fisher`), the largest eigenvalue, or
    1; `probe_error` and `data_error` are its standard errors from the random probes and from which batches were used
    (nan where they are not known). `perturbation` (layers, bits) is ||Q_b(W) - W||^2 and `omega` (layers, bits) the
    metric itself, never negative. `stability` is the share of resampled probes and batches that would choose the same
    bits. With activations, `activation_trace` (layers,) and `activation_omega` (layers, activation bits) are those of
    the layers' inputs. `forms` (batches, probes, layers) are the single estimates behind mean traces, and `shares` the
    batches' shares of the samples. `notes` says what was clipped.
    """

    metric: Metric
    layers: LayerTable
    bits: tuple[int, ...]
    curvature: Tensor
    probe_error: Tensor
    data_error: Tensor
    perturbation: Tensor
    omega: Tensor
    probes: int = 0
    stability: float | None = None
    activation_bits: tuple[int, ...] = ()
    activation_trace: Tensor | None = None
    activation_omega: Tensor | None = None
    forms: Tensor | None = None
    shares: Tensor | None = None
    notes: tuple[str, ...] = field(default=())

    def table(self, choices: Sequence[BitChoice]) -> np.ndarray:
        """Omega of weights and input for each choice: float64 (layers, choices).

        Raises InputError for bits that were not measured. Activation bits count only where they were measured.
        """
        unknown = [c for c in choices if c.weight not in self.bits]
        if unknown:
            raise InputError(f"weights of {unknown[0].weight} bits were not measured; {self.bits} were")
        total = self.omega[:, [self.bits.index(c.weight) for c in choices]].clone()
        if self.activation_omega is not None:
            unknown = [c for c in choices if c.activation not in self.activation_bits]
            if unknown:
                raise InputError(
                    f"inputs of {unknown[0].activation} bits were not measured; {self.activation_bits} were"
                )
            total += self.activation_omega[:, [self.activation_bits.index(c.activation) for c in choices]]
        return total.numpy()


def sensitivity(
    model: nn.Module,
    loss: Loss,
    data: Sequence[tuple[Any, Any]],
    *,
    layers: Sequence[str] | None = None,
    bits: Sequence[int] = BITS,
    quantizer: WeightQuantizer | None = None,
    metric: Metric = "hessian",
    probes: int = 100,
    seed: int = 0,
    budget: Budget | None = None,
    activation_bits: Sequence[int] = (),
    activations: ActivationSettings | None = None,
    forms: Forms | None = None,
    known: "Sensitivity | None" = None,
) -> Sensitivity:
    """How sensitive every convolution and linear layer of a trained network is to quantisation.

    `loss(model(input), target)` is the mean over a batch, and `data` a list of batches (input, target), or one pair of
    tensors; several batches let the error from the choice of data be told. Traces take one product per probe for all
    layers, in rounds of 10, until `probes`, or until every trace is known to 5 %, or, with a `budget`, until 95 % of
    resampled probes and batches choose the same bits. `activation_bits` adds the layers' inputs. The network runs in
    evaluation mode; fold batch norm before (`fold_batch_norm`) when the deployed network has it folded.
    `forms(start, count)` computes the quadratic forms (batches, count, layers) of `quadratic_forms` elsewhere, on a
    cluster say. The curvature of a `known` sensitivity of the same network is taken over: only the perturbations are
    new then.

    Raises InputError for data that are empty or do not fit the model or the loss, unknown layers, frozen weights or
    bits outside 2 to 16, and NonFiniteError.

    >>> from library.images import image_network
    >>> batch = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))
    >>> found = sensitivity(image_network("cnn8"), nn.functional.cross_entropy, [batch], probes=10)
    >>> found.omega.shape
    torch.Size([8, 6])
    """
    data, quantizer = list(map(as_pair, as_batches(data))), quantizer or WeightQuantizer()
    bits, activation_bits = bit_numbers(bits), activation_bits and bit_numbers(activation_bits, "activation_bits")
    modules = quantizable_layers(model, layers)
    _require_fitting(model, loss, data, next(iter(modules.values())).weight.device)
    frozen = [name for name, module in modules.items() if not module.weight.requires_grad]
    if frozen:
        raise InputError(f"layer {frozen[0]!r} is frozen; its weight must require gradients to be measured")
    table = layer_table(model, data[0][0], list(modules))
    weights = [f"{name}.weight" if name else "weight" for name in table.names]
    perturbation = torch.stack([quantizer.squared_errors(module.weight, bits).cpu() for module in modules.values()])
    unknown = torch.full((len(table.names),), float("nan"), dtype=torch.float64)
    sizes = torch.tensor(table.n_params, dtype=torch.float64)
    found = {"curvature": torch.ones_like(sizes), "probe_error": unknown, "data_error": unknown}
    omega = None
    if known is not None:
        names = ("curvature", "probe_error", "data_error", "probes", "stability", "forms", "shares")
        found = {name: getattr(known, name) for name in names}
    elif metric in TRACES:
        measure = forms or _forms_here(model, loss, data, weights, metric, seed)
        shares = torch.tensor([float(len(target)) for _, target in data], dtype=torch.float64)
        decide = _decision(perturbation, table, tuple(bits), budget) if budget else None
        found = _traces(measure, shares / shares.sum(), sizes, probes, decide, seed)
    elif metric == "top-eigenvalue":
        found["curvature"] = top_eigenvalues(model, loss, data, weights, seed=seed).cpu()
    elif metric == "second-order":
        changes = {weight: _changes(m, bits, quantizer) for weight, m in zip(weights, modules.values(), strict=True)}
        omega = second_order_terms(model, loss, data, changes).cpu()
        found["curvature"] = (omega / perturbation.clamp(min=torch.finfo(torch.float64).tiny)).mean(1)
    elif metric != "unweighted":
        raise InputError(f"unknown metric {metric!r}; allowed: {', '.join(get_args(Metric))}")
    notes = _clipped(found["curvature"] if omega is None else omega.amin(1), table)
    made = Sensitivity(
        metric=metric,
        layers=table,
        bits=tuple(bits),
        perturbation=perturbation,
        omega=positive_curvature(found["curvature"])[:, None] * perturbation if omega is None else omega.clamp(min=0),
        notes=notes,
        **found,
    )
    if not activation_bits:
        return made
    return _with_activations(made, model, loss, data, tuple(activation_bits), activations, seed)


@torch.no_grad()
def _require_fitting(model: nn.Module, loss: Loss, data: Sequence[tuple[Any, Any]], device: torch.device | str) -> None:
    """Raise InputError unless there are batches, none is empty, and all fit the model and the loss."""
    if not data:
        raise InputError("data: there are no batches")
    with evaluation_mode(model):
        for place, batch in enumerate(data):
            if not len(batch[1]):
                raise InputError(f"data: batch {place} has no samples")
            output_and_loss(model, loss, *to_device(batch, device))


def _forms_here(
    model: nn.Module, loss: Loss, data: Sequence[tuple[Any, Any]], weights: list[str], metric: str, seed: int
) -> Forms:
    def measure(start: int, count: int) -> Tensor:
        options = {"curvature": metric, "seed": seed, "start": start, "count": count}
        return torch.stack([quadratic_forms(model, loss, batch, weights, **options).cpu() for batch in data])

    return measure


def _traces(
    measure: Forms,
    shares: Tensor,
    sizes: Tensor,
    most: int,
    decide: Callable[[Tensor], np.ndarray] | None,
    seed: int,
) -> dict[str, Any]:
    """Mean traces with both errors, and the stability of what they decide."""
    if most < 2:
        raise InputError(f"probes must be at least 2, got {most}")
    generator = torch.Generator().manual_seed(seed)
    forms = torch.zeros(len(shares), 0, len(sizes), dtype=torch.float64)
    stability = None
    while forms.shape[1] < most:
        count = min(ROUND, most - forms.shape[1])
        forms = torch.cat([forms, measure(forms.shape[1], count) / sizes], 1)
        per_probe = torch.einsum("b,bpl->pl", shares, forms)
        trace, error = per_probe.mean(0), per_probe.std(0) / forms.shape[1] ** 0.5
        if decide is not None:
            stability = _stability(forms, shares, trace, decide, generator)
        if forms.shape[1] >= 2 * ROUND and (
            bool((error <= TOLERANCE * trace.abs()).all()) if stability is None else stability >= CONFIDENCE
        ):
            break
    per_batch = forms.mean(1)
    spread = (shares[:, None].square() * (per_batch - trace).square()).sum(0) * len(shares) / max(1, len(shares) - 1)
    data_error = spread.sqrt() if len(shares) > 1 else torch.full_like(trace, float("nan"))
    return {
        "curvature": trace,
        "probe_error": error,
        "data_error": data_error,
        "probes": forms.shape[1],
        "stability": stability,
        "forms": forms,
        "shares": shares,
    }


def selection_stability(found: Sensitivity, budget: Budget, *, seed: int = 0) -> float | None:
    """Share of resampled probes and batches that would choose the same bits within a budget.

    None where no mean traces were measured, or they no longer are what `omega` rests on.
    """
    if found.forms is None or found.shares is None:
        return None
    decide = _decision(found.perturbation, found.layers, found.bits, budget)
    generator = torch.Generator().manual_seed(seed)
    return _stability(found.forms, found.shares, found.curvature, decide, generator)


def _stability(
    forms: Tensor,
    shares: Tensor,
    trace: Tensor,
    decide: Callable[[Tensor], np.ndarray],
    generator: torch.Generator,
) -> float:
    """Share of resamples, of probes and batches with replacement, that decide as all of them together do."""
    chosen, same = decide(trace), 0
    batches, probes = forms.shape[:2]
    for _ in range(RESAMPLES):
        some = torch.randint(0, batches, (batches,), generator=generator)
        others = torch.randint(0, probes, (probes,), generator=generator)
        weight = shares[some] / shares[some].sum()
        drawn = torch.einsum("b,bl->l", weight, forms[some][:, others].mean(1))
        same += bool((decide(drawn) == chosen).all())
    return same / RESAMPLES


def _decision(
    perturbation: Tensor, table: LayerTable, bits: tuple[int, ...], budget: Budget
) -> Callable[[Tensor], np.ndarray]:
    choices = [BitChoice(b) for b in bits]
    cost = budget.costs(table, choices)
    limit = budget.limit(table, choices)

    def decide(trace: Tensor) -> np.ndarray:
        return frontier((positive_curvature(trace)[:, None] * perturbation).numpy(), cost).choose(limit).choice

    return decide


def positive_curvature(curvature: Tensor) -> Tensor:
    """The curvature, with a tiny share of the largest for what is not positive; all ones when nothing is."""
    largest = float(curvature.max())
    return curvature.clamp(min=LEAST * largest) if largest > 0 else torch.ones_like(curvature)


def _clipped(curvature: Tensor, table: LayerTable) -> tuple[str, ...]:
    wrong = [name for name, value in zip(table.names, curvature.tolist(), strict=True) if value <= 0]
    if not wrong:
        return ()
    return (
        f"the curvature of {', '.join(wrong)} is not positive (not at a minimum, or too few probes); it counts as 0 "
        "there and the perturbation decides",
    )


def _changes(module: nn.Module, bits: Sequence[int], quantizer: WeightQuantizer) -> Tensor:
    weight = module.weight.detach()
    return torch.stack([quantizer.quantize(weight, b).values() - weight for b in bits])


def _with_activations(
    made: Sensitivity,
    model: nn.Module,
    loss: Loss,
    data: Sequence[tuple[Any, Any]],
    bits: tuple[int, ...],
    settings: ActivationSettings | None,
    seed: int,
) -> Sensitivity:
    """Omega^a_j(b) = Tbar_{a_j} E_x ||Q_b(a_j(x)) - a_j(x)||^2 with the static range of all batches."""
    settings = settings or ActivationSettings()
    names = made.layers.names
    inputs = [recorded_inputs(model, source, names) for source, _ in data]
    counts = torch.tensor([float(len(target)) for _, target in data], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    traces = torch.zeros(len(names), dtype=torch.float64)
    errors = torch.zeros(len(names), len(bits), dtype=torch.float64)
    for batch, count in zip(data, counts, strict=True):
        forms = activation_forms(model, loss, batch, names, generator=generator, probes=max(1, made.probes // 10))
        traces += count * torch.stack([forms[name].mean().cpu() for name in names]) / counts.sum()
    for place, name in enumerate(names):
        observer = ActivationQuantizer(bits[0], settings).fit(inputs[0][name])
        for batch in inputs:
            observer.observe(batch[name])
        for batch, count in zip(inputs, counts, strict=True):
            error = activation_errors(batch[name], observer.low, observer.high, bits, settings).cpu()
            errors[place] += count * error / counts.sum()
    entries = torch.tensor([float(inputs[0][name][0].numel()) for name in names], dtype=torch.float64)
    traces = traces / entries
    wrong = _clipped(traces, made.layers)
    return replace(
        made,
        activation_bits=bits,
        activation_trace=traces,
        activation_omega=traces.clamp(min=0)[:, None] * errors,
        notes=(*made.notes, *(f"inputs: {note}" for note in wrong)),
    )


@torch.no_grad()
def recorded_inputs(model: nn.Module, source: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The input of each layer, by name, from one evaluation-mode pass."""
    layers = quantizable_layers(model, names)
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: found.update({name: arguments[0].detach()}))
        for name, module in layers.items()
    ]
    try:
        with evaluation_mode(model):
            model(to_device(source, next(iter(layers.values())).weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return found
