"""Right answers count once, whatever their image, wrong and invalid ones against; samples stay with their molecule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.diffspectra.data import load_molecules
from library.diffspectra.evaluation import Evaluation, evaluate, right_of
from library.diffspectra.molecules import Structure
from library.diffspectra.ranking import rank
from library.diffspectra.sdf import from_smiles
from library.errors import InputError

CHIRAL = "C[C@H](O)F"


@pytest.fixture(scope="module")
def made() -> dict[str, Structure]:
    names = ("CCO", "COC", "C=O", CHIRAL, "C/C=C/C", r"C/C=C\C", "CC#N")
    return dict(zip(names, (entry.structure for entry in from_smiles(names)), strict=True))


def mirrored(structure: Structure) -> Structure:
    positions = structure.positions * torch.tensor([-1.0, 1.0, 1.0])
    return Structure(positions, structure.types, structure.charges, structure.bonds)


def broken(structure: Structure) -> Structure:
    return Structure(structure.positions, structure.types, structure.charges, 3 * (structure.bonds > 0).long())


def nowhere(structure: Structure) -> Structure:
    return Structure(structure.positions * float("nan"), structure.types, structure.charges, structure.bonds)


def stripped(structure: Structure) -> Structure:
    """Without its last hydrogen."""
    parts = (structure.positions[:-1], structure.types[:-1], structure.charges[:-1])
    return Structure(*parts, structure.bonds[:-1, :-1])


def test_the_truth_is_right_in_everything() -> None:
    data = load_molecules()
    truths = {i: data.atoms.structure(i) for i in data.parts["test"].tolist()[:12]}
    found = evaluate(truths, {i: [one, mirrored(one)] for i, one in truths.items()}, at=(1, 2), mces=True)
    for name in (
        "valid",
        "stable",
        "formula",
        "constitution",
        "stereo",
        "morgan_tanimoto",
        "functional_group",
        "top@1",
    ):
        assert found.metrics[name] == 1
    assert found.metrics["mces"] == 0
    assert found.metrics["rmsd"] < 1e-4
    assert found.metrics["samples"] == 24


def test_the_released_accuracies_toss_a_coin_on_chirality(made) -> None:
    """A chiral molecule and its mirror image have one spectrum: ours takes both, InChIKeys one, SMILES none."""
    chiral = made[CHIRAL]
    found = evaluate({0: chiral}, {0: [chiral, mirrored(chiral)]}, at=(1,))
    assert found.metrics["constitution"] == found.metrics["stereo"] == 1
    assert found.metrics["paper_inchikey"] == 0.5
    assert found.metrics["paper_smiles"] == 0
    achiral = evaluate({0: made["CCO"]}, {0: [made["CCO"]]}, at=(1,))
    assert achiral.metrics["paper_inchikey"] == achiral.metrics["paper_smiles"] == 1


def test_stereoisomers_are_right_in_constitution_alone(made) -> None:
    found = evaluate({0: made["C/C=C/C"]}, {0: [made[r"C/C=C\C"]]}, at=(1,)).metrics
    assert (found["constitution"], found["stereo"]) == (1, 0)


def test_tautomers_are_one_in_connectivity_alone() -> None:
    first, second = (entry.structure for entry in from_smiles(["Cc1ccn[nH]1", "Cc1cc[nH]n1"]))
    found = evaluate({0: first}, {0: [second]}, at=(1,)).metrics
    assert (found["connectivity"], found["constitution"], found["formula"]) == (1, 0, 1)


def test_failures_count_as_zeros(made) -> None:
    truth = made["CCO"]
    found = evaluate(
        {0: truth}, {0: [truth, broken(truth), stripped(truth), made["COC"]]}, at=(1, 4), mces=True
    ).metrics
    assert found["valid"] == 0.5
    assert found["constitution"] == 0.25
    assert found["formula"] == 0.75
    assert found["functional_group"] == pytest.approx((1 + 1 / 3) / 4)
    assert found["mces"] == pytest.approx((0 + 2 + 2 + 2) / 4)
    assert found["best_morgan_tanimoto"] == 1
    assert found["paper_functional_group"] == pytest.approx(
        (1 + 1 + 1 / 3) / 3
    )  # the broken one is skipped, as released
    assert found["constitution@4"] == 1
    assert found["top@1"] == 1


def test_molecules_without_samples_are_not_found(made) -> None:
    truths = {0: made["CCO"], 1: made["C=O"]}
    found = evaluate(truths, {0: [made["CCO"]]}, at=(1,))
    assert found.metrics["constitution"] == found.metrics["constitution@1"] == found.metrics["top@1"] == 0.5
    assert [row["samples"] for row in found.rows] == [1, 0]
    assert found.errors["constitution"] == pytest.approx(0.5)


def grouped(made: dict[str, Structure], right: list[int], of: int) -> Evaluation:
    truths = dict.fromkeys(range(len(right)), made["CCO"])
    samples = {i: [made["CCO"]] * c + [made["COC"]] * (of - c) for i, c in enumerate(right)}
    return evaluate(truths, samples, at=tuple(range(1, of + 1)))


def test_any_of_k_is_below_the_law_of_independence_unless_all_are_alike(made) -> None:
    unequal = grouped(made, [6, 0, 1], 6).metrics
    values = [unequal[f"constitution@{k}"] for k in range(1, 7)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(unequal["constitution"]) == pytest.approx(7 / 18)
    assert values[-1] == pytest.approx(2 / 3)
    for k in range(2, 7):
        assert unequal[f"constitution@{k}"] < unequal[f"independent@{k}"]
        assert unequal[f"independent@{k}"] == pytest.approx(1 - (1 - 7 / 18) ** k)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.data())
def test_the_estimate_is_the_chance_of_drawing(samples: int, draw) -> None:
    right, k = draw.draw(st.integers(0, samples)), draw.draw(st.integers(1, samples))
    miss = np.prod([(samples - right - i) / (samples - i) for i in range(k)]) if right + k <= samples else 0
    assert right_of(samples, right, k) == pytest.approx(1 - miss)


def test_ranking_is_by_count_then_by_penalty(made) -> None:
    a, b, c = made["CCO"], made["COC"], made["C=O"]
    drawn = [b, broken(a), a, c, mirrored(a), stripped(a), b]
    found = rank(drawn)
    assert [(one.smiles, one.count, one.samples) for one in found.candidates] == [
        ("COC", 2, (0, 6)),
        ("CCO", 2, (2, 4)),
        ("C=O", 1, (3,)),
    ]
    assert found.candidates[0].score == pytest.approx(2 / 7)
    assert found.failures == {"valence": 1, "missing hydrogens": 1}
    better = rank(drawn, penalties=torch.tensor([3.0, 0, 9, 0, 1, 0, 2]))
    assert [one.smiles for one in better.candidates] == ["CCO", "COC", "C=O"]
    assert better.candidates[0].structure is drawn[4]
    only = rank(drawn, formula={"C": 2, "H": 6, "O": 1, "N": 0})
    assert [one.smiles for one in only.candidates] == ["COC", "CCO"]
    assert only.failures == {"valence": 1, "another formula": 1, "missing hydrogens": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: rank([]), "no samples to rank"),
        (lambda one: rank([one], penalties=torch.zeros(2)), "1 samples have 2 penalties"),
        (lambda one: evaluate({}, {}), "no samples to evaluate"),
        (lambda one: evaluate({0: one}, {0: []}), "no samples to evaluate"),
        (lambda one: evaluate({0: one}, {4: [one]}), "samples of molecule 4, which is not among"),
        (lambda one: evaluate({0: stripped(one)}, {0: [one]}), "a true molecule cannot be built: missing hydrogens"),
        (lambda one: evaluate({0: one}, {0: [nowhere(one)]}), "a sample: a position is not finite"),
        (lambda one: right_of(3, 1, 4), "1 to 3 can be drawn, not 4"),
    ],
)
def test_bad_input_is_one_clear_line(made, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(made["CCO"])
