"""A trained network as something to ask: molecules or graphs in, predictions, encodings and what they rest on out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from library.artifact import Artifact
from library.errors import InputError
from library.molecules import Molecule
from library.recipe import to_device
from library.spe.data import GraphData, GraphSamples, spectra_of
from library.spe.encode import batches_by_size
from library.spe.features import feature_graph, token_graph
from library.spe.network import GraphNetwork, Spe
from library.spe.recipe import load_network
from library.spe.settings import Encoding, Schema
from library.spectral.graph_spectra import GraphSpectra
from library.spectral.graphs import Graphs

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class GraphInput:
    """A graph to be asked about: nodes (n,) types or (n, features), edges (2, e) once, attributes (e,) or (e, ...)."""

    nodes: Tensor
    edges: Tensor
    attributes: Tensor


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network says of one graph. Encodings and phi are None where the method has none.

    values          (targets,) in the targets' unit, or probabilities
    encodings       (n, p)
    eigenvalues     (k,) those that the encoding uses, none for method none
    phi             (k, channels), the functions at them
    gap             distance to the next eigenvalue; infinite where all or none are used
    multiplicities  dimensions of the eigenspaces, smallest eigenvalue first
    """

    values: Tensor
    encodings: Tensor | None
    eigenvalues: Tensor
    phi: Tensor | None
    gap: float
    multiplicities: list[int]


class GraphPredictor:
    """The network of an artifact of kind `spe`.

    >>> predictor = GraphPredictor.from_artifact(open_artifact("outputs/spe"))  # doctest: +SKIP
    >>> predictor.answer([predictor.molecule("CCO")])[0].values  # doctest: +SKIP
    tensor([0.83], dtype=torch.float64)
    """

    def __init__(self, network: GraphNetwork, encoding: Encoding, schema: Schema, device: str = "cpu") -> None:
        self.network, self.encoding, self.schema = network.to(device).eval(), encoding, schema
        self.device = torch.device(device)

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: str = "cpu") -> Self:
        """The predictor of a trained network. Raises ArtifactError for one that does not fit."""
        network, recipe, schema = load_network(artifact)
        return cls(network, recipe.encoding, schema, device)

    def molecule(self, smiles: str, name: str = "smiles") -> GraphInput:
        """The graph of a molecule as the network was trained on.

        Raises InputError, beginning with `name`, for a SMILES that cannot be read, an atom that the network does not
        know, and a network that was not trained on molecules that RDKit can make.
        """
        if self.schema.reader == "none":
            raise InputError(f"{name}: the model was not trained on molecules from SMILES; give nodes and edges")
        tokens = self.schema.reader == "tokens"
        found = Molecule.from_smiles(smiles, kekulized=tokens, name=name)
        return GraphInput(*(token_graph(found, self.schema.vocabulary, name) if tokens else feature_graph(found)))

    def graph(self, nodes: Sequence[Any], edges: Sequence[Any], attributes: Sequence[Any], name: str) -> GraphInput:
        """A checked graph from plain lists: types or features of nodes and edges, and node pairs.

        Raises InputError that begins with `name` and says what is allowed.
        """
        schema = self.schema
        pairs = _pairs(edges, name)
        made = GraphInput(
            _described(nodes, schema.node_types, schema.node_features, f"{name}: a node"),
            pairs,
            _described(attributes, schema.edge_types, schema.edge_features, f"{name}: an edge"),
        )
        if len(made.attributes) != pairs.shape[1]:
            raise InputError(f"{name}: {pairs.shape[1]} edges have {len(made.attributes)} types or features")
        with _beginning(name):
            Graphs.from_edges([len(made.nodes)], pairs)
        return made

    def answer(self, inputs: Sequence[GraphInput], names: Sequence[str] | None = None) -> list[Answer]:
        """What the network says of each graph.

        Raises InputError when there are no graphs and, with the graph's name, for a cut that is refused.
        """
        if not inputs:
            raise InputError("there are no graphs")
        data = self._data(inputs)
        spectra = self._spectra(data.graphs, names)
        everything = torch.arange(len(inputs))
        samples = GraphSamples(data, spectra, everything)
        found: list[Answer | None] = [None] * len(inputs)
        with torch.no_grad():
            for chosen, batch in batches_by_size([samples[place] for place in range(len(samples))], self.encoding):
                moved = to_device(batch, self.device)
                encodings, phi = self.network.encode(moved), None
                values = self.network.predict(moved, encodings, binary=self.schema.task == "binary").cpu()
                rows = encodings.cpu().split(batch.counts.tolist()) if encodings is not None else None
                if isinstance(self.network.encoder, Spe):
                    phi = self.network.encoder.phi(moved.values, moved.kept).cpu()
                for i, place in enumerate(chosen):
                    kept = int(batch.kept[i])
                    found[place] = Answer(
                        values[i],
                        None if rows is None else rows[i],
                        spectra.graph(place)[0],
                        None if phi is None else phi[i, :kept],
                        float(spectra.gaps[place]),
                        spectra.multiplicities(place),
                    )
        return found

    def sensitivities(self, given: GraphInput) -> Tensor:
        """How much the predictions change when each edge is taken away: (edges, targets)."""
        count = given.edges.shape[1]
        kept = [[place for place in range(count) if place != gone] for gone in range(count)]
        variants = [GraphInput(given.nodes, given.edges[:, own], given.attributes[own]) for own in kept]
        whole, *parts = self.answer([given, *variants])
        changes = [part.values - whole.values for part in parts]
        return torch.stack(changes) if changes else whole.values.new_zeros(0, len(whole.values))

    def _data(self, inputs: Sequence[GraphInput]) -> GraphData:
        graphs = Graphs.from_edges(
            [len(given.nodes) for given in inputs],
            torch.cat([given.edges for given in inputs], 1),
            edge_counts=[given.edges.shape[1] for given in inputs],
        )
        nodes, attributes = (torch.cat([getattr(g, part) for g in inputs]) for part in ("nodes", "attributes"))
        targets = torch.full((len(inputs), len(self.schema.targets)), torch.nan)
        return GraphData(graphs, nodes, attributes, targets, {}, self.schema, standardized=False, name="request")

    def _spectra(self, graphs: Graphs, names: Sequence[str] | None) -> GraphSpectra:
        try:
            return spectra_of(graphs, self.encoding)
        except InputError:
            for place in range(len(graphs)):  # which one it is
                with _beginning(names[place] if names else f"graph {place}"):
                    spectra_of(graphs.select([place]), self.encoding)
            raise


def _pairs(edges: Sequence[Any], name: str) -> Tensor:
    """Node pairs as a tensor (2, edges)."""
    found = _tensor(edges)
    if not len(edges):
        return torch.zeros(2, 0, dtype=torch.int64)
    if found is None or found.dtype not in INTEGERS or tuple(found.shape) != (len(edges), 2):
        raise InputError(f"{name}: an edge is a pair of nodes, two integers")
    return found.long().T


def _tensor(values: Any) -> Tensor | None:
    """Numbers in rows of one length as a tensor; None for anything else."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None


def _described(values: Sequence[Any], types: int, features: int, what: str) -> Tensor:
    """Types or feature rows as a tensor. Raises InputError that says which are allowed."""
    if not features:
        bad = [value for value in values if not isinstance(value, int) or not 0 <= value < max(types, 1)]
        if bad:
            raise InputError(f"{what} has type {bad[0]!r}; types are 0 to {max(types, 1) - 1}")
        return torch.tensor(values, dtype=torch.int64)
    if any(isinstance(value, str) or not isinstance(value, Sequence) or len(value) != features for value in values):
        raise InputError(f"{what} needs {features} features")
    found = _tensor(values)
    if found is None or found.numel() != features * len(values):
        raise InputError(f"{what} has a feature that is no number")
    found = found.float().reshape(-1, features)
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{what} has a feature that is NaN or infinite")
    return found


@contextmanager
def _beginning(name: str) -> Iterator[None]:
    """Let an InputError begin with a name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
