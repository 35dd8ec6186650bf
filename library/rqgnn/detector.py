"""The detector a user calls: graphs to calibrated probabilities of being anomalous, decisions, and the evidence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import ValidationError
from torch import Tensor

from library.artifact import Artifact
from library.errors import ArtifactError, InputError
from library.recipe import to_device
from library.rqgnn.batches import PreparedGraphs, prepare
from library.rqgnn.calibrated import Decision, Reference, energy_curves, read_decision
from library.rqgnn.data import Vocabulary
from library.rqgnn.metrics import detection_metrics
from library.rqgnn.model import RQGNN
from library.rqgnn.recipe import VOCABULARY, RqgnnRecipe, margin, margins_of
from library.spectral.graph_laplacians import quotients
from library.spectral.graph_spectra import eigenpairs
from library.spectral.graphs import Graphs, size_buckets
from library.weights import load_tensors

BATCH_NODES = 1 << 15
MARGIN_GRAPHS = 1024


@dataclass(frozen=True)
class Evidence:
    """Why a graph got its probability.

    `eigenvalues` of its normalised Laplacian. `energies` (points, features): accumulated energy at `Reference.points`.
    `node_scores` (nodes,): each node's share in the pooling, positive or negative; their sizes compare within a graph.
    `percentiles` (features,): per cent of training normals with a smaller quotient, nan where none has the feature.
    """

    eigenvalues: Tensor
    energies: Tensor
    node_scores: Tensor
    percentiles: Tensor


@dataclass(frozen=True)
class Finding:
    """What a graph looks like to the detector.

    `probability` is calibrated on validation graphs; `anomalous` says whether it reaches `threshold`. `quotients` and
    `present` (features,): Rayleigh quotients, and whether the graph has the feature at all. `without_edges` flags a
    graph whose quotients are all 0 because it has no edge. `evidence` is None unless asked for.
    """

    probability: float
    anomalous: bool
    threshold: float
    quotients: Tensor
    present: Tensor
    without_edges: bool
    evidence: Evidence | None


class GraphAnomalyDetector:
    """A trained network, the kinds of nodes that it knows, its decision, and what normal graphs look like.

    Example:
        >>> from library.recipe import fit
        >>> artifact = fit(RqgnnRecipe(data="tox21:SR-p53", steps=4, hidden=8))
        >>> detector = GraphAnomalyDetector.from_artifact(artifact)
        >>> ethanol = Graphs.from_edges([3], [[0, 1], [1, 2]])
        >>> [found] = detector.detect(ethanol, kinds=[["C", "C", "O"]])
        >>> 0 < found.probability < 1
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: RqgnnRecipe,
        width: int,
        vocabulary: Vocabulary | None,
        decision: Decision,
        reference: Reference,
    ) -> None:
        self.model, self.recipe, self.width = model.eval(), recipe, width
        self.vocabulary, self.decision, self.reference = vocabulary, decision, reference

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: torch.device | str = "cpu") -> Self:
        """The detector of an artifact of kind `rqgnn`; needs no data set.

        Raises ArtifactError when the artifact is of another kind or its parts do not fit.
        """
        if artifact.kind != RqgnnRecipe.kind:
            raise ArtifactError(f"{artifact.path} is an artifact of {artifact.kind!r}, not of 'rqgnn'")
        try:
            recipe = RqgnnRecipe.model_validate(artifact.recipe)
            known = json.loads(artifact.text(VOCABULARY))
            vocabulary = None if known is None else Vocabulary(tuple(known["symbols"]), bool(known["other"]))
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise ArtifactError(f"{artifact.path}: its recipe or vocabulary does not fit: {first}") from error
        decision, reference = read_decision(artifact.arrays())
        width = len(reference.mean)
        if vocabulary is not None and len(vocabulary) != width:
            raise ArtifactError(f"{artifact.path}: {len(vocabulary)} kinds of nodes, but a reference of {width}")
        model = recipe.network_of(width)
        load_tensors(model, artifact.weights(), source=str(artifact.path))
        return cls(model.to(device), recipe, width, vocabulary, decision, reference)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def prepared(
        self,
        graphs: Graphs,
        *,
        kinds: Sequence[Sequence[str]] | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PreparedGraphs:
        """Graphs as the network takes them: a kind for each node of each graph, or features (nodes, width).

        Raises InputError for kinds that the model does not know, and a wrong number or width of either.
        """
        if self.vocabulary is None:
            if features is None or kinds is not None:
                raise InputError(f"features: this model needs {self.width} features at each node, and no kinds")
            if features.ndim != 2 or features.shape != (graphs.num_nodes, self.width):
                wanted = (graphs.num_nodes, self.width)
                raise InputError(f"features: shape {tuple(features.shape)}, the model needs {wanted}")
            if not bool(torch.isfinite(features).all()):
                raise InputError("features: there is a NaN or infinity")
            return prepare(graphs, features=features, labels=labels, depth=self.recipe.depth)
        if kinds is None or features is not None:
            raise InputError("kinds: this model needs the kind of each node, and no features")
        if len(kinds) != len(graphs):
            raise InputError(f"kinds: {len(kinds)} lists for {len(graphs)} graphs; one is needed for each")
        for place, (own, size) in enumerate(zip(kinds, graphs.sizes.tolist(), strict=True)):
            if len(own) != size:
                raise InputError(f"kinds: graph {place} has {size} nodes and {len(own)} kinds")
        flat = [kind for own in kinds for kind in own]
        distinct = tuple(dict.fromkeys(flat))
        place_of = dict(zip(distinct, self.vocabulary.numbers(distinct).tolist(), strict=True))
        numbers = torch.tensor([place_of[kind] for kind in flat])
        return prepare(graphs, kinds=numbers, count=self.width, labels=labels, depth=self.recipe.depth)

    def detect(
        self,
        graphs: Graphs,
        *,
        kinds: Sequence[Sequence[str]] | None = None,
        features: Tensor | None = None,
        threshold: float | None = None,
        explain: bool = False,
    ) -> list[Finding]:
        """Score graphs, in batches of like size; what a graph gets does not depend on the others.

        `threshold`, within [0, 1], replaces the one chosen in training. See `prepared` for nodes and errors; InputError
        also for features so large that a probability is NaN.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold must be within [0, 1], got {threshold}")
        prepared = self.prepared(graphs, kinds=kinds, features=features)
        margins, scores = self.scores(prepared)
        if not bool(torch.isfinite(margins).all()):
            place = int((~torch.isfinite(margins)).nonzero()[0])
            raise InputError(f"graph {place} has no finite score: its features are too large for the network")
        probabilities = self.decision.scaling.probability(margins)
        limit = self.decision.threshold if threshold is None else threshold
        parts = zip(
            probabilities.tolist(),
            quotients(prepared.energies, prepared.squares).unbind(),
            (prepared.squares > 0).unbind(),
            (graphs.edge_counts == 0).tolist(),
            self._evidence(prepared, scores) if explain else [None] * len(graphs),
            strict=True,
        )
        return [
            Finding(probability, probability >= limit, limit, own, present, without_edges, evidence)
            for probability, own, present, without_edges, evidence in parts
        ]

    @torch.no_grad()
    def scores(self, prepared: PreparedGraphs) -> tuple[Tensor, Tensor]:
        """The margins float64 (graphs,) and node scores float32 (nodes,) of prepared graphs, on the CPU."""
        margins = torch.zeros(len(prepared.graphs), dtype=torch.float64)
        scores = torch.ones(prepared.graphs.num_nodes)
        for chosen in size_buckets(prepared.graphs.sizes, budget=BATCH_NODES):
            batch = to_device(prepared.batch(chosen), self.device)
            if isinstance(self.model, RQGNN):
                found = self.model.scored(batch)
                scores[prepared.graphs.nodes_of(chosen)] = found.node_scores.float().cpu()
                margins[chosen] = margin(found.logits)
            else:
                margins[chosen] = margin(self.model(batch))
        return margins, scores

    def margins(self, prepared: PreparedGraphs, chosen: Tensor) -> Tensor:
        """The margins of the chosen graphs in their order, float64 (chosen,) on the CPU."""
        return margins_of(self.model, prepared, chosen, MARGIN_GRAPHS)

    def metrics(self, prepared: PreparedGraphs) -> dict[str, float]:
        """`detection_metrics` of the calibrated probabilities on labelled graphs, at the detector's threshold."""
        probabilities = self.decision.scaling.probability(self.scores(prepared)[0])
        return detection_metrics(probabilities, prepared.labels, threshold=self.decision.threshold)

    def _evidence(self, prepared: PreparedGraphs, scores: Tensor) -> list[Evidence]:
        graphs = prepared.graphs
        values = eigenpairs(graphs).values.split(graphs.sizes.tolist())
        curves = energy_curves(prepared, torch.arange(len(graphs)), self.reference.points)
        percentiles = self.reference.percentile(quotients(prepared.energies, prepared.squares).double())
        parts = zip(values, curves, scores.split(graphs.sizes.tolist()), percentiles, strict=True)
        return [Evidence(*part) for part in parts]
