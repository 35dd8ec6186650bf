"""What the network sees of a molecule, and the way back: one-hot elements, charges, bonds, scaled and masked.

nodes (B, N, 9): positions in angstrom about their unweighted mean; (2 onehot - 1) / 4 of H C N O F; charge / 4
edges (B, N, N, 2): 2 e - 1 of e = [there is a bond, order / 3]; no bond is (-1, -1), padding and diagonal are 0

Source: the released code of DiffSpectra (section "scaler"), after JODO (Huang et al., 2023).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from library.diffspectra.molecules import ELEMENTS, MOST_ORDER, MoleculeBatch, Structure
from library.errors import InputError

TYPE_SCALE = 0.25
CHARGE_SCALE = 0.25
NODE_CHANNELS = 3 + len(ELEMENTS) + 1
EDGE_CHANNELS = 2


class State(NamedTuple):
    """Molecules, their noise, or predictions of them: nodes (B, N, 9), edges (B, N, N, 2)."""

    nodes: Tensor
    edges: Tensor

    @property
    def positions(self) -> Tensor:
        """The coordinates (B, N, 3)."""
        return self.nodes[..., :3]

    @property
    def features(self) -> Tensor:
        """Elements and charges (B, N, 6)."""
        return self.nodes[..., 3:]

    def at(self, rows: Tensor | slice, size: int | None = None) -> "State":
        """Some of the molecules, cut to `size` atoms."""
        return State(self.nodes[rows, :size], self.edges[rows, :size, :size])


def pair_mask(node_mask: Tensor) -> Tensor:
    """Ordered pairs of different atoms of a molecule: bool (B, N, N) of bool (B, N)."""
    off_diagonal = ~torch.eye(node_mask.shape[1], dtype=torch.bool, device=node_mask.device)
    return node_mask[:, :, None] & node_mask[:, None, :] & off_diagonal


def centred(positions: Tensor, node_mask: Tensor) -> Tensor:
    """Positions (B, N, 3) about the mean of the atoms; 0 at padding."""
    mask = node_mask[..., None].to(positions.dtype)
    mean = (positions * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (positions - mean) * mask


def scale(batch: MoleculeBatch) -> State:
    """The molecules of a batch as the network sees them."""
    mask, pairs = batch.node_mask[..., None].float(), batch.edge_mask[..., None].float()
    types = (2 * one_hot(batch.types, len(ELEMENTS)) - 1) * TYPE_SCALE
    charges = batch.charges[..., None] * CHARGE_SCALE
    nodes = torch.cat([centred(batch.positions, batch.node_mask), types, charges], -1) * mask
    bonded = torch.stack([(batch.bonds > 0).float(), batch.bonds / MOST_ORDER], -1)
    return State(nodes, (2 * bonded - 1) * pairs)


def check_state(state: State, node_mask: Tensor) -> None:
    """Raise InputError for shapes that do not fit each other, or coordinates that are not about their mean."""
    b, n = node_mask.shape
    shapes = (tuple(state.nodes.shape), tuple(state.edges.shape))
    needed = ((b, n, NODE_CHANNELS), (b, n, n, EDGE_CHANNELS))
    if shapes != needed:
        raise InputError(f"{b} molecules of up to {n} atoms need nodes {needed[0]} and edges {needed[1]}, not {shapes}")
    off = float((state.positions * node_mask[..., None]).sum(1).abs().max()) if b else 0.0
    if off > 1e-3 * max(1.0, float(state.positions.abs().max())) * n:
        raise InputError(f"coordinates must be about the mean of each molecule's atoms; they are off by {off / n:.3g}")


def discretise(state: State, node_mask: Tensor) -> list[Structure]:
    """The molecules that continuous outputs mean, without padding.

    Element: the largest of the five; charge: round(4 c); bond: where (e_0 + 1) / 2 >= 0.5, of the order that
    3 (e_1 + 1) / 2 rounds to with cuts 0.5, 1.5, 2.5 (a bond whose order is below 0.5 is none). Bonds are read off the
    mean of both directions.
    """
    types = state.nodes[..., 3 : 3 + len(ELEMENTS)].argmax(-1)
    charges = (state.nodes[..., -1] / CHARGE_SCALE).round().long()
    edges = (state.edges + state.edges.transpose(1, 2)) / 2
    exists = (edges[..., 0] + 1) / 2 >= 0.5
    cuts = torch.tensor([0.5, 1.5, 2.5], dtype=edges.dtype, device=edges.device)
    orders = torch.bucketize((MOST_ORDER * (edges[..., 1] + 1) / 2).contiguous(), cuts, right=True)
    bonds = orders * (exists & pair_mask(node_mask))
    found = zip(
        state.positions.float().cpu(), types.cpu(), charges.cpu(), bonds.cpu(), node_mask.sum(1).tolist(), strict=True
    )
    return [Structure(p[:n], kinds[:n], signs[:n], pairs[:n, :n]) for p, kinds, signs, pairs, n in found]
