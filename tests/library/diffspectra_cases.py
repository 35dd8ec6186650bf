"""Golden arrays and small networks that DiffSpectra's tests share."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.diffspectra.conditioned import Conditioned
from library.diffspectra.denoiser import DenoiserSettings
from library.diffspectra.released import load_released
from library.diffspectra.scaling import State, centred, pair_mask
from library.diffspectra.specformer import SpecFormerSettings

FOLDER = Path(__file__).parents[1] / "golden" / "diffspectra"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of the released code in float32
PATCHES = {"patch_length": (100, 500, 500), "stride": (50, 250, 250)}


@cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of a golden file as tensors."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files if arrays[key].dtype.kind != "U"}


def released(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released state in a golden file, by its own names."""
    return {key.removeprefix("w."): value for key, value in arrays.items() if key.startswith("w.")}


def spectra(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three spectra in a golden file."""
    return {name: arrays[name] for name in ("uv", "ir", "raman")}


def golden_network() -> Conditioned:
    """The released small conditional denoiser."""
    encoder = SpecFormerSettings(**PATCHES, width=8, heads=2, layers=2, features=24)
    network = Conditioned(encoder, DenoiserSettings(width=24, pair_width=6, heads=4, blocks=2, condition=96)).eval()
    load_released(network, released(golden("dmt_forward")))
    return network


def masks(*counts: int) -> Tensor:
    """The node mask of molecules of those sizes."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def random_state(node_mask: Tensor, seed: int = 0) -> State:
    """Random molecules with centred coordinates and symmetric edges."""
    generator = torch.Generator().manual_seed(seed)
    b, n = node_mask.shape
    nodes = torch.randn(b, n, 9, generator=generator) * node_mask[..., None]
    edges = torch.randn(b, n, n, 2, generator=generator)
    nodes = torch.cat([centred(nodes[..., :3], node_mask), nodes[..., 3:]], -1)
    return State(nodes, (edges + edges.transpose(1, 2)) * pair_mask(node_mask)[..., None])
