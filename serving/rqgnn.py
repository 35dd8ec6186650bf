"""The endpoint `graph-anomaly`: is a graph unlike the many normal ones, how likely, and what tells."""

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from library.errors import InputError
from serving.endpoint import ARROW, BulkRequest, Endpoint, Request, Response, optional
from serving.rqgnn_graphs import LONGEST_KIND, MOST_GRAPHS, GraphList

if TYPE_CHECKING:
    import pyarrow

    from library.artifact import Artifact
    from library.rqgnn.detector import Evidence, Finding, GraphAnomalyDetector

MOST_NODES = 20_000
EDGES_PER_NODE = 10  # beyond which edges, not nodes, are what a graph costs
MOST_EXPLAINED = 1_000  # nodes of one graph whose spectrum is taken
Node = Annotated[int, Field(ge=0, le=MOST_NODES)]
Edge = Annotated[list[Node], Field(min_length=2, max_length=2)]
Kind = Annotated[str, Field(min_length=1, max_length=LONGEST_KIND)]
Row = Annotated[list[float], Field(min_length=1, max_length=4096, fail_fast=True)]
ASPIRIN = {
    "kinds": ["C", "C", "O", "O", "C", "C", "C", "C", "C", "C", "C", "O", "O"],
    "edges": [
        [0, 1],
        [1, 2],
        [1, 3],
        [3, 4],
        [4, 5],
        [5, 6],
        [6, 7],
        [7, 8],
        [8, 9],
        [4, 9],
        [9, 10],
        [10, 11],
        [10, 12],
    ],
}
ETHANOL = {"kinds": ["C", "C", "O"], "edges": [[0, 1], [1, 2]]}


class Graph(Request):
    """An undirected graph: a kind or a row of features for each node, and each edge once."""

    kinds: list[Kind] = optional(
        min_length=1, max_length=MOST_NODES, fail_fast=True, description="Of each node, such as its element."
    )
    features: list[Row] = optional(
        min_length=1, max_length=MOST_NODES, fail_fast=True, description="Of each node, for other models."
    )
    edges: list[Edge] = Field(
        max_length=EDGES_PER_NODE * MOST_NODES, fail_fast=True, description="Pairs of node numbers from 0, each once."
    )

    @model_validator(mode="after")
    def _one_kind_of_nodes(self) -> Self:
        if (self.kinds is None) == (self.features is None):
            raise ValueError("kinds: give either kinds or features, one for each node")
        if self.features is not None and len({len(row) for row in self.features}) > 1:
            raise ValueError("features: rows differ in length")
        top = max(chain.from_iterable(self.edges), default=0)
        if top >= self.size:
            raise ValueError(f"edges: node {top} is not there; nodes are 0 to {self.size - 1}")
        return self

    @property
    def size(self) -> int:
        """The number of nodes."""
        return len(self.kinds if self.kinds is not None else self.features)


class GraphAnomalyRequest(BulkRequest):
    """Graphs, and what is wanted about them.

    Graphs may also be the body itself: an Arrow table with a row for each graph and the columns `edges`, lists of
    pairs, and `kinds` or `features`, a list with one entry for each node.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["graphs"]})

    graphs: list[Graph] = optional(min_length=1, max_length=MOST_GRAPHS, fail_fast=True)
    threshold: float = optional(ge=0, le=1, description="Instead of the one chosen on validation graphs.")
    explain: bool = Field(False, description="Return each graph's spectrum, energy curves and node scores.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.graphs is None) == (self.bulk is None):
            given = "needed, here or as the body's table" if self.bulk is None else "they are the body already"
            raise ValueError(f"graphs: {given}")
        for place, size in enumerate(self.sizes() if self.explain else ()):
            if size > MOST_EXPLAINED:
                raise ValueError(f"explain: graph {place} has {size} nodes; at most {MOST_EXPLAINED} here")
        return self

    def sizes(self) -> list[int]:
        """The number of nodes of each graph."""
        return self.bulk.sizes if self.bulk is not None else [graph.size for graph in self.graphs]

    def edge_counts(self) -> list[int]:
        """The number of edges of each graph."""
        return self.bulk.edge_counts if self.bulk is not None else [len(graph.edges) for graph in self.graphs]

    def listed(self) -> GraphList:
        """The graphs in one piece. Raises InputError when nodes of some have kinds, of others features."""
        return self.bulk if self.bulk is not None else GraphList.of_bodies(self.graphs)


class EnergyCurve(BaseModel, frozen=True):
    """The accumulated energy F(t) of one feature's signal, at the explanation's points, beside training normals."""

    graph: list[float]
    normal_mean: list[float] = Field(description="Over training normals that have the feature.")
    normal_low: list[float] = Field(description="5 % quantile of them.")
    normal_high: list[float] = Field(description="95 % quantile of them.")


class Explanation(BaseModel, frozen=True):
    """What the decision rests on."""

    eigenvalues: list[float] = Field(description="Of the normalised Laplacian, rising, within [0, 2].")
    points: list[float] = Field(description="The t of the energy curves.")
    accumulated_energy: dict[str, EnergyCurve] = Field(description="By feature that the graph has.")
    rayleigh_percentile: dict[str, float | None] = Field(
        description="Per cent of training normals with a smaller quotient; null where none has the feature."
    )
    node_scores: list[float] = Field(description="Each node's weight in the pooling; sizes compare within a graph.")


class GraphFinding(BaseModel, frozen=True):
    """What one graph looks like."""

    anomaly_probability: float = Field(ge=0, le=1, description="Calibrated on validation graphs.")
    is_anomalous: bool = Field(description="Whether the probability reaches the threshold.")
    threshold: float
    rayleigh_quotient: dict[str, float] = Field(description="By feature that the graph has, within [0, 2].")
    without_edges: bool = Field(description="Then all quotients are 0 and say nothing.")
    explanation: Explanation | None = Field(description="Null unless `explain` is true.")


class GraphAnomalyResponse(Response):
    """One finding for each graph, in the order of the request."""

    results: list[GraphFinding]


class GraphAnomaly(Endpoint):
    """Graphs against what normal ones look like."""

    name = "graph-anomaly"
    summary = (
        "Is a graph anomalous? A calibrated probability, with the energy of its signals beside that of normal ones."
    )
    kind = "rqgnn"
    model = "rqgnn"
    Request = GraphAnomalyRequest
    Response = GraphAnomalyResponse
    examples = {  # noqa: RUF012 - read only
        "molecules": {"graphs": [ASPIRIN, ETHANOL]},
        "explained": {"graphs": [ASPIRIN], "explain": True},
    }
    media = (ARROW,)
    nested = True
    cost_unit = "nodes"
    request_cost = MOST_NODES
    batch_cost = MOST_NODES

    def __init__(self, detector: "GraphAnomalyDetector", version: str):
        self.detector, self.version = detector, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.rqgnn.detector import GraphAnomalyDetector

        return cls(GraphAnomalyDetector.from_artifact(artifact, device), artifact.version)

    @classmethod
    def read(cls, body: "pyarrow.Table", settings: dict[str, Any]) -> GraphAnomalyRequest:
        return GraphAnomalyRequest.model_validate(settings, context=GraphList.of_table(body))

    def cost(self, request: GraphAnomalyRequest) -> int:
        counts = zip(request.sizes(), request.edge_counts(), strict=True)
        return sum(max(size, edges // EDGES_PER_NODE) for size, edges in counts)

    def scores(self, response: GraphAnomalyResponse) -> list[float]:
        return [result.anomaly_probability for result in response.results]

    def group(self, request: GraphAnomalyRequest) -> Hashable:
        return request.explain

    def answer(self, requests: Sequence[GraphAnomalyRequest]) -> list[GraphAnomalyResponse]:
        listed = GraphList.joined([request.listed() for request in requests])
        found = iter(self._findings(listed, explain=requests[0].explain))
        return [
            GraphAnomalyResponse(
                model=self.version, results=[self._result(next(found), request.threshold) for _ in request.sizes()]
            )
            for request in requests
        ]

    def limits(self) -> dict[str, int]:
        return {"features": self.detector.width, "explained_nodes": MOST_EXPLAINED}

    def _findings(self, graphs: GraphList, *, explain: bool) -> "list[Finding]":
        import torch

        from library.spectral.graphs import Graphs

        wants_kinds = self.detector.vocabulary is not None
        if (graphs.kinds is not None) != wants_kinds:
            raise InputError(f"graphs: this model takes {'kinds' if wants_kinds else 'features'} of the nodes")
        if not wants_kinds and graphs.width != self.detector.width:
            raise InputError(f"graphs: each node needs {self.detector.width} features")
        try:
            pairs = torch.from_numpy(graphs.ends).mT
            batch = Graphs.from_edges(graphs.sizes, pairs, edge_counts=graphs.edge_counts)
            if wants_kinds:
                return self.detector.detect(batch, kinds=graphs.kinds, explain=explain)
            return self.detector.detect(batch, features=torch.from_numpy(graphs.features).float(), explain=explain)
        except InputError as error:
            raise InputError(f"graphs: {error}") from error

    def _result(self, found: "Finding", threshold: float | None) -> GraphFinding:
        limit = found.threshold if threshold is None else threshold
        names, quotients = self._names(), found.quotients.tolist()
        present = [i for i, there in enumerate(found.present.tolist()) if there]
        return GraphFinding(
            anomaly_probability=found.probability,
            is_anomalous=found.probability >= limit,
            threshold=limit,
            rayleigh_quotient={names[i]: quotients[i] for i in present},
            without_edges=found.without_edges,
            explanation=None if found.evidence is None else self._explanation(found.evidence, present, names),
        )

    def _explanation(self, evidence: "Evidence", present: list[int], names: Sequence[str]) -> Explanation:
        reference = self.detector.reference
        curves = {
            names[i]: EnergyCurve(
                graph=evidence.energies[:, i].tolist(),
                normal_mean=reference.mean[i].tolist(),
                normal_low=reference.low[i].tolist(),
                normal_high=reference.high[i].tolist(),
            )
            for i in present
        }
        ranks = {names[i]: float(evidence.percentiles[i]) for i in present}
        return Explanation(
            eigenvalues=evidence.eigenvalues.tolist(),
            points=reference.points.tolist(),
            accumulated_energy=curves,
            rayleigh_percentile={name: rank if rank == rank else None for name, rank in ranks.items()},
            node_scores=evidence.node_scores.tolist(),
        )

    def _names(self) -> Sequence[str]:
        known = self.detector.vocabulary
        return known.symbols if known is not None else [f"feature {i}" for i in range(self.detector.width)]
