"""The configuration of a forecaster in flat fields: an onion of reservoirs, a classical layer, a read-out."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from library.errors import InputError
from library.qrc.esn import EchoState
from library.qrc.forecaster import Forecaster
from library.qrc.hybrid import HybridReservoir
from library.qrc.readout import ALPHAS
from library.qrc.reservoir import QuantumReservoir
from library.qrc.shots import SampledReservoir

SEEDS_APART = 100  # member k of seed s draws its angles with seed 100 s + k, unless the recipe says otherwise
Angle = Annotated[float, Field(allow_inf_nan=False)]
Mode = Literal["persistent", "feedback", "both"]
Kind = Literal["su2", "ising"]
Encoding = Literal["pair", "rx_anc"]
PER_MEMBER = ("mode", "kind", "encoding", "qubits", "measured", "sigma", "feedback", "scale", "bias", "reps")


class QrcRecipe(BaseModel, frozen=True, extra="forbid"):
    """An onion's members in lists: an entry for each member, or one that all of them share.

    >>> QrcRecipe(sigma=(0.2, 0.8), units=10).reservoir().width
    30
    """

    mode: tuple[Mode, ...] = Field(("persistent",), min_length=1)
    """Where memory lives: in qubits that are not reset, in expectations that are fed back, or both."""
    kind: tuple[Kind, ...] = Field(("su2",), min_length=1)
    """Fixed gates of the circuits."""
    encoding: tuple[Encoding, ...] = Field(("pair",), min_length=1)
    """How inputs rotate qubits: pairs of them, or the measured ones alone."""
    qubits: tuple[int, ...] = Field((4,), min_length=1)
    """Qubits of each member."""
    measured: tuple[int, ...] = Field((1,), min_length=1)
    """Qubits that each member measures and resets in a step; mode feedback measures all."""
    sigma: tuple[float, ...] = Field((0.1, 0.3, 1.0), min_length=1)
    """Scale of each member's fixed angles: the smaller, the longer its memory."""
    feedback: tuple[float, ...] = Field((1.0,), min_length=1)
    """Feedback angle of each member; of no effect in mode persistent."""
    scale: tuple[Angle, ...] = Field((0.5,), min_length=1)
    """a of each member's input angles a s + b."""
    bias: tuple[Angle, ...] = Field((-0.31,), min_length=1)
    """b of each member's input angles a s + b."""
    reps: tuple[int, ...] = Field((2,), min_length=1)
    """Layers of each member's fixed gates."""
    angles: tuple[NonNegativeInt, ...] = ()
    """Seeds of each member's fixed angles, for a configuration that was found with them; none numbers the members."""
    shots: PositiveInt | None = None
    """Shots behind each feature of each step; None gives exact expectation values."""
    units: NonNegativeInt = 30
    """Units of the classical layer; 0 is none."""
    spectral_radius: PositiveFloat = 0.9
    """Its spectral radius."""
    leak: float = Field(0.3, gt=0, le=1)
    """Share of its state that is renewed each step."""
    input_scale: PositiveFloat = 0.5
    """Its largest input weight."""
    wiring: Literal["parallel", "stacked"] = "parallel"
    """Whether it sees the inputs, or the onion's features."""
    alphas: tuple[Annotated[float, Field(ge=0)], ...] = Field(ALPHAS, min_length=1)
    """Regularisations to choose from, per sample."""
    washout: NonNegativeInt = 300
    """Rows at the start of a series from which nothing is learned."""
    skip: bool | None = None
    """Give the read-out the scaled inputs beside the features; None does so when shots are finite."""

    @model_validator(mode="after")
    def _members(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in PER_MEMBER}
        count = max(lengths.values())
        if set(lengths.values()) - {1, count} or len(self.angles) not in (0, count):
            lengths["angles"] = len(self.angles)
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items() if length > 1)
            raise InputError(f"members: {shown} entries; give as many of each as there are members, or one for all")
        if self.wiring == "stacked" and not self.units:
            raise InputError("wiring stacked needs units above 0")
        self.reservoir()
        return self

    def reservoir(self, seed: int = 0) -> HybridReservoir:
        """The reservoir whose angles and weights are drawn with `seed`."""
        count = max(len(getattr(self, name)) for name in PER_MEMBER)
        members = []
        for number in range(count):
            own = {name: getattr(self, name)[number % len(getattr(self, name))] for name in PER_MEMBER}
            if own["mode"] == "feedback":
                del own["measured"]
            drawn = self.angles[number] if self.angles else number
            member = QuantumReservoir(seed=SEEDS_APART * seed + drawn, **own)
            shot_seed = SEEDS_APART * seed + number
            members.append(
                SampledReservoir(reservoir=member, shots=self.shots, seed=shot_seed) if self.shots else member
            )
        layer = None
        if self.units:
            layer = EchoState(
                units=self.units,
                spectral_radius=self.spectral_radius,
                leak=self.leak,
                input_scale=self.input_scale,
                seed=seed,
            )
        return HybridReservoir(members=tuple(members), layer=layer, wiring=self.wiring)

    @classmethod
    def of(cls, members: Sequence[QuantumReservoir], **changes: Any) -> Self:
        """The recipe whose seed 0 has these members, which differ from the defaults in what `PER_MEMBER` names."""
        values = {name: tuple(getattr(member, name) for member in members) for name in PER_MEMBER if name != "measured"}
        measured = tuple(member.measured_qubits for member in members)
        seeds = tuple(member.seed for member in members)
        made = cls(**values, measured=measured, angles=seeds, **changes)
        if made.model_copy(update={"shots": None}).reservoir().members != tuple(members):
            raise InputError("members: one of them has a field that a recipe cannot say")
        return made

    def forecaster(self, seed: int = 0, *, closed_loop: bool = False, device: str = "cpu") -> Forecaster:
        """The forecaster, not fitted yet."""
        return Forecaster(
            self.reservoir(seed),
            alphas=self.alphas,
            washout=self.washout,
            skip=bool(self.shots) if self.skip is None else self.skip,
            closed_loop=closed_loop,
            device=device,
        )
