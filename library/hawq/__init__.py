"""HAWQ-V2: how many bits each layer of a trained network needs, from the curvature of its loss.

>>> import torch
>>> from library import hawq
>>> model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
>>> def loss(outputs, labels): return torch.nn.functional.cross_entropy(outputs, labels)
>>> batches = [(torch.randn(32, 6), torch.randint(3, (32,)))]
>>> found = hawq.sensitivity(model, loss, batches)          # traces of all layers, perturbations of all bit numbers
>>> plan = hawq.frontier(found).plan(0.375)                 # exact: least sensitivity within 3 bits per weight
>>> small = hawq.quantize(model, plan)                      # a network that computes with them
>>> small(batches[0][0]).shape
torch.Size([32, 3])
"""

from library.hawq.activation_traces import activation_forms
from library.hawq.activations import ActivationSettings
from library.hawq.analysis import Metric, Sensitivity, sensitivity
from library.hawq.costs import BitChoice
from library.hawq.layers import LayerTable, fold_batch_norm, layer_table, quantizable_layers
from library.hawq.network import quantize, quantized_layers
from library.hawq.plan import BitFrontier, BitPlan, Budget, explicit_plan, frontier, plan_within
from library.hawq.quantizers import WeightQuantizer
from library.hawq.validity import Validity, check_validity

__all__ = [
    "ActivationSettings",
    "BitChoice",
    "BitFrontier",
    "BitPlan",
    "Budget",
    "LayerTable",
    "Metric",
    "Sensitivity",
    "Validity",
    "WeightQuantizer",
    "activation_forms",
    "check_validity",
    "explicit_plan",
    "fold_batch_norm",
    "frontier",
    "layer_table",
    "plan_within",
    "quantizable_layers",
    "quantize",
    "quantized_layers",
    "sensitivity",
]
