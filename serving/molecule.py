"""The endpoint `molecule`: spectra in, ranked candidate molecules out, with progress while they are drawn."""

import base64
from collections.abc import Generator, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from library.errors import InputError
from serving.endpoint import Endpoint, Part, Progress, Request, Response, optional
from serving.molecule_examples import ETHANOL
from serving.threads import in_steps

if TYPE_CHECKING:
    from library.artifact import Artifact
    from library.diffspectra.generation import Elucidator, Found
    from library.diffspectra.queries import Query
    from library.diffspectra.ranking import Candidate
    from library.diffspectra.sampling import Sampling

Modality = Literal["uv", "ir", "raman"]
Numbers = Annotated[list[float], Field(min_length=2, max_length=20_000, fail_fast=True)]
MOST_SAMPLES, MOST_STEPS = 256, 1000
PASSES = 65_536  # of one molecule through the network, for one request


class SpectrumBody(Part):
    """A spectrum as it was recorded."""

    y: Numbers = Field(description="What was recorded.")
    x: Numbers = optional(description="Where, rising or falling; left out: the grid of the modality.")
    axis: Literal["eV", "nm", "cm-1", "um"] = optional(description="Unit of x: eV for uv, cm-1 for the others.")
    values: Literal["intensity", "absorbance", "transmittance", "percent transmittance"] = Field(
        "intensity", description="What y is."
    )
    absolute: bool = Field(False, description="Whether y is in the units of the training data; others are scaled.")


class MoleculeRequest(Request):
    """Spectra of one unknown molecule, what else is known of it, and how candidates are drawn."""

    spectra: dict[Modality, SpectrumBody] = Field(min_length=1, description="One or more of uv, ir and raman.")
    formula: str = optional(min_length=1, max_length=60, description="Its formula, such as C2H6O, where it is known.")
    atoms: Annotated[int, Field(ge=1, le=29)] = optional(description="Its atoms with hydrogens, where they are known.")
    candidates: int = Field(5, ge=1, le=50, description="Most candidates in the answer.")
    samples: int = Field(16, ge=1, le=MOST_SAMPLES, description="Molecules that are drawn; their shares are scores.")
    sampler: Literal["dpm-solver", "ancestral"] = Field("dpm-solver", description="ancestral needs many more steps.")
    steps: int = Field(50, ge=1, le=MOST_STEPS, description="Steps of the sampler.")
    guidance: float = Field(1.0, ge=0, le=20, description="Above 1 the spectra are followed more closely.")
    seed: int = Field(0, ge=0, lt=2**31, description="Equal seeds give equal candidates.")
    picture: bool = Field(False, description="Also a PNG of the spectra and the candidates, in base64.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if {"formula", "atoms"} <= self.model_fields_set:
            raise ValueError("a formula says how many atoms there are; give one of formula and atoms")
        return self


class Molecule(BaseModel, frozen=True):
    """A candidate with its geometry."""

    smiles: str = Field(description="Its constitution, without stereo.")
    score: float = Field(ge=0, le=1, description="The share of all samples that have it.")
    samples: int = Field(description="How many samples have it.")
    penalty: float | None = Field(description="How badly it is denoised, told the spectra: orders equal scores.")
    elements: list[str]
    charges: list[int]
    positions: list[list[float]] = Field(description="Angstrom; a mirror image has the same spectra.")
    bonds: list[list[int]] = Field(description="Two atoms, from 0, and the order.")


class MoleculeResponse(Response):
    """Candidates, best first, and what became of the samples that are none."""

    candidates: list[Molecule]
    validity: float = Field(ge=0, le=1, description="The share of samples that are whole molecules.")
    failures: dict[str, int] = Field(description="How many samples are no candidates, by reason.")
    spectra: list[str] = Field(description="What the network has read.")
    atom_counts: dict[int, float] | None = Field(description="Chances by the spectra; null where it cannot tell.")
    warnings: list[str]
    picture: str | None = Field(description="A PNG in base64, when asked for.")


class MoleculeSearch(Endpoint):
    """Draws molecules that have the given spectra."""

    name = "molecule"
    summary = "Which molecule has these UV-Vis, IR and Raman spectra? Ranked candidates with coordinates."
    kind = "diffspectra"
    model = "diffspectra"
    Request = MoleculeRequest
    Response = MoleculeResponse
    examples = {  # noqa: RUF012 - read only
        "ethanol": {"spectra": ETHANOL, "formula": "C2H6O"},
        "few samples": {"spectra": ETHANOL, "atoms": 9, "samples": 4, "steps": 20, "picture": True},
    }
    cost_unit = "passes of a molecule through the network"
    request_cost = PASSES
    batch_cost = PASSES

    def __init__(self, elucidator: "Elucidator", version: str):
        self.elucidator, self.version = elucidator, version

    @classmethod
    def load(cls, artifact: "Artifact", device: str) -> Self:
        from library.diffspectra.generation import Elucidator

        return cls(Elucidator.from_artifact(artifact, device), artifact.version)

    def cost(self, request: MoleculeRequest) -> int:
        return request.samples * request.steps * (1 if request.guidance == 1 else 2)

    def group(self, request: MoleculeRequest) -> Hashable:
        return request.samples, request.sampler, request.steps, request.guidance, request.seed

    def limits(self) -> dict[str, int]:
        return {"atoms": 29, "samples": MOST_SAMPLES, "steps": MOST_STEPS} | {
            f"reads {modality}": 1 for modality in self.elucidator.modalities
        }

    def scores(self, response: MoleculeResponse) -> Iterable[float]:
        """How sure the first candidate is."""
        return [candidate.score for candidate in response.candidates[:1]]

    def answer(self, requests: Sequence[MoleculeRequest]) -> Generator[Progress, None, list[MoleculeResponse]]:
        queries = [self._query(request) for request in requests]
        sampling = _sampling(requests[0])
        found = yield from in_steps(lambda progress: self.elucidator.find(queries, sampling, progress=progress))
        return [self._response(*parts) for parts in zip(requests, queries, found, strict=True)]

    def _query(self, request: MoleculeRequest) -> "Query":
        from library.diffspectra.formulas import parse_formula
        from library.diffspectra.measured import Recording

        recordings = {name: Recording(**one.model_dump()) for name, one in request.spectra.items()}
        formula = None if request.formula is None else parse_formula(request.formula)
        try:
            return self.elucidator.query(recordings, atoms=request.atoms, formula=formula)
        except InputError as error:
            raise InputError(_with_field(str(error), request)) from error

    def _response(self, request: MoleculeRequest, query: "Query", found: "Found") -> MoleculeResponse:
        best = found.candidates[: request.candidates]
        failed = sum(found.failures.values())
        warnings = list(found.warnings)
        if not best:
            warnings.append("no sample is a whole molecule: ask for more samples or steps, or serve a longer training")
        return MoleculeResponse(
            model=self.version,
            candidates=[_molecule(candidate) for candidate in best],
            validity=1 - failed / len(found.samples),
            failures=found.failures,
            spectra=list(found.modalities),
            atom_counts=found.atom_counts,
            warnings=warnings,
            picture=_picture(query, best) if request.picture else None,
        )


def _sampling(request: MoleculeRequest) -> "Sampling":
    from library.diffspectra.sampling import Sampling

    names = ("samples", "sampler", "steps", "guidance", "seed")
    return Sampling(**{name: getattr(request, name) for name in names})


def _with_field(problem: str, request: MoleculeRequest) -> str:
    """A problem of a spectrum with the whole name of its field."""
    return f"spectra.{problem}" if problem.partition(":")[0] in request.spectra else problem


def _molecule(candidate: "Candidate") -> Molecule:
    from library.diffspectra.molecules import ELEMENTS

    structure = candidate.structure
    ends = structure.bonds.triu().nonzero()
    return Molecule(
        smiles=candidate.smiles,
        score=candidate.score,
        samples=candidate.count,
        penalty=candidate.penalty,
        elements=[ELEMENTS[place] for place in structure.types.tolist()],
        charges=structure.charges.tolist(),
        positions=[[round(value, 4) for value in row] for row in structure.positions.tolist()],
        bonds=[[a, b, int(structure.bonds[a, b])] for a, b in ends.tolist()],
    )


def _picture(query: "Query", candidates: Sequence["Candidate"]) -> str:
    from library.diffspectra.broadening import network_input
    from library.diffspectra.drawing import candidates_figure, png

    spectra: dict[str, Any] = {name: network_input(spectrum) for name, spectrum in query.spectra.items()}
    return base64.b64encode(png(candidates_figure(spectra, candidates))).decode()
