"""Noise of molecules, drawn from one key per molecule, so that neither batch, padding nor workers change it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.diffspectra.scaling import EDGE_CHANNELS, NODE_CHANNELS, State, centred


def key_generators(keys: Sequence[int] | Tensor) -> list[torch.Generator]:
    """One generator on the CPU for each 63-bit key."""
    return [torch.Generator().manual_seed(int(key)) for key in keys]


def stream(seed: int, *places: int) -> int:
    """A 63-bit key that is a function of a seed and of places: of a molecule, a sample, a step."""
    key = seed
    for place in places:  # the finaliser of MurmurHash3, on 64 bits
        key = (key * 0x9E3779B97F4A7C15 + place + 1) & (2**64 - 1)
        key = ((key ^ (key >> 33)) * 0xFF51AFD7ED558CCD) & (2**64 - 1)
        key = ((key ^ (key >> 33)) * 0xC4CEB9FE1A85EC53) & (2**64 - 1)
        key ^= key >> 33
    return key % 2**63


def draw_noise(node_mask: Tensor, generators: Sequence[torch.Generator]) -> State:
    """Standard normal noise for molecules bool (B, N): coordinates about their mean, edges symmetric, masked.

    A molecule of n atoms draws 9 n + n (n - 1) numbers from its own generator, whatever it is padded to.
    """
    b, size = node_mask.shape
    nodes = torch.zeros(b, size, NODE_CHANNELS)
    edges = torch.zeros(b, size, size, EDGE_CHANNELS)
    for row, (n, generator) in enumerate(zip(node_mask.sum(1).tolist(), generators, strict=True)):
        drawn = torch.randn(NODE_CHANNELS * n + EDGE_CHANNELS * n * (n - 1) // 2, generator=generator)
        nodes[row, :n] = drawn[: NODE_CHANNELS * n].view(n, NODE_CHANNELS)
        lower = torch.tril_indices(n, n, -1)
        edges[row, lower[0], lower[1]] = drawn[NODE_CHANNELS * n :].view(-1, EDGE_CHANNELS)
    edges = (edges + edges.transpose(1, 2)).to(node_mask.device)
    nodes = nodes.to(node_mask.device)
    return State(torch.cat([centred(nodes[..., :3], node_mask), nodes[..., 3:]], -1), edges)


def random_rotations(generators: Sequence[torch.Generator]) -> Tensor:
    """One rotation for each generator, uniform over SO(3): float32 (B, 3, 3), from normalised random quaternions."""
    q = torch.stack([torch.randn(4, generator=generator, dtype=torch.float64) for generator in generators])
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], 1).float()
