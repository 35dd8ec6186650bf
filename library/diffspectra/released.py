"""Weights of the released code (AzureLeon1/DiffSpectra) in the networks here.

Names are translated, and the first linear map of each coordinate update is split; nothing else. A state of that code
is a flat mapping of tensors, with the prefix `module.` of its data-parallel wrapper or without.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.diffspectra.attention import Block
from library.diffspectra.specformer import SpecFormer
from library.errors import ArtifactError
from library.weights import load_tensors

DROPPED = re.compile(r"(sdp_attn\.scale|num_batches_tracked)$")  # constants, and counts that nothing reads
ENCODER = (
    (r"^backbone\.W_pos(?:_(\w+))?$", r"places.\1"),
    (r"^backbone\.W_P\.(\d+)\.", r"patches.\1."),
    (r"^backbone\.encoder\.layers\.(\d+)\.", r"layers.\1."),
    (r"self_attn\.W_Q\.", "query."),
    (r"self_attn\.W_K\.", "key."),
    (r"self_attn\.W_V\.", "value."),
    (r"self_attn\.to_out\.0\.", "out."),
    (r"norm_attn\.1\.", "attention_norm."),
    (r"norm_ffn\.1\.", "last_norm."),
    (r"\.ff\.0\.", ".first."),
    (r"\.ff\.3\.", ".last."),
    (r"^head\.linear\.", "head."),
    (r"^out_norm\.", "norm."),
)
BLOCK = (
    (r"^edge_emb\.", "join."),
    (r"^node2edge_lin\.", "message."),
    (r"^attn_mpnn\.lin_key\.", "attention.key."),
    (r"^attn_mpnn\.lin_query\.", "attention.query."),
    (r"^attn_mpnn\.lin_value\.", "attention.value."),
    (r"^attn_mpnn\.lin_edge0\.", "attention.score_gate."),
    (r"^attn_mpnn\.lin_edge1\.", "attention.value_gate."),
    (r"^ff_linear1\.", "node_mlp.first."),
    (r"^ff_linear2\.", "node_mlp.last."),
    (r"^ff_linear3\.", "pair_mlp.first."),
    (r"^ff_linear4\.", "pair_mlp.last."),
    (r"^equi_update\.coord_norm\.scale$", "coordinates.kappa"),
    (r"^equi_update\.time_mlp\.1\.", "coordinates.modulation."),
    (r"^equi_update\.coord_mlp\.0\.", "coordinates.hidden."),
    (r"^equi_update\.coord_mlp\.2\.", "coordinates.weight."),
    (r"^node_time_mlp\.1\.", "node_modulation."),
    (r"^edge_time_mlp\.1\.", "pair_modulation."),
    (r"^dist_layer\.means\.weight$", "basis.means"),
    (r"^dist_layer\.stds\.weight$", "basis.deviations"),
    (r"^dist_layer\.time_mlp\.1\.", "basis.modulation."),
)
DENOISER = (
    (r"^node_emb\.", "node_input."),
    (r"^edge_emb\.", "pair_input."),
    (r"^node_(\d+)\.", r"node_skips.\1."),
    (r"^edge_(\d+)\.", r"pair_skips.\1."),
    (r"^node_pred_mlp\.", "node_head."),
    (r"^edge_exist_mlp\.", "exists_head."),
    (r"^edge_type_mlp\.", "order_head."),
    (r"^time_mlp\.0\.weights$", "level.0.frequencies"),
    (r"^time_mlp\.", "level."),
    (r"^dist_layer\.means\.weight$", "basis.means"),
    (r"^dist_layer\.stds\.weight$", "basis.deviations"),
    (r"^dist_layer\.time_mlp\.1\.", "basis.modulation."),
)


def load_released_encoder(encoder: SpecFormer, state: Mapping[str, Tensor]) -> None:
    """Copy a released SpecFormer into one of the same sizes. Raises ArtifactError when names or shapes do not fit."""
    _load(encoder, _encoder(encoder, _plain(state)))


def load_released_block(block: Block, state: Mapping[str, Tensor]) -> None:
    """Copy one released `EquivariantMixBlock` into a block of the same sizes. Raises ArtifactError likewise."""
    _load(block, _block(_plain(state)))


def load_released(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a released conditional `DMT` into a `Conditioned` network of the same sizes. Raises ArtifactError."""
    state = _plain(state)
    encoder = {k.removeprefix("cond_encoder."): v for k, v in state.items() if k.startswith("cond_encoder.")}
    found = {f"encoder.{name}": value for name, value in _encoder(network.encoder, encoder).items()}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if inside := re.match(r"e_block_(\d+)\.(.+)", name):
            blocks.setdefault(inside[1], {})[inside[2]] = value
        elif name.startswith("cond_lin."):
            found[name.replace("cond_lin.", "project.")] = value
        elif not name.startswith("cond_encoder."):
            found[f"denoiser.{_renamed(name, DENOISER)}"] = value
    for place, part in blocks.items():
        found |= {f"denoiser.blocks.{place}.{name}": value for name, value in _block(part).items()}
    _load(network, found)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items() if not DROPPED.search(name)}


def _encoder(encoder: SpecFormer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modalities, found = encoder.settings.modalities, {}
    for name, value in state.items():
        kind, _, rest = _renamed(name, ENCODER).partition(".")
        if kind == "patches":
            place, _, rest = rest.partition(".")
            if int(place) >= len(modalities):
                raise ArtifactError(f"the released encoder reads more spectra than {', '.join(modalities)}")
            rest = f"{modalities[int(place)]}.{rest}"
        found[f"{kind}.{rest or modalities[0]}"] = value
    return found


def _block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {_renamed(name, BLOCK): value for name, value in state.items()}
    whole = found.pop("equi_update.input_lin.weight", None)
    bias = found.pop("equi_update.input_lin.bias", None)
    if whole is None or bias is None:
        raise ArtifactError("the released state has no coordinate update; it is of the network without equivariance")
    width = len(whole)
    parts = whole.split([width, width, *[(whole.shape[1] - 2 * width) // 2] * 2], 1)
    for name, part in zip(("receiver", "sender", "pair", "distance"), parts, strict=True):
        found[f"coordinates.{name}.weight"] = part
    return found | {"coordinates.receiver.bias": bias}


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    flat = {name: value.flatten() if name.endswith(("means", "deviations")) else value for name, value in state.items()}
    load_tensors(module, {name: torch.as_tensor(value) for name, value in flat.items()}, source="the released state")
