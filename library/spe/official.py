"""Weights of the released code (Graph-COM/SPE) in the network here: names are translated, nothing else."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from library.spe.basisnet import BasisNet
from library.spe.network import GraphNetwork, Spe
from library.spe.rho import PerceptronRho
from library.spe.signnet import SignNet
from library.weights import load_tensors, state_tensors

GROUPED = re.compile(r"positional_encoding\.psi_list\.(\d+)\.(.+)")
INVARIANT_NET = re.compile(r"positional_encoding\.phi\.encs\.(\d+)\.(.+)")
RENAMED = (
    (r"^node_features\.", "nodes."),
    (r"^pe_embedding\.", "join."),
    (r"^fc\.", "mix."),
    (r"^base_model\.mlp\.", "head."),
    (r"^base_model\.gine\.layers\.", "layers."),
    (r"\.edge_features\.", ".edges."),
    (r"\.pe_embedding\.", ".position."),
    (r"^positional_encoding\.phi\.gin\.", "encoders.0.rho.gin."),
    (r"^positional_encoding\.phi\.mlp\.", "encoders.0.rho.mlp."),
    (r"\.layers\.(\d+)\.fc\.(?=weight|bias)", r".hidden.\1."),
    (r"\.layers\.(\d+)\.bn\.", r".norms.\1."),
    (r"^head\.layers", "head.hidden"),
    (r"(mlp|position|head|out)\.fc\.", r"\1.last."),
    (r"\.batch_norms\.", ".between."),
)
PHI = (
    (r"^layers\.(\d+)\.fc\.", r"hidden.\1."),
    (r"^layers\.(\d+)\.bn\.", r"norms.\1."),
    (r"^fc\.", "last."),
    (r"^layers\.(\d+)\.fc_curr\.", r"own.\1."),
    (r"^layers\.(\d+)\.fc_all\.", r"pooled.\1."),
    (r"^linear_in\.", "first."),
    (r"^linear_out\.", "last."),
    (r"^layers\.(\d+)\.in_proj_", r"inputs.\1."),
    (r"^layers\.(\d+)\.out_proj\.", r"outputs.\1."),
)
INVARIANT = (
    (r"^fc1\.", "first."),
    (r"^fc2\.", "last."),
    (r"^bns\.", "norms."),
)


def load_official(network: GraphNetwork, state: Mapping[str, Tensor]) -> None:
    """Copy a state of the released code, by its names, into a network of the same sizes.

    Raises ArtifactError when names or shapes do not fit.
    """
    own = state_tensors(network)
    constants = {name: own[name] for name in ("centre", "scale")}
    load_tensors(network, constants | translated(network, state), source="the released state")


def translated(network: GraphNetwork, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of the released code under the names and in the shapes of a network here.

    What the released code holds but never uses (a perceptron after rho, counters of batches, PEG's input map, the last
    norm of BasisNet's networks, the layers' perceptrons of encodings where there are none) is left out.
    """
    found: dict[str, Tensor] = {}
    copies: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if _unused(name, network):
            continue
        if match := GROUPED.match(name):
            copies.setdefault(_renamed(match[2], PHI), {})[int(match[1])] = tensor
        elif match := INVARIANT_NET.match(name):
            found |= _invariant(f"encoders.0.nets.{match[1]}.", match[2], tensor)
        else:
            found[_renamed(_places(name, network), RENAMED)] = tensor
    for name, parts in copies.items():
        stacked = [parts[place] for place in sorted(parts)]
        if name.startswith("norms."):
            joined = torch.cat(stacked)
        else:
            joined = torch.stack([part.T if part.ndim == 2 else part for part in stacked])
        found[f"encoders.0.phi.{name}"] = joined
    return found


def _unused(name: str, network: GraphNetwork) -> bool:
    after_rho = name.startswith("positional_encoding.phi.mlp.") and isinstance(network.encoder, Spe)
    return (
        name.endswith("num_batches_tracked")
        or (after_rho and not isinstance(network.encoder.rho, PerceptronRho))
        or (name.startswith("pe_embedding.") and network.peg)
        or (".pe_embedding." in name and network.encoder is None)
        or re.search(r"\.encs\.\d+\.bns\.3\.", name) is not None
    )


def _places(name: str, network: GraphNetwork) -> str:
    """Names whose meaning depends on the method: SignNet's GIN is called phi, its perceptron rho."""
    if isinstance(network.encoder, SignNet):
        name = re.sub(r"^positional_encoding\.phi\.", "encoders.0.gin.", name)
        return re.sub(r"^positional_encoding\.rho\.", "encoders.0.out.", name)
    if isinstance(network.encoder, BasisNet):
        return re.sub(r"^positional_encoding\.rho\.", "encoders.0.gin.", name)
    return name


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _invariant(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Parts of one invariant network: coefficients (in, out, contractions), biases (1, out, 1)."""
    match = re.match(r"equi_layers\.(\d)\.(coeffs|bias)", name)
    if match is None:
        return {prefix + _renamed(name, INVARIANT): tensor}
    place = int(match[1])
    if match[2] == "bias":
        return {prefix + ("contraction_bias" if place == 0 else f"biases.{place - 1}"): tensor.flatten()}
    if place == 0:
        return {prefix + "contractions": tensor[0].T}
    return {prefix + f"own.{place - 1}": tensor[..., 0], prefix + f"mean.{place - 1}": tensor[..., 1]}
