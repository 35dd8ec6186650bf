"""The endpoints `graph-property`, what a network with positional encodings predicts, and `graph-encoding`."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from library.errors import InputError
from serving.endpoint import Endpoint, Request, Response, optional

if TYPE_CHECKING:
    from library.artifact import Artifact
    from library.spe.predictor import Answer, GraphInput, GraphPredictor

MOST_GRAPHS = 256
MOST_NODES = 1000
PAIRS = 4_000_000  # node pairs of the graphs of one batch: activations are a multiple of them
Node = Annotated[int, Field(ge=0, lt=MOST_NODES)]
Types = Annotated[list[int], Field(fail_fast=True)]
Features = Annotated[list[float], Field(min_length=1, max_length=1000, fail_fast=True)]
Rows = Annotated[list[Features], Field(fail_fast=True)]
Edge = Annotated[list[Node], Field(min_length=2, max_length=2)]
ASPIRIN, CAFFEINE = "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C)C(=O)N2C"
RING = {"nodes": [0] * 6, "edges": [[i, (i + 1) % 6] for i in range(6)], "edge_types": [1] * 6}


class GraphBody(BaseModel):
    """A molecule by its SMILES, or a graph: nodes, and edges once each with the types that the model was trained on."""

    model_config = Request.model_config

    smiles: str = optional(min_length=1, max_length=2000, description="A molecule.")
    nodes: Types | Rows = optional(
        min_length=1, max_length=MOST_NODES, description="The type, or the features, of each node."
    )
    edges: list[Edge] = optional(
        max_length=100_000, fail_fast=True, description="Pairs of nodes, from 0, each pair once."
    )
    edge_types: Types | Rows = optional(
        max_length=100_000, description="The type, or the features, of each edge, where the model has them."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = self.model_fields_set
        if ("smiles" in given) == bool(given - {"smiles"}):
            raise ValueError("give smiles, or nodes and edges")
        if "smiles" not in given and not {"nodes", "edges"} <= given:
            raise ValueError("a graph needs nodes and edges")
        return self

    def size(self) -> int:
        """Nodes, or for a molecule no fewer than its atoms."""
        return len(self.nodes) if self.nodes is not None else min(len(self.smiles), MOST_NODES)


Graphs = Annotated[list[GraphBody], Field(min_length=1, max_length=MOST_GRAPHS)]


class PropertyRequest(Request):
    """Molecules or graphs to predict of, and whether to show what the predictions rest on."""

    graphs: Graphs
    explain: bool = Field(False, description="Also encodings, eigenvalues, functions on them, gap and sensitivities.")


class EncodingRequest(Request):
    """Molecules or graphs whose nodes are encoded."""

    graphs: Graphs


class Spectrum(BaseModel, frozen=True):
    """What an encoding is made from."""

    eigenvalues: list[float] = Field(description="Of the normalised Laplacian: the smallest, those that are used.")
    gap: float | None = Field(description="From the last one to the next; null where all are used.")
    multiplicities: list[int] = Field(description="Dimensions of the eigenspaces, smallest eigenvalue first.")


class Explanation(Spectrum, frozen=True):
    """What a prediction rests on."""

    encodings: list[list[float]] | None = Field(description="One row for each node; null for a model without any.")
    functions: list[list[float]] | None = Field(description="Each function phi at the eigenvalues; null without any.")
    sensitivities: list[dict[str, float]] = Field(description="How predictions change without each edge, in order.")


class Property(BaseModel, frozen=True):
    """What is predicted of one graph."""

    nodes: int
    prediction: dict[str, float] = Field(description="By target: in its unit, or the probability that it is 1.")
    explanation: Explanation | None = Field(description="When asked for.")


class PropertyResponse(Response):
    """A prediction for each graph, in order."""

    unit: str
    properties: list[Property]


class Encodings(Spectrum, frozen=True):
    """The encodings of one graph."""

    encodings: list[list[float]] = Field(description="One row for each node.")


class EncodingResponse(Response):
    """The encodings of each graph, in order."""

    width: int = Field(description="Numbers for each node.")
    graphs: list[Encodings]


class _Asked(Endpoint):
    """What both endpoints share: the predictor, reading graphs, and what they cost."""

    kind = "spe"
    model = "spe"
    cost_unit = "node pairs"
    request_cost = PAIRS
    batch_cost = PAIRS

    def __init__(self, predictor: "GraphPredictor", version: str):
        self.predictor, self.version = predictor, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.spe.predictor import GraphPredictor

        return cls(GraphPredictor.from_artifact(artifact, device), artifact.version)

    def cost(self, request: Any) -> int:
        return sum(body.size() ** 2 for body in request.graphs)

    def group(self, request: Any) -> Hashable:
        return None

    def limits(self) -> dict[str, int]:
        return {"graphs": MOST_GRAPHS, "nodes": MOST_NODES, "eigenpairs": self.predictor.encoding.eigenpairs}

    def answers(self, requests: Sequence[Any]) -> "list[list[tuple[GraphInput, Answer]]]":
        """The graphs of each request with what the network says of them, all by one call."""
        inputs, names, counts = [], [], []
        for request in requests:
            for place, body in enumerate(request.graphs):
                names.append(f"graphs[{place}]")
                inputs.append(self._input(body, names[-1]))
            counts.append(len(request.graphs))
        found = iter(zip(inputs, self.predictor.answer(inputs, names), strict=True))
        return [[next(found) for _ in range(count)] for count in counts]

    def _input(self, body: GraphBody, name: str) -> "GraphInput":
        if body.smiles is not None:
            made = self.predictor.molecule(body.smiles, name)
            if len(made.nodes) > MOST_NODES:
                raise InputError(f"{name}: {len(made.nodes)} atoms; at most {MOST_NODES} are allowed")
            return made
        schema = self.predictor.schema
        types = body.edge_types
        if types is None:
            types = [] if schema.edge_types or schema.edge_features else [0] * len(body.edges)
        return self.predictor.graph(body.nodes, body.edges, types, name)


class GraphProperty(_Asked):
    """Properties of molecules and graphs."""

    name = "graph-property"
    summary = "What is this molecule's or graph's property? With the spectrum and encodings behind the answer."
    Request = PropertyRequest
    Response = PropertyResponse
    examples = {  # noqa: RUF012 - read only
        "molecules": {"graphs": [{"smiles": ASPIRIN}, {"smiles": CAFFEINE}]},
        "explained": {"graphs": [{"smiles": "CCO"}], "explain": True},
        "graph": {"graphs": [RING]},
    }

    def cost(self, request: PropertyRequest) -> int:
        """An explanation asks once more for each edge that is left out; a molecule has little more than atoms."""
        if not request.explain:
            return super().cost(request)
        return sum(
            body.size() ** 2 * (2 + (body.size() + 1 if body.edges is None else len(body.edges)))
            for body in request.graphs
        )

    def answer(self, requests: Sequence[PropertyRequest]) -> list[PropertyResponse]:
        unit = self.predictor.schema.unit
        return [
            PropertyResponse(
                model=self.version,
                unit=unit,
                properties=[self._property(given, answer, request.explain) for given, answer in rows],
            )
            for request, rows in zip(requests, self.answers(requests), strict=True)
        ]

    def _property(self, given: "GraphInput", answer: "Answer", explain: bool) -> Property:
        explanation = None
        if explain:
            explanation = Explanation(
                **_spectrum(answer),
                encodings=None if answer.encodings is None else answer.encodings.tolist(),
                functions=None if answer.phi is None else answer.phi.T.tolist(),
                sensitivities=[self._by_target(row) for row in self.predictor.sensitivities(given).tolist()],
            )
        prediction = self._by_target(answer.values.tolist())
        return Property(nodes=len(given.nodes), prediction=prediction, explanation=explanation)

    def _by_target(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.predictor.schema.targets, values, strict=True))


class GraphEncoding(_Asked):
    """Encodings alone, for any other model."""

    name = "graph-encoding"
    summary = "Stable positional encodings of a molecule's or graph's nodes, to feed to any other model."
    Request = EncodingRequest
    Response = EncodingResponse
    examples = {  # noqa: RUF012 - read only
        "molecules": {"graphs": [{"smiles": ASPIRIN}]},
        "graph": {"graphs": [RING]},
    }

    def answer(self, requests: Sequence[EncodingRequest]) -> list[EncodingResponse]:
        if self.predictor.encoding.method == "none":
            raise InputError("graphs: the model was trained without encodings; serve one with encoding.method spe")
        return [
            EncodingResponse(
                model=self.version,
                width=self.predictor.encoding.out,
                graphs=[Encodings(**_spectrum(answer), encodings=answer.encodings.tolist()) for _, answer in rows],
            )
            for rows in self.answers(requests)
        ]


def _spectrum(answer: "Answer") -> Mapping[str, Any]:
    """The fields of `Spectrum`."""
    return {
        "eigenvalues": answer.eigenvalues.tolist(),
        "gap": answer.gap if math.isfinite(answer.gap) else None,
        "multiplicities": answer.multiplicities,
    }
