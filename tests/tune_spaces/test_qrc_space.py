"""The space of quantum reservoirs: every point is a reservoir, within the qubits that are allowed."""

import pytest
from pydantic import ValidationError

from library.errors import InputError
from library.qrc.reservoir import QuantumReservoir
from tune_spaces.qrc import PoolRanges, onion, refined, reservoir, unrefined


def test_every_size_and_mode_makes_a_reservoir_within_the_limit():
    varies = PoolRanges().domains(most_qubits=4)
    point = PoolRanges().first_guesses(4)[0]
    assert point.keys() == varies.keys()
    for size in varies["size"].values:
        for mode in varies["mode"].values:
            for encoding in varies["encoding"].values:
                member = reservoir({**point, "size": size, "mode": mode, "encoding": encoding})
                assert member.qubits <= 4
                assert member.measured_qubits == (member.qubits if mode == "feedback" else int(size[2:]))
    assert [reservoir(guess).sigma for guess in PoolRanges().first_guesses()] == [0.1, 0.3, 1.0]
    with pytest.raises(InputError, match="most_qubits 2: a reservoir has at least 3"):
        PoolRanges().domains(2)


def test_ranges_can_be_said_and_the_first_guesses_lie_in_them():
    narrow = PoolRanges(mode=("persistent",), qubits=(5,), sigma=(0.2, 2.0), reps=(2, 2))
    varies = narrow.domains()
    assert varies["size"].values == ("5:1", "5:2", "5:3", "5:4")
    guesses = narrow.first_guesses()
    assert [guess["sigma"] for guess in guesses] == [0.3, 1.0]
    assert all(guess["size"] in varies["size"].values for guess in guesses)
    assert PoolRanges(mode=("feedback",)).first_guesses() == []
    for changes, message in (
        ({"qubits": (1,)}, "qubits 1: allowed are 2 to 8"),
        ({"sigma": (2.0, 0.1)}, "range 2.0 to 0.1"),
        ({"reps": (0, 3)}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            PoolRanges(**changes)


def test_the_first_variants_are_the_members_as_they_are():
    members = [QuantumReservoir(sigma=0.3, scale=0.7), QuantumReservoir(mode="feedback", feedback=2.0)]
    without, layered = unrefined(2)
    assert without.keys() == layered.keys() == onion(2).keys()
    assert refined(members, without) == members
    moved = refined(members, {**without, "0.sigma": 2.0, "1.feedback": 0.5, "1.bias": 0.1})
    assert (moved[0].sigma, moved[1].feedback, moved[1].bias) == pytest.approx((0.6, 1.0, -0.21))
