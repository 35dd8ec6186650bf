"""Known formulas: what they are, and predictions of elements that agree with them.

The best prediction of an element's one-hot code is a probability p_ic of element c at atom i. Where the formula is
known, the expected number of atoms of each element must be right: the distribution that is closest to the predicted one
(in relative entropy) with sum_i p_ic = count_c and sum_c p_ic = 1 is p_ic u_i v_c, found by scaling rows and columns in
turn (Sinkhorn). Where nothing is known yet, this is the formula's composition at every atom; where the prediction is
sure, it stays. After the last step each atom gets its element by the best assignment, so that the counts are exact.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from library.diffspectra.molecules import ELEMENTS
from library.diffspectra.scaling import TYPE_SCALE, State
from library.errors import InputError

ROUNDS = 30  # of scaling rows and columns
LEAST = 1e-4  # probability that an atom may still be any element of the formula
FIRST, LAST = 3, 3 + len(ELEMENTS)  # channels of an atom


def counted(formula: Mapping[str, int]) -> dict[str, int]:
    """A formula in the order of ELEMENTS without zeros. Raises InputError for other elements and wrong counts."""
    for element, count in formula.items():
        if element not in ELEMENTS:
            raise InputError(f"formula: {element} is none of {', '.join(ELEMENTS)}, which molecules here consist of")
        if not isinstance(count, Integral) or count < 0:
            raise InputError(f"formula: {count} atoms of {element}")
    return {element: formula[element] for element in ELEMENTS if formula.get(element)}


def parse_formula(text: str) -> dict[str, int]:
    """The counts of a formula such as C2H6O. Raises InputError for what is none, or has other elements.

    >>> parse_formula("CH3CHO")
    {'H': 4, 'C': 2, 'O': 1}
    """
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", text)
    if not parts or "".join(element + count for element, count in parts) != text:
        raise InputError(f"formula: {text!r} is no formula; write one as C2H6O")
    counts: dict[str, int] = {}
    for element, count in parts:
        counts[element] = counts.get(element, 0) + int(count or 1)
    return counted(counts)


def formula_text(formula: Mapping[str, int]) -> str:
    """A formula in Hill's order, as `parse_formula` reads it.

    >>> formula_text({"H": 6, "C": 2, "O": 1})
    'C2H6O'
    """
    first = ("C", "H") if formula.get("C") else ()
    order = [*first, *sorted(element for element in formula if element not in first)]
    return "".join(f"{one}{formula[one] if formula[one] > 1 else ''}" for one in order if formula.get(one))


class Formulas:
    """The formulas of a batch of molecules, some of which may be unknown."""

    def __init__(self, formulas: Sequence[Mapping[str, int] | None], node_mask: Tensor) -> None:
        """One for each row of the mask bool (B, N), of as many atoms as it has."""
        self.known = torch.tensor([formula is not None for formula in formulas], device=node_mask.device)
        counts = [[0] * len(ELEMENTS) if one is None else [one.get(e, 0) for e in ELEMENTS] for one in formulas]
        self.counts = torch.tensor(counts, device=node_mask.device)
        self.mask = node_mask

    def expected(self, prediction: State) -> State:
        """The prediction with elements whose expected counts are the formula's, where it is known."""
        if not bool(self.known.any()):
            return prediction
        return self._with(prediction, self._chances(prediction)[self.known])

    def chosen(self, state: State) -> State:
        """The same with every atom's element chosen: the counts are the formula's, where it is known."""
        if not bool(self.known.any()):
            return state
        chances = self._chances(state)[self.known].cpu()
        for row, counts in zip(chances, self.counts[self.known].cpu(), strict=True):
            places = torch.repeat_interleave(counts)
            n = len(places)
            atoms, seats = linear_sum_assignment(row[:n, places].clamp(min=1e-30).log().numpy(), maximize=True)
            row.zero_()
            row[torch.from_numpy(atoms), places[torch.from_numpy(seats)]] = 1.0
        return self._with(state, chances.to(state.nodes))

    def _chances(self, prediction: State) -> Tensor:
        """p_ic, (B, N, 5); padding is 0."""
        counts = self.counts[:, None].to(prediction.nodes.dtype)
        chances = (prediction.nodes[..., FIRST:LAST] / TYPE_SCALE + 1) / 2
        chances = chances.clamp(LEAST, 1.0) * (counts > 0) * self.mask[..., None]
        for _ in range(ROUNDS):
            chances = chances * counts / chances.sum(1, keepdim=True).clamp(min=1e-30)
            chances = chances / chances.sum(2, keepdim=True).clamp(min=1e-30)
        return chances

    def _with(self, state: State, chances: Tensor) -> State:
        """The state with the elements of molecules of known formula replaced, (known, N, 5)."""
        nodes = state.nodes.clone()
        nodes[self.known, :, FIRST:LAST] = (2 * chances - 1) * TYPE_SCALE * self.mask[self.known][..., None]
        return State(nodes, state.edges)
