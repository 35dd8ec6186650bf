"""The experiments behind the results: encodings of graphs that change a little, counting cycles, other domains."""

from functools import lru_cache
from typing import Any

import torch
from pydantic import BaseModel, Field, PositiveInt

from library import files
from library.recipe import evaluation_batches, fit
from library.spe.data import CYCLES, GraphData, GraphSamples, counting_data, load_graphs, spectra_of
from library.spe.network import GraphNetwork, make_encoder
from library.spe.recipe import SpeRecipe, gathered
from library.spe.settings import Backbone, Encoding
from library.spe.stability import laplacian_distance, noisy_cycles, relative_changes, without_one_edge
from library.spectral.graphs import Graphs
from library.weights import load_tensors

ENCODERS = {"SPE": "spe", "SignNet": "signnet", "BasisNet": "basisnet", "eigenvectors": "peg"}
ARMS: dict[str, dict[str, Any]] = {
    "no encoding": {"method": "none"},
    "PEG-8": {"method": "peg", "eigenpairs": 8},  # with all of them each |V_u - V_v| is sqrt(2)
    "SignNet": {"method": "signnet"},
    "SPE": {"method": "spe"},
    "SPE, phi = 1": {"method": "spe", "phi": "one"},
}
DOMAIN_ARMS: dict[str, dict[str, Any]] = {
    "no encoding": {"method": "none"},
    "SignNet": {"method": "signnet"},
    "SPE": {"method": "spe"},
    "SPE, mean": {"method": "spe", "over_nodes": "mean"},
}
CUTS = ("scaffold", "size")


class Study(BaseModel, frozen=True, extra="forbid"):
    """How large the experiments are."""

    cycle: int = Field(12, ge=6)
    """Nodes of the cycle whose weights get noise."""
    cycle_pairs: int = Field(9, ge=3)
    """Eigenpairs of it that are encoded; odd, so that the cut splits no eigenspace."""
    noises: int = Field(16, ge=4)
    """Sizes of the noise, from 1e-6 to 0.1."""
    molecules: PositiveInt = 100
    """Molecules that lose a bond."""
    graphs: tuple[PositiveInt, PositiveInt, PositiveInt] = (1500, 500, 1000)
    """Simulated graphs to count cycles in: training, validation, test."""
    eigenpairs: PositiveInt = 30
    """Eigenpairs that the counting networks use: all."""
    steps: PositiveInt = 600
    """Optimiser steps of each counting network."""
    batch_size: PositiveInt = 64
    """Graphs per step."""
    width: PositiveInt = 16
    """Width of all parts of the counting networks."""
    layers: PositiveInt = 3
    """Layers of their outer networks and backbones."""
    domain_steps: PositiveInt = 600
    """Optimiser steps of each network that is tested on other scaffolds or sizes."""
    domain_batch: PositiveInt = 32
    """Molecules per step of those."""


def weight_noise(study: Study, seed: int) -> list[dict[str, Any]]:
    """A row per encoder and noise: |L - L'|_F, and the relative change of the encodings of a cycle, untrained."""
    noises = torch.logspace(-6, -1, study.noises, dtype=torch.float64)
    before, after = noisy_cycles(study.cycle, noises, torch.Generator().manual_seed(seed))
    return _changes(before, after, study.cycle_pairs, seed)


def bond_deletion(study: Study, seed: int) -> list[dict[str, Any]]:
    """A row per encoder and molecule: the same, for a molecule of ZINC that loses one bond."""
    data, random = load_graphs("zinc12k"), torch.Generator().manual_seed(seed)
    chosen = data.parts["test"][torch.randperm(len(data.parts["test"]), generator=random)[: study.molecules]]
    before = data.graphs.select(chosen)
    return _changes(before, without_one_edge(before, random), 37, seed)


def counting(study: Study, seed: int, arm: str) -> dict[str, Any]:
    """A row: the normalised test error of one way to encode, for each length of cycles, and its weights."""
    settings = {"eigenpairs": study.eigenpairs} | ARMS[arm]
    encoding = Encoding(
        width=study.width,
        channels=8,
        phi_hidden=study.width,
        rho_layers=study.layers,
        rho_hidden=study.width,
        mlp_hidden=study.width,
        norm="batch",
        **settings,
    )
    backbone = Backbone(layers=study.layers, hidden=study.width, norm="batch", pooling="add")
    recipe = CountingRecipe(
        seed=seed,
        graphs=study.graphs,
        steps=study.steps,
        batch_size=study.batch_size,
        encoding=encoding,
        backbone=backbone,
        lr=4e-3,
        warmup=study.steps // 10,
    )
    network, splits = _fitted(recipe), recipe.datasets()
    with torch.no_grad():
        found, targets = gathered(network, evaluation_batches(splits, splits.test, 128))
    errors = (found - (targets - network.centre) / network.scale).abs().mean(0)
    lengths = dict(zip((f"cycles{length}" for length in CYCLES), errors.tolist(), strict=True))
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"seed": seed, "encoding": arm, "weights": weights, **lengths}


def other_domains(study: Study, seed: int, cut: str, arm: str) -> dict[str, Any]:
    """A row: areas under the ROC curve on test molecules of known scaffolds or sizes (`cut`) and of others.

    The weights are those of the last step: no part chooses anything.
    """
    encoding = Encoding(
        eigenpairs=32,
        width=study.width,
        rho_layers=study.layers,
        rho_hidden=study.width,
        mlp_hidden=study.width,
        norm="layer",
        **DOMAIN_ARMS[arm],
    )
    recipe = SpeRecipe(
        seed=seed,
        data=f"hiv-{cut}",
        steps=study.domain_steps,
        batch_size=study.domain_batch,
        encoding=encoding,
        backbone=Backbone(layers=study.layers, hidden=2 * study.width, join="concat"),
        warmup=study.domain_steps // 10,
    )
    network, splits = _fitted(recipe), recipe.datasets()
    areas = {
        name: recipe.evaluate(network, evaluation_batches(splits, recipe.samples(part), 128))["auroc"]
        for name, part in (("inside", "test"), ("outside", "ood_test"))
    }
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"seed": seed, "cut": cut, "encoding": arm, "weights": weights, **areas}


def _fitted(recipe: SpeRecipe) -> GraphNetwork:
    """The network of a recipe after its last step, in evaluation."""
    network = recipe.model()
    with files.scratch_folder() as folder:
        load_tensors(network, fit(recipe, path=folder / "artifact").weights())
    return network.eval()


class CountingRecipe(SpeRecipe, frozen=True, extra="forbid"):
    """The recipe on as many simulated graphs as a study asks for; all four lengths are learned by one network."""

    graphs: tuple[int, int, int] = (1500, 500, 1000)
    """Graphs to train, validate and test on."""

    def graph_data(self) -> GraphData:
        return _counting(self.graphs)

    def samples(self, part: str) -> GraphSamples:
        data = self.graph_data()
        return GraphSamples(data, _spectra(self.graphs, self.encoding.eigenpairs), data.parts[part])


@lru_cache(maxsize=2)
def _counting(graphs: tuple[int, int, int]) -> GraphData:
    return counting_data(graphs, seed=0)


@lru_cache(maxsize=2)
def _spectra(graphs: tuple[int, int, int], eigenpairs: int) -> Any:
    return spectra_of(_counting(graphs).graphs, Encoding(eigenpairs=eigenpairs))


def _changes(before: Graphs, after: Graphs, pairs: int, seed: int) -> list[dict[str, Any]]:
    distances, rows = laplacian_distance(before, after).tolist(), []
    for name, method in ENCODERS.items():
        encoding = Encoding(method=method, eigenpairs=pairs, width=16, multiplicities=37, norm="layer")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = make_encoder(encoding).double().eval()
        changes = relative_changes(encoder, before, after, encoding).tolist()
        rows += [
            {"seed": seed, "encoder": name, "distance": distance, "change": change}
            for distance, change in zip(distances, changes, strict=True)
        ]
    return rows
